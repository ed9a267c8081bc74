"""Every setting of both stages, as frozen dataclasses.

A field made with `free` says how long, how often or where a run is computed, and may change when
the run is resumed. Every other field says what is trained and may not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

UNKNOWN = "unknown"  # the dataset of an imported run
OF_A_MACHINE = ("workdir", "path", "cache", "workers")  # settings that differ between machines


class Range(NamedTuple):
    """The values that a setting may have, as a function and in words."""

    holds: Callable[[Any], bool]
    words: str


COUNT = Range(lambda x: x >= 1, "must be 1 or more")
NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "must be 0 or more")
POSITIVE = Range(lambda x: 0 < x < math.inf, "must be above 0")
SHARE = Range(lambda x: 0 <= x <= 1, "is a share, from 0 to 1")
PART = Range(lambda x: 0 < x < 1, "is a share between 0 and 1")
SEED = Range(lambda x: 0 <= x < 2**32, f"must be from 0 to {2**32 - 1}")


def setting(default: Any, values: Range | None = None, meaning: bool = False) -> Any:
    """A field whose value must lie in a range, unless it is None. `meaning` marks a setting that
    changes what trained weights mean, even if their shapes stay the same."""
    return field(default=default, metadata={"range": values, "meaning": meaning})


def free(default: Any, values: Range | None = None) -> Any:
    """A field that a resumed run may change."""
    return field(default=default, metadata={"free": True, "range": values})


@dataclass(frozen=True)
class DataConfig:
    name: str = "mnist"
    """The dataset: mnist; synthetic (small pictures made by rule, of any size); folder (pictures in
    --data.path); OWNER/NAME on the Hugging Face hub; tfds:NAME of TensorFlow Datasets. An imported
    run's is unknown until it is named."""
    path: str | None = free(None)
    """A folder with your own copy of the files, in place of a download."""
    image_column: str | None = None
    """The column of a table that holds the images; found unless told."""
    label_column: str | None = None
    """The column of a table that holds the classes; found unless told."""
    image_size: int = setting(28, COUNT)
    """Height and width of the images the model sees."""
    channels: int = 1
    """1 for grayscale, 3 for colour."""
    random_crop: bool = False
    """Train on crops at random places of images kept an eighth larger."""
    mirror: bool = False
    """Train on images of which every second one, at random, is mirrored."""
    squeeze: bool = False
    """Resize pictures to squares as they are, in place of cutting out their middle square."""
    cache: str | None = free(None)
    """The folder of decoded images; the user's own cache folder unless told."""
    bad_share: float = free(0.1, SHARE)
    """The largest share of pictures that may be unreadable and left out."""
    workers: int | None = free(None, COUNT)
    """Threads that decode pictures; default: one per core."""
    resident_share: float = free(0.2, SHARE)
    """A split that takes no more than this share of a device's memory is kept there; a larger one
    is read from the disk, batch by batch."""
    test_share: float = setting(0.1, PART)
    """The share of the images kept for testing, where a dataset has no test split."""
    validation_share: float = setting(0.05, PART)
    """The share of the training images kept for validation, on which models are chosen."""
    split_seed: int = setting(0, SEED)
    """The seed that cuts the validation images from the training images."""


@dataclass(frozen=True)
class StageConfig:
    """What the training loop needs to know of either stage."""

    epochs: int = free(200, COUNT)
    """Passes over the training images."""
    steps: int | None = free(None, COUNT)
    """Training steps, in place of epochs."""
    batch_size: int = setting(256, COUNT)
    """Images a step, over all devices together."""
    micro_batches: int = free(1, COUNT)
    """Parts that a batch is taken in, one after the other, to save memory; their gradients are
    added up."""
    eval_every: int | None = free(None, COUNT)
    """Steps between validations; an epoch unless told."""
    fd_every: int | None = setting(None, COUNT)
    """Steps between validations that also take the Fréchet distance, in VGG16's features, of
    reconstructions (in stage 2 of samples) to the validation split; the best checkpoint is then the
    one with the least of it, so that it cannot be changed later."""
    checkpoint_every: int | None = free(None, COUNT)
    """Steps between checkpoints; an epoch unless told."""
    log_every: int | None = free(None, COUNT)
    """Steps to a line of the log; about a thousand lines a run unless told."""
    draw_every: int | None = free(None, COUNT)
    """Least steps between redrawings of the figures; a twentieth of the run unless told."""
    profile: tuple[int, int] | None = free(None)
    """Trace the steps from one to another, counted from 1, with jax.profiler."""
    learning_rate: float = setting(4.5e-4, POSITIVE)
    """The highest learning rate (in stage 1 the generator's)."""
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    """Steps over which the learning rate rises from zero."""
    final_learning_rate: float = setting(1.0, SHARE)
    """Where the cosine decay of the learning rate ends, as a share of it; 1 keeps it constant."""
    clip: float | None = setting(None, POSITIVE)
    """The largest global norm of a network's gradients; larger ones are scaled down to it."""
    init_from: str | None = None
    """The folder of a run from whose weights this one begins, in place of random ones, where names
    and shapes are the same."""
    skipped_in_a_row: int = free(10, NOT_NEGATIVE)
    """Steps in a row that may be skipped because something in them is not finite; one more ends the
    run."""

    def total_steps(self, examples: int) -> int:
        """How many steps the run has, on that many training images."""
        return self.steps or math.ceil(self.epochs * examples / self.batch_size)


