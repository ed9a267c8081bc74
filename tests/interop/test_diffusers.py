"""Tests of imports from and exports to the VQModel of diffusers. diffusers.npz holds what the real
package computed (diffusers_torch.py)."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from taming_jax.cli import export_diffusers, import_diffusers
from taming_jax.config.load import load_config
from taming_jax.errors import UserError
from taming_jax.interop import diffusers
from taming_jax.models.vqgan import build_vqgan
from taming_jax.run import load_run
from taming_jax.weights import layout
from tests import hub_server, small_runs
from tests.interop import diffusers_torch


@pytest.fixture(scope="module")
def golden():
    with np.load(diffusers_torch.FILE) as content:
        return dict(content)


@pytest.fixture
def folder(golden, tmp_path):
    """The folder that diffusers would have written."""
    return write_folder(golden, tmp_path / "vqmodel")


def write_folder(golden, folder, **changes):
    folder.mkdir()
    settings = json.loads(str(golden["settings"])) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    arrays = {k.removeprefix("model."): x for k, x in golden.items() if k.startswith("model.")}
    save_file(arrays, folder / diffusers.WEIGHTS[0])
    return folder


def run_import(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import", *map(str, arguments)])
    import_diffusers.main()


def check_outputs(run, golden):
    indices = run.encode(golden["images"])
    np.testing.assert_array_equal(indices, golden["indices"])
    expected = np.clip(golden["decoded"], -1, 1)
    np.testing.assert_allclose(run.decode(indices), expected, atol=1e-5)


def test_an_imported_model_computes_what_diffusers_computes(folder, golden, tmp_path, monkeypatch):
    run_import(monkeypatch, folder, "--workdir", tmp_path / "run")
    run = load_run(tmp_path / "run")
    vqgan = run.config.vqgan
    assert (vqgan.channels, vqgan.multipliers, vqgan.attention_resolutions) == (8, (1, 1), (8,))
    check_outputs(run, golden)
    # The same with the names of older versions.
    old = {new: name for name, new in diffusers.OLD_NAMES.items()}
    arrays, _ = diffusers.open_state_dict(folder / diffusers.WEIGHTS[0])
    renamed = {}
    for name, array in arrays.items():
        for new, other in old.items():
            name = name.replace(f".{new}.", f".{other}.")
        renamed[name] = array
    assert renamed.keys() != arrays.keys()
    save_file(renamed, folder / diffusers.WEIGHTS[0])
    run_import(monkeypatch, folder, "--workdir", tmp_path / "old")
    check_outputs(load_run(tmp_path / "old"), golden)


def test_an_export_has_the_arrays_and_settings_of_the_import(folder, golden, tmp_path, monkeypatch):
    run_import(monkeypatch, folder, "--workdir", tmp_path / "run")
    argv = ["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    export_diffusers.main()
    files = [
        diffusers.open_state_dict(x / diffusers.WEIGHTS[0])[0] for x in (folder, tmp_path / "out")
    ]
    assert files[0].keys() == files[1].keys()
    for name, array in files[0].items():
        np.testing.assert_array_equal(files[1][name], array, err_msg=name)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = json.loads(str(golden["settings"]))
    assert exported == {name: settings[name] for name in exported}
    assert exported.keys() >= diffusers_torch.SETTINGS.keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL, not a VQModel"),
        ({"norm_num_groups": 4}, r"it normalizes \[8, 8\] channels in 4 groups"),
        ({"norm_type": "spatial"}, "its norm_type is not group"),
        ({"act_fn": "gelu"}, "its act_fn is not silu"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "it has the blocks"),
        ({"out_channels": 1}, "it has 3 input and 1 output channels"),
        ({"block_out_channels": [8, 12]}, r"\[8, 12\] are not multiples of the first width"),
        ({"sample_size": 15}, "15 px cannot be halved 1 times; set --image-size"),
        ({"mid_block_add_attention": False}, "has the unknown arrays decoder.mid_block.attent"),
        ({"block_out_channels": "x"}, "does not describe a VQModel"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_represent_is_named(golden, tmp_path, monkeypatch, changes, message):
    folder = write_folder(golden, tmp_path / "changed", **changes)
    with pytest.raises(UserError, match=message):
        run_import(monkeypatch, folder, "--workdir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no model of diffusers"):
        run_import(monkeypatch, tmp_path, "--workdir", tmp_path / "run")


def test_models_are_read_from_the_hub(golden, folder, tmp_path, monkeypatch):
    """Also from a folder of a repository, and without a network from the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    files = {f"vqvae/{file.name}": file.read_bytes() for file in folder.iterdir()}
    with hub_server.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        server.repositories = {"user/ldm": [files], "user/other": [{"a": b""}]}
        run_import(monkeypatch, "hf://user/ldm/vqvae", "--workdir", tmp_path / "run")
        check_outputs(load_run(tmp_path / "run"), golden)
        for source, message in (
            ("hf://user/other", "user/other holds no VQModel: it has no config.json"),
            ("hf://vqvae", "hf://vqvae names no repository; use hf://user/name"),
        ):
            with pytest.raises(UserError, match=message):
                run_import(monkeypatch, source, "--workdir", tmp_path / "none")
    run_import(monkeypatch, "hf://user/ldm/vqvae", "--workdir", tmp_path / "cached")
    check_outputs(load_run(tmp_path / "cached"), golden)


