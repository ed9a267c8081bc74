"""CUB-200-2011 birds at 64 px, 16x16 codes, in twenty minutes on two CPU cores, without LPIPS."""

from taming_jax.config.quantizers import EMAConfig, IBQConfig, SimVQConfig, VQConfig
from taming_jax.config.schema import Config, DataConfig, PriorConfig, VQGANConfig

CONFIG = Config(
    config="birds_tiny",
    data=DataConfig(
        name="bentrevett/caltech-ucsd-birds-200-2011",
        image_size=64,
        channels=3,
        random_crop=True,
        mirror=True,
    ),
    vqgan=VQGANConfig(
        steps=4000,
        batch_size=4,
        eval_every=1000,
        checkpoint_every=1000,
        channels=24,
        multipliers=(1, 2, 2),
        blocks=1,
        decoder_blocks=1,
        attention_resolutions=(),
        latent_channels=96,
        codebook_size=512,
        code_dim=4,
        vq=VQConfig(l2_normalise=True),
        ema=EMAConfig(l2_normalise=True),
        simvq=SimVQConfig(l2_normalise=True),
        ibq=IBQConfig(l2_normalise=True),
        codebook_weight=0.2,  # keeps more codes in use than 1
        perceptual_weight=0.0,
        learning_rate=2e-3,
        warmup_steps=100,
        final_learning_rate=0.05,
        discriminator_learning_rate=5e-4,
        epsilon=1e-6,
        discriminator_filters=16,
        discriminator_layers=3,
        discriminator_start=0.85,
        discriminator_weight=0.05,
        adaptive_weight=True,
        ema_decay=0.99,
    ),
    prior=PriorConfig(
        steps=600, batch_size=8, eval_every=150, checkpoint_every=150, layers=4, heads=4,
        width=128, dropout=0.2, attention_dropout=0.2, learning_rate=1e-3, grad_clip_norm=1.0,
        schedule="one-cycle", augmented_versions=4,
    ),
)  # fmt: skip
