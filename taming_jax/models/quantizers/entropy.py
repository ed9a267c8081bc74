"""The entropy penalty: E[H(p)] - w * H(E[p]) for the distribution p over the codes at a position.

A small first term makes each choice certain, and a large second term makes all codes used
(MAGVIT-v2, arXiv 2310.05737, section 3.1). The expectations are over all latents of the global
batch, or of a micro-batch on all devices.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.config.quantizers import EntropyConfig
from taming_jax.errors import UserError
from taming_jax.parallel.devices import maybe_pmean

# The largest array of probabilities, of one number per latent and code.
MAX_BYTES = 4 * 2**30
TINY = 1e-20  # keeps logarithms and their gradients finite


def compute_entropy(p: jax.Array) -> jax.Array:
    """Returns the entropy in nats of distributions [...,k]."""
    return -(p * jnp.log(p + TINY)).sum(-1)


def categorical_penalty(
    scores: jax.Array, name: str, settings: EntropyConfig, axis_name: str | None
) -> jax.Array:
    """Returns the penalty at each position, float32 [b,h,w], for p = softmax(scores / temperature)
    with scores [b,h,w,k]. `name` is the quantizer's.

    Raises UserError if the probabilities would take more than `MAX_BYTES` of memory.
    """
    size = 4 * math.prod(scores.shape)
    if size > MAX_BYTES:
        latents, codes = math.prod(scores.shape[:-1]), scores.shape[-1]
        raise UserError(
            f"the entropy penalty of the quantizer {name} needs {size / 2**30:.1f} GiB for each "
            f"array of {latents} latents times {codes} codes on a device; at most "
            f"{MAX_BYTES // 2**30} GiB are allowed. Use a smaller codebook or batch, more "
            f"--vqgan.micro-batches, or --vqgan.{name}.entropy-weight 0."
        )
    logits = jax.nn.log_softmax(scores / settings.entropy_temperature)
    p = jnp.exp(logits)
    each = -(p * logits).sum(-1)
    mean = maybe_pmean(p.mean((0, 1, 2)), axis_name)
    return settings.entropy_weight * (each - settings.diversity_weight * compute_entropy(mean))


def binary_penalty(
    logits: jax.Array, group_bits: int, settings: EntropyConfig, axis_name: str | None
) -> jax.Array:
    """Returns the penalty at each position, float32 [b,h,w], for independent bits that are 1 with
    probability sigmoid(logits / temperature), logits [b,h,w,bits].

    E[H(p)] is exact. H(E[p]) is computed for groups of at most `group_bits` bits, and summed: an
    upper bound, and exact for a single group. Each half of a group has a table of probabilities
    [n,2^(group_bits/2)], so memory does not grow with latents times codes: the mean distribution of
    the group is the product of the two tables.
    """
    logits = logits / settings.entropy_temperature
    p = jax.nn.sigmoid(logits)
    each = (jax.nn.softplus(logits) - p * logits).sum(-1)
    p = p.reshape(-1, p.shape[-1])
    total = jnp.zeros(())
    for start in range(0, p.shape[-1], group_bits):
        group = p[:, start : start + group_bits]
        half = group.shape[-1] // 2
        left, right = tabulate(group[:, :half]), tabulate(group[:, half:])
        joint = jnp.matmul(left.T, right, precision=lax.Precision.HIGHEST) / len(p)
        total += compute_entropy(maybe_pmean(joint, axis_name).ravel())
    return settings.entropy_weight * (each - settings.diversity_weight * total)


def tabulate(p: jax.Array) -> jax.Array:
    """Returns the probabilities [n,2^m] of all values of m independent bits, [n,m]."""
    table = jnp.ones((len(p), 1))
    for bit in p.T:
        table = jnp.concatenate([table * (1 - bit)[:, None], table * bit[:, None]], -1)
    return table
