"""Tests of the commands that import and export the official checkpoints."""

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
from taming_jax.config.quantizers import VQConfig
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


def replace(model, **settings):
    """Returns a copy of a model's settings with other values. The names are dotted paths whose dots
    are written as two underscores."""
    model = copy.deepcopy(model)
    for name, value in settings.items():
        *sections, last = name.split("__")
        section_settings = model["params"]
        for section in sections:
            section_settings = section_settings[section]
        section_settings[last] = value
    return model


@pytest.fixture
def command(capsys):
    """Returns a function that runs an import or export script in this process and returns its exit
    status, stdout, and stderr."""

    def call(name, *arguments):
        status = commands.run_for_status(f"scripts/{name}_compvis.py", *arguments)
        return status, *capsys.readouterr()

    return call


class Files:
    """The checkpoint and the config file of a model."""

    def __init__(self, folder, model, weights, name="model", **entries):
        self.model, self.folder, self.weights = model, folder, weights
        self.ckpt, self.yaml = folder / f"{name}.ckpt", folder / f"{name}.yaml"
        data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 4}}
        self.yaml.write_text(yaml.safe_dump({"model": model, "data": data}))
        write_tensors(self.ckpt, {"global_step": 7, "epoch": 1, "state_dict": weights} | entries)

    def import_into(self, command, workdir, *flags):
        """Imports the model and returns the command's output."""
        status, output, err = command(
            "import", "--checkpoint", self.ckpt, "--config", self.yaml, "--workdir", workdir, *flags
        )
        assert status == 0, err
        return output


def get_official_shapes(settings):
    """Returns the shapes of the arrays of a model's official state dict, by name."""
    from taming_jax.interop.compvis import get_layouts
    from taming_jax.interop.compvis_config import parse_yaml
    from taming_jax.interop.imports import compute_shapes, get_file_shapes

    model = parse_yaml({"model": settings}, commands.ROOT / "tests" / "x.yaml")
    return get_file_shapes(get_layouts(model), compute_shapes(model))


def make_official_weights(model, seed=0):
    """Returns random weights of a model, with the BatchNorm counts and attention masks that the
    official state dicts also contain."""
    weights = random_weights(get_official_shapes(model), seed)
    for name in list(weights):
        if name.endswith("running_var"):
            weights[name] = np.exp(weights[name])
            weights[name.replace("running_var", "num_batches_tracked")] = np.array(9, np.int64)
        if name.endswith("attn.query.bias"):
            mask = np.tril(np.ones((24, 24), np.float32))[None, None]
            weights[name.replace("query.bias", "mask")] = mask
    return weights


def test_imported_models_compute_the_recorded_outputs_of_the_official_modules(command, tmp_path):
    """Also checks runs that were exported and imported again."""
    vqgan, gpt = golden.load("compvis_vqgan"), golden.load("compvis_gpt")
    net_weights = {
        f"first_stage_model.{k}": x for k, x in golden.select_prefix(vqgan, "sd/").items()
    }
    net_weights |= {f"transformer.{k}": x for k, x in golden.select_prefix(gpt, "sd/").items()}
    vqgan_files = Files(tmp_path, VQ, golden.select_prefix(vqgan, "sd/"), "vq")
    net_files = Files(tmp_path, NET, net_weights, "net")
    for files in (vqgan_files, net_files):
        name = files.ckpt.stem
        files.import_into(command, tmp_path / name)
        out = tmp_path / f"{name}_again.safetensors"
        status, _, err = command("export", "--workdir", tmp_path / name, "--out", out)
        assert status == 0, err
        reexported = Files(tmp_path, files.model, {}, f"{name}_again")
        reexported.ckpt = out
        reexported.import_into(command, tmp_path / f"{name}_again")
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
        *(pytest.param(model, marks=pytest.mark.slow) for model in (
            NET,
            replace(NET, cond_stage_config="__is_unconditional__", sos_token=5, pkeep=0.9),
            replace(VQ, ddconfig__ch_mult=[1, 1], ddconfig__resolution=16, embed_dim=4, n_embed=10,
                    ddconfig__in_channels=1, ddconfig__out_ch=1,
                    lossconfig={"target": "DummyLoss"}),
            replace(VQ, embed_dim=32, temperature_scheduler_config={"params": {"lr_max": 0.9}})
            | {"target": "taming.models.vqgan.GumbelVQ"},
        )),
    ],
    ids=["VQModel", "class-conditional", "unconditional", "small and gray", "GumbelVQ"],
)  # fmt: skip
def test_an_export_equals_the_imported_model(command, tmp_path, model, monkeypatch):
    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    torch.device = type("device", (), {})  # tyro accesses it
    torch.from_numpy, torch.save = lambda x: x, lambda content, file: write_tensors(file, content)
    monkeypatch.setitem(sys.modules, "torch", torch)
    weights = make_official_weights(model)
    files = Files(tmp_path, model, weights)
    files.import_into(command, tmp_path / "run")
    for suffix in (".ckpt", ".safetensors"):
        out = tmp_path / f"back{suffix}"
        assert command("export", "--workdir", tmp_path / "run", "--out", out)[0] == 0
        exported, _ = open_state_dict(out)
        # If the model has a discriminator, the export also contains the perceptual loss.
        assert {name for name in exported if ".perceptual_loss." not in f".{name}"} == set(weights)
        for name, array in weights.items():
            if name.endswith("num_batches_tracked"):
                continue  # the number of updates, which the import does not keep
            exported_array = np.asarray(exported[name])
            assert exported_array.dtype == array.dtype and exported_array.shape == array.shape
            np.testing.assert_array_equal(exported_array, array, name)
    files.ckpt, files.yaml = tmp_path / "back.safetensors", tmp_path / "back.yaml"
    files.import_into(command, tmp_path / "again")
    first, again = (taming_jax.load_run(tmp_path / name).config for name in ("run", "again"))
    assert again == dataclasses.replace(first, config="back")


