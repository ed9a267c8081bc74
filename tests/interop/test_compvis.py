"""The official files in and out, by the commands."""

import copy
import dataclasses
import importlib.machinery
import importlib.util
import sys
import types

import jax
import numpy as np
import pytest
import yaml

import taming_jax
from taming_jax.errors import UserError
from taming_jax.models.lpips import load_lpips
from taming_jax.weights.state_dict import open_state_dict
from tests import commands, golden
from tests.golden import assert_close, to_nhwc
from tests.interop.llamagen_torch import random_weights
from tests.weights.torch_writer import write_tensors

DD = {
    "double_z": False, "z_channels": 32, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {
        "disc_conditional": False, "disc_in_channels": 3, "disc_start": 10, "disc_weight": 0.8,
        "disc_ndf": 16, "codebook_weight": 1.0,
    },
}  # fmt: skip
VQ = {
    "base_learning_rate": 4.5e-6,
    "target": "taming.models.vqgan.VQModel",
    "params": {"embed_dim": 16, "n_embed": 64, "ddconfig": DD, "lossconfig": LOSS},
}
NET = {
    "base_learning_rate": 4.5e-6,
    "target": "taming.models.cond_transformer.Net2NetTransformer",
    "params": {
        "cond_stage_key": "class_label",
        "cond_stage_config": {
            "target": "taming.modules.util.Labelator", "params": {"n_classes": 10},
        },
        "first_stage_config": {
            "target": VQ["target"],
            "params": VQ["params"] | {"lossconfig": {"target": "taming.modules.losses.DummyLoss"}},
        },
        "transformer_config": {
            "target": "taming.modules.transformer.mingpt.GPT",
            "params": {
                "vocab_size": 64, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32,
            },
        },
    },
}  # fmt: skip


def changed(model, **settings):
    """A copy of a model's settings, with others by their dotted names, a dot written as two
    underscores."""
    model = copy.deepcopy(model)
    for name, value in settings.items():
        *sections, last = name.split("__")
        place = model["params"]
        for section in sections:
            place = place[section]
        place[last] = value
    return model


@pytest.fixture
def command(capsys):
    """A script in this process: its exit status, stdout and stderr."""

    def call(name, *arguments):
        status = commands.status_of(f"scripts/{name}_compvis.py", *arguments)
        return status, *capsys.readouterr()

    return call


class Files:
    """A model's two files."""

    def __init__(self, folder, model, weights, name="model", **said):
        self.model, self.folder, self.weights = model, folder, weights
        self.ckpt, self.yaml = folder / f"{name}.ckpt", folder / f"{name}.yaml"
        data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 4}}
        self.yaml.write_text(yaml.safe_dump({"model": model, "data": data}))
        write_tensors(self.ckpt, {"global_step": 7, "epoch": 1, "state_dict": weights} | said)

    def imported(self, command, workdir, *flags):
        status, said, err = command(
            "import", "--checkpoint", self.ckpt, "--config", self.yaml, "--workdir", workdir, *flags
        )
        assert status == 0, err
        return said


def names_of(content):
    """The names and shapes of a model's state dict, as the official modules have them."""
    from taming_jax.interop.compvis import get_layouts
    from taming_jax.interop.compvis_config import parse_yaml
    from taming_jax.interop.imports import compute_shapes, get_file_shapes

    model = parse_yaml({"model": content}, commands.ROOT / "tests" / "x.yaml")
    return get_file_shapes(get_layouts(model), compute_shapes(model))


def with_rest(model, seed=0):
    """Random weights, with what the official modules hold besides."""
    weights = random_weights(names_of(model), seed)
    for name in list(weights):
        if name.endswith("running_var"):
            weights[name] = np.exp(weights[name])
            weights[name.replace("running_var", "num_batches_tracked")] = np.array(9, np.int64)
        if name.endswith("attn.query.bias"):
            mask = np.tril(np.ones((24, 24), np.float32))[None, None]
            weights[name.replace("query.bias", "mask")] = mask
    return weights


