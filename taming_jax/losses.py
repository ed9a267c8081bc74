"""The losses of both stages, as pure functions of arrays.

Most return one value per example, float32 [b]: a training step averages them, and an evaluation
ignores the examples that pad its last batch.
"""

import jax
import jax.numpy as jnp


def per_example(values: jax.Array) -> jax.Array:
    """Averages over all axes except the first."""
    return values.reshape(len(values), -1).mean(-1)


def l1(images: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Returns the mean absolute difference [b] between images and reconstruction [b,h,w,c]."""
    return per_example(jnp.abs(images - reconstruction))


def generator_adversarial(fake: jax.Array) -> jax.Array:
    """Returns the generator's adversarial loss [b] from the logits [b,h,w,1] of its images. It is
    the same for both discriminator losses, as in the official code."""
    return -per_example(fake)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Returns the discriminator's hinge loss [b] (arXiv 1705.02894) for logits [b,h,w,1]."""
    return 0.5 * (per_example(jax.nn.relu(1 - real)) + per_example(jax.nn.relu(1 + fake)))


def vanilla(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Returns the discriminator's cross-entropy [b] (arXiv 1406.2661) for logits [b,h,w,1]."""
    return 0.5 * (per_example(jax.nn.softplus(-real)) + per_example(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}


def lecam(
    real: jax.Array, fake: jax.Array, real_average: jax.Array, fake_average: jax.Array
) -> jax.Array:
    """Returns the LeCam regularization [b] (arXiv 2104.03310, equation 4), with ReLU as in its
    official code. It keeps the logits [b,h,w,1] of real images close to the moving average [] of
    the logits of fake images, and vice versa."""
    real_excess = jnp.square(jax.nn.relu(real - fake_average))
    fake_excess = jnp.square(jax.nn.relu(real_average - fake))
    return per_example(real_excess) + per_example(fake_excess)


def adaptive_weight(
    reconstruction_gradient: jax.Array, adversarial_gradient: jax.Array, largest: float = 1e4
) -> jax.Array:
    """Returns the adaptive weight lambda [] of arXiv 2012.09841, equation 7: the ratio of the norms
    of the two gradients at the decoder's last kernel, clipped to [0, largest]. delta is 1e-4, as in
    the official code."""
    ratio = jnp.linalg.norm(reconstruction_gradient.ravel()) / (
        jnp.linalg.norm(adversarial_gradient.ravel()) + 1e-4
    )
    return jnp.clip(ratio, 0.0, largest)


def perplexity(counts: jax.Array) -> jax.Array:
    """Returns the perplexity [] of the codes from their counts [k]: the exponential of the entropy
    of their distribution. It is k if all codes are used equally often, and 1 if only one is used.
    """
    shares = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(
        -jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0).sum()
    )


def cross_entropy(logits: jax.Array, codes: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Returns the cross-entropy [b,t], in nats, of codes int [b,t] under logits float32 [b,t,k].
    Label smoothing mixes this share of a uniform distribution into the targets."""
    log_probs = jax.nn.log_softmax(logits)
    # A sum over a mask instead of an indexed lookup, whose gradient would be a scatter.
    is_code = jnp.arange(logits.shape[-1]) == codes[..., None]
    loss = -jnp.where(is_code, log_probs, 0).sum(-1)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(-1)


def next_token(logits: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the mean negative log-likelihood [b], in nats per code, of codes int [b,t] under
    logits float32 [b,t,k]."""
    return per_example(cross_entropy(logits, codes))