def test_official_settings_are_converted_to_our_config(command, tmp_path):
    # The official loss accepts a pixel weight but ignores it.
    model = replace(
        VQ, lossconfig__params__disc_loss="vanilla", lossconfig__params__disc_factor=0.5,
        lossconfig__params__pixelloss_weight=3.0,
    )  # fmt: skip
    files = Files(tmp_path, model, random_weights(get_official_shapes(model), 1))
    output = files.import_into(command, tmp_path / "run")
    assert (
        "contains these networks of" in output
        and "discriminator; images of 32 px, 64 codes." in output
    )
    config = taming_jax.load_run(tmp_path / "run").config
    assert config.vqgan.vq == VQConfig(legacy_commitment=True)
    assert config.vqgan.discriminator_loss == "vanilla" and config.vqgan.batch_size == 4
    assert config.vqgan.discriminator_weight == pytest.approx(0.4)
    assert config.vqgan.learning_rate == pytest.approx(1.8e-5)
    assert config.vqgan.l1_weight == 1.0 and config.vqgan.discriminator_start == 0.0
    generator_weights = {k: x for k, x in files.weights.items() if not k.startswith("loss.")}
    Files(tmp_path, model, generator_weights).import_into(command, tmp_path / "generator")
    assert taming_jax.load_run(tmp_path / "generator").config.vqgan.discriminator_start == 0.25
    standard = Files(tmp_path, replace(model, legacy=False, beta=0.5), files.weights)
    standard.import_into(command, tmp_path / "standard")
    config = taming_jax.load_run(tmp_path / "standard").config
    assert config.vqgan.vq == VQConfig(commitment=0.5)


