"""Figures: plots and grids of images, written as PNG files.

Images [n,h,w,c] are uint8, or float in [-1, 1]. Figures do not use pyplot, so they open no window,
have no global state, and do not interfere with the figures of a notebook.
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
from taming_jax.storage import atomic_write

DPI = 110
GAP = 2  # pixels between the images of a grid
INK, ACCENT, FAINT = "#1f2933", "#c2410c", "#9aa5b1"
# Metrics on a logarithmic scale, since they span orders of magnitude.
LOG_SCALE = {"l1", "perceptual", "codebook", "adaptive_weight"}
# The titles of metrics, in the order of their plots. Other metrics follow, titled by their names.
TITLES = {
    "l1": "L1 (images in [0, 1])",
    "perceptual": "perceptual (LPIPS)",
    "reconstruction_loss": "reconstruction loss (weighted sum)",
    "nll": "negative log-likelihood (nats per code)",
    "codebook": "loss of the quantizer",
    "perplexity": "perplexity of the codes",
    "usage": "share of codes in use",
    "accuracy": "accuracy (share of codes)",
    "code_bits_per_subpixel": "code rate (bits per subpixel)",
    "psnr": "PSNR (dB)",
    "fd_vgg16": "FD-VGG16",
    "loss": "total generator loss",
    "adversarial": "adversarial loss of the generator",
    "adaptive_weight": "adaptive weight",
    "discriminator": "discriminator loss",
    "lecam": "LeCam",
    "logits_real": "logits of real images",
    "logits_fake": "logits of reconstructions",
    "generator_gradient": "norm of the generator's gradient",
    "discriminator_gradient": "norm of the discriminator's gradient",
    "transformer_gradient": "norm of the transformer's gradient",
}
NOT_PLOTTED = ("step", "epoch", "split", "skipped")  # keys of a log row that are not plotted


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, facecolor="white")
    atomic_write(path, content.getvalue())


def set_title(axes: Axes, title: str) -> None:
    """Sets the title of a plot and hides the top and right sides of its frame."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def tile_images(images: np.ndarray, columns: int, gap: int = GAP) -> np.ndarray:
    """Arranges images [n,h,w,c] in rows of `columns` as one image uint8, with white gaps."""
    n, h, w, c = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, image in enumerate(to_uint8(images)):
        row, column = divmod(i, columns)
        sheet[row * (h + gap) :, column * (w + gap) :][:h, :w] = image
    return sheet


def plot_loss_curves(
    rows: Sequence[dict[str, Any]], path: Path, title: str, mark: int | None = None
) -> None:
    """Plots each metric of the log's rows over the steps: training as a line, validation with dots.
    A dotted line marks the step `mark`, if it is within the range."""
    steps = max(row["step"] for row in rows)
    logged = dict.fromkeys(name for row in rows for name in row if name not in NOT_PLOTTED)
    metrics = sorted(logged, key=lambda name: [*TITLES, name].index(name))
    columns = min(4, len(metrics))
    plot_rows = math.ceil(len(metrics) / columns)
    size = 3.6 * columns, 2.5 * plot_rows + 0.7
    figure = Figure(figsize=size)
    # Use a fixed layout, since matplotlib's layout engines take seconds.
    figure.subplots_adjust(
        left=0.6 / size[0], right=1 - 0.15 / size[0], bottom=0.5 / size[1],
        top=1 - 0.7 / size[1], wspace=0.24, hspace=0.34,
    )  # fmt: skip
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(plot_rows, columns, i + 1)
        plot_metric(axes, rows, metric)
        axes.set_xlim(0, steps)
        if i >= len(metrics) - columns:
            axes.set_xlabel("step", fontsize=9)
        if mark is not None:
            axes.axvline(mark, color=FAINT, linestyle=":", linewidth=1)
    figure.suptitle(
        f"{title}: training (dark) and validation (orange)",
        fontsize=11, x=0.01, y=1 - 0.12 / size[1], ha="left",
    )  # fmt: skip
    save(figure, path)


def plot_metric(axes: Axes, rows: Sequence[dict[str, Any]], metric: str) -> None:
    """Plots one metric of the log's rows. A long training curve also gets a moving average."""
    for split in ("train", "validation"):
        points = [
            (row["step"], row[metric]) for row in rows if row["split"] == split and metric in row
        ]
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
    set_title(axes, TITLES.get(metric, metric))
    axes.tick_params(labelsize=8)
    if metric == "usage":
        axes.set_ylim(0, 1.05)
    # The losses of some quantizers are 0 or negative.
    if metric in LOG_SCALE and all(row[metric] > 0 for row in rows if metric in row):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()