@pytest.mark.parametrize(
    "preset, message",
    [
        ("mnist", r"needs 3 blocks per level .* has 2\.$"),
        ("mnist_tiny", "needs 2 blocks per level .* has 1; it has the same number of groups in all "
         "layers, but the layers of this run with 16 and 32 channels have 16 and 32 groups"),
        ("birds_tiny", r"needs 2 blocks per level .* has 1\.$"),
    ],
)  # fmt: skip
def test_presets_that_a_vqmodel_cannot_represent(preset, message):
    with pytest.raises(UserError, match=f"the VQModel {message}"):
        diffusers.build_config(load_config(preset))


def test_normalized_codes_are_exported_with_unit_length():
    codes = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    params = layout.normalize_codes({"quantizer": {"codebook": codes, "proj": 1}, "encoder": 2})
    normalized = params["quantizer"]["codebook"]
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(normalized * np.linalg.norm(codes, axis=1)[:, None], codes, 1e-5)
    assert params["encoder"] == 2 and params["quantizer"]["proj"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mid_attention", [True, False])
def test_the_real_package_loads_an_export(tmp_path, monkeypatch, mid_attention):
    """With levels of two widths, attention at one of them, and normalized codes."""
    vq_model = pytest.importorskip("diffusers").VQModel
    folder = tmp_path / "run"
    small_runs.train(
        folder, vqgan__steps=2, vqgan__decoder_blocks=2, vqgan__channels=32, data__image_size=16,
        vqgan__multipliers=(1, 2), vqgan__attention_resolutions=(8,),
        vqgan__mid_attention=mid_attention,
    )  # fmt: skip
    run = load_run(folder)
    assert build_vqgan(run.config).settings.mid_attention == mid_attention
    diffusers.export_run(folder, tmp_path / "out")
    model = vq_model.from_pretrained(tmp_path / "out").eval()
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)
    indices, decoded = diffusers_torch.compute(model, images)
    np.testing.assert_array_equal(run.encode(images), indices)
    difference = np.abs(run.decode(indices) - np.clip(decoded, -1, 1)).max()
    print(f"largest difference {difference:.2g}")
    assert difference < 1e-5
    model.save_pretrained(tmp_path / "back")
    run_import(monkeypatch, tmp_path / "back", "--workdir", tmp_path / "imported")
    imported = load_run(tmp_path / "imported")
    np.testing.assert_array_equal(imported.encode(images), indices)
    difference = np.abs(imported.decode(indices) - np.clip(decoded, -1, 1)).max()
    print(f"largest difference of the model imported back {difference:.2g}")
    assert difference < 1e-5