def test_the_recorded_vqgan_and_gpt(command, tmp_path):
    """Exported and imported again, too."""
    vqgan, gpt = golden.load("compvis_vqgan"), golden.load("compvis_gpt")
    below = {f"first_stage_model.{k}": x for k, x in golden.select_prefix(vqgan, "sd/").items()}
    below |= {f"transformer.{k}": x for k, x in golden.select_prefix(gpt, "sd/").items()}
    alone = Files(tmp_path, VQ, golden.select_prefix(vqgan, "sd/"), "vq")
    both = Files(tmp_path, NET, below, "net")
    for files in (alone, both):
        name = files.ckpt.stem
        files.imported(command, tmp_path / name)
        out = tmp_path / f"{name}_again.safetensors"
        status, _, err = command("export", "--workdir", tmp_path / name, "--out", out)
        assert status == 0, err
        again = Files(tmp_path, files.model, {}, f"{name}_again")
        again.ckpt = out
        again.imported(command, tmp_path / f"{name}_again")
    for name in ("vq", "vq_again", "net", "net_again"):
        run = taming_jax.load_run(tmp_path / name)
        images = to_nhwc(vqgan["x"])
        np.testing.assert_array_equal(run.encode(images), vqgan["indices"])
        expected = np.clip(to_nhwc(vqgan["reconstruction"]), -1, 1)
        np.testing.assert_allclose(run.reconstruct(images), expected, atol=2e-3)
        if "net" in name:
            with jax.default_matmul_precision("highest"):
                logits = run.prior.apply({"params": run.transformer}, gpt["tokens"])
            assert_close(logits, gpt["logits"], "logits", 1e-4)


@pytest.mark.parametrize(
    "model",
    [
        VQ,
        NET,
        changed(NET, cond_stage_config="__is_unconditional__", sos_token=5, pkeep=0.9),
        changed(VQ, ddconfig__ch_mult=[1, 1], ddconfig__resolution=16, ddconfig__in_channels=1,
                ddconfig__out_ch=1, embed_dim=4, n_embed=10, lossconfig={"target": "DummyLoss"}),
        changed(VQ, embed_dim=32, temperature_scheduler_config={"params": {"lr_max": 0.9}})
        | {"target": "taming.models.vqgan.GumbelVQ"},
    ],
    ids=["VQModel", "class-conditional", "unconditional", "small and gray", "GumbelVQ"],
)  # fmt: skip
def test_an_export_is_the_model_that_was_imported(command, tmp_path, model, monkeypatch):
    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    torch.device = type("device", (), {})  # tyro asks for it
    torch.from_numpy, torch.save = lambda x: x, lambda content, file: write_tensors(file, content)
    monkeypatch.setitem(sys.modules, "torch", torch)
    weights = with_rest(model)
    files = Files(tmp_path, model, weights)
    files.imported(command, tmp_path / "run")
    for ending in (".ckpt", ".safetensors"):
        out = tmp_path / f"back{ending}"
        assert command("export", "--workdir", tmp_path / "run", "--out", out)[0] == 0
        found, _ = open_state_dict(out)
        # The perceptual loss is written, too, where the model has a discriminator.
        assert {name for name in found if ".perceptual_loss." not in f".{name}"} == set(weights)
        for name, array in weights.items():
            if name.endswith("num_batches_tracked"):
                continue  # steps that this run has not taken
            back = np.asarray(found[name])
            assert back.dtype == array.dtype and back.shape == array.shape
            np.testing.assert_array_equal(back, array, name)
    files.ckpt, files.yaml = tmp_path / "back.safetensors", tmp_path / "back.yaml"
    files.imported(command, tmp_path / "again")
    first, again = (taming_jax.load_run(tmp_path / name).config for name in ("run", "again"))
    assert again == dataclasses.replace(first, config="back")