def plot_reconstructions(
    images: np.ndarray, reconstruction: np.ndarray, path: Path, step: int
) -> None:
    """Plots images, their reconstructions, and the absolute errors, one column per image."""
    images, reconstruction = to_uint8(images), to_uint8(reconstruction)
    error, colored = color_errors(images, reconstruction)
    rows = [np.broadcast_to(row, colored.shape) for row in (images, reconstruction, colored)]
    title = f"Validation images after step {step}; the mean error (0 to 1) is below each column"
    names = ("original", "reconstruction", "error")
    means = [f"{image_error.mean() / 255:.3f}" for image_error in error]
    save(draw_grid(np.concatenate(rows), names, len(images), title, means), path)


def color_errors(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the absolute errors of images uint8 [n,h,w,c], averaged over the channels, float
    [n,h,w], and pictures of them, uint8 [n,h,w,3]."""
    error = np.abs(images.astype(int) - others).mean(-1)
    return error, colormaps["magma"](error.astype(np.uint8), bytes=True)[..., :3]


def plot_codebook_usage(counts: np.ndarray, path: Path, source: str) -> None:
    """Plots how often each code is used, from counts [k], in descending order. The title names
    `source`, the images that the counts are from."""
    shares = np.sort(counts / counts.sum())[::-1]
    used = shares[shares > 0]
    perplexity = math.exp(-(used * np.log(used)).sum())
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(100 * shares, np.arange(len(shares) + 1) - 0.5, fill=True, color=INK)
    axes.axhline(100 / len(shares), color=ACCENT, linewidth=1, linestyle="--")
    line_end = (len(shares) - 1, 100 / len(shares))
    axes.annotate("uniform usage", line_end, ha="right", va="bottom", fontsize=8, color=ACCENT)
    axes.set_xlim(-0.5, len(shares) - 0.5)
    axes.set_xlabel("codes, by usage")
    axes.set_ylabel("usage (%)")
    set_title(
        axes,
        f"Codes of {source}: {len(used)} of {len(shares)} in use "
        f"({100 * len(used) / len(shares):.0f}%), perplexity {perplexity:.1f}",
    )
    save(figure, path)


def plot_curves(
    curves: dict[str, Sequence[tuple[float, float]]], path: Path, title: str, quantity: str
) -> None:
    """Plots curves from 0 to 1, given as (step, value), with a legend."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["tab10"](range(10))
    for i, (name, points) in enumerate(curves.items()):
        x, y = np.array(points, float).T
        style = ("-", "--", ":", "-.")[i % 4]  # shows both of two equal curves
        axes.plot(x, y, style, color=colors[i % 10], marker="o", markersize=3, label=name)
    axes.set_ylim(0, 1.05)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel(quantity)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    set_title(axes, title)
    save(figure, path)


def plot_points(
    points: dict[str, tuple[float, float]], path: Path, title: str, labels: tuple[str, str]
) -> None:
    """Plots named points (x, y), with the labels of the two axes."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["tab10"](range(10))
    for i, (name, (x, y)) in enumerate(points.items()):
        marker = "osD^v"[i // 10 % 5]
        axes.plot(x, y, marker, color=colors[i % 10], markersize=7, label=name)
    axes.margins(0.15)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    set_title(axes, title)
    save(figure, path)


def draw_grid(
    images: np.ndarray,
    names: Sequence[str],
    columns: int,
    title: str | None = None,
    below: Sequence[str] = (),
) -> Figure:
    """Returns a figure of images [n,h,w,c] in rows of `columns`. `names` are the labels of the rows
    (or empty), and `below` are the texts below the columns. Pixels of images are drawn with
    sharp edges if they are at least two pixels of the figure wide."""
    sheet = tile_images(images, columns)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    # Sizes in inches. Matplotlib's "constrained" layout would cut off long names.
    width, margin = min(columns, 8.0), 0.05
    height = width * sheet.shape[0] / sheet.shape[1]
    longest_name = max(map(len, names), default=0)
    left = max(0.8, 0.2 + 0.09 * longest_name) if names else margin  # the font size is 9 points
    top = margin if title is None else 0.4
    bottom = 0.25 if below else margin
    title_width = 0.075 * len(title or "")  # the font size is 10 points
    size = max(left + width + margin, title_width), bottom + height + top
    figure = Figure(figsize=size)
    if title is not None:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", y=1 - 0.1 / size[1])
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    sharp = width * DPI >= 2 * sheet.shape[1]
    axes.imshow(
        np.broadcast_to(sheet, (*sheet.shape[:2], 3)),
        interpolation="nearest" if sharp else "antialiased",
    )
    axes.spines[:].set_visible(False)
    row, column = images.shape[1] + GAP, images.shape[2] + GAP
    axes.set_yticks([row * (i + 0.5) - 1.5 for i in range(len(names))], names, fontsize=9)
    axes.set_xticks([column * (i + 0.5) - 1.5 for i in range(len(below))], below, fontsize=8)
    axes.tick_params(length=0)
    return figure
