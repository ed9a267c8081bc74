"""A reference implementation of a step of stage 1 in the style of the official code.

One backward pass per loss computes its gradient with respect to the last kernel of the decoder, and
another one computes the gradient of the total loss. Then the loss module runs again on the detached
reconstruction for the discriminator. With `lpips_twice`, it evaluates LPIPS again before that, like
the official loss module. As in PyTorch, the backward passes share their forward pass and nothing
else.

Unlike the official code, this step runs the generator only once, so that both networks use the same
reconstruction.
"""

import jax
import jax.numpy as jnp

from taming_jax import losses
from taming_jax.models.lpips import lpips

# Passed as an argument, so that the compiler does not know that the values are ones and cannot
# merge two passes that differ only in such a factor.
ONES = jnp.ones(6)


def compute_plain_gradients(
    networks, generator, discriminator, images, lpips_params, ones, lpips_twice=True
):
    """Returns the gradients of the generator and of the discriminator, and the metrics."""
    settings = networks.settings
    stats = discriminator.extra["batch_stats"]

    def discriminate(params, x):
        variables = {"params": params, "batch_stats": stats}
        return networks.discriminator.apply(variables, x, mutable=["batch_stats"])[0]

    def compute_losses(params):
        output = networks.generator.apply({"params": params}, images)
        difference = jnp.abs(images - output.images)
        nll = settings.l1_weight * difference.mean()
        perceptual = jnp.zeros(())
        if settings.perceptual_weight:
            perceptual = lpips(lpips_params, images, output.images, networks.dtype).mean()
            nll += settings.perceptual_weight * perceptual
        adversarial = -discriminate(discriminator.params, output.images).mean()
        codebook = output.quantized.loss.mean()
        return (nll, adversarial, codebook), (output.images, difference.mean() / 2, perceptual)

    (nll, adversarial, codebook), backward, (reconstruction, l1, perceptual) = jax.vjp(
        compute_losses, generator.params, has_aux=True
    )
    zero = jnp.zeros(())

    def compute_last_kernel_gradient(*seeds):
        return backward(seeds)[0]["decoder"]["conv_out"]["kernel"]

    weight = jnp.asarray(settings.discriminator_weight, jnp.float32)
    if settings.adaptive_weight:
        nll_gradient = compute_last_kernel_gradient(ones[0], zero, zero)
        adversarial_gradient = compute_last_kernel_gradient(zero, ones[1], zero)
        weight *= losses.adaptive_weight(
            nll_gradient, adversarial_gradient, settings.adaptive_weight_max
        )
    total = nll + weight * adversarial + settings.codebook_weight * codebook
    gradient = backward((ones[2], weight, settings.codebook_weight * ones[2]))[0]

    metrics = {}
    if settings.perceptual_weight and lpips_twice:
        second_lpips = lpips(
            lpips_params, ones[3] * images, ones[4] * reconstruction, networks.dtype
        )
        metrics["perceptual_again"] = second_lpips.mean()

    def discriminator_loss(params):
        real, fake = discriminate(params, images), discriminate(params, ones[5] * reconstruction)
        return losses.DISCRIMINATOR_LOSSES[settings.discriminator_loss](real, fake).mean()

    loss, discriminator_gradient = jax.value_and_grad(discriminator_loss)(discriminator.params)
    metrics |= {
        "l1": l1, "perceptual": perceptual, "reconstruction_loss": nll, "codebook": codebook,
        "loss": total,
        "adversarial": adversarial, "adaptive_weight": weight, "discriminator": loss,
    }  # fmt: skip
    return gradient, discriminator_gradient, metrics