@dataclass(frozen=True)
class VQGANConfig(StageConfig):
    """Stage 1: encoder, quantizer, decoder and discriminator."""

    micro_batches: int = setting(1, COUNT)
    """Parts that a batch is taken in, one after the other, to save memory; their gradients are
    added up. The discriminator's BatchNorm normalises within a part."""

    channels: int = setting(128, COUNT)
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level as multiples of that; between two levels the image is halved."""
    blocks: int = setting(2, COUNT)
    """Residual blocks a level of the encoder."""
    decoder_blocks: int | None = setting(None, COUNT)
    """Residual blocks a level of the decoder; one more than the encoder's unless told."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights of feature maps at which every block is followed by self-attention; the middle of the
    networks always has it."""
    latent_channels: int = setting(256, COUNT)
    """Channels between the encoder and the 1x1 convolution into code space."""

    codebook_size: int = setting(1024, COUNT)
    """How many codes there are."""
    code_dim: int = setting(256, COUNT)
    """The dimension of a code."""
    commitment: float = setting(0.25, NOT_NEGATIVE)
    """The weight of the commitment term (beta in the papers)."""
    legacy_commitment: bool = False
    """Put that weight on the codebook term instead, as the official code did at first."""
    l2_normalise: bool = setting(False, meaning=True)
    """Compare directions only: latents and codes are scaled to length one."""
    quantizer: Literal["nearest", "gumbel"] = setting("nearest", meaning=True)
    """The nearest code, or in training one drawn by the Gumbel-softmax trick from what a 1x1
    convolution makes of a latent, and else the likeliest."""
    gumbel_temperature: tuple[float, float] = (1.0, 1 / 16)
    """That trick's, at the first step and at the last, with a cosine between."""
    kl_weight: float = setting(5e-4, NOT_NEGATIVE)
    """The weight of the divergence of its distribution from all codes alike."""

    l1_weight: float = setting(1.0, NOT_NEGATIVE)
    perceptual_weight: float = setting(1.0, NOT_NEGATIVE)
    """LPIPS on VGG16 features; 0 leaves VGG16 out."""
    codebook_weight: float = setting(1.0, NOT_NEGATIVE)

    discriminator_filters: int = setting(64, COUNT)
    discriminator_layers: int = setting(3, COUNT)
    discriminator_start: float = setting(0.25, SHARE)
    """The share of the run after which the adversarial part begins, 0 to 1 (1: never)."""
    discriminator_start_step: int | None = free(None, NOT_NEGATIVE)
    """The step at which it begins. Default: computed from the share when the run is created, and
    kept when it is resumed, also where it is made longer (training/vqgan.py refuses another)."""
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    discriminator_weight: float = setting(0.8, NOT_NEGATIVE)
    """The weight of the generator's adversarial loss."""
    adaptive_weight: bool = True
    """Multiply that by the ratio of the reconstruction's and the adversarial gradient's norms."""
    adaptive_weight_max: float = setting(1e4, NOT_NEGATIVE)
    diff_augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """How real and fake images are changed alike before the discriminator sees them, for small
    datasets."""
    discriminator_every: int = setting(1, COUNT)
    """The discriminator learns in every so many steps, to hold it back."""
    lecam_weight: float = setting(0.0, NOT_NEGATIVE)
    """LeCAM regularisation of the discriminator, for small datasets; 0 is off."""
    lecam_decay: float = setting(0.999, SHARE)

    discriminator_learning_rate: float = setting(4.5e-4, POSITIVE)
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's, for both networks."""
    epsilon: float = setting(1e-8, POSITIVE)
    """Adam's: gradients far below it move a parameter by little, so that rounding errors in place
    of a zero are not made full steps of."""
    remat: bool = False
    """Recompute the residual blocks' activations in the backward pass, to save memory."""
    ema_decay: float | None = setting(None, SHARE)
    """Keep a moving average of the generator, and evaluate and draw with it."""

    def start_step(self, examples: int) -> int | None:
        """The step, counted from 0, at which the adversarial part begins in a run on that many
        training images; None where it never does."""
        if self.discriminator_start_step is not None or self.discriminator_start == 1:
            return self.discriminator_start_step
        return round(self.discriminator_start * self.total_steps(examples))


