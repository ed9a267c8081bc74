"""CUB-200-2011 birds at 256 px, 16x16 codes: 11,788 pictures of 200 species.

Where a value differs from thibmonsel/taming_transformer's defaults, theirs stands beside it.
"""

from taming_jax.config.schema import Config, DataConfig, PriorConfig, VQGANConfig

CONFIG = Config(
    config="birds",
    data=DataConfig(
        name="bentrevett/caltech-ucsd-birds-200-2011",
        image_size=256,
        channels=3,
        random_crop=True,  # none: with 30 pictures a class both stages overfit without
        mirror=True,  # none
    ),
    vqgan=VQGANConfig(
        epochs=200,  # 10, which shows the pictures to the network too seldom
        batch_size=4,  # 128; about 2.5 GB an image in float32: take more where memory allows
        channels=128,  # 64, with 4 blocks a level; these are the official code's
        multipliers=(1, 1, 2, 2, 4),
        blocks=2,
        attention_resolutions=(16,),
        latent_channels=256,
        codebook_size=1024,  # 128, too few for colour
        code_dim=8,  # 64; directions of few dimensions keep all codes in use
        l2_normalise=True,  # no
        commitment=0.25,  # 1.0
        learning_rate=1e-4,
        discriminator_learning_rate=1e-4,
        warmup_steps=500,  # none
        final_learning_rate=0.1,  # 1
        discriminator_start=0.25,  # epoch 5 of 10
        discriminator_weight=0.8,
        adaptive_weight=True,  # no: fixed weights need tuning for every dataset
        diff_augment=("color", "translation"),  # none; for a discriminator that sees few pictures
        lecam_weight=0.001,  # none
        ema_decay=0.999,  # none
    ),
    prior=PriorConfig(
        epochs=300, batch_size=32, layers=12, heads=8, width=512, dropout=0.2,
        learning_rate=3e-4, grad_clip_norm=1.0, schedule="one-cycle", augmented_versions=8,
        guidance_scale=1.5,
    ),
)  # fmt: skip
