"""Distances between two sets of images, computed from their features with numpy in float64.

Features are [n,d], one row per image, and can come from any network.
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

ROWS = 1024  # rows of a distance matrix that are in memory at once


@dataclass
class Moments:
    """The count, mean [d] and covariance [d,d] of features that arrive in batches. The pairwise
    update of Chan, Golub and LeVeque needs constant memory, and loses less precision than sums of
    squares."""

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0
    """The sum of the outer products of the deviations from the mean."""

    def add(self, features: np.ndarray) -> None:
        """Adds features [n,d]. Raises RunFailed if they are not finite, since distances would be
        meaningless or fail."""
        if not len(features):
            return
        if not np.isfinite(features).all():
            raise RunFailed("the features of some images are not finite; check the images.")
        x = features.astype(np.float64)
        mean = x.mean(0)
        x -= mean
        total = self.count + len(x)
        delta = mean - self.mean
        weight = self.count * len(x) / total
        self.scatter = self.scatter + x.T @ x + weight * np.outer(delta, delta)
        self.mean = self.mean + delta * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, which requires at least two images."""
        return np.asarray(self.scatter) / (self.count - 1)


def compute_moments(features: np.ndarray) -> Moments:
    """Computes the moments of features [n,d]."""
    moments = Moments()
    moments.add(features)
    return moments


def save_moments(file: Path, moments: Moments) -> None:
    """Writes an .npz file with the usual `mu` [d] and `sigma` [d,d], and `count`. Raises OSError if
    it cannot be written."""
    content = io.BytesIO()
    np.savez(content, mu=moments.mean, sigma=moments.covariance, count=moments.count)
    atomic_write(file, content.getvalue())


def load_moments(file: Path, dimensions: int) -> Moments:
    """Reads an .npz file with `mu` and `sigma`: ours, pytorch-fid's, or ADM's. The count is 2 if
    the file has none; the distance does not depend on it.

    Raises UserError if the file is invalid or has another number of dimensions.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            mean = np.asarray(content["mu"], np.float64)
            covariance = np.asarray(content["sigma"], np.float64)
            count = int(content["count"]) if "count" in content else 2
        if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
            shapes = f"{mean.shape} and {covariance.shape}"
            raise ValueError(
                f"the shapes are {shapes}, but these features have {dimensions} dimensions"
            )
        if count < 2 or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"the values must be finite, and the count ({count}) at least 2")
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error) as error:
        raise UserError(
            f"{file} has no usable statistics ({error}); name an .npz file with mu and sigma."
        ) from error
    return Moments(count, mean, covariance * (count - 1))


def frechet_distance(left: Moments, right: Moments) -> float:
    """Computes the Fréchet distance between two normal distributions (arXiv 1706.08500):
    |m - n|^2 + tr(A + B - 2 (A B)^1/2).

    The trace of the root comes from the eigenvalues of the symmetric A^1/2 B A^1/2. This also works
    for a singular covariance (fewer images than dimensions), where a general matrix root fails or
    becomes complex.
    """
    values, vectors = np.linalg.eigh(left.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ right.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    delta = np.asarray(left.mean - right.mean)
    traces = np.trace(left.covariance) + np.trace(right.covariance)
    return float(max(delta @ delta + traces - 2 * cross, 0.0))


def kernel_distance(
    left: np.ndarray, right: np.ndarray, seed: int = 0, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """Computes the unbiased squared maximum mean discrepancy with the kernel (x y / d + 1)^3 (arXiv
    1801.01401). Returns its mean and standard deviation over random subsets of `size` images, or of
    the size of the smaller set if that is smaller."""
    rng = np.random.default_rng(seed)
    size = min(size, len(left), len(right))
    estimates = []
    for _ in range(subsets):
        x = left[rng.choice(len(left), size, replace=False)].astype(np.float64)
        y = right[rng.choice(len(right), size, replace=False)].astype(np.float64)

        def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a @ b.T / a.shape[1] + 1) ** 3

        xx, yy = kernel(x, x), kernel(y, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        estimates.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def iterate_distances(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the squared distances from the rows of `left` [n,d] to those of `right` [m,d], in
    strips of at most `ROWS` rows: a slice of `left`, and its distances float64 [rows,m]."""
    right = right.astype(np.float64)
    for start in range(0, len(left), ROWS):
        rows = slice(start, start + ROWS)
        x = left[rows].astype(np.float64)
        squares = np.square(x).sum(1)[:, None] + np.square(right).sum(1) - 2 * x @ right.T
        yield rows, np.maximum(squares, 0)


