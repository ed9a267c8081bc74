"""The step of stage 2 in PyTorch, and sampling with the GPT-2 of `transformers`, as comparisons."""

from collections.abc import Iterator
from typing import Any

import jax
import torch
from torch import nn
from torch.nn import functional

from taming_jax.cli.report.sampling import get_micro_batches
from taming_jax.cli.report.timing import CLASSES, Entry, Job, require_gpu, time_calls
from taming_jax.cli.report.torch_vqgan import check_parameters, measure_torch, prepare_torch
from taming_jax.config.schema import Config, PriorConfig
from taming_jax.priors.registry import build_prior


class Block(nn.Module):
    def __init__(self, settings: PriorConfig):
        super().__init__()
        width = settings.width
        self.heads, self.dropout = settings.heads, settings.dropout
        self.attention_dropout = settings.attention_dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
            nn.Dropout(self.dropout),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            *qkv, is_causal=True, dropout_p=self.attention_dropout if self.training else 0.0
        )
        attended = self.projection(attended.transpose(1, 2).reshape(b, t, width))
        x = x + functional.dropout(attended, self.dropout, self.training)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT like the prior: learned positions, LayerNorm and GELU."""

    def __init__(self, config: Config):
        super().__init__()
        settings, codes = config.prior, config.vqgan.codebook_size
        self.embedding = nn.Embedding(codes + CLASSES + 1, settings.width)
        self.positions = nn.Parameter(0.02 * torch.randn(config.grid_size**2, settings.width))
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, codes, bias=False)

    def forward(self, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of codes [b,t], given the tokens [b,t] before them."""
        x = self.blocks(self.dropout(self.embedding(tokens) + self.positions))
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def build_optimizer(model: nn.Module, settings: PriorConfig) -> Any:
    """Returns AdamW, whose weight decay applies only to matrices."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, settings.learning_rate, settings.betas, fused=True)


def run_prior(job: Job, preset: str, dtype: str, dropout: bool) -> Iterator[Entry]:
    """The row of stage 2, compiled."""
    require_gpu(job, torch.cuda.is_available())
    overrides = {"dtype": dtype} | ({} if dropout else {"prior.dropout": 0.0})
    config, (device, wait) = job.load_config(preset, overrides), prepare_torch()
    settings = config.prior
    model = GPT(config).to(device)
    prior, length = build_prior(config, CLASSES), config.grid_size**2
    tokens = jax.ShapeDtypeStruct((1, length), "int32")
    count = check_parameters(
        model, jax.eval_shape(prior.init, jax.random.key(0), tokens)["params"]
    )  # fmt: skip
    optimizer = build_optimizer(model, settings)
    parameters = list(model.parameters())
    model.compile()
    shape = settings.batch_size, length
    codes = torch.randint(config.vqgan.codebook_size, shape, device=device)
    labels = torch.randint(CLASSES, shape[:1], device=device) + config.vqgan.codebook_size
    inputs = torch.cat([labels[:, None], codes[:, :-1]], 1)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(inputs, codes)
        optimizer.zero_grad()
        loss.backward()
        if settings.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, settings.grad_clip_norm)
        optimizer.step()
        return loss.detach()

    values = measure_torch(step, wait, settings.batch_size, job.steps)
    label = f"{preset}, stage 2, dropout {settings.dropout}, PyTorch compiled, {dtype}"
    yield f"{label}, batch {settings.batch_size}", values | {"parameters": count}


def run_sampling(job: Job, preset: str) -> Iterator[Entry]:
    """The row of sampling with `transformers`: a GPT-2 of the size of the prior with a static
    cache, in bfloat16. It generates two sequences per image, which is the work of guidance."""
    from transformers import GPT2Config, GPT2LMHeadModel

    require_gpu(job, torch.cuda.is_available())
    config, (device, wait) = job.load_config(preset, {}), prepare_torch()
    settings, length = config.prior, config.grid_size**2
    tokens = config.vqgan.codebook_size + CLASSES + 1
    sizes = GPT2Config(
        vocab_size=tokens, n_positions=length + 1, n_embd=settings.width, n_layer=settings.layers,
        n_head=settings.heads, bos_token_id=tokens - 1, eos_token_id=None, pad_token_id=tokens - 1,
    )  # fmt: skip
    model = GPT2LMHeadModel(sizes).to(device, torch.bfloat16).eval()
    for batch in get_micro_batches(job)[:2]:
        start = torch.full((2 * batch, 1), tokens - 1, device=device)

        def generate(start: torch.Tensor = start) -> torch.Tensor:
            return model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                min_new_tokens=length, max_new_tokens=length, cache_implementation="static",
            )  # fmt: skip

        with torch.no_grad():
            milliseconds = time_calls(generate, max(job.steps // 20, 1), wait)["milliseconds"]
        yield f"{preset}, transformers, bfloat16, micro-batch {batch}", {
            "codes_per_second": 1e3 * batch * length / milliseconds,
            "sampling_milliseconds": milliseconds,
        }  # fmt: skip
