"""Every setting of both stages, as frozen dataclasses.

You may change a field made with `free` when you resume a run: it sets how long the run trains, how
often it reports or saves, where and how it runs, or how it samples. The exception is
`discriminator_start_step`, which is fixed when the run is created. Every other field determines
what is trained."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from taming_jax.config.fields import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_FRACTION,
    SEED,
    free,
    setting,
)
from taming_jax.config.priors import PriorConfigs
from taming_jax.config.quantizers import QuantizerConfigs

UNKNOWN = "unknown"  # the dataset of an imported run
MACHINE_SETTINGS = ("workdir", "path", "cache", "workers")  # settings that differ between machines


@dataclass(frozen=True)
class DataConfig:
    """The dataset, and how its images are prepared."""

    name: str = "mnist"
    """The dataset: mnist, synthetic (simple shapes of any size), folder (pictures in --data.path),
    OWNER/NAME from the Hugging Face hub, or tfds:NAME from TensorFlow Datasets. An imported run
    has `unknown` until you name its dataset."""
    path: str | None = free(None)
    """A folder with your own copy of the files. Default: the dataset is downloaded or read from
    where its library keeps it."""
    layout: Literal["auto", "splits", "classes"] = "auto"
    """How the folders in a folder of pictures are read: splits reads those that are named after
    splits (train, validation, test), classes reads each as a class. auto chooses, and says so if
    both are possible."""
    config: str | None = None
    """The configuration of a dataset of the Hugging Face hub that has several."""
    image_column: str | None = None
    """The table column that holds the images. Default: the first column of images."""
    label_column: str | None = None
    """The table column that holds the classes. Default: the first column of class labels, or else
    one with a name such as label or class, or else the only text column whose values repeat."""
    image_size: int = setting(28, COUNT)
    """The height and width of the images that the model sees."""
    channels: int = 1
    """The color channels of the images: 1 for grayscale, 3 for color."""
    random_crop: bool = False
    """Crop training images at random. For this, they are stored an eighth larger."""
    mirror: bool = False
    """Mirror each training image with a probability of one half."""
    resize_mode: Literal["crop", "squeeze"] = "crop"
    """How a picture becomes square: crop cuts out its center before resizing; squeeze resizes the
    whole picture, which changes its aspect ratio."""
    cache: str | None = free(None)
    """The folder for decoded images. Default: ~/.cache/taming_jax."""
    max_corrupt_fraction: float = free(0.1, FRACTION)
    """The largest fraction of pictures that may be unreadable. Unreadable pictures are left out."""
    max_decoded_mib: int = free(1024, COUNT)
    """The memory, in MiB, that decoding one picture may take in each thread. Pictures that take
    more are unreadable."""
    workers: int | None = free(None, COUNT)
    """The number of threads that decode pictures. Default: one per core."""
    resident_share: float = free(0.2, FRACTION)
    """The fraction of a device's memory up to which a split is kept on the device. A larger split
    is read from the disk batch by batch."""
    test_share: float = setting(0.1, PROPER_FRACTION)
    """The fraction of the images to hold out for testing, if a dataset has no test split."""
    validation_share: float = setting(0.05, PROPER_FRACTION)
    """The fraction of the training images to hold out for validation, if a dataset has no
    validation split. Validation selects the best checkpoint."""
    split_seed: int = setting(0, SEED)
    """The seed for the random choice of the images to hold out."""


@dataclass(frozen=True)
class StageConfig:
    """The settings of the training loop, for either stage."""

    epochs: int = free(200, COUNT)
    """The number of passes over the training images."""
    steps: int | None = free(None, COUNT)
    """The number of training steps. Default: computed from the epochs."""
    batch_size: int = setting(256, COUNT)
    """The number of images per step, over all devices together."""
    micro_batches: int = free(1, COUNT)
    """The number of parts into which a batch is divided to save memory. Their gradients are
    accumulated."""
    eval_every: int | None = free(None, COUNT)
    """The number of steps between validations. Default: a fiftieth of the run, but at least one
    epoch and 100 steps."""
    fd_every: int | None = setting(None, COUNT)
    """The number of steps between validations that also compute the Fréchet distance, with VGG16
    features, between the validation split and its reconstructions (stage 2: samples). The best
    checkpoint is then the one with the smallest distance. Default: never."""
    checkpoint_every: int | None = free(None, COUNT)
    """The number of steps between checkpoints. Default: a twentieth of the run, but at least one
    epoch and 100 steps. If the last checkpoint is ten minutes old, another is written at the next
    line of the log."""
    log_every: int | None = free(None, COUNT)
    """The number of steps between lines of the log. Default: a thousandth of the run, rounded up to
    a multiple of --prior.steps-per-dispatch in stage 2."""
    draw_every: int | None = free(None, COUNT)
    """The minimum number of steps between updates of the figures, which follow a validation.
    Default: a tenth of the run, but at least one epoch and 100 steps."""
    profile: tuple[int, int] | None = free(None)
    """The first and the last step, counted from 1, to trace with jax.profiler. Default: no
    trace."""
    learning_rate: float = setting(4.5e-4, POSITIVE)
    """The peak learning rate (in stage 1 the generator's)."""
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    """The number of steps over which the learning rate rises from zero."""
    final_learning_rate: float = setting(1.0, FRACTION)
    """The learning rate at the end of the cosine decay, as a fraction of the peak. 1 keeps it
    constant."""
    grad_clip_norm: float | None = setting(None, POSITIVE)
    """The global norm to which a network's gradients are clipped. Default: no clipping."""
    init_from: str | None = None
    """The folder of a run whose weights initialize this run, wherever names and shapes match.
    Default: random initialization."""
    skipped_in_a_row: int = free(10, NOT_NEGATIVE)
    """The number of consecutive steps that may be skipped because of values that are not finite.
    One more ends the run."""

    def total_steps(self, examples: int) -> int:
        """Returns the number of steps of a run on `examples` training images."""
        return self.steps or math.ceil(self.epochs * examples / self.batch_size)


@dataclass(frozen=True)
class VQGANConfig(QuantizerConfigs, StageConfig):
    """The settings of stage 1: encoder, quantizer, decoder and discriminator."""

    micro_batches: int = setting(1, COUNT)
    """The number of parts into which a batch is divided to save memory. Their gradients are
    accumulated, and the BatchNorm of the discriminator normalizes within each part."""

    channels: int = setting(128, COUNT)
    """The number of channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """The channels of each level, as multiples of --vqgan.channels. The resolution halves from one
    level to the next."""
    blocks: int = setting(2, COUNT)
    """The number of residual blocks per level of the encoder."""
    decoder_blocks: int | None = setting(None, COUNT)
    """The number of residual blocks per level of the decoder. Default: one more than the
    encoder's."""
    attention_resolutions: tuple[int, ...] = (16,)
    """The heights of feature maps at which self-attention follows every block."""
    mid_attention: bool = True
    """Whether the middle of the networks, at the lowest resolution, has self-attention."""
    latent_channels: int = setting(256, COUNT)
    """The number of channels between the encoder and the 1x1 convolution to the code dimension."""

    codebook_weight: float = setting(1.0, NOT_NEGATIVE)
    """The weight of the quantizer's own loss, such as the codebook loss and the commitment loss."""

    l1_weight: float = setting(1.0, NOT_NEGATIVE)
    """The weight of the L1 reconstruction loss."""
    perceptual_weight: float = setting(1.0, NOT_NEGATIVE)
    """The weight of the perceptual loss, LPIPS on VGG16 features. 0 turns it off, and VGG16 is not
    loaded."""
    discriminator_filters: int = setting(64, COUNT)
    """The number of filters of the discriminator's first layer."""
    discriminator_layers: int = setting(3, COUNT)
    """The number of discriminator layers that halve the resolution."""
    discriminator_start: float = setting(0.25, FRACTION)
    """The fraction of the run after which the discriminator and the adversarial loss start. 1 turns
    them off."""
    discriminator_start_step: int | None = free(None, NOT_NEGATIVE)
    """The step at which the discriminator and the adversarial loss start. Default: computed from
    --vqgan.discriminator-start when the run is created. It cannot change afterwards, even if you
    make the run longer."""
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    """The adversarial loss: hinge or vanilla (cross-entropy)."""
    discriminator_weight: float = setting(0.8, NOT_NEGATIVE)
    """The weight of the adversarial loss of the generator."""
    adaptive_weight: bool = True
    """Multiply --vqgan.discriminator-weight by the ratio of the gradient norms of the
    reconstruction loss and the adversarial loss."""
    adaptive_weight_max: float = setting(1e4, NOT_NEGATIVE)
    """The upper limit of the ratio for --vqgan.adaptive-weight."""
    diff_augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """The differentiable augmentations of the real and fake images that the discriminator sees
    (DiffAugment), for small datasets."""
    discriminator_every: int = setting(1, COUNT)
    """The number of steps per update of the discriminator. More than 1 slows its learning."""
    lecam_weight: float = setting(0.0, NOT_NEGATIVE)
    """The weight of the LeCam regularization of the discriminator, for small datasets. 0 turns it
    off."""
    lecam_decay: float = setting(0.999, FRACTION)
    """The decay of the moving averages of the logits in the LeCam regularization."""

    discriminator_learning_rate: float = setting(4.5e-4, POSITIVE)
    """The peak learning rate of the discriminator."""
    betas: tuple[float, float] = (0.5, 0.9)
    """The decay rates beta1 and beta2 of Adam, for both networks."""
    epsilon: float = setting(1e-8, POSITIVE)
    """The epsilon of Adam. Gradients far below it hardly change a parameter, so that rounding
    errors in gradients that should be zero do not cause full steps."""
    remat: bool = False
    """Recompute the activations of residual blocks in the backward pass, to save memory."""
    ema_decay: float | None = setting(None, FRACTION)
    """The decay of the moving average (EMA) of the generator, which is then used for evaluation and
    figures. Default: no average."""

    @property
    def downsample_factor(self) -> int:
        """The height and width of a code in pixels."""
        return int(2 ** (len(self.multipliers) - 1))

    def start_step(self, examples: int) -> int | None:
        """Returns the step, counted from 0, at which the discriminator starts in a run on
        `examples` training images, or None if it never does."""
        if self.discriminator_start_step is not None or self.discriminator_start == 1:
            return self.discriminator_start_step
        return round(self.discriminator_start * self.total_steps(examples))


@dataclass(frozen=True)
class PriorConfig(PriorConfigs, StageConfig):
    """The settings of stage 2: the prior over grids of codes."""

    layers: int = setting(6, COUNT)
    """The number of transformer blocks."""
    heads: int = setting(8, COUNT, meaning=True)
    """The number of attention heads per block."""
    width: int = setting(256, COUNT)
    """The number of channels of the transformer."""
    steps_per_dispatch: int = free(1, COUNT)
    """The number of steps that the devices take per call from Python. On a CPU, the result is the
    same, bit for bit. No call crosses a line of the log, so --prior.log-every, if you set it,
    should be a multiple of it."""
    dropout: float = setting(0.1, FRACTION)
    """The dropout rate in training, of the embeddings and of what each layer adds to them."""
    attention_dropout: float = setting(0.0, FRACTION)
    """The dropout rate of the attention weights in training. With 0, training in bfloat16 on a GPU
    uses cuDNN's attention, which keeps no attention weights in memory."""
    norm: Literal["layer", "rms"] = "layer"
    """The normalization layers: LayerNorm or RMSNorm."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward network of a block: with GELU, or gated with SwiGLU."""
    mlp_width: int | None = setting(None, COUNT)
    """The number of hidden channels of the feed-forward network. Default: four times the width, or
    with swiglu two thirds of that, rounded up to a multiple of 8."""
    bias: bool = True
    """Whether dense layers have a bias."""
    positions: Literal["learned", "rotary", "llamagen"] = setting("learned", meaning=True)
    """The position embeddings. learned: one per position in the sequence. rotary: rotary embeddings
    of the row and column in the grid, and none for the class. llamagen: rotary embeddings that
    also set the query and key of the class to zero, as in LlamaGen."""
    # Only imported models need the next three settings, mlp_width, bias, and positions "llamagen".
    block_size: int | None = setting(None, COUNT)
    """The maximum length of a sequence, which is also the number of learned positions. Default: the
    number of codes in the grid."""
    vocabulary: int | None = setting(None, COUNT, meaning=True)
    """The number of tokens, if classes and codes share one vocabulary, as in the official
    transformer. Default: classes have their own embeddings, and the head predicts only codes."""
    first_class: int = setting(0, NOT_NEGATIVE, meaning=True)
    """The token of the first class in a shared vocabulary."""
    qk_norm: bool = False
    """Normalize queries and keys in attention."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The decay rates beta1 and beta2 of AdamW."""
    weight_decay: float = setting(0.01, NOT_NEGATIVE)
    """The weight decay of AdamW, which applies only to matrices."""
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    """The learning rate schedule: one-cycle rises and falls once; cosine warms up over
    --prior.warmup-steps and then decays."""
    final_learning_rate: float = setting(0.0, FRACTION)
    """The learning rate at the end of the cosine decay, as a fraction of the peak."""
    label_dropout: float = setting(0.1, FRACTION)
    """The fraction of training examples whose class is dropped, which guidance requires."""
    augmented_versions: int = setting(8, COUNT)
    """The number of versions of each training image to encode if training images are augmented.
    Version 0 is not augmented. Epochs use the versions in turn."""
    token_keep_prob: float = setting(1.0, FRACTION)
    """The probability that an input code is kept in training. The other input codes are replaced
    with random codes."""

    temperature: float = free(1.0)
    """The temperature for sampling, unless the sampling command sets another. 0 is greedy."""
    top_k: int | None = free(None)
    """The number of most likely codes to sample from, unless the sampling command sets another.
    Default: all codes."""
    top_p: float | None = free(None)
    """Sample from the smallest set of most likely codes whose probabilities sum to at least this,
    unless the sampling command sets another value. Default: all codes."""
    guidance_scale: float | None = free(None)
    """The classifier-free guidance scale for sampling, unless the sampling command sets another. 1
    turns guidance off. Default: off."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    config: str = "mnist"
    """The name of a preset, or the path of a run's config.json."""
    workdir: str | None = free(None)
    """The folder of the run. Default: runs/NAME, with the name of the preset."""
    seed: int = setting(0, SEED)
    """The seed for all random numbers of the run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """The dtype in which the networks compute. Parameters, losses and statistics stay float32. auto
    is replaced when a run is created: bfloat16 on NVIDIA GPUs that support it (compute capability
    8.0 or higher), and float32 elsewhere."""
    devices: int | None = free(None, COUNT)
    """The number of devices to use. Default: all."""
    deterministic: bool = free(False)
    """Make runs on a GPU reproducible, but slower: XLA does not autotune kernels, and scatter-adds
    (in the gradients of embeddings, codes and DiffAugment's translation) are computed in a fixed
    order. On a CPU, runs are reproducible without this."""
    log: tuple[str, ...] = free(("tensorboard",))
    """Where to log metrics and figures, besides the JSON lines in the run's folder: tensorboard
    (files in that folder), wandb (Weights & Biases), or trackio."""
    compile_cache: bool = free(True)
    """Keep compiled programs in ~/.cache/taming_jax, so that the next run starts faster."""
    data: DataConfig = DataConfig()
    vqgan: VQGANConfig = VQGANConfig()
    prior: PriorConfig = PriorConfig()

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.workdir or f"runs/{self.config}")

    @property
    def downsample_factor(self) -> int:
        """The height and width of a code in pixels."""
        return self.vqgan.downsample_factor

    @property
    def grid_size(self) -> int:
        """The height and width of the grid of codes."""
        return self.data.image_size // self.downsample_factor

    @property
    def level_resolutions(self) -> list[int]:
        """The heights of the feature maps of the encoder and decoder, from full resolution down."""
        return [self.data.image_size // 2**level for level in range(len(self.vqgan.multipliers))]
