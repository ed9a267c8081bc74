"""The losses of both stages, as pure functions of arrays.

Each returns one number an example, float32 [b], so that a step averages them and an evaluation
can leave out the examples that only fill its last batch.
"""

import jax
import jax.numpy as jnp


def per_example(values: jax.Array) -> jax.Array:
    """The mean over all axes but the first."""
    return values.reshape(len(values), -1).mean(-1)


def l1(images: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Absolute difference of images [b,h,w,c]: [b]."""
    return per_example(jnp.abs(images - reconstruction))


def generator_adversarial(fake: jax.Array) -> jax.Array:
    """The generator's loss [b] from the discriminator's logits [b,h,w,1] on its images, for either
    kind of discriminator loss, as in the official code."""
    return -per_example(fake)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's hinge loss (arXiv 1705.02894) of logits [b,h,w,1]: [b]."""
    return 0.5 * (per_example(jax.nn.relu(1 - real)) + per_example(jax.nn.relu(1 + fake)))


def vanilla(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's cross-entropy (arXiv 1406.2661) of logits [b,h,w,1]: [b]."""
    return 0.5 * (per_example(jax.nn.softplus(-real)) + per_example(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}


def lecam(
    real: jax.Array, fake: jax.Array, real_average: jax.Array, fake_average: jax.Array
) -> jax.Array:
    """LeCAM regularisation (arXiv 2104.03310, equation 4) with relu as in its public code: logits
    [b,h,w,1] are held near the moving average [] of the other kind's. Answers [b]."""
    up = jnp.square(jax.nn.relu(real - fake_average))
    down = jnp.square(jax.nn.relu(real_average - fake))
    return per_example(up) + per_example(down)


def adaptive_weight(
    reconstruction_gradient: jax.Array, adversarial_gradient: jax.Array, largest: float = 1e4
) -> jax.Array:
    """lambda of arXiv 2012.09841, equation 7: the ratio of the norms of two gradients at the
    decoder's last kernel, within [0, largest]. delta is the official code's 1e-4."""
    ratio = jnp.linalg.norm(reconstruction_gradient.ravel()) / (
        jnp.linalg.norm(adversarial_gradient.ravel()) + 1e-4
    )
    return jnp.clip(ratio, 0.0, largest)


def perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of how often each code was used, from counts [k]: k when all are used
    alike, 1 when only one is."""
    shares = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(
        -jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0).sum()
    )


def next_token(logits: jax.Array, codes: jax.Array) -> jax.Array:
    """Negative log-likelihood of codes int [b,t] under logits float32 [b,t,k], in nats a code."""
    likely = jax.nn.log_softmax(logits)
    return -per_example(jnp.take_along_axis(likely, codes[..., None], -1))