def test_settings_become_ours(command, tmp_path):
    # The official loss takes a weight of pixels, and does nothing with it.
    model = changed(
        VQ, lossconfig__params__disc_loss="vanilla", lossconfig__params__disc_factor=0.5,
        lossconfig__params__pixelloss_weight=3.0,
    )  # fmt: skip
    files = Files(tmp_path, model, random_weights(names_of(model), 1))
    said = files.imported(command, tmp_path / "run")
    assert "contains the generator and discriminator of" in said and "32 px, 64 codes." in said
    config = taming_jax.load_run(tmp_path / "run").config
    assert config.vqgan.legacy_commitment and config.vqgan.commitment == 0.25
    assert config.vqgan.discriminator_loss == "vanilla" and config.vqgan.batch_size == 4
    assert config.vqgan.discriminator_weight == pytest.approx(0.4)
    assert config.vqgan.learning_rate == pytest.approx(1.8e-5)
    assert config.vqgan.l1_weight == 1.0 and config.vqgan.discriminator_start == 0.0
    alone = {k: x for k, x in files.weights.items() if not k.startswith("loss.")}
    Files(tmp_path, model, alone).imported(command, tmp_path / "alone")
    assert taming_jax.load_run(tmp_path / "alone").config.vqgan.discriminator_start == 0.25
    standard = Files(tmp_path, changed(model, legacy=False, beta=0.5), files.weights)
    standard.imported(command, tmp_path / "standard")
    config = taming_jax.load_run(tmp_path / "standard").config
    assert not config.vqgan.legacy_commitment and config.vqgan.commitment == 0.5


@pytest.mark.slow
def test_a_token_before_the_codes_is_the_class(command, tmp_path):
    """A class is the token of its number, among the codes; of an unconditional one all images are
    of the start token."""
    weights = random_weights(names_of(NET), 3)
    Files(tmp_path, NET, weights, "net").imported(command, tmp_path / "net")
    alone = changed(NET, unconditional=True, sos_token=4)
    Files(tmp_path, alone, weights, "alone").imported(command, tmp_path / "alone")
    net, one = (taming_jax.load_run(tmp_path / name) for name in ("net", "alone"))
    assert net.class_names == tuple(map(str, range(10))) and one.class_names == ("image",)
    drawn = net.sample([4], temperature=0)
    np.testing.assert_array_equal(drawn, one.sample([0], temperature=0))
    assert (drawn != net.sample([5], temperature=0)).any()
    # A block of 24 tokens holds windows of 4x4 codes of the 8x8.
    codes = np.random.default_rng(1).integers(0, 64, (3, 4, 4)).astype(np.int32)
    expected = one.code_log_likelihood(codes, np.zeros(3, np.int32))
    found = net.code_log_likelihood(codes, np.full(3, 4, np.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (VQ | {"target": "taming.models.vqgan.EMAVQ"}, r"describes taming.models.vqgan.EMAVQ,"),
        (changed(VQ, ddconfig__double_z=True), r"sets double_z to True; only False is supported"),
        (changed(VQ, ddconfig__in_channels=4), "with 4 input and 3 output channels"),
        (changed(VQ, remap="used.npy"), "sets remap, which is not supported"),
        (changed(NET, cond_stage_config=NET["params"]["first_stage_config"]),
         r"conditions its transformer on VQModel"),
        (changed(NET, permuter_config={"target": "taming.x.ZCurve"}), r"permutes its codes with"),
        (changed(NET, transformer_config__target="x.CodeGPT"), r"has a transformer x.CodeGPT"),
        (changed(NET, transformer_config__params__n_unmasked=3), r"sets n_unmasked to 3"),
        ({"params": {}}, r"describes None, which is not supported; use a VQModel, GumbelVQ or"),
        (VQ | {"params": {"n_embed": 3}}, r"description: it does not set 'ddconfig'"),
        (changed(VQ, n_embed=float("inf")), r"description: inf is not a valid size"),
        (changed(VQ, ddconfig__ch=1e30), r"description: 1e\+30 is not a valid size"),
        (changed(VQ, ddconfig__ch_mult=[1, 2.5]), r"description: 2.5 is not a valid size"),
        (changed(VQ, lossconfig__params__disc_loss="foo"), r"'vqgan.discriminator_loss' cannot be"),
        (changed(NET, cond_stage_key="objects", cond_stage_config={"target": "x.DummyCondStage"}),
         r"conditions its transformer on DummyCondStage"),
    ],
)  # fmt: skip
def test_models_that_ours_cannot_be(model, says, tmp_path):
    from taming_jax.interop.compvis_config import parse_yaml

    with pytest.raises(UserError, match=says):
        parse_yaml({"model": model}, tmp_path / "x.yaml")


