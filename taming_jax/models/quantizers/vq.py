"""The quantizer of VQ-VAE, and the base class of quantizers that choose the nearest code."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.quantizers.entropy import categorical_penalty
from taming_jax.models.quantizers.interface import (
    Quantized,
    Quantizer,
    Training,
    draw_latents,
    l2_normalize,
    mean_square,
    rotate,
    straight_through,
)


def score_codes(z: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns 2 z e - |e|^2 for latents z [b,h,w,d] and codes e [k,d], as [b,h,w,k]: the larger,
    the nearer. |z|^2 is omitted from -|z - e|^2 because it is the same for every code."""
    # A product in TF32 could choose another code if two codes are almost equally near.
    products = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
    return 2 * products - jnp.square(codes).sum(-1)


class NearestQuantizer(Quantizer):
    """The base class of quantizers that choose the nearest code, in float32. A subclass defines
    `get_codes`."""

    def get_codes(self) -> jax.Array:
        """Returns the codes float32 [k,d]."""
        raise NotImplementedError

    def compute_loss(self, z: jax.Array, vectors: jax.Array) -> jax.Array:
        """Returns |sg(z) - e|^2 + commitment * |z - sg(e)|^2, averaged over the d dimensions."""
        codebook_loss = mean_square(vectors, lax.stop_gradient(z))
        return codebook_loss + self.options.commitment * mean_square(z, lax.stop_gradient(vectors))

    def normalize(self, x: jax.Array) -> jax.Array:
        """Scales vectors [...,d] to unit length if the settings say so."""
        return l2_normalize(x) if self.options.l2_normalise else x

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        z, codes = self.normalize(z.astype(jnp.float32)), self.get_codes()
        scores = score_codes(z, codes)
        indices = jnp.argmax(scores, -1).astype(jnp.int32)
        vectors, statistics = codes[indices], None
        loss = self.compute_loss(z, vectors)
        if training is not None:
            loss += self.compute_penalty(scores)
            statistics = self.collect_statistics(z, indices, training)
        estimate = rotate if self.options.rotation_trick else straight_through
        return Quantized(estimate(z, vectors), indices, loss, statistics)

    def compute_penalty(self, scores: jax.Array) -> jax.Array | float:
        """Returns the part of the loss [b,h,w] that applies only in training."""
        return 0.0

    def collect_statistics(
        self, z: jax.Array, indices: jax.Array, training: Training
    ) -> dict[str, jax.Array]:
        """Returns the sums that `update` requires."""
        return {}

    def lookup(self, indices: jax.Array) -> jax.Array:
        return self.get_codes()[indices]


class CodebookQuantizer(NearestQuantizer):
    """The base class of quantizers with a codebook whose unused codes can be restarted. With
    `restart_after`, the state counts for how many steps in a row each code has been unused. A
    restart does not reset the optimizer's moments of the code."""

    def setup(self) -> None:
        k, d = self.num_codes, self.code_dim
        # The directions of normally distributed codes are uniformly distributed. Without
        # normalization, the codes start small, as in the official code.
        init = nn.initializers.normal(1.0) if self.options.l2_normalise else uniform(1 / k)
        self.codebook = self.param("codebook", init, (k, d))

    def get_codes(self) -> jax.Array:
        return self.normalize(self.codebook)

    def collect_statistics(
        self, z: jax.Array, indices: jax.Array, training: Training
    ) -> dict[str, jax.Array]:
        if self.options.restart_after is None:
            return {}
        latents = draw_latents(z, training, self.num_codes, self.settings.batch_size)
        return {"candidates": latents}

    def init_state(self) -> dict[str, jax.Array]:
        if self.options.restart_after is None:
            return {}
        return {"unused_steps": jnp.zeros(self.num_codes, jnp.int32)}

    def update(
        self, params: Any, state: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> tuple[Any, dict[str, jax.Array]]:
        if self.options.restart_after is None:
            return params, state
        unused_steps = jnp.where(statistics["counts"] > 0, 0, state["unused_steps"] + 1)
        restarts = unused_steps >= self.options.restart_after
        codebook = jnp.where(restarts[:, None], statistics["candidates"], params["codebook"])
        unused_steps = jnp.where(restarts, 0, unused_steps)
        return params | {"codebook": codebook}, state | {"unused_steps": unused_steps}


class VectorQuantizer(CodebookQuantizer):
    """The quantizer of VQ-VAE (arXiv 1711.00937, equation 3).

    `legacy_commitment` puts the commitment weight on the codebook loss, as the official code does
    by default. `l2_normalise` first scales the latents and the codes to unit length (arXiv
    2110.04627, section 3.2)."""

    def compute_loss(self, z: jax.Array, vectors: jax.Array) -> jax.Array:
        if not self.options.legacy_commitment:
            return super().compute_loss(z, vectors)
        codebook_loss = mean_square(vectors, lax.stop_gradient(z))
        return mean_square(z, lax.stop_gradient(vectors)) + self.options.commitment * codebook_loss

    def compute_penalty(self, scores: jax.Array) -> jax.Array | float:
        if not self.options.entropy_weight:
            return 0.0
        return categorical_penalty(scores, "vq", self.options, self.axis_name)


def uniform(bound: float) -> nn.initializers.Initializer:
    """Returns an initializer that draws uniformly from [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
