"""Your own pictures at 256 px: `--data.path FOLDER`, a folder a class, or none. Birds' sizes."""

from dataclasses import replace

from taming_jax.config.presets.birds import CONFIG as BIRDS
from taming_jax.config.schema import Config

CONFIG: Config = replace(
    BIRDS, config="folder", data=replace(BIRDS.data, name="folder", mirror=False)
)
