"""Your own pictures at 256 px: `--data.path FOLDER`, a folder a class, or none. Birds' sizes."""

from dataclasses import replace

from taming_jax.config import Config
from taming_jax.configs.birds import CONFIG as BIRDS

CONFIG: Config = replace(
    BIRDS, config="folder", data=replace(BIRDS.data, name="folder", mirror=False)
)
