"""Oxford Flowers 102 at 256 px, with the networks of the preset birds.

The official training split has only 1,020 pictures, ten per class, so the prior is smaller and has
more dropout.
"""

from dataclasses import replace

from taming_jax.config.presets.birds import CONFIG as BIRDS
from taming_jax.config.schema import Config

CONFIG: Config = replace(
    BIRDS,
    config="flowers",
    data=replace(BIRDS.data, name="dpdl-benchmark/oxford_flowers102"),
    vqgan=replace(BIRDS.vqgan, epochs=2000, diff_augment=("color", "translation", "cutout")),
    prior=replace(BIRDS.prior, epochs=2000, layers=8, width=256, dropout=0.3,
                  augmented_versions=16),
)  # fmt: skip
