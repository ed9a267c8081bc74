"""Writes diffusers.npz: a small VQModel of diffusers with random weights, its settings, and what it
computes. Needs torch and diffusers.

    python -m tests.interop.diffusers_torch
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "diffusers.npz"
SETTINGS = {
    "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "sample_size": 16,
    "num_vq_embeddings": 16, "norm_num_groups": 8, "vq_embed_dim": 3,
}  # fmt: skip


def build_model(settings):
    """Returns a VQModel with random weights of all layers, among them those that start at zero."""
    import torch
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def compute(model, images):
    """Returns the codes [n,h',w'] and reconstructions of images [n,h,w,c] in [-1, 1]."""
    import torch

    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        latents = model.encode(x).latents
        indices = model.quantize(latents)[2][2].reshape(len(x), *latents.shape[2:])
        decoded = model.decode(latents).sample.permute(0, 2, 3, 1)
    return indices.numpy().astype(np.int32), decoded.numpy()


def main():
    model = build_model(SETTINGS)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    indices, decoded = compute(model, images)
    arrays = {f"model.{name}": x.numpy() for name, x in model.state_dict().items()}
    settings = json.dumps(dict(model.config) | {"_class_name": "VQModel"}, default=list)
    np.savez_compressed(
        FILE, **arrays, images=images, indices=indices, decoded=decoded, settings=settings
    )


if __name__ == "__main__":
    main()
