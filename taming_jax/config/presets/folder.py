"""Your own pictures at 256 px, with the networks of the preset birds.

`--data.path FOLDER` names a folder with one folder per class, or with pictures without classes.
"""

from dataclasses import replace

from taming_jax.config.presets.birds import CONFIG as BIRDS
from taming_jax.config.schema import Config

CONFIG: Config = replace(
    BIRDS, config="folder", data=replace(BIRDS.data, name="folder", mirror=False)
)
