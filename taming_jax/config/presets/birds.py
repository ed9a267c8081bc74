"""CUB-200-2011 birds at 256 px, 16x16 codes: 11,788 pictures of 200 species.

If a value differs from the default of thibmonsel/taming_transformer, a comment gives that default.
"""

from taming_jax.config.quantizers import EMAConfig, IBQConfig, SimVQConfig, VQConfig
from taming_jax.config.schema import Config, DataConfig, PriorConfig, VQGANConfig

CONFIG = Config(
    config="birds",
    dtype="auto",
    data=DataConfig(
        name="bentrevett/caltech-ucsd-birds-200-2011",
        image_size=256,
        channels=3,
        random_crop=True,  # reference: off; without it both stages overfit (30 pictures per class)
        mirror=True,  # reference: off
    ),
    vqgan=VQGANConfig(
        epochs=200,  # reference: 10, which is too few passes over the pictures
        batch_size=16,  # reference: 128; can be divided among 1, 2, 4, 8 or 16 devices
        channels=128,  # reference: 64, with 4 blocks per level; ours are from the official code
        multipliers=(1, 1, 2, 2, 4),
        blocks=2,
        attention_resolutions=(16,),
        latent_channels=256,
        codebook_size=1024,  # reference: 128, too few for color
        code_dim=8,  # reference: 64; few dimensions and L2 normalization keep all codes in use
        vq=VQConfig(
            l2_normalise=True,  # reference: off
            commitment=0.25,  # reference: 1.0
        ),
        ema=EMAConfig(l2_normalise=True),
        simvq=SimVQConfig(l2_normalise=True),
        ibq=IBQConfig(l2_normalise=True),
        # Twice the learning rates that suit batches of four: those of Adam grow with the square
        # root of the batch size (arXiv 2205.10287).
        learning_rate=2e-4,
        discriminator_learning_rate=2e-4,
        warmup_steps=500,  # reference: none
        final_learning_rate=0.1,  # reference: 1
        discriminator_start=0.25,  # reference: epoch 5 of 10
        discriminator_weight=0.8,
        adaptive_weight=True,  # reference: off; fixed weights need tuning for every dataset
        diff_augment=("color", "translation"),  # reference: none; for small datasets
        lecam_weight=0.001,  # reference: none
        ema_decay=0.999,  # reference: none
    ),
    prior=PriorConfig(
        epochs=300, batch_size=32, layers=12, heads=8, width=512, dropout=0.2,
        learning_rate=3e-4, grad_clip_norm=1.0, schedule="one-cycle", augmented_versions=8,
        guidance_scale=1.5,
    ),
)  # fmt: skip
