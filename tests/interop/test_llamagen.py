"""LlamaGen's files, by the command, against what llamagen_torch.py computed with PyTorch 2.14."""

import jax
import numpy as np
import pytest

import taming_jax
from tests import commands
from tests.golden import assert_close, to_nhwc
from tests.interop import llamagen_torch as reference
from tests.weights.torch_writer import write_tensors

RECORDED = np.load(reference.FILE)


def shapes():
    """The two state dicts' names, in the order the reference has them, and shapes by what is known
    of its sizes: those that ours would have."""
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
    known = {name: flatten_shapes(tree) for name, tree in compute_shapes(model).items()}
    generator = llamagen.build_tokenizer_layout(known["generator"])
    transformer = llamagen.build_transformer_layout(known["transformer"], 2, 24)
    return (
        convert_shapes(generator, known["generator"]),
        convert_shapes(transformer, known["transformer"]),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen")
    for seed, (name, found) in enumerate(zip(("vq.pt", "gpt.pt"), shapes(), strict=True)):
        weights = reference.random_weights(found, seed)
        if name == "vq.pt":
            weights["quantize.codebook_used"] = np.zeros(65536, np.float32)
        write_tensors(folder / name, {"model": weights, "steps": 3})
    return folder


def imported(folder, workdir, *flags, run=commands.run_here):
    return run(
        "scripts/import_llamagen.py", "--tokenizer", folder / "vq.pt", "--workdir", workdir,
        "--image-size", 16, *flags,
    )  # fmt: skip


def test_a_tokenizer_and_its_transformer_are_the_references(files, tmp_path):
    tokenizer, transformer = shapes()
    assert {*tokenizer, *transformer} == set(RECORDED["names"].tolist())
    status, said, err = imported(
        files, tmp_path / "run", "--gpt", files / "gpt.pt", "--heads", 2, run=commands.run
    )  # fmt: skip
    assert status == 0, err
    assert (
        "contains the generator and transformer of LlamaGen: images of 16 px, 24 codes, 3" in said
    )
    run = taming_jax.load_run(tmp_path / "run")
    images, codes, labels = reference.inputs()
    np.testing.assert_array_equal(run.encode(to_nhwc(images)), RECORDED["indices"])
    pictures = np.clip(to_nhwc(RECORDED["pictures"]), -1, 1)
    assert_close(run.decode(RECORDED["indices"]), pictures, "pictures", 1e-4)
    tokens = np.concatenate([24 + labels[:, None], codes[:, :-1]], 1)
    with jax.default_matmul_precision("highest"):
        logits = run.prior.apply({"params": run.transformer}, tokens)
    assert_close(logits, RECORDED["logits"], "logits", 1e-4)
    # Drawn with a cache, greedily, as one pass over what was drawn would choose.
    drawn = run.sample([2], 1, temperature=0, guidance_scale=1, top_k=24)
    assert drawn.shape == (1, 16, 16, 3)


def test_what_does_not_belong_together_is_refused(files, tmp_path):
    tables = {"cls_embedding.embedding_table.weight": (4, 32), "tok_embeddings.weight": (24, 32)}
    part = {name: np.zeros(shape, np.float32) for name, shape in tables.items()}
    write_tensors(files / "part.pt", part)
    for flags, says in (
        (("--gpt", files / "vq.pt"), "is not a LlamaGen class-conditional transformer"),
        (
            ("--gpt", files / "gpt.pt"),
            "has width 32; set --heads to its number of attention heads",
        ),
        (("--gpt", files / "none.pt"), "there is no file"),
        (("--gpt", files / "part.pt"), "it has no layers.0.feed_forward.w1.weight of 2 dimensions"),
    ):
        status, _, err = imported(files, tmp_path / "run", *flags)
        assert status == 2 and says in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()
