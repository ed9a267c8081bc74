"""Compares quantizers with those of the package vector-quantize-pytorch, where it has the method.

pip install torch vector-quantize-pytorch
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden
from tests.models.quantizers import reference
from tests.models.quantizers.reference import make_quantizer, make_training

pytestmark = pytest.mark.slow


@pytest.fixture
def torch():
    pytest.importorskip("vector_quantize_pytorch")
    import torch

    return torch


def compare(torch, quantizer, forward, params, **inputs):
    """Compares codes, loss and the gradient with respect to the latents. forward(x) applies the
    other quantizer to latents [6,12,d], and returns codes and loss. Returns our indices."""
    z, _, cotangent = reference.make_arrays(quantizer)
    x = torch.tensor(z.reshape(6, 12, -1), requires_grad=True)
    vectors, loss = forward(x)
    (loss + (vectors * torch.tensor(cotangent.reshape(6, 12, -1))).sum()).backward()

    def quantize(z, params):
        return quantizer.apply({"params": params}, z, inputs.get("training"))

    (codes, indices, losses), (gradient, _) = reference.differentiate(
        quantize, z, params, cotangent
    )
    for name, actual, expected in (
        ("codes", codes, vectors), ("loss", losses.mean(), loss), ("latents", gradient, x.grad)
    ):  # fmt: skip
        expected = expected.detach().numpy().reshape(actual.shape)
        difference = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-6)
        print(f"{type(quantizer).__name__} {name}: {difference:.1e}")
        golden.assert_close(actual, expected, name, 1e-5)
    return indices


def test_fsq(torch):
    from vector_quantize_pytorch import FSQ

    other = FSQ(levels=[8, 5, 4, 3])
    quantizer = make_quantizer("fsq", 480, levels=(8, 5, 4, 3))
    ours = compare(torch, quantizer, lambda x: (other(x)[0], x.sum() * 0), {})
    z = reference.make_arrays(quantizer)[0]
    np.testing.assert_array_equal(ours.reshape(6, 12), other(torch.tensor(z.reshape(6, 12, 4)))[1])


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq_and_bsq(torch, spherical):
    """For the sphere, the package takes the joint distribution of all bits in the second term of
    the penalty, which is left out here, and the mean in place of the sum in the commitment loss.
    Its first bit is the highest."""
    from vector_quantize_pytorch import LFQ

    diversity = 0.0 if spherical else 0.6
    other = LFQ(
        codebook_size=16, entropy_loss_weight=0.3, diversity_gamma=diversity, spherical=spherical,
        commitment_loss_weight=0.5,
    )  # fmt: skip
    quantizer = make_quantizer(
        "bsq" if spherical else "lfq", 16, commitment=0.125 if spherical else 0.5,
        entropy_weight=0.3, diversity_weight=diversity, entropy_temperature=2.0,
    )  # fmt: skip

    def forward(x):
        vectors, _, loss = other(x, inv_temperature=0.5)
        return vectors, loss

    ours = compare(torch, quantizer, forward, {}, training=make_training())
    z = reference.make_arrays(quantizer)[0]
    theirs = other(torch.tensor(z.reshape(6, 12, 4)))[1].numpy()
    reversed_bits = sum((ours.reshape(6, 12) >> i & 1) << (3 - i) for i in range(4))
    np.testing.assert_array_equal(reversed_bits, theirs)


@pytest.mark.parametrize("rotation", [False, True])
def test_simvq(torch, rotation):
    from vector_quantize_pytorch import SimVQ

    other = SimVQ(dim=5, codebook_size=16, rotation_trick=rotation)
    quantizer = make_quantizer("simvq", 16, 5, rotation_trick=rotation)
    params = {
        "codebook": other.frozen_codebook.numpy(),
        "kernel": other.code_transform.weight.detach().numpy().T,
    }

    def forward(x):
        vectors, _, loss = other(x)
        return vectors, loss

    compare(torch, quantizer, forward, params)


@pytest.mark.parametrize("rotation", [False, True])
def test_ema(torch, rotation):
    """Without Laplace smoothing (`eps`), which we leave out."""
    from vector_quantize_pytorch import VectorQuantize

    other = VectorQuantize(
        dim=5, codebook_size=16, decay=0.8, eps=0, commitment_weight=0.4, rotation_trick=rotation
    )
    quantizer = make_quantizer("ema", 16, 5, decay=0.8, commitment=0.4, rotation_trick=rotation)
    params = {"codebook": other.codebook.detach().numpy().copy()}

    def forward(x):
        vectors, _, loss = other(x)
        return vectors, loss.sum()

    indices = compare(torch, quantizer, forward, params)
    z = reference.make_arrays(quantizer)[0]
    statistics = quantizer.apply({"params": params}, z, make_training()).statistics
    counts = jnp.asarray(np.bincount(indices.ravel(), minlength=16), jnp.float32)
    updated, state = quantizer.update(
        params, quantizer.init_state(), statistics | {"counts": counts}
    )
    golden.assert_close(updated["codebook"], other.codebook.detach().numpy(), "codebook", 1e-5)
    golden.assert_close(state["usage"], other._codebook.cluster_size.numpy()[0], "N", 1e-5)