@dataclass(frozen=True)
class PriorConfig(StageConfig):
    """Stage 2: the prior over grids of codes."""

    kind: Literal["autoregressive"] = setting("autoregressive", meaning=True)
    """The kind of prior; an autoregressive one draws codes one after the other, in raster order."""
    layers: int = setting(6, COUNT)
    heads: int = setting(8, COUNT, meaning=True)
    width: int = setting(256, COUNT)
    dropout: float = setting(0.1, SHARE)
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_width: int | None = setting(None, COUNT)
    """Channels within a block's two-layer network; four times the width unless told, and two thirds
    of that with swiglu."""
    bias: bool = True
    """Whether dense layers add one."""
    positions: Literal["learned", "rotary", "llamagen"] = setting("learned", meaning=True)
    """Of codes in the sequence; or in the grid, by rotary embeddings, without any for the class, or
    as LlamaGen has them, where a class's queries and keys vanish."""
    # Only imported models need these three, mlp_width, bias, and positions "llamagen".
    block_size: int | None = setting(None, COUNT)
    """The longest sequence there are learned positions for; the grid's unless told."""
    vocabulary: int | None = setting(None, COUNT, meaning=True)
    """Tokens that embeddings and head have, where classes are tokens among the codes, as in the
    official transformer; unless told classes have their own, and the head speaks codes only."""
    first_class: int = setting(0, NOT_NEGATIVE, meaning=True)
    """The token of the first class, then."""
    qk_norm: bool = False
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = setting(0.01, NOT_NEGATIVE)
    """AdamW's, on matrices only."""
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    """One cycle up and down, or warm-up steps and cosine decay."""
    final_learning_rate: float = setting(0.0, SHARE)
    """Where the cosine decay of the learning rate ends, as a share of it."""
    label_dropout: float = setting(0.1, SHARE)
    """The share of examples that learn without their class, which guidance needs."""
    augmented_versions: int = setting(8, COUNT)
    """Where training images are augmented, how many versions of each are encoded: the image as it
    is in the first epoch, others in the next ones, then again from the first."""
    keep_codes: float = setting(1.0, SHARE)
    """The share of input codes left as they are; the others become random ones."""

    temperature: float = free(1.0)
    """Of samples, unless told; 0 is greedy."""
    top_k: int | None = free(None)
    """Of samples, unless told: the most likely codes, this many, are drawn from."""
    top_p: float | None = free(None)
    """Of samples, unless told: the fewest codes that hold this share of probability are drawn
    from."""
    guidance_scale: float | None = free(None)
    """Of samples, unless told: how much is made of the class; 1, or None, is as learned."""


@dataclass(frozen=True)
class Config:
    config: str = "mnist"
    """A preset's name, or the path of a run's config.json."""
    workdir: str | None = free(None)
    """The run's folder; runs/NAME unless told."""
    seed: int = setting(0, SEED)
    """What all of a run's randomness derives from."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; parameters, losses and statistics stay float32."""
    devices: int | None = free(None, COUNT)
    """How many devices to use; all unless told."""
    deterministic: bool = free(False)
    """On a GPU, the same numbers in every run, at a price: kernels are not chosen by their speed,
    and what adds up by index (the gradients of LPIPS's max pooling, of DiffAugment's translation
    and of the prior's loss) does so in order. A CPU's numbers are the same anyway."""
    compile_cache: bool = free(True)
    """Keep compiled programs in the user's own cache folder, so that the next run begins sooner."""
    data: DataConfig = DataConfig()
    vqgan: VQGANConfig = VQGANConfig()
    prior: PriorConfig = PriorConfig()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.workdir or f"runs/{self.config}")

    @property
    def downsample_factor(self) -> int:
        """The pixels per code along each axis."""
        return int(2 ** (len(self.vqgan.multipliers) - 1))

    @property
    def grid_size(self) -> int:
        """Height and width of the grid of codes."""
        return self.data.image_size // self.downsample_factor

    @property
    def level_resolutions(self) -> list[int]:
        """Heights of the feature maps of encoder and decoder, from full resolution down."""
        return [self.data.image_size // 2**level for level in range(len(self.vqgan.multipliers))]
