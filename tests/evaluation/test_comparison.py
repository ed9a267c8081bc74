"""Tests of the page that compares runs, with made-up results."""

import json

import numpy as np
import pytest
from PIL import Image

from taming_jax.errors import RunFailed
from taming_jax.evaluation import comparison

PROTOCOL = {
    "images": 100, "split": "test", "samples": 50, "features": "VGG16", "generator": "abc",
}  # fmt: skip


def make_results(workdir):
    """Writes the results of two quantizers, one of them with two priors, and two seeds."""
    rng = np.random.default_rng(0)
    for seed in (1, 0):
        for quantizer, prior in (
            ("fsq", ""), ("vq --vqgan.channels 8", ""), ("vq --vqgan.channels 8", "masked"),
            ("vq --vqgan.channels 8", "autoregressive"),
        ):  # fmt: skip
            folder = f"{quantizer[:3].strip()}-{prior}/seed-{seed}"
            result = {
                "quantizer": quantizer, "prior": prior, "seed": seed, "folder": folder,
                "hash": f"{len(quantizer)}{len(prior)}{seed}", "command": f"train {quantizer}",
                "machine": "a cpu", "protocol": PROTOCOL, "parameters": 12345, "fd": 2.0 + seed,
                "seconds_per_step": 0.5, "step_minutes": 1.0,
            }  # fmt: skip
            if prior:
                result |= {"latency": 0.1, "throughput": 10.0 + 2 * seed}
                result |= {"nats_per_code": 1.5} if prior == "autoregressive" else {}
            else:
                result |= {"psnr": 20.0, "entropy_bits_per_image": 300.0, "usage": 0.5}
                result |= {"usage_by_step": [(1, 0.2), (2, 0.5)]}
            (workdir / folder).mkdir(parents=True)
            (workdir / folder / "result.json").write_text(json.dumps(result))
            images = rng.integers(0, 256, (10, 8, 8, 1), np.uint8)
            pictures = {"pictures": images} | ({} if prior else {"originals": images})
            np.savez(workdir / folder / "pictures.npz", **pictures)


def test_a_page_has_means_over_seeds_and_the_hash_of_each_run(tmp_path):
    make_results(tmp_path)
    lines = comparison.write_page(tmp_path, "Title").splitlines()
    assert lines[0] == "# Title" and "100 images of the test split and 50 samples" in lines[2]
    rows = [line for line in lines if line.startswith("| ")]
    tokenizers = [row for row in rows if row.startswith(("| vq --vqgan.channels 8 | –", "| fsq"))]
    # In the order of the quantizers, and fd is 2 and 3.
    assert [row.split(" | ")[0] for row in tokenizers[:2]] == ["| vq --vqgan.channels 8", "| fsq"]
    assert "| 20 | – | – | 2.5 ± 0.5 | 0.5 | – | 12,345 | 0.5 | 1 |" in tokenizers[0]
    priors = [row for row in rows if row.startswith("| vq --vqgan.channels 8 | a")]
    assert priors == [
        "| vq --vqgan.channels 8 | autoregressive | 2.5 ± 0.5 | – | – | – | 1.5 | 0.1 | 11 ± 1 "
        "| 12,345 | 0.5 | 1 |"
    ]
    runs = comparison.read_runs(tmp_path / "comparison.md")
    assert len(runs) == 8
    for folder, value in runs:
        assert json.loads((folder / "result.json").read_text())["hash"] == value


def test_a_page_is_checked_against_the_results(tmp_path):
    make_results(tmp_path)
    comparison.write_page(tmp_path, "Title")
    page, file = tmp_path / "comparison.md", tmp_path / "vq-masked" / "seed-1" / "result.json"
    comparison.check_page(page)
    text = page.read_text()
    page.write_text(text.replace("2.5 ± 0.5", "1.5 ± 0.5"))
    with pytest.raises(RunFailed, match=r"comparison.md is not what the results in its folder"):
        comparison.check_page(page)
    page.write_text(text)
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"protocol": PROTOCOL | {"generator": "another"}}))
    with pytest.raises(RunFailed, match="vq-masked/seed-1 was not trained on the tokenizer"):
        comparison.check_page(page)


def test_the_figures_show_every_group(tmp_path):
    make_results(tmp_path)
    comparison.draw_figures(tmp_path)
    for name in ("rate", "speed", "usage", "samples", "reconstructions"):
        image = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert image.std() > 5, name
