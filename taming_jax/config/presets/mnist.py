"""MNIST with the settings of mnist_launch.sh in thibmonsel/taming_transformer."""

from taming_jax.config.quantizers import VQConfig
from taming_jax.config.schema import Config, DataConfig, PriorConfig, VQGANConfig

CONFIG = Config(
    config="mnist",
    dtype="auto",
    data=DataConfig(name="mnist", image_size=28, channels=1),
    vqgan=VQGANConfig(
        epochs=200,
        batch_size=256,
        channels=32,
        multipliers=(1, 2, 2),
        blocks=2,
        decoder_blocks=2,
        # The reference sets 16, which no level has (28, 14, 7), so only the middle has attention.
        attention_resolutions=(),
        latent_channels=64,
        codebook_size=64,
        code_dim=64,
        vq=VQConfig(commitment=1.0),
        learning_rate=4e-4,
        discriminator_learning_rate=1e-4,
        betas=(0.5, 0.9),
        discriminator_filters=32,
        discriminator_layers=2,
        discriminator_start=0.1,  # epoch 20 of 200
        discriminator_weight=1.0,
        adaptive_weight=False,
    ),
    prior=PriorConfig(
        epochs=200, batch_size=256, layers=6, heads=8, width=256, dropout=0.1,
        learning_rate=3e-4, grad_clip_norm=1.0, schedule="one-cycle",
    ),
)  # fmt: skip
