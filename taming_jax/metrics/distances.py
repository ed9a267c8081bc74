"""Distances of two sets of images, from their features: everything here is numpy in float64.

Features are [n,d], one row an image; the functions do not know which network they come from.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from taming_jax.data.datasets import evenly_spaced
from taming_jax.errors import RunFailed, UserError
from taming_jax.storage import atomic_write

ROWS = 1024  # of a matrix of distances held at once


@dataclass
class Moments:
    """Number, mean [d] and covariance [d,d] of features that come in parts, merged by the pairwise
    update of Chan, Golub and LeVeque: in constant memory, and without the loss of precision that
    sums of squares have."""

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0  # the sum of the outer products of what departs from the mean

    def add(self, features: np.ndarray) -> None:
        """Takes in features [n,d]. RunFailed where they are not finite, which distances would hide
        or fail on."""
        if not len(features):
            return
        if not np.isfinite(features).all():
            raise RunFailed("the features of some images are not finite; are the images?")
        x = features.astype(np.float64)
        mean = x.mean(0)
        x -= mean
        total = self.count + len(x)
        apart = mean - self.mean
        share = self.count * len(x) / total
        self.scatter = self.scatter + x.T @ x + share * np.outer(apart, apart)
        self.mean = self.mean + apart * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased one. Needs two images."""
        return np.asarray(self.scatter) / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """The moments of features [n,d]."""
    found = Moments()
    found.add(features)
    return found


def save_moments(file: Path, found: Moments) -> None:
    """As the field keeps them: an .npz with `mu` [d] and `sigma` [d,d], and `count`. Raises
    OSError."""
    content = io.BytesIO()
    np.savez(content, mu=found.mean, sigma=found.covariance, count=found.count)
    atomic_write(file, content.getvalue())


def load_moments(file: Path, dimensions: int) -> Moments:
    """Reads an .npz with `mu` and `sigma`: ours, pytorch-fid's, or one of ADM's. Where it does not
    say of how many images, it counts as two (the distance does not depend on it).

    Raises UserError for a file that is none, or has another number of dimensions.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            mean = np.asarray(content["mu"], np.float64)
            covariance = np.asarray(content["sigma"], np.float64)
            count = int(content["count"]) if "count" in content else 2
        if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
            shapes = f"{mean.shape} and {covariance.shape}"
            raise ValueError(f"of shapes {shapes}; these features have {dimensions} dimensions")
        if count < 2 or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"of {count} images, or not finite")
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error) as error:
        raise UserError(
            f"{file} holds no statistics that can be used ({error}); an .npz with mu and sigma is "
            "needed."
        ) from error
    return Moments(count, mean, covariance * (count - 1))


def frechet_distance(left: Moments, right: Moments) -> float:
    """The Fréchet distance of two normal distributions (arXiv 1706.08500): |m - n|^2 +
    tr(A + B - 2 (A B)^1/2).

    The trace of the root is taken from the eigenvalues of A^1/2 B A^1/2, which is symmetric, so
    that a singular covariance (fewer images than dimensions) is no trouble: a general matrix root
    fails there, or turns complex.
    """
    values, vectors = np.linalg.eigh(left.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ right.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    apart = np.asarray(left.mean - right.mean)
    traces = np.trace(left.covariance) + np.trace(right.covariance)
    return float(max(apart @ apart + traces - 2 * cross, 0.0))


def kernel_distance(
    left: np.ndarray, right: np.ndarray, seed: int = 0, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """The squared maximum mean discrepancy under the kernel (x y / d + 1)^3, unbiased (arXiv
    1801.01401): its mean over random subsets, and the standard deviation over them. Subsets are of
    `size` images, or of as many as the smaller set has."""
    rng = np.random.default_rng(seed)
    size = min(size, len(left), len(right))
    found = []
    for _ in range(subsets):
        x = left[rng.choice(len(left), size, replace=False)].astype(np.float64)
        y = right[rng.choice(len(right), size, replace=False)].astype(np.float64)

        def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a @ b.T / a.shape[1] + 1) ** 3

        xx, yy = kernel(x, x), kernel(y, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        found.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


def distance_strips(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """The squared distances of rows [n,d] to rows [m,d], in strips of at most `ROWS` rows: which
    rows of `left`, and their distances float64 [rows,m]."""
    right = right.astype(np.float64)
    for start in range(0, len(left), ROWS):
        rows = slice(start, start + ROWS)
        x = left[rows].astype(np.float64)
        squares = np.square(x).sum(1)[:, None] + np.square(right).sum(1) - 2 * x @ right.T
        yield rows, np.maximum(squares, 0)


def nearest(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of left [n,d] the number of the nearest row of right [m,d], and the square of
    its distance."""
    numbers, squares = zip(
        *((strip.argmin(1), strip.min(1)) for _, strip in distance_strips(left, right)), strict=True
    )
    return np.concatenate(numbers), np.concatenate(squares)


def radii(features: np.ndarray, neighbours: int, of: np.ndarray | None = None) -> np.ndarray:
    """The squared distance of each row (or of each row of `of`, which are among them) to the k-th
    nearest of the others."""
    strips = distance_strips(features if of is None else of, features)
    return np.concatenate(
        [np.partition(strip, neighbours, 1)[:, neighbours] for _, strip in strips]
    )


def manifold(real: np.ndarray, fake: np.ndarray, neighbours: int = 5) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of fake
    features [m,d] against real [n,d]: how many of the ones lie in a ball around one of the others
    that reaches its k-th neighbour. Holds a strip of the matrix of distances at a time.

    Needs more images of each kind than `neighbours`.
    """
    real_radii, fake_radii = radii(real, neighbours), radii(fake, neighbours)
    in_real, recalled, covered = np.zeros(len(fake), np.int64), 0, 0
    for rows, squares in distance_strips(real, fake):
        radius = real_radii[rows, None]
        in_real += (squares < radius).sum(0)
        recalled += int((squares < fake_radii).any(1).sum())
        covered += int((squares.min(1, keepdims=True) < radius).sum())
    return {
        "precision": float((in_real > 0).mean()),
        "recall": recalled / len(real),
        "density": float(in_real.mean() / neighbours),
        "coverage": covered / len(real),
    }


def inception_score(
    probabilities: np.ndarray, splits: int = 10, seed: int = 0
) -> tuple[float, float]:
    """The exponential of the mean divergence of each image's classes [n,c] from those of all
    (arXiv 1606.03498): mean and standard deviation over parts, of images in random order, since
    samples come class after class."""
    found = []
    shuffled = np.random.default_rng(seed).permutation(probabilities.astype(np.float64))
    for part in np.array_split(shuffled, min(splits, len(shuffled))):
        logarithms = np.log(np.maximum(part, 1e-16)) - np.log(np.maximum(part.mean(0), 1e-16))
        found.append(np.exp((part * logarithms).sum(1).mean()))
    return float(np.mean(found)), float(np.std(found))


class FeatureStats:
    """What is kept of the features of `count` images, which come in parts: the moments of all of
    them, and at most `kept` of them, evenly spread, those of `rows` int [m]."""

    def __init__(self, count: int, kept: int):
        self.moments, self.rows = Moments(), evenly_spaced(count, kept)
        self._parts: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Takes in the features [n,d] of the next images. RunFailed where they are not finite."""
        rows = self.rows - self.moments.count
        self._parts.append(features[rows[(rows >= 0) & (rows < len(features))]])
        self.moments.add(features)

    @property
    def features(self) -> np.ndarray:
        """The features [m,d] of `rows`, as far as they have come."""
        return np.concatenate(self._parts)
