"""MNIST in a few minutes on two CPU cores: a small generator, L2-normalized codes, no LPIPS."""

from taming_jax.config.quantizers import EMAConfig, IBQConfig, SimVQConfig, VQConfig
from taming_jax.config.schema import Config, DataConfig, PriorConfig, VQGANConfig

CONFIG = Config(
    config="mnist_tiny",
    data=DataConfig(name="mnist", image_size=28, channels=1),
    vqgan=VQGANConfig(
        steps=640,
        batch_size=64,
        eval_every=160,
        checkpoint_every=160,
        draw_every=320,
        channels=16,
        multipliers=(1, 2, 2),
        blocks=1,
        decoder_blocks=1,
        attention_resolutions=(),
        latent_channels=32,
        codebook_size=128,
        code_dim=4,  # uses all codes and gives sharper reconstructions (docs/recipes.md)
        vq=VQConfig(l2_normalise=True),
        ema=EMAConfig(l2_normalise=True),
        simvq=SimVQConfig(l2_normalise=True),
        ibq=IBQConfig(l2_normalise=True),
        perceptual_weight=0.0,
        learning_rate=2e-3,
        warmup_steps=40,
        final_learning_rate=0.05,
        discriminator_learning_rate=5e-4,
        betas=(0.5, 0.9),
        epsilon=1e-6,
        discriminator_filters=16,
        discriminator_layers=2,
        discriminator_start=0.25,
        discriminator_weight=0.1,
        adaptive_weight=False,  # gives a smaller Fréchet distance (docs/recipes.md)
        ema_decay=0.99,
    ),
    prior=PriorConfig(
        steps=1000, batch_size=64, eval_every=250, checkpoint_every=250, draw_every=500,
        layers=4, heads=4, width=128, dropout=0.0, learning_rate=1e-3, grad_clip_norm=1.0,
        schedule="one-cycle", guidance_scale=2.0,
    ),
)  # fmt: skip
