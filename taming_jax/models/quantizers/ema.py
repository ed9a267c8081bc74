"""A quantizer whose codebook consists of moving averages."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.quantizers.interface import Training, mean_square
from taming_jax.models.quantizers.vq import CodebookQuantizer


class EMAQuantizer(CodebookQuantizer):
    """The nearest code, where each code is the moving average of the latents that use it (arXiv
    1711.00937, appendix A.1), instead of learned by gradients.

    The paper averages the number N of latents and their sum m, and sets e = m / N. Since m = N e at
    all times, the state holds only N, `usage`, and a codebook that comes from elsewhere always fits
    it. N starts at 1. A code that is not used keeps its value exactly.

    loss = commitment * |z - sg(e)|^2, averaged over the d dimensions.
    """

    def compute_loss(self, z: jax.Array, vectors: jax.Array) -> jax.Array:
        return self.options.commitment * mean_square(z, lax.stop_gradient(vectors))

    def collect_statistics(
        self, z: jax.Array, indices: jax.Array, training: Training
    ) -> dict[str, jax.Array]:
        sums = jnp.zeros((self.num_codes, self.code_dim)).at[indices].add(z)
        return super().collect_statistics(z, indices, training) | {"sums": sums}

    def init_state(self) -> dict[str, jax.Array]:
        return super().init_state() | {"usage": jnp.ones(self.num_codes)}

    def update(
        self, params: Any, state: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> tuple[Any, dict[str, jax.Array]]:
        decay, counts, codebook = self.options.decay, statistics["counts"], params["codebook"]
        usage = decay * state["usage"] + (1 - decay) * counts
        # (decay N e + (1 - decay) sums) / usage, written so that an unused code stays e exactly.
        change = (1 - decay) * (statistics["sums"] - counts[:, None] * codebook)
        codebook = codebook + change / jnp.maximum(usage, 1e-20)[:, None]
        averaged = params | {"codebook": codebook}
        params, state = super().update(averaged, state | {"usage": usage}, statistics)
        if self.options.restart_after is not None:
            restarted = (state["unused_steps"] == 0) & (counts == 0)
            state = state | {"usage": jnp.where(restarted, 1, state["usage"])}
        return params, state
