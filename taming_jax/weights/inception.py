"""The weights of the Fréchet inception distance, as pytorch-fid gives them out, as variables of
ours (pt_inception-2015-12-05-6726825d.pth, of github.com/mseitzer/pytorch-fid's releases)."""

from collections.abc import Iterable

from taming_jax.weights.layout import Layout, Path, parameter


def inception_layout(paths: Iterable[Path]) -> Layout:
    """Of `InceptionV3`'s `params` and `batch_stats` in a FIDInceptionV3."""
    return {path: parameter(".".join(path[1:-1]), path[-1]) for path in paths}