@pytest.mark.slow
def test_the_token_before_the_codes_is_the_class_or_the_start_token(command, tmp_path):
    """In a class-conditional model, the token is the class number, in the vocabulary of the codes.
    In an unconditional model, it is the start token."""
    weights = random_weights(get_official_shapes(NET), 3)
    Files(tmp_path, NET, weights, "net").import_into(command, tmp_path / "net")
    unconditional = replace(NET, unconditional=True, sos_token=4)
    Files(tmp_path, unconditional, weights, "alone").import_into(command, tmp_path / "alone")
    conditional_run, unconditional_run = (
        taming_jax.load_run(tmp_path / name) for name in ("net", "alone")
    )
    assert conditional_run.class_names == tuple(
        map(str, range(10))
    ) and unconditional_run.class_names == ("image",)
    samples = conditional_run.sample([4], temperature=0)
    np.testing.assert_array_equal(samples, unconditional_run.sample([0], temperature=0))
    assert (samples != conditional_run.sample([5], temperature=0)).any()
    # A block of 24 tokens holds a window of 4x4 of the 8x8 codes.
    codes = np.random.default_rng(1).integers(0, 64, (3, 4, 4)).astype(np.int32)
    expected = unconditional_run.code_log_likelihood(codes, np.zeros(3, np.int32))
    log_likelihoods = conditional_run.code_log_likelihood(codes, np.full(3, 4, np.int32))
    np.testing.assert_allclose(log_likelihoods, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (VQ | {"target": "taming.models.vqgan.EMAVQ"}, r"describes taming.models.vqgan.EMAVQ,"),
        (replace(VQ, ddconfig__double_z=True), r"sets double_z to True; only False is supported"),
        (replace(VQ, ddconfig__in_channels=4), "with 4 input and 3 output channels"),
        (replace(VQ, remap="used.npy"), "sets remap, which is not supported"),
        (replace(NET, cond_stage_config=NET["params"]["first_stage_config"]),
         r"conditions its transformer on VQModel"),
        (replace(NET, permuter_config={"target": "taming.x.ZCurve"}), r"permutes its codes with"),
        (replace(NET, transformer_config__target="x.CodeGPT"), r"uses the transformer x.CodeGPT"),
        (replace(NET, transformer_config__params__n_unmasked=3), r"sets n_unmasked to 3"),
        ({"params": {}}, r"describes None, which is not supported; use a VQModel, GumbelVQ or"),
        (VQ | {"params": {"n_embed": 3}}, r"description: it does not set 'ddconfig'"),
        (replace(VQ, n_embed=float("inf")), r"description: inf is not a valid size"),
        (replace(VQ, ddconfig__ch=1e30), r"description: 1e\+30 is not a valid size"),
        (replace(VQ, ddconfig__ch_mult=[1, 2.5]), r"description: 2.5 is not a valid size"),
        (replace(VQ, lossconfig__params__disc_loss="foo"), r"'vqgan.discriminator_loss' cannot be"),
        (replace(NET, cond_stage_key="objects", cond_stage_config={"target": "x.DummyCondStage"}),
         r"conditions its transformer on DummyCondStage"),
    ],
)  # fmt: skip
def test_unsupported_models_are_refused(model, message, tmp_path):
    from taming_jax.interop.compvis_config import parse_yaml

    with pytest.raises(UserError, match=message):
        parse_yaml({"model": model}, tmp_path / "x.yaml")


def test_damaged_or_incomplete_files_are_refused(command, tmp_path):
    model = replace(VQ, lossconfig={"target": "DummyLoss"})
    weights = random_weights(get_official_shapes(model), 4)

    def assert_refused(message, files, *flags):
        status, _, err = command(
            "import", "--checkpoint", files.ckpt, "--config", files.yaml, "--workdir",
            tmp_path / "run", *flags,
        )  # fmt: skip
        assert status == 2 and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()

    incomplete = {k: x for k, x in weights.items() if not k.startswith("decoder.up.0")}
    assert_refused("it lacks decoder.up.0.block.0.conv1.bias, ", Files(tmp_path, model, incomplete))
    assert_refused("and 13 more", Files(tmp_path, model, incomplete))
    assert_refused(
        "it has the unknown arrays colorize",
        Files(tmp_path, model, weights | {"colorize": weights["quant_conv.bias"]}),
    )
    wider_model = replace(model, ddconfig__z_channels=64)
    message = "has shape [64, 32, 3, 3] in the file, but"
    assert_refused(message, Files(tmp_path, wider_model, weights))
    integer_weights = {"quant_conv.bias": np.arange(16)}
    assert_refused(
        "has int64 values in quant_conv.bias, which must be floats",
        Files(tmp_path, model, weights | integer_weights),
    )
    files = Files(tmp_path, model, weights)
    content = files.ckpt.read_bytes()
    for fraction in (0.0, 0.5, 0.99):
        files.ckpt.write_bytes(content[: int(fraction * len(content))])
        assert_refused("is damaged or not a PyTorch file", files)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    files.ckpt.write_bytes(flipped)
    assert_refused("is damaged or not a PyTorch file", files)
    files.ckpt.write_text("no checkpoint")
    assert_refused("is", files)
    files.ckpt.unlink()
    assert_refused("there is no file", files)
    files = Files(tmp_path, model, weights)
    files.yaml.write_text("a: [")
    assert_refused("is not YAML", files)
    files.yaml.unlink()
    assert_refused("cannot be read", files)


def test_non_finite_arrays_are_imported_with_a_warning(command, tmp_path):
    model = replace(VQ, lossconfig={"target": "DummyLoss"})
    weights = random_weights(get_official_shapes(model), 4)
    weights["encoder.conv_in.bias"][3] = np.nan
    weights["quant_conv.bias"] = weights["quant_conv.bias"].astype(np.float64)
    weights["quant_conv.bias"][0] = 1e300
    output = Files(tmp_path, model, weights).import_into(command, tmp_path / "run")
    assert "Warning: encoder.conv_in.bias contains values that are not finite." in output
    assert "Warning: quant_conv.bias contains values that are not finite." in output
    status, _, err = command(
        "import", "--checkpoint", tmp_path / "model.ckpt", "--config", tmp_path / "model.yaml",
        "--workdir", tmp_path / "run",
    )  # fmt: skip
    assert status == 2 and "is not an empty folder; name another one" in err


