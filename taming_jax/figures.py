"""Every picture, from arrays to PNG. Images are uint8, or float in [-1, 1]; [n,h,w,c].

Figures are made without pyplot: no window, no global state, safe beside a notebook's own.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from taming_jax.data.pixels import to_uint8
from taming_jax.files import write_whole

DPI = 110
INK, ACCENT, FAINT = "#1f2933", "#c2410c", "#9aa5b1"
# Losses that only fall, and are easier to read by their orders of magnitude.
LOGARITHMIC = {"l1", "perceptual", "codebook", "adaptive_weight"}
# Titles of metrics, in the order of their curves; others follow, under their own names.
TITLES = {
    "l1": "L1 (images in 0 to 1)",
    "perceptual": "perceptual (LPIPS)",
    "nll": "reconstruction loss",
    "codebook": "codebook loss",
    "perplexity": "perplexity of the codes",
    "usage": "share of codes in use",
    "accuracy": "accuracy (share of codes)",
    "bits_per_dim": "bits a dimension",
    "psnr": "PSNR (dB)",
    "fd_vgg16": "FD-VGG16",
    "loss": "generator's whole loss",
    "adversarial": "generator's adversarial loss",
    "adaptive_weight": "adaptive weight",
    "discriminator": "discriminator loss",
    "lecam": "LeCAM",
    "logits_real": "logits of real images",
    "logits_fake": "logits of reconstructions",
    "generator_gradient": "norm of the generator's gradient",
    "discriminator_gradient": "norm of the discriminator's gradient",
    "transformer_gradient": "norm of the transformer's gradient",
}
NOT_DRAWN = ("step", "epoch", "split", "skipped")  # of a row of the log


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, facecolor="white")
    write_whole(path, content.getvalue())


def show(axes: Axes, image: np.ndarray) -> None:
    """One image [h,w,c] without axes; gray for one channel, with sharp pixels where they are twice
    as large as the screen's, or more."""
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, -1)
    figure: Any = axes.figure
    pixels = axes.get_position().width * figure.get_figwidth() * DPI
    sharp = pixels >= 2 * image.shape[1]
    axes.imshow(image, interpolation="nearest" if sharp else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def tiles(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Images [n,h,w,c] side by side as one image, white between."""
    n, h, w, c = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, image in enumerate(to_uint8(images)):
        row, column = divmod(i, columns)
        sheet[row * (h + gap) :, column * (w + gap) :][:h, :w] = image
    return sheet


def loss_curves(
    rows: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    mark: int | None = None,
    mark_name: str = "",
    names: Mapping[str, str] | None = None,
) -> None:
    """Every metric over the steps, training as a line and validation as dots. A dotted line marks
    the step `mark`, where it lies within; `names` replaces titles of terms."""
    steps = [row["step"] for row in rows]
    logged = dict.fromkeys(name for row in rows for name in row if name not in NOT_DRAWN)
    terms = sorted(logged, key=lambda name: [*TITLES, name].index(name))
    columns = min(4, len(terms))
    lines = math.ceil(len(terms) / columns)
    size = 3.6 * columns, 2.5 * lines + 0.7
    figure = Figure(figsize=size)
    # By hand: a layout that is solved for takes most of a short run's last seconds.
    figure.subplots_adjust(
        left=0.6 / size[0], right=1 - 0.15 / size[0], bottom=0.5 / size[1],
        top=1 - 0.7 / size[1], wspace=0.24, hspace=0.34,
    )  # fmt: skip
    for i, term in enumerate(terms):
        axes = figure.add_subplot(lines, columns, i + 1)
        for split in ("train", "validation"):
            points = [(r["step"], r[term]) for r in rows if r["split"] == split and term in r]
            if not points:
                continue
            x, y = np.array(points, float).T
            if split == "validation":
                axes.plot(
                    x, y, "o-", color=ACCENT, markersize=3.5, linewidth=1, zorder=3, clip_on=False
                )
            elif len(y) < 100:
                axes.plot(x, y, color=INK, linewidth=1.2)
            else:
                axes.plot(x, y, color=FAINT, linewidth=0.5)
                axes.plot(x, smooth(y, len(y) // 50), color=INK, linewidth=1.2)
        axes.set_title((TITLES | dict(names or {})).get(term, term), loc="left", fontsize=10)
        first = min(row["step"] for row in rows if term in row)
        # What begins late, as the adversarial terms do, has the panel to itself.
        late = mark is not None and mark < first < max(steps)
        axes.set_xlim(first if late else 0, max(steps))
        if term == "usage":
            axes.set_ylim(0, 1.05)
        if term in LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if i >= len(terms) - columns:
            axes.set_xlabel("step", fontsize=9)
        if mark is not None and mark < max(steps):
            axes.axvline(mark, color=FAINT, linestyle=":", linewidth=1)
            if i == 0:
                side = "left" if mark < max(steps) / 2 else "right"
                axes.annotate(
                    f" {mark_name} \n starts ", (mark, 0.98), xycoords=("data", "axes fraction"),
                    va="top", ha=side, fontsize=8, color=INK,
                )  # fmt: skip
    figure.suptitle(
        f"{title}: training (dark) and validation (orange)",
        fontsize=11, x=0.01, y=1 - 0.12 / size[1], ha="left",
    )  # fmt: skip
    save(figure, path)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A centred moving average that gets narrower towards the ends."""
    sums = np.concatenate([[0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - window, 0), np.minimum(i + window + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def reconstructions(images: np.ndarray, reconstruction: np.ndarray, path: Path, step: int) -> None:
    """Originals, reconstructions and the absolute difference, a column an image."""
    images, reconstruction = to_uint8(images), to_uint8(reconstruction)
    error = np.abs(images.astype(int) - reconstruction).mean(-1)
    coloured = colormaps["magma"](error.astype(np.uint8), bytes=True)[..., :3]
    rows = [np.broadcast_to(row, coloured.shape) for row in (images, reconstruction, coloured)]
    title = f"Validation images after step {step}; under each error its mean (0 to 1)"
    names = ("original", "reconstruction", "error")
    means = [f"{each.mean() / 255:.3f}" for each in error]
    save(labelled_grid(np.concatenate(rows), names, len(images), title, means), path)


def codebook_usage(counts: np.ndarray, path: Path, of: str) -> None:
    """How often each code is used, from counts [k], the most used first; `of` which images."""
    shares = np.sort(counts / counts.sum())[::-1]
    used = shares[shares > 0]
    perplexity = math.exp(-(used * np.log(used)).sum())
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(100 * shares, np.arange(len(shares) + 1) - 0.5, fill=True, color=INK)
    axes.axhline(100 / len(shares), color=ACCENT, linewidth=1, linestyle="--")
    here = (len(shares) - 1, 100 / len(shares))
    axes.annotate("if all were used alike", here, ha="right", va="bottom", fontsize=8, color=ACCENT)
    axes.set_xlim(-0.5, len(shares) - 0.5)
    axes.set_xlabel("code, by use")
    axes.set_ylabel("% of all uses")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"Codes on {of}: {len(used)} of {len(shares)} in use "
        f"({100 * len(used) / len(shares):.0f} %), perplexity {perplexity:.1f}",
        loc="left", fontsize=10,
    )  # fmt: skip
    save(figure, path)


def sheet(images: np.ndarray, path: Path, columns: int, title: str) -> None:
    """Images as one sheet of tiles under a title."""
    picture = tiles(images, columns)
    width = 8.0
    figure = Figure(
        figsize=(width, width * picture.shape[0] / picture.shape[1] + 0.45), layout="constrained"
    )
    show(figure.add_subplot(), picture)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    save(figure, path)


def random_latents(images: np.ndarray, path: Path, step: int) -> None:
    """Decoded grids whose codes were drawn independently."""
    title = f"Codes drawn independently, as often as images use them: no prior yet (step {step})"
    sheet(images, path, 8, title)


def codebook(images: np.ndarray, counts: np.ndarray, path: Path, size: int, step: int) -> None:
    """Decoded grids of one code each, the most used first."""
    which = "All" if len(images) == size else f"The {len(images)} most used of"
    title = (
        f"{which} {size} codes, each decoded from a grid of itself, most used first (step {step})"
    )
    if (counts == 0).any():
        title += f"; the last {(counts == 0).sum()} are unused"
    sheet(images, path, 16, title)


def class_samples(images: np.ndarray, names: Sequence[str], path: Path, step: int) -> None:
    """Samples [n,h,w,c] of classes, as many of each, a labelled row a class."""
    columns = len(images) // len(names)
    save(labelled_grid(images, names, columns, f"Samples of each class (step {step})"), path)


def labelled_grid(
    images: np.ndarray,
    names: Sequence[str],
    columns: int,
    title: str | None = None,
    below: Sequence[str] = (),
) -> Figure:
    """Images [n,h,w,c] in rows of `columns`, with the name of each row beside it, and what is said
    of each column below."""
    picture = tiles(images, columns)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    # In inches. A layout that is solved for, matplotlib's "constrained", cuts long names.
    width, margin = min(columns, 8.0), 0.05
    height = width * picture.shape[0] / picture.shape[1]
    beside = max(0.8, 0.2 + 0.09 * max(map(len, names)))  # letters of nine points
    above = margin if title is None else 0.4
    under = 0.25 if below else margin
    size = beside + width + margin, under + height + above
    figure = Figure(figsize=size)
    if title is not None:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", y=1 - 0.1 / size[1])
    axes = figure.add_axes((beside / size[0], under / size[1], width / size[0], height / size[1]))
    show(axes, picture)
    row, column = (picture.shape[0] + 2) / len(names), (picture.shape[1] + 2) / columns
    axes.set_yticks([row * (i + 0.5) - 1.5 for i in range(len(names))], names, fontsize=9)
    axes.set_xticks([column * (i + 0.5) - 1.5 for i in range(len(below))], below, fontsize=8)
    axes.tick_params(length=0)
    return figure


def nearest_images(
    images: np.ndarray, nearest: np.ndarray, far: np.ndarray, of: str, path: Path
) -> None:
    """Samples [n,h,w,c] above the images nearest to them, `of` which ones, which are `far` [n]
    away."""
    title = f"Samples and {of}; below,\nhow far (1: as far as a training image's nearest)"
    names, said = ("sample", "training image"), [f"{value:.2f}" for value in far]
    save(labelled_grid(np.concatenate([images, nearest]), names, len(images), title, said), path)


def sweep(found: Sequence[dict[str, Any]], features: str, path: Path) -> None:
    """What samples are worth by guidance scale: the distance, and precision and recall."""
    panels = {features: ("fd",), "share": ("precision", "recall", "coverage", "accuracy")}
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    x = [each["guidance_scale"] for each in found]
    for i, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, i + 1)
        for name, colour in zip(names, (INK, ACCENT, FAINT, "#2563eb"), strict=False):
            if name in found[0]:
                axes.plot(x, [each[name] for each in found], "o-", color=colour, label=name)
        if i:
            axes.legend(fontsize=8, frameon=False)
            axes.set_ylim(0, 1.02)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("guidance scale")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
