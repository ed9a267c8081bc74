"""The step of stage 1 written plainly in PyTorch, as a comparison.

The networks, losses and optimizers have the sizes of the preset. As in the official code, the
adaptive weight takes two partial backward passes, one per loss, before the full one. The image
augmentations of the preset are left out.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch
from torch import nn
from torch.nn import functional

from taming_jax.cli.report.timing import (
    Entry,
    Job,
    make_random_images,
    require_gpu,
    time_calls,
)
from taming_jax.config.schema import Config, VQGANConfig
from taming_jax.models.lpips import GROUPS, SCALE, SHIFT
from taming_jax.training.vqgan_step import VQGANObjective


def conv(inputs: int, features: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, features, size, padding=size // 2)


def group_norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv(inputs, features)
        self.norm2, self.conv2 = group_norm(features), conv(features, features)
        self.shortcut = nn.Identity() if inputs == features else conv(inputs, features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.proj_out = group_norm(channels), conv(channels, channels, 1)
        self.q, self.k, self.v = (conv(channels, channels, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        # [b,c,h,w] to [b,1,h*w,c]
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


def middle(channels: int) -> list[nn.Module]:
    return [
        ResidualBlock(channels, channels), AttentionBlock(channels),
        ResidualBlock(channels, channels),
    ]  # fmt: skip


def level(settings: VQGANConfig, inputs: int, features: int, blocks: int, size: int) -> list[Any]:
    """Returns the blocks of a level, with attention if the level has the right height."""
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers.append(ResidualBlock(features if block else inputs, features))
        if size in settings.attention_resolutions:
            layers.append(AttentionBlock(features))
    return layers


def build_encoder(config: Config) -> nn.Sequential:
    settings, channels = config.vqgan, config.vqgan.channels
    layers: list[nn.Module] = [conv(config.data.channels, channels)]
    for i, (size, factor) in enumerate(
        zip(config.level_resolutions, settings.multipliers, strict=True)
    ):
        features = settings.channels * factor
        layers += level(settings, channels, features, settings.blocks, size)
        channels = features
        if i < len(settings.multipliers) - 1:
            layers.append(Downsample(channels))
    layers += [*middle(channels), group_norm(channels), nn.SiLU()]
    latent = settings.latent_channels
    return nn.Sequential(*layers, conv(channels, latent), conv(latent, settings.code_dim, 1))


def build_decoder(config: Config) -> tuple[nn.Sequential, nn.Conv2d]:
    """Returns the decoder without its last convolution, and that convolution."""
    settings, sizes = config.vqgan, config.level_resolutions
    channels = settings.channels * settings.multipliers[-1]
    latent = settings.latent_channels
    layers = [conv(settings.code_dim, latent, 1), conv(latent, channels), *middle(channels)]
    for i in reversed(range(len(sizes))):
        features = settings.channels * settings.multipliers[i]
        blocks = settings.decoder_blocks or settings.blocks + 1
        layers += level(settings, channels, features, blocks, sizes[i])
        channels = features
        if i:
            layers += [nn.Upsample(scale_factor=2), conv(channels, channels)]
    body = nn.Sequential(*layers, group_norm(channels), nn.SiLU())
    return body, conv(channels, config.data.channels)


class Generator(nn.Module):
    """The encoder, the quantizer, and the decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.settings = config.vqgan
        self.encoder = build_encoder(config)
        self.codebook = nn.Parameter(
            torch.randn(self.settings.codebook_size, self.settings.code_dim)
        )
        self.decoder, self.conv_out = build_decoder(config)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the reconstruction and the codebook loss."""
        vectors, loss = self.quantize(self.encoder(images).float())
        return self.conv_out(self.decoder(vectors)).float(), loss

    def quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, codes = z.permute(0, 2, 3, 1), self.codebook
        if self.settings.vq.l2_normalise:
            z, codes = functional.normalize(z, dim=-1), functional.normalize(codes, dim=-1)
        with torch.autocast(z.device.type, enabled=False):
            distances = codes.square().sum(-1) - 2 * z @ codes.T
        vectors = functional.embedding(distances.argmin(-1), codes)
        loss = (vectors - z.detach()).square().mean()
        loss = loss + self.settings.vq.commitment * (vectors.detach() - z).square().mean()
        return (z + (vectors - z).detach()).permute(0, 3, 1, 2), loss


def build_discriminator(config: Config) -> nn.Sequential:
    settings, inputs = config.vqgan, config.data.channels
    features = settings.discriminator_filters
    layers: list[nn.Module] = [nn.Conv2d(inputs, features, 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(1, settings.discriminator_layers + 1):
        inputs, features = features, settings.discriminator_filters * min(2**i, 8)
        stride = 2 if i < settings.discriminator_layers else 1
        layers += [
            nn.Conv2d(inputs, features, 4, stride, 1, bias=False), nn.BatchNorm2d(features),
            nn.LeakyReLU(0.2),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.Conv2d(features, 1, 4, 1, 1))


class LPIPS(nn.Module):
    """LPIPS on VGG16 with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, inputs = nn.ModuleList(), 3
        for i, group in enumerate(GROUPS):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
            for channels in group:
                layers += [conv(inputs, channels), nn.ReLU()]
                nn.init.kaiming_normal_(layers[-2].weight)
                inputs = channels
            self.groups.append(nn.Sequential(*layers))
        self.heads = nn.ParameterList(0.1 * torch.rand(group[-1], 1, 1) for group in GROUPS)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.requires_grad_(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        h, features = (images - self.shift) / self.scale, []
        for group in self.groups:
            h = group(h)
            x = h.float()
            features.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return features

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.heads, self.features(left), self.features(right), strict=True)
        return sum((h * (a - b).square()).sum(1).mean() for h, a, b in pairs)


