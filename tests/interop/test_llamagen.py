"""Compares imported LlamaGen files with the outputs of llamagen_torch.py in PyTorch 2.14."""

import jax
import numpy as np
import pytest

import taming_jax
from tests import commands
from tests.golden import assert_close, to_nhwc
from tests.interop import llamagen_torch as reference
from tests.weights.torch_writer import write_tensors

RECORDED = np.load(reference.FILE)


def compute_file_shapes():
    """Returns the shapes of the arrays of both state dicts, by name, in the order of the reference.
    They follow from the shapes of our parameters at the sizes of the reference."""
    from taming_jax.interop import llamagen
    from taming_jax.interop.imports import Model, compute_shapes
    from taming_jax.weights.layout import convert_shapes, flatten_shapes

    config = taming_jax.load_config("folder", {
        "data.image_size": 16, "vqgan.discriminator_start": 1.0, "vqgan.channels": 32,
        "vqgan.multipliers": (1, 2, 1),
        "vqgan.blocks": 1, "vqgan.latent_channels": 16, "vqgan.codebook_size": 24,
        "vqgan.code_dim": 8, "vqgan.attention_resolutions": (4,), "prior.width": 32,
        "prior.heads": 2, "prior.layers": 2, "prior.mlp": "swiglu", "prior.mlp_width": 40,
        "prior.bias": False, "prior.norm": "rms", "prior.positions": "llamagen",
    })  # fmt: skip
    model = Model(config, tuple("abc"))
    our_shapes = {name: flatten_shapes(tree) for name, tree in compute_shapes(model).items()}
    generator = llamagen.build_tokenizer_layout(our_shapes["generator"])
    transformer = llamagen.build_transformer_layout(our_shapes["transformer"], 2, 24)
    return (
        convert_shapes(generator, our_shapes["generator"]),
        convert_shapes(transformer, our_shapes["transformer"]),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen")
    for seed, (name, file_shapes) in enumerate(
        zip(("vq.pt", "gpt.pt"), compute_file_shapes(), strict=True)
    ):
        weights = reference.random_weights(file_shapes, seed)
        if name == "vq.pt":
            weights["quantize.codebook_used"] = np.zeros(65536, np.float32)
        write_tensors(folder / name, {"model": weights, "steps": 3})
    return folder


def run_import(folder, workdir, *flags, run=commands.run_here):
    return run(
        "scripts/import_llamagen.py", "--tokenizer", folder / "vq.pt", "--workdir", workdir,
        "--image-size", 16, *flags,
    )  # fmt: skip


@pytest.mark.slow
def test_an_imported_tokenizer_and_transformer_compute_the_recorded_outputs(folder, tmp_path):
    tokenizer, transformer = compute_file_shapes()
    assert {*tokenizer, *transformer} == set(RECORDED["names"].tolist())
    status, output, err = run_import(
        folder, tmp_path / "run", "--gpt", folder / "gpt.pt", "--heads", 2, run=commands.run
    )  # fmt: skip
    assert status == 0, err
    contents = "contains these networks of LlamaGen: generator, transformer; images of 16 px, 24"
    assert contents in output
    run = taming_jax.load_run(tmp_path / "run")
    images, codes, labels = reference.make_inputs()
    np.testing.assert_array_equal(run.encode(to_nhwc(images)), RECORDED["indices"])
    pictures = np.clip(to_nhwc(RECORDED["pictures"]), -1, 1)
    assert_close(run.decode(RECORDED["indices"]), pictures, "pictures", 1e-4)
    tokens = np.concatenate([24 + labels[:, None], codes[:, :-1]], 1)
    with jax.default_matmul_precision("highest"):
        logits = run.prior.apply({"params": run.transformer}, tokens)
    assert_close(logits, RECORDED["logits"], "logits", 1e-4)
    # Sampling with a cache works too.
    samples = run.sample([2], 1, temperature=0, guidance_scale=1, top_k=24)
    assert samples.shape == (1, 16, 16, 3)


def test_files_that_do_not_fit_are_refused(folder, tmp_path):
    tables = {"cls_embedding.embedding_table.weight": (4, 32), "tok_embeddings.weight": (24, 32)}
    partial_weights = {name: np.zeros(shape, np.float32) for name, shape in tables.items()}
    write_tensors(folder / "part.pt", partial_weights)
    for flags, message in (
        (("--gpt", folder / "vq.pt"), "is not a LlamaGen class-conditional transformer"),
        (
            ("--gpt", folder / "gpt.pt"),
            "has width 32; set --heads to its number of attention heads",
        ),
        (("--gpt", folder / "none.pt"), "there is no file"),
        (
            ("--gpt", folder / "part.pt"),
            "it has no 2-dimensional array layers.0.feed_forward.w1.weight",
        ),
    ):
        status, _, err = run_import(folder, tmp_path / "run", *flags)
        assert status == 2 and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()