def test_files_that_are_not_as_they_should_be(command, tmp_path):
    model = changed(VQ, lossconfig={"target": "DummyLoss"})
    weights = random_weights(names_of(model), 4)

    def refused(says, files, *flags):
        status, _, err = command(
            "import", "--checkpoint", files.ckpt, "--config", files.yaml, "--workdir",
            tmp_path / "run", *flags,
        )  # fmt: skip
        assert status == 2 and says in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()

    lacking = {k: x for k, x in weights.items() if not k.startswith("decoder.up.0")}
    refused("it lacks decoder.up.0.block.0.conv1.bias, ", Files(tmp_path, model, lacking))
    refused("and 13 more", Files(tmp_path, model, lacking))
    refused(
        "it has the unknown arrays colorize",
        Files(tmp_path, model, weights | {"colorize": weights["quant_conv.bias"]}),
    )
    wider = changed(model, ddconfig__z_channels=64)
    says = "has shape [64, 32, 3, 3] in the file, but"
    refused(says, Files(tmp_path, wider, weights))
    counts = {"quant_conv.bias": np.arange(16)}
    refused(
        "has int64 values in quant_conv.bias, which must be floats",
        Files(tmp_path, model, weights | counts),
    )
    whole = Files(tmp_path, model, weights)
    content = whole.ckpt.read_bytes()
    for share in (0.0, 0.5, 0.99):
        whole.ckpt.write_bytes(content[: int(share * len(content))])
        refused("is damaged or not a PyTorch file", whole)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    whole.ckpt.write_bytes(flipped)
    refused("is damaged or not a PyTorch file", whole)
    whole.ckpt.write_text("no checkpoint")
    refused("is", whole)
    whole.ckpt.unlink()
    refused("there is no file", whole)
    whole = Files(tmp_path, model, weights)
    whole.yaml.write_text("a: [")
    refused("is not YAML", whole)
    whole.yaml.unlink()
    refused("cannot be read", whole)


def test_what_is_not_finite_is_imported_and_named(command, tmp_path):
    model = changed(VQ, lossconfig={"target": "DummyLoss"})
    weights = random_weights(names_of(model), 4)
    weights["encoder.conv_in.bias"][3] = np.nan
    weights["quant_conv.bias"] = weights["quant_conv.bias"].astype(np.float64)
    weights["quant_conv.bias"][0] = 1e300
    said = Files(tmp_path, model, weights).imported(command, tmp_path / "run")
    assert "Warning: encoder.conv_in.bias contains values that are not finite." in said
    assert "Warning: quant_conv.bias contains values that are not finite." in said
    status, _, err = command(
        "import", "--checkpoint", tmp_path / "model.ckpt", "--config", tmp_path / "model.yaml",
        "--workdir", tmp_path / "run",
    )  # fmt: skip
    assert status == 2 and "is not an empty folder; name another --workdir" in err