class Trainer:
    """The networks, the optimizers, and the step."""

    def __init__(self, config: Config, device: torch.device):
        self.settings, self.bfloat16 = config.vqgan, config.dtype == "bfloat16"
        self.device = device
        self.generator, self.discriminator, self.lpips = (
            network.to(device, memory_format=torch.channels_last)
            for network in (Generator(config), build_discriminator(config), LPIPS())
        )
        self.parameters = list(self.generator.parameters())
        settings = {"betas": config.vqgan.betas, "eps": config.vqgan.epsilon, "fused": True}
        self.optimizers = [
            torch.optim.Adam(parameters, rate, **settings)
            for parameters, rate in (
                (self.parameters, config.vqgan.learning_rate),
                (self.discriminator.parameters(), config.vqgan.discriminator_learning_rate),
            )
        ]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.averages = torch.zeros(2, device=device)

    def compile(self) -> None:
        """Compiles the networks, except for the last convolution: its gradients for the adaptive
        weight would need a backward pass through the whole compiled decoder."""
        from torch._functorch import config as functorch

        functorch.donated_buffer = False  # the adaptive weight keeps the graph
        for network in (
            self.generator.encoder, self.generator.decoder, self.discriminator, self.lpips
        ):  # fmt: skip
            # All are compiled as `Sequential.forward`, whose shapes would seem to vary.
            network.compile(dynamic=False)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def step(self, images: torch.Tensor) -> torch.Tensor:
        """Takes a step on images [b,c,h,w] in [-1, 1] and returns the generator's loss."""
        settings = self.settings
        self.discriminator.requires_grad_(False)
        with self.autocast():
            reconstruction, codebook = self.generator(images)
            nll = settings.l1_weight * (images - reconstruction).abs().mean()
            if settings.perceptual_weight:
                nll = nll + settings.perceptual_weight * self.lpips(
                    *repeat_gray(images, reconstruction)
                )
            adversarial = -self.discriminator(reconstruction).float().mean()
        weight: Any = settings.discriminator_weight
        if settings.adaptive_weight:
            last = self.generator.conv_out.weight
            norms = [
                torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
                for loss in (nll, adversarial)
            ]
            weight = weight * (norms[0] / (norms[1] + 1e-4)).clamp(0, settings.adaptive_weight_max)
        loss = nll + weight * adversarial + settings.codebook_weight * codebook
        self.update(0, loss)
        if settings.ema_decay is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.parameters, 1 - settings.ema_decay)

        self.discriminator.requires_grad_(True)
        with self.autocast():
            real = self.discriminator(images).float()
            fake = self.discriminator(reconstruction.detach()).float()
        loss_d = 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())
        if settings.lecam_weight:
            means = torch.stack([real.mean(), fake.mean()]).detach()
            self.averages.lerp_(means, 1 - settings.lecam_decay)
            lecam = functional.relu(real - self.averages[1]).square().mean()
            lecam = lecam + functional.relu(self.averages[0] - fake).square().mean()
            loss_d = loss_d + settings.lecam_weight * lecam
        self.update(1, loss_d)
        return loss.detach()

    def update(self, number: int, loss: torch.Tensor) -> None:
        self.optimizers[number].zero_grad()
        loss.backward()
        self.optimizers[number].step()


