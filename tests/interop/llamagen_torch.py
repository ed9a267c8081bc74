"""A small PyTorch reference of LlamaGen's tokenizer and class-conditional transformer.

It follows the description in the paper (arXiv 2406.06525) and the names in its state dicts. The
file llamagen.npz contains its outputs for the weights of `random_weights`, with which the tests
compare. If PyTorch is installed, you can recompute the file:

    python -m tests.interop.llamagen_torch
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("llamagen.npz")
CHANNELS, MULTIPLIERS, BLOCKS, LATENT, CODES, CODE_DIM, SIDE = 32, (1, 2, 1), 1, 16, 24, 8, 16
WIDTH, HEADS, LAYERS, HIDDEN, CLASSES, GRID = 32, 2, 2, 40, 3, 4


def random_weights(shapes, seed):
    """Returns random weights, which depend only on the names, the shapes, and the seed."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            values /= np.float32(np.sqrt(np.prod(shape[1:]) / 2))
        else:
            values = values / 10 + ("norm" in name and name.endswith("weight"))
        weights[name] = values.astype(np.float32)
    return weights


def make_inputs():
    rng = np.random.default_rng(5)
    images = np.tanh(rng.standard_normal((3, 3, SIDE, SIDE), np.float32))
    codes = rng.integers(0, CODES, (2, GRID * GRID))
    return images, codes, np.array([2, CLASSES])  # the second label means no class


