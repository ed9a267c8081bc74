"""One step of stage 1 written the way of the papers' code, to compare ours with.

The gradient of each loss at the decoder's last kernel is taken by a backward pass of its own, then
the gradient of the losses' sum by another. Then it is the discriminator's turn: the loss module is
called anew on the reconstruction, detached, where the official one evaluates LPIPS again before it
comes to the discriminator (`lpips_twice`). As in PyTorch, a forward pass is kept for its backward
passes, and nothing else is shared.

Unlike both projects it runs the generator only once, so that it sees the same reconstruction.
"""

import jax
import jax.numpy as jnp

from taming_jax import losses
from taming_jax.models.lpips import lpips

# Passed as an argument: the compiler does not know that these are ones, so it cannot see that two
# passes, one times this and one times that, are the same and leave one of them out.
ONES = jnp.ones(6)


def plain_gradients(
    networks, generator, discriminator, images, lpips_params, ones, lpips_twice=True
):
    """Gradients of the generator's and of the discriminator's loss, the losses and the weight."""
    settings = networks.settings
    stats = discriminator.extra["batch_stats"]

    def logits_of(params, x):
        variables = {"params": params, "batch_stats": stats}
        return networks.discriminator.apply(variables, x, mutable=["batch_stats"])[0]

    def terms(params):
        output = networks.generator.apply({"params": params}, images)
        difference = jnp.abs(images - output.images)
        nll = settings.l1_weight * difference.mean()
        perceptual = jnp.zeros(())
        if settings.perceptual_weight:
            perceptual = lpips(lpips_params, images, output.images, networks.dtype).mean()
            nll += settings.perceptual_weight * perceptual
        adversarial = -logits_of(discriminator.params, output.images).mean()
        codebook = output.quantized.loss.mean()
        return (nll, adversarial, codebook), (output.images, difference.mean() / 2, perceptual)

    (nll, adversarial, codebook), backward, (reconstruction, l1, perceptual) = jax.vjp(
        terms, generator.params, has_aux=True
    )
    none = jnp.zeros(())

    def at_last_kernel(*seeds):
        return backward(seeds)[0]["decoder"]["conv_out"]["kernel"]

    weight = jnp.asarray(settings.discriminator_weight, jnp.float32)
    if settings.adaptive_weight:
        of_nll = at_last_kernel(ones[0], none, none)
        of_adversarial = at_last_kernel(none, ones[1], none)
        weight *= losses.adaptive_weight(of_nll, of_adversarial, settings.adaptive_weight_max)
    total = nll + weight * adversarial + settings.codebook_weight * codebook
    gradient = backward((ones[2], weight, settings.codebook_weight * ones[2]))[0]

    found = {}
    if settings.perceptual_weight and lpips_twice:
        again = lpips(lpips_params, ones[3] * images, ones[4] * reconstruction, networks.dtype)
        found["perceptual_again"] = again.mean()

    def discriminator_loss(params):
        real, fake = logits_of(params, images), logits_of(params, ones[5] * reconstruction)
        return losses.DISCRIMINATOR_LOSSES[settings.discriminator_loss](real, fake).mean()

    loss, discriminator_gradient = jax.value_and_grad(discriminator_loss)(discriminator.params)
    found |= {
        "l1": l1, "perceptual": perceptual, "reconstruction_loss": nll, "codebook": codebook,
        "loss": total,
        "adversarial": adversarial, "adaptive_weight": weight, "discriminator": loss,
    }  # fmt: skip
    return gradient, discriminator_gradient, found