def test_a_run_of_ones_own_goes_there_and_back(command, tmp_path):
    """Classes of its own, l2-normalised codes and a discriminator; what the official modules hold
    besides is there."""
    from taming_jax.interop.imports import Model, compute_shapes, write_run

    config = taming_jax.load_config("folder", {
        "data.image_size": 32, "vqgan.channels": 32, "vqgan.multipliers": (1, 2),
        "vqgan.blocks": 1, "vqgan.latent_channels": 16, "vqgan.codebook_size": 24,
        "vqgan.code_dim": 8, "vqgan.discriminator_filters": 8, "vqgan.discriminator_layers": 2,
        "prior.width": 32, "prior.heads": 2, "prior.layers": 1,
    })  # fmt: skip
    rng, model = np.random.default_rng(0), Model(config, ("cat", "dog", "owl"), True)
    networks = jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) / 3).astype(np.float32), compute_shapes(model)
    )
    write_run(tmp_path / "run", model, networks)
    again, codes = {}, rng.integers(0, 24, (3, 16, 16)).astype(np.int32)
    for stage in ("vqgan", "prior"):
        out = tmp_path / f"{stage}.safetensors"
        status, said, err = command(
            "export", "--workdir", tmp_path / "run", "--out", out, "--stage", stage
        )
        assert status == 0 and "have unit length" in said, err
        assert ("Class c is token 24 + c" in said) == (stage == "prior")
        status, _, err = command(
            "import", "--checkpoint", out, "--config", out.with_suffix(".yaml"), "--workdir",
            tmp_path / stage,
        )  # fmt: skip
        assert status == 0, err
        again[stage] = taming_jax.load_run(tmp_path / stage)
    own, prior = taming_jax.load_run(tmp_path / "run"), again["prior"]
    assert prior.class_names == own.class_names
    np.testing.assert_allclose(again["vqgan"].decode(codes), own.decode(codes), atol=1e-5)
    numbers = np.array([2, 0, 1], np.int32)
    expected = own.code_log_likelihood(codes, numbers)
    np.testing.assert_allclose(prior.code_log_likelihood(codes, numbers), expected, rtol=1e-5)
    with jax.default_matmul_precision("highest"):
        tokens = np.concatenate([24 + numbers[:, None], codes.reshape(3, -1)[:, :-1]], 1)
        logits = prior.prior.apply({"params": prior.transformer}, tokens)
    assert logits.shape[-1] == 27
    np.testing.assert_allclose(logits[..., 24:], -50, atol=1e-2)
    # The settings, too, but for what was said; fresh optimisers warm up.
    assert again["vqgan"].config.vqgan == dataclasses.replace(
        config.vqgan, discriminator_start=0.0, warmup_steps=max(config.vqgan.warmup_steps, 200)
    )
    assert prior.config.prior == dataclasses.replace(
        config.prior, vocabulary=27, first_class=24, block_size=256, label_dropout=0.0,
        guidance_scale=None,
    )  # fmt: skip

    held, _ = open_state_dict(tmp_path / "vqgan.safetensors")
    lpips = load_lpips()
    last = held["loss.perceptual_loss.net.slice5.28.weight"]
    np.testing.assert_array_equal(last, lpips["vgg"]["Conv_12"]["kernel"].transpose(3, 2, 0, 1))
    assert held["loss.perceptual_loss.net.slice2.5.bias"].shape == (128,)
    assert held["loss.perceptual_loss.lin4.model.1.weight"].shape == (1, 512, 1, 1)
    assert held["loss.discriminator.main.3.num_batches_tracked"].shape == ()
    assert held["loss.discriminator.main.8.weight"].shape == (1, 32, 4, 4)
    held, _ = open_state_dict(tmp_path / "prior.safetensors")
    mask = np.asarray(held["transformer.blocks.0.attn.mask"])
    np.testing.assert_array_equal(mask, np.tril(np.ones((1, 1, 256, 256))))


def test_runs_that_the_official_code_cannot_have(command, both, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    for arguments, says in (
        (("--workdir", both, "--out", tmp_path / "x.ckpt"), "which is not installed; install it"),
        (
            ("--workdir", both, "--out", tmp_path / "x.safetensors"),
            "blocks per level of the decoder",
        ),
        (
            ("--workdir", tmp_path / "none", "--out", tmp_path / "x.safetensors"),
            "there is no folder",
        ),
        (
            ("--workdir", both, "--out", tmp_path / "x.pt"),
            "is neither a .ckpt nor a .safetensors file",
        ),
        (
            ("--workdir", both, "--out", tmp_path / "no" / "x.safetensors"),
            "cannot be written",
        ),
        (("--workdir", tmp_path, "--out", tmp_path / "x.safetensors"), "holds no vqgan checkpoint"),
    ):
        status, _, err = command("export", *arguments)
        assert status == 2 and says in err and err.count("\n") == 1, err
        assert not list(tmp_path.glob("x.*"))