def build_modules():
    """Returns the tokenizer and the transformer."""
    import torch
    from torch import nn
    from torch.nn import functional

    def norm(channels):
        return nn.GroupNorm(32, channels, eps=1e-6)

    class Residual(nn.Module):
        def __init__(self, before, after):
            super().__init__()
            self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
            self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
            if before != after:
                self.nin_shortcut = nn.Conv2d(before, after, 1)

        def forward(self, x):
            h = self.conv1(functional.silu(self.norm1(x)))
            h = self.conv2(functional.silu(self.norm2(h)))
            return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

    class Attention(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.norm = norm(c)
            self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

        def forward(self, x):
            h = self.norm(x)
            q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
            attended = functional.scaled_dot_product_attention(q, k, v)
            return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))

    class Resample(nn.Module):
        def __init__(self, c, up):
            super().__init__()
            self.up = up
            self.conv = nn.Conv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, stride=2)

        def forward(self, x):
            if self.up:
                return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
            return self.conv(functional.pad(x, (0, 1, 0, 1)))

    def level(before, after, blocks, attention, sampling):
        block = nn.Module()
        widths = [before, *[after] * blocks]
        block.res = nn.ModuleList([Residual(*widths[i : i + 2]) for i in range(blocks)])
        block.attn = nn.ModuleList([Attention(after) for _ in range(blocks if attention else 0)])
        if sampling:
            setattr(block, sampling, Resample(after, sampling == "upsample"))
        return block

    def apply_level(block, h):
        for i, residual in enumerate(block.res):
            h = residual(h)
            if len(block.attn):
                h = block.attn[i](h)
        for name in ("downsample", "upsample"):
            if hasattr(block, name):
                h = getattr(block, name)(h)
        return h

    class Half(nn.Module):
        """The encoder or the decoder."""

        def __init__(self, decoder):
            super().__init__()
            widths, last = [CHANNELS * m for m in MULTIPLIERS], len(MULTIPLIERS) - 1
            middle = nn.ModuleList([Residual(widths[-1], widths[-1]), Attention(widths[-1]),
                                    Residual(widths[-1], widths[-1])])  # fmt: skip
            self.decoder = decoder
            if decoder:
                self.conv_in = nn.Conv2d(LATENT, widths[-1], 3, padding=1)
                self.conv_blocks = nn.ModuleList([
                    level(
                        widths[min(i + 1, last)], widths[i], BLOCKS + 1, i == last,
                        "upsample" if i else "",
                    )
                    for i in reversed(range(last + 1))
                ])  # fmt: skip
                out, c = widths[0], 3
            else:
                self.conv_in = nn.Conv2d(3, CHANNELS, 3, padding=1)
                self.conv_blocks = nn.ModuleList([
                    level(
                        widths[i - 1] if i else CHANNELS, widths[i], BLOCKS, i == last,
                        "downsample" if i < last else "",
                    )
                    for i in range(last + 1)
                ])  # fmt: skip
                out, c = widths[-1], LATENT
            self.mid, self.norm_out = middle, norm(out)
            self.conv_out = nn.Conv2d(out, c, 3, padding=1)

        def forward(self, x):
            h = self.conv_in(x)
            middle = nn.Sequential(*self.mid)
            h = middle(h) if self.decoder else h
            for block in self.conv_blocks:
                h = apply_level(block, h)
            h = h if self.decoder else middle(h)
            return self.conv_out(functional.silu(self.norm_out(h)))

    class Tokenizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Half(False), Half(True)
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(CODES, CODE_DIM)
            self.quant_conv = nn.Conv2d(LATENT, CODE_DIM, 1)
            self.post_quant_conv = nn.Conv2d(CODE_DIM, LATENT, 1)

        def forward(self, images):
            z = functional.normalize(self.quant_conv(self.encoder(images)), dim=1)
            codes = functional.normalize(self.quantize.embedding.weight, dim=-1)
            indices = torch.einsum("bdhw,kd->bhwk", z, codes).argmax(-1)
            vectors = codes[indices].permute(0, 3, 1, 2)
            return indices, self.decoder(self.post_quant_conv(vectors))

    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight

    def rotate(x):
        """Applies rotary embeddings to queries or keys [b,t,heads,d].

        Neighboring channels form complex numbers. The first half of them is rotated by the row of a
        code, the second half by its column. LlamaGen sets the rotation at the class token to zero,
        so its queries and keys become zero."""
        d = x.shape[-1]
        frequency = 10_000.0 ** (-torch.arange(d // 4) / (d // 4))
        row, column = (
            g.flatten() for g in torch.meshgrid(*[torch.arange(GRID)] * 2, indexing="ij")
        )
        angles = torch.cat([row[:, None] * frequency, column[:, None] * frequency], -1)
        rotations = torch.cat(
            [torch.zeros(1, d // 2), torch.polar(torch.ones_like(angles), angles)]
        )
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2))
        return torch.view_as_real(pairs * rotations[: x.shape[1], None]).flatten(-2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.feed_forward = nn.Module(), nn.Module()
            self.attention.wqkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.attention.wo = nn.Linear(WIDTH, WIDTH, bias=False)
            for name in ("w1", "w3"):
                setattr(self.feed_forward, name, nn.Linear(WIDTH, HIDDEN, bias=False))
            self.feed_forward.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
            self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()

        def forward(self, x):
            qkv = self.attention.wqkv(self.attention_norm(x)).chunk(3, -1)
            q, k, v = (x.unflatten(-1, (HEADS, -1)) for x in qkv)
            q, k, v = (x.transpose(1, 2) for x in (rotate(q), rotate(k), v))
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attention.wo(attended.transpose(1, 2).flatten(-2))
            h, net = self.ffn_norm(x), self.feed_forward
            return x + net.w2(functional.silu(net.w1(h)) * net.w3(h))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_embedding = nn.Module()
            self.cls_embedding.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)
            self.tok_embeddings = nn.Embedding(CODES, WIDTH)
            self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
            self.norm, self.output = RMSNorm(), nn.Linear(WIDTH, CODES, bias=False)

        def forward(self, codes, labels):
            first = self.cls_embedding.embedding_table(labels)[:, None]
            h = torch.cat([first, self.tok_embeddings(codes[:, :-1])], 1)
            for layer in self.layers:
                h = layer(h)
            return self.output(self.norm(h))

    return Tokenizer(), Transformer()


def main():
    import torch

    images, codes, labels = make_inputs()
    nets = build_modules()
    for seed, net in enumerate(nets):
        shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
        weights = random_weights(shapes, seed)
        net.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    with torch.no_grad():
        indices, pictures = nets[0](torch.from_numpy(images))
        logits = nets[1](torch.from_numpy(codes), torch.from_numpy(labels))
    np.savez_compressed(
        FILE, indices=indices.numpy(), pictures=pictures.numpy(), logits=logits.numpy(),
        names=[*nets[0].state_dict(), *nets[1].state_dict()],
    )  # fmt: skip


if __name__ == "__main__":
    main()
