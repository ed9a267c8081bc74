"""Compares the distances with plain float64 implementations that follow the papers."""

import numpy as np
import pytest
from scipy import linalg

from taming_jax.errors import UserError
from taming_jax.metrics import distances
from taming_jax.metrics.distances import compute_moments

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(20, 20)) / 5
REAL = (RNG.normal(size=(300, 20)) @ MIXING).astype(np.float32)
FAKE = (RNG.normal(size=(400, 20)) @ MIXING * 1.2 + 0.5).astype(np.float32)


def test_moments_added_in_parts_equal_those_of_all_rows():
    moments = distances.Moments()
    for part in np.array_split(REAL + 1000, [7, 8, 100]):
        moments.add(part)
    moments.add(REAL[:0])
    np.testing.assert_allclose(moments.mean, (REAL + 1000).astype(float).mean(0), rtol=1e-12)
    expected = np.cov((REAL + 1000).astype(float), rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-10)
    assert moments.count == 300


def test_the_frechet_distance_equals_the_formula_with_a_matrix_root():
    left, right = compute_moments(REAL), compute_moments(FAKE)
    root = linalg.sqrtm(left.covariance @ right.covariance).real
    difference = left.mean - right.mean
    expected = difference @ difference + np.trace(left.covariance + right.covariance - 2 * root)
    assert distances.frechet_distance(left, right) == pytest.approx(expected, rel=1e-8)
    assert distances.frechet_distance(right, left) == pytest.approx(expected, rel=1e-8)
    assert distances.frechet_distance(left, left) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_singular_covariances_equals_its_closed_form():
    """Covariances of fewer images than dimensions are singular. If they share their axes, the
    distance has a closed form."""
    deviations, other_deviations = np.zeros(50), np.zeros(50)
    deviations[:3], other_deviations[2:6] = [1, 2, 3], [5, 1, 2, 1]
    basis = linalg.qr(RNG.normal(size=(50, 50)))[0]

    def make_moments(deviations, mean):
        covariance = basis @ np.diag(np.square(deviations)) @ basis.T
        return distances.Moments(2, np.full(50, mean), covariance)

    expected = np.square(deviations - other_deviations).sum() + 50 * 0.25
    distance = distances.frechet_distance(
        make_moments(deviations, 0.0), make_moments(other_deviations, 0.5)
    )
    assert distance == pytest.approx(expected, rel=1e-6)


def test_the_kernel_distance_is_the_unbiased_estimate():
    x, y = REAL.astype(float), FAKE[:300].astype(float)

    def kernel(a, b):
        return (a @ b / 20 + 1) ** 3

    n = len(x)
    within = [kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j]
    expected = sum(within) / (n * (n - 1)) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    mean, deviation = distances.kernel_distance(REAL, FAKE[:300], subsets=3)
    assert mean == pytest.approx(expected, rel=1e-9) and deviation < 1e-9 * abs(mean)
    halves = distances.kernel_distance(REAL[:150], REAL[150:], subsets=50, size=100)
    assert abs(halves[0]) < mean / 10, "the distance between halves of the same data is near zero"


def test_precision_recall_density_and_coverage_equal_those_of_all_pairs(monkeypatch):
    real, fake = REAL[:60, :4], FAKE[:80, :4]
    monkeypatch.setattr(distances, "ROWS", 17)

    def compute_distances(a, b):
        return np.linalg.norm(a[:, None].astype(float) - b, axis=-1)

    k = 5
    real_radii = np.sort(compute_distances(real, real), 1)[:, k]
    fake_radii = np.sort(compute_distances(fake, fake), 1)[:, k]
    inside = compute_distances(real, fake) < real_radii[:, None]
    expected = {
        "precision": inside.any(0).mean(),
        "recall": (compute_distances(real, fake) < fake_radii).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": (compute_distances(real, fake).min(1) < real_radii).mean(),
    }
    assert distances.compute_prdc(real, fake, k) == pytest.approx(expected)
    assert all(0 < value < 1 for value in expected.values())
    indices, squared_distances = distances.find_nearest(fake, real)
    np.testing.assert_array_equal(indices, compute_distances(fake, real).argmin(1))
    np.testing.assert_allclose(
        np.sqrt(squared_distances), compute_distances(fake, real).min(1), rtol=1e-6
    )


def test_the_inception_score_equals_its_definition():
    certain = np.eye(10).repeat(5, 0)
    assert distances.inception_score(certain, 1)[0] == pytest.approx(10)
    assert distances.inception_score(np.full((50, 10), 0.1), 5)[0] == pytest.approx(1)
    # The order of the samples, here class by class, must not matter.
    rows = np.eye(10).repeat(50, 0) * 0.8 + 0.02
    assert distances.inception_score(rows)[0] == pytest.approx(
        distances.inception_score(np.random.default_rng(5).permutation(rows))[0], rel=0.05
    )
    assert np.isfinite(distances.inception_score(rows[:3])).all()
    p = RNG.dirichlet(np.ones(4), 20)
    divergences = (p * np.log(p / p.mean(0))).sum(1)
    assert distances.inception_score(p, 1)[0] == pytest.approx(np.exp(divergences.mean()))


def test_statistics_can_be_saved_and_loaded(tmp_path):
    distances.save_moments(tmp_path / "real.npz", compute_moments(REAL))
    moments = distances.load_moments(tmp_path / "real.npz", 20)
    assert moments.count == 300
    assert distances.frechet_distance(moments, compute_moments(REAL)) == pytest.approx(0, abs=1e-6)
    # Published statistics contain only mu and sigma.
    np.savez(tmp_path / "published.npz", mu=moments.mean, sigma=moments.covariance)
    published_moments = distances.load_moments(tmp_path / "published.npz", 20)
    np.testing.assert_allclose(published_moments.covariance, moments.covariance)


def test_unusable_statistics_are_refused(tmp_path):
    distances.save_moments(tmp_path / "real.npz", compute_moments(REAL))
    (tmp_path / "text.npz").write_text("no statistics")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "real.npz").read_bytes()[:-40])
    np.save(tmp_path / "array.npy", np.zeros(512))
    mu, sigma = np.full(512, np.nan), np.eye(512)
    np.savez(tmp_path / "nan.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "one.npz", mu=np.zeros(512), sigma=sigma, count=1)
    for name, message in {
        "real.npz": r"shapes are \(20,\) and \(20, 20\), but these features have 512",
        "text.npz": "has no usable statistics",
        "other.npz": "an .npz file with mu and sigma",
        "none.npz": "there is no file",
        "cut.npz": "has no usable statistics",
        "array.npy": "has no usable statistics",
        "nan.npz": "must be finite",
        "one.npz": r"the count \(1\) at least 2",
    }.items():
        with pytest.raises(UserError, match=message):
            distances.load_moments(tmp_path / name, 512)
