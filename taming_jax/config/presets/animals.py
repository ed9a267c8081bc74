"""Animals-10 at 64 px, as in thibmonsel/taming_transformer: 26,000 pictures of ten animals.

The dataset has no test split, so some of the pictures are held out at random.
"""

from dataclasses import replace

from taming_jax.config.presets.birds import CONFIG as BIRDS
from taming_jax.config.schema import Config

CONFIG: Config = replace(
    BIRDS,
    config="animals",
    data=replace(BIRDS.data, name="dgrnd4/animals-10", image_size=64),
    vqgan=replace(
        BIRDS.vqgan, epochs=100, batch_size=64, multipliers=(1, 2, 4), learning_rate=1e-4,
        discriminator_learning_rate=1e-4,
    ),
    prior=replace(BIRDS.prior, epochs=100),
)  # fmt: skip