@pytest.mark.slow
def test_our_own_run_survives_export_and_import(command, tmp_path):
    """The run has class names, l2-normalized codes, and a discriminator. The export also contains
    the masks, counts, and LPIPS weights of the official modules."""
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
    imported, codes = {}, rng.integers(0, 24, (3, 16, 16)).astype(np.int32)
    for stage in ("vqgan", "prior"):
        out = tmp_path / f"{stage}.safetensors"
        status, output, err = command(
            "export", "--workdir", tmp_path / "run", "--out", out, "--stage", stage
        )
        assert status == 0 and "have unit length" in output, err
        assert ("Class c is token 24 + c" in output) == (stage == "prior")
        status, _, err = command(
            "import", "--checkpoint", out, "--config", out.with_suffix(".yaml"), "--workdir",
            tmp_path / stage,
        )  # fmt: skip
        assert status == 0, err
        imported[stage] = taming_jax.load_run(tmp_path / stage)
    original, prior = taming_jax.load_run(tmp_path / "run"), imported["prior"]
    assert prior.class_names == original.class_names
    np.testing.assert_allclose(imported["vqgan"].decode(codes), original.decode(codes), atol=1e-5)
    labels = np.array([2, 0, 1], np.int32)
    expected = original.code_log_likelihood(codes, labels)
    np.testing.assert_allclose(prior.code_log_likelihood(codes, labels), expected, rtol=1e-5)
    with jax.default_matmul_precision("highest"):
        tokens = np.concatenate([24 + labels[:, None], codes.reshape(3, -1)[:, :-1]], 1)
        logits = prior.prior.apply({"params": prior.transformer}, tokens)
    assert logits.shape[-1] == 27
    np.testing.assert_allclose(logits[..., 24:], -50, atol=1e-2)
    # The settings are kept too, except those listed here. New optimizers warm up.
    assert imported["vqgan"].config.vqgan == dataclasses.replace(
        config.vqgan, discriminator_start=0.0, warmup_steps=max(config.vqgan.warmup_steps, 200)
    )
    assert prior.config.prior == dataclasses.replace(
        config.prior, vocabulary=27, first_class=24, block_size=256, label_dropout=0.0,
        guidance_scale=None,
    )  # fmt: skip

    exported, _ = open_state_dict(tmp_path / "vqgan.safetensors")
    lpips = load_lpips()
    last = exported["loss.perceptual_loss.net.slice5.28.weight"]
    np.testing.assert_array_equal(last, lpips["vgg"]["Conv_12"]["kernel"].transpose(3, 2, 0, 1))
    assert exported["loss.perceptual_loss.net.slice2.5.bias"].shape == (128,)
    assert exported["loss.perceptual_loss.lin4.model.1.weight"].shape == (1, 512, 1, 1)
    assert exported["loss.discriminator.main.3.num_batches_tracked"].shape == ()
    assert exported["loss.discriminator.main.8.weight"].shape == (1, 32, 4, 4)
    exported, _ = open_state_dict(tmp_path / "prior.safetensors")
    mask = np.asarray(exported["transformer.blocks.0.attn.mask"])
    np.testing.assert_array_equal(mask, np.tril(np.ones((1, 1, 256, 256))))


def test_exports_that_are_impossible_are_refused(command, prior_workdir, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    for arguments, message in (
        (
            ("--workdir", prior_workdir, "--out", tmp_path / "x.ckpt"),
            "which is not installed; install it",
        ),
        (
            ("--workdir", prior_workdir, "--out", tmp_path / "x.safetensors"),
            "blocks per level of the decoder",
        ),
        (
            ("--workdir", tmp_path / "none", "--out", tmp_path / "x.safetensors"),
            "there is no folder",
        ),
        (
            ("--workdir", prior_workdir, "--out", tmp_path / "x.pt"),
            "is neither a .ckpt nor a .safetensors file",
        ),
        (
            ("--workdir", prior_workdir, "--out", tmp_path / "no" / "x.safetensors"),
            "cannot be written",
        ),
        (("--workdir", tmp_path, "--out", tmp_path / "x.safetensors"), "holds no vqgan checkpoint"),
    ):
        status, _, err = command("export", *arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
        assert not list(tmp_path.glob("x.*"))
