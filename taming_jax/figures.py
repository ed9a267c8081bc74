"""Every picture, from arrays to PNG. Images are uint8, or float in [-1, 1]; [n,h,w,c].

Figures are made without pyplot: no window, no global state, safe beside a notebook's own.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from taming_jax.data.pixels import to_uint8
from taming_jax.files import write_whole

DPI = 110
GAP = 2  # pixels between the images of a grid
INK, ACCENT, FAINT = "#1f2933", "#c2410c", "#9aa5b1"
# Losses that only fall, and are easier to read by their orders of magnitude.
LOGARITHMIC = {"l1", "perceptual", "codebook", "adaptive_weight"}
# Titles of metrics, in the order of their curves; others follow, under their own names.
TITLES = {
    "l1": "L1 (images in 0 to 1)",
    "perceptual": "perceptual (LPIPS)",
    "nll": "negative log-likelihood",
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


def set_title(axes: Axes, title: str) -> None:
    """Gives a plot a title, and takes the frame's top and right side away."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def tiles(images: np.ndarray, columns: int, gap: int = GAP) -> np.ndarray:
    """Images [n,h,w,c] side by side as one image, white between."""
    n, h, w, c = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, image in enumerate(to_uint8(images)):
        row, column = divmod(i, columns)
        sheet[row * (h + gap) :, column * (w + gap) :][:h, :w] = image
    return sheet


def loss_curves(
    rows: Sequence[dict[str, Any]], path: Path, title: str, mark: int | None = None
) -> None:
    """Draws every metric over the steps, training as a line and validation as dots, with a dotted
    line at the step `mark`, where it lies within."""
    steps = max(row["step"] for row in rows)
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
        draw_term(axes, rows, term)
        axes.set_xlim(0, steps)
        if i >= len(terms) - columns:
            axes.set_xlabel("step", fontsize=9)
        if mark is not None:
            axes.axvline(mark, color=FAINT, linestyle=":", linewidth=1)
    figure.suptitle(
        f"{title}: training (dark) and validation (orange)",
        fontsize=11, x=0.01, y=1 - 0.12 / size[1], ha="left",
    )  # fmt: skip
    save(figure, path)


def draw_term(axes: Axes, rows: Sequence[dict[str, Any]], term: str) -> None:
    """Draws one metric of the log's rows. A long line of training gets its moving average."""
    for split in ("train", "validation"):
        points = [(row["step"], row[term]) for row in rows if row["split"] == split and term in row]
        x, y = np.array(points, float).reshape(-1, 2).T
        if split == "validation":
            axes.plot(x, y, "o-", color=ACCENT, markersize=3.5, linewidth=1, clip_on=False)
        elif len(y) < 100:
            axes.plot(x, y, color=INK, linewidth=1.2)
        else:
            window = len(y) // 25
            mean = np.convolve(y, np.full(window, 1 / window), "valid")
            axes.plot(x, y, color=FAINT, linewidth=0.5)
            axes.plot(x[window // 2 :][: len(mean)], mean, color=INK, linewidth=1.2)
    set_title(axes, TITLES.get(term, term))
    axes.tick_params(labelsize=8)
    if term == "usage":
        axes.set_ylim(0, 1.05)
    if term in LOGARITHMIC:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()


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
    set_title(
        axes,
        f"Codes on {of}: {len(used)} of {len(shares)} in use "
        f"({100 * len(used) / len(shares):.0f} %), perplexity {perplexity:.1f}",
    )
    save(figure, path)


def labelled_grid(
    images: np.ndarray,
    names: Sequence[str],
    columns: int,
    title: str | None = None,
    below: Sequence[str] = (),
) -> Figure:
    """Images [n,h,w,c] in rows of `columns`, with the name of each row (or none) beside it, and a
    text below each column. Pixels are sharp where they are at least twice as large as the
    screen's."""
    picture = tiles(images, columns)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    # In inches. A layout that is solved for, matplotlib's "constrained", cuts long names.
    width, margin = min(columns, 8.0), 0.05
    height = width * picture.shape[0] / picture.shape[1]
    longest = max(map(len, names), default=0)
    beside = max(0.8, 0.2 + 0.09 * longest) if names else margin  # letters of nine points
    above = margin if title is None else 0.4
    under = 0.25 if below else margin
    room = 0.075 * len(title or "")  # letters of ten points
    size = max(beside + width + margin, room), under + height + above
    figure = Figure(figsize=size)
    if title is not None:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", y=1 - 0.1 / size[1])
    axes = figure.add_axes((beside / size[0], under / size[1], width / size[0], height / size[1]))
    sharp = width * DPI >= 2 * picture.shape[1]
    axes.imshow(
        np.broadcast_to(picture, (*picture.shape[:2], 3)),
        interpolation="nearest" if sharp else "antialiased",
    )
    axes.spines[:].set_visible(False)
    row, column = images.shape[1] + GAP, images.shape[2] + GAP
    axes.set_yticks([row * (i + 0.5) - 1.5 for i in range(len(names))], names, fontsize=9)
    axes.set_xticks([column * (i + 0.5) - 1.5 for i in range(len(below))], below, fontsize=8)
    axes.tick_params(length=0)
    return figure
