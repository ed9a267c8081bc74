"""The random-order prior, RAR (arXiv 2411.00776): an autoregressive transformer that is trained on
random orders of the codes at first, and on the raster order in the end.

Since a code can follow any others, each input also carries the place of the code to predict.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from taming_jax.errors import UserError
from taming_jax.losses import next_token
from taming_jax.priors.autoregressive import GPT, scan_positions
from taming_jax.priors.decoding import Inputs, TokenSampler
from taming_jax.priors.transformer import init


class RandomOrderGPT(GPT):
    """A GPT whose codes may come in any order.

    `order` int [b,t] holds the places of the codes in the grid, in the order in which they are
    predicted: the inputs are the class and all codes but the last, and the logits are those of the
    codes, in this order. None is the raster order.
    """

    @property
    def num_positions(self) -> int:
        """The number of learned positions, for the class and the codes."""
        return self.length + 1

    def setup(self) -> None:
        super().setup()
        self.target_embedding = self.param("targets", init, (self.length, self.settings.width))

    def embed(
        self, tokens: jax.Array, position: jax.Array | int, order: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Like `GPT.embed`, for positions in the order."""
        targets = jnp.arange(self.length)[None] if order is None else order
        # The class has place 0, and the codes have those from 1 on.
        places = jnp.pad(targets + 1, ((0, 0), (1, 0)))
        places, targets = (
            lax.dynamic_slice_in_dim(x, position, tokens.shape[1], 1) for x in (places, targets)
        )
        x = self.embedding[tokens] + self.target_embedding[targets]
        if self.settings.positions != "learned":
            return x, self.locate(places)
        return x + self.position_embedding[places], None

    @nn.nowrap
    def loss(
        self,
        params: Any,
        labels: jax.Array,
        codes: jax.Array,
        keys: Mapping[str, jax.Array],
        progress: jax.Array | float,
    ) -> jax.Array:
        """Returns the cross-entropy of the codes, float32 [b], for codes int [b,t]. A share of the
        examples that depends on `progress` has a random order, the others have the raster order.
        `keys` maps "dropout" and "codes" (for the orders) to one key per example [b]."""
        share, length = self.compute_share(progress), codes.shape[1]

        def draw_order(key: jax.Array) -> jax.Array:
            # `corrupt_inputs` splits the same key, which is like folding in 0 and 1.
            share_key, order_key = jax.random.split(jax.random.fold_in(key, 2))
            is_random = jax.random.bernoulli(share_key, share)
            order = jax.random.permutation(order_key, length)
            return jnp.where(is_random, order, jnp.arange(length))

        order = jax.vmap(draw_order)(keys["codes"])
        targets = jnp.take_along_axis(codes, order, 1)
        tokens = self.shift_right(labels, self.corrupt_inputs(targets, keys))
        return next_token(self.train_logits(params, tokens, keys["dropout"], order), targets)

    @nn.nowrap
    def compute_share(self, progress: jax.Array | float) -> jax.Array:
        """Returns the share of examples in random order, [], when the fraction `progress` of the
        run is over."""
        settings = self.settings.random_order
        duration = max(settings.anneal_end - settings.anneal_start, 1e-9)
        remaining = jnp.clip((settings.anneal_end - progress) / duration, 0, 1)
        return settings.final_share + (1 - settings.final_share) * remaining

    @property
    def completion_limits(self) -> str:
        """A sentence on the known codes that `sample` does not take; see `check_drawing`."""
        if self.settings.random_order.final_share:
            return ""
        return (
            "This prior was trained without --prior.random-order.final-share, so it can keep only "
            "codes that come before all others, from left to right and from top to bottom."
        )

    @nn.nowrap
    def check_drawing(self, grid: tuple[int, int], known: Any) -> None:
        """Raises UserError for known codes that follow unknown ones in raster order, if the prior
        knows only the raster order at the end of the training, or if the grid is too large."""
        is_known = np.asarray(known) >= 0
        if (is_known[:, :-1] >= is_known[:, 1:]).all():
            return
        if not self.settings.random_order.final_share:
            raise UserError(
                "codes are kept after codes to draw, which needs a random-order prior trained with "
                "--prior.random-order.final-share above 0. Keep rows from the top only, or use a "
                "masked prior."
            )
        if grid != self.grid:
            raise UserError(
                f"codes are kept after codes to draw, which works only for images of the training "
                f"size, a grid of {self.grid} codes, not {grid}. Keep rows from the top only."
            )

    @nn.nowrap
    def sample_window(
        self,
        params: Any,
        labels: jax.Array,
        choose: TokenSampler,
        inputs: Inputs,
        pieces: int | None,
    ) -> jax.Array:
        """Samples the codes int32 [b,t] of a grid of the training size: first the known codes, then
        the others, both in raster order."""
        positions, scales, known = inputs[0], inputs[1], inputs[2].T
        order = jnp.argsort(known < 0, 1, stable=True)
        inputs = positions, scales, jnp.take_along_axis(known, order, 1).T
        copies = 1 if scales is None else 2  # one for the unconditional pass
        codes = scan_positions(
            self, params, labels, choose, inputs, pieces, jnp.tile(order, (copies, 1))
        )
        return jnp.take_along_axis(codes, jnp.argsort(order, 1), 1)