def find_nearest(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of the nearest row of `right` [m,d] for each row of `left` [n,d], and the
    squared distance to it: int and float64 [n]."""
    indices, squares = zip(
        *((strip.argmin(1), strip.min(1)) for _, strip in iterate_distances(left, right)),
        strict=True,
    )
    return np.concatenate(indices), np.concatenate(squares)


def compute_squared_radii(
    features: np.ndarray, neighbors: int, queries: np.ndarray | None = None
) -> np.ndarray:
    """Returns the squared distance from each row to its k-th nearest other row, where k is
    `neighbors`: float64 [n]. With `queries`, a subset of the rows, returns only theirs."""
    strips = iterate_distances(features if queries is None else queries, features)
    return np.concatenate([np.partition(strip, neighbors, 1)[:, neighbors] for _, strip in strips])


def compute_prdc(real: np.ndarray, fake: np.ndarray, neighbors: int = 5) -> dict[str, float]:
    """Computes precision and recall (arXiv 1904.06991), and density and coverage (arXiv 2002.09797)
    of fake features [m,d] relative to real ones [n,d].

    All four depend on which images of one set lie within balls around the images of the other,
    whose radius is the distance to the k-th nearest neighbor, where k is `neighbors`. Both sets
    must have more than k images. Only a strip of the distance matrix is in memory at once."""
    real_radii = compute_squared_radii(real, neighbors)
    fake_radii = compute_squared_radii(fake, neighbors)
    in_real, recalled, covered = np.zeros(len(fake), np.int64), 0, 0
    for rows, squares in iterate_distances(real, fake):
        radii = real_radii[rows, None]
        in_real += (squares < radii).sum(0)
        recalled += int((squares < fake_radii).any(1).sum())
        covered += int((squares.min(1, keepdims=True) < radii).sum())
    return {
        "precision": float((in_real > 0).mean()),
        "recall": recalled / len(real),
        "density": float(in_real.mean() / neighbors),
        "coverage": covered / len(real),
    }


def inception_score(
    probabilities: np.ndarray, splits: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Computes the Inception Score (arXiv 1606.03498) from class probabilities [n,c]: the
    exponential of the mean KL divergence of the images' class distributions from their mean.

    Returns its mean and standard deviation over splits of the images in random order, since samples
    are ordered by class.
    """
    scores = []
    shuffled = np.random.default_rng(seed).permutation(probabilities.astype(np.float64))
    for part in np.array_split(shuffled, min(splits, len(shuffled))):
        logarithms = np.log(np.maximum(part, 1e-16)) - np.log(np.maximum(part.mean(0), 1e-16))
        scores.append(np.exp((part * logarithms).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


class FeatureStats:
    """Statistics of the features of `count` images, which arrive in batches: the moments of all
    features, and the features of at most `kept` evenly spaced images, `rows` int [m]."""

    def __init__(self, count: int, kept: int):
        self.moments, self.rows = Moments(), evenly_spaced(count, kept)
        self._parts: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Adds the features [n,d] of the next images. Raises RunFailed if they are not finite."""
        rows = self.rows - self.moments.count
        self._parts.append(features[rows[(rows >= 0) & (rows < len(features))]])
        self.moments.add(features)

    @property
    def features(self) -> np.ndarray:
        """The features [m,d] of those `rows` that were added so far."""
        return np.concatenate(self._parts)
