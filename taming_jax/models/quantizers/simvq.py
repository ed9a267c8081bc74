"""A quantizer whose codebook is a learned linear map of fixed random vectors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.layers import kernel_init
from taming_jax.models.quantizers.vq import NearestQuantizer


class SimVQQuantizer(NearestQuantizer):
    """SimVQ (arXiv 2411.02038): the codes are C W, where C [k,d] is drawn once from a normal
    distribution of variance 1/d and never trained, and W [d,d] is learned. Each step moves all
    codes, used or not. The official code has a bias besides W; the paper has none.

    loss = |sg(z) - e|^2 + commitment * |z - sg(e)|^2, averaged over the d dimensions.
    """

    def setup(self) -> None:
        k, d = self.num_codes, self.code_dim
        self.codebook = self.param("codebook", nn.initializers.normal(d**-0.5), (k, d))
        self.kernel = self.param("kernel", kernel_init, (d, d))

    def get_codes(self) -> jax.Array:
        codebook = lax.stop_gradient(self.codebook)
        codes = jnp.matmul(codebook, self.kernel, precision=lax.Precision.HIGHEST)
        return self.normalize(codes)