def repeat_gray(*images: torch.Tensor) -> list[torch.Tensor]:
    """Repeats the channel of grayscale images for VGG16."""
    return [x.expand(-1, 3, -1, -1) for x in images]


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def check_parameters(network: nn.Module, ours: Any) -> int:
    """Returns the number of parameters. Raises ValueError if it is not that of the JAX model."""
    count = count_parameters(network)
    expected = sum(x.size for x in jax.tree.leaves(ours))
    if count != expected:
        raise ValueError(f"the PyTorch network has {count} parameters, not {expected}")
    return count


def prepare_torch() -> tuple[torch.device, Callable[[Any], None]]:
    """Sets PyTorch up for speed. Returns the device, and a function that waits for it."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    if torch.cuda.is_available():
        return torch.device("cuda"), lambda _: torch.cuda.synchronize()
    return torch.device("cpu"), lambda _: None


def measure_torch(
    step: Callable[[], Any], wait: Callable[[Any], None], batch: int, steps: int
) -> dict[str, float]:
    """Returns the values of a training step in PyTorch."""
    values = time_calls(step, steps, wait)
    values["images_per_second"] = 1e3 * batch / values["milliseconds"]
    if torch.cuda.is_available():
        values["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return values


def run_vqgan(job: Job, preset: str, dtype: str) -> Iterator[Entry]:
    """The row of stage 1, eager and compiled."""
    require_gpu(job, torch.cuda.is_available())
    config, (device, wait) = job.load_config(preset, {"dtype": dtype}), prepare_torch()
    trainer = Trainer(config, device)
    count = check_models(config, trainer)
    size, batch = config.data.image_size, config.vqgan.batch_size
    pixels = make_random_images((batch, size, size, config.data.channels))
    images = (torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1).contiguous(
        memory_format=torch.channels_last
    )
    for compiled in (False, True):
        if compiled:
            trainer.compile()
        values = measure_torch(lambda: trainer.step(images), wait, batch, job.steps)
        mode = "compiled" if compiled else "eager"
        label = f"{preset}, stage 1, with discriminator, PyTorch {mode}, {dtype}, batch {batch}"
        yield label, values | {"parameters": count}


def check_models(config: Config, trainer: Trainer) -> int:
    """Checks that the networks have as many parameters as ours, and returns their number."""
    objective = VQGANObjective.build(config)
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((1, size, size, config.data.channels), "float32")
    networks = (
        (trainer.generator, objective.generator), (trainer.discriminator, objective.discriminator)
    )  # fmt: skip
    return sum(
        check_parameters(network, jax.eval_shape(ours.init, jax.random.key(0), images)["params"])
        for network, ours in networks
    )
