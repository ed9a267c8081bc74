"""Tests of folders with plain files, and of pushing to and pulling from a server with the hub's
interface."""

import dataclasses
import json
import shutil
import socket
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from taming_jax import hub, pretrained, sharing
from taming_jax.cli import pull as pull_command
from taming_jax.cli import push as push_command
from taming_jax.config.load import replace_section
from taming_jax.errors import UserError
from taming_jax.run import load_run
from taming_jax.training import loop
from taming_jax.training.checkpoints import Store
from taming_jax.training.vqgan import VQGANStage
from tests import hub_server

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server, and this process as a client with its token."""
    from huggingface_hub import constants

    with hub_server.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def assert_same_outputs(one, other):
    """Checks that two runs have the same codes, reconstructions and samples, bit for bit."""
    np.testing.assert_array_equal(one.encode(IMAGES), other.encode(IMAGES))
    np.testing.assert_array_equal(one.reconstruct(IMAGES), other.reconstruct(IMAGES))
    np.testing.assert_array_equal(one.sample([0, 1], 2), other.sample([0, 1], 2))


def test_a_pushed_run_is_loaded_and_pulled_bit_for_bit(
    server, prior_workdir, tmp_path, monkeypatch
):
    argv = ["push", "user/digits", "--workdir", str(prior_workdir), "--private", "--license", "mit"]
    monkeypatch.setattr(sys, "argv", argv)
    push_command.main()
    (files,) = server.repositories["user/digits"][1:]
    assert files.keys() == {*pretrained.FILES, "README.md", "samples.png"}
    assert server.private == {"user/digits"}
    run = load_run(prior_workdir)
    loaded = load_run("hf://user/digits")
    assert_same_outputs(run, loaded)
    assert (loaded.step, loaded.class_names) == (run.step, run.class_names)
    monkeypatch.setattr(sys, "argv", ["pull", "user/digits", "--workdir", str(tmp_path / "pulled")])
    pull_command.main()
    pulled = load_run(tmp_path / "pulled")
    assert_same_outputs(run, pulled)
    assert pulled.dataset == run.dataset
    # The files name no folders of this machine, and another commit keeps the old one.
    assert str(tmp_path.parent) not in files["config.json"].decode()
    sharing.push(prior_workdir, "user/digits", license="cc0-1.0")
    first = hub_server.hash_commit("user/digits", 1)
    assert_same_outputs(run, load_run(f"hf://user/digits@{first}"))


@pytest.mark.slow
def test_a_pulled_run_can_be_trained_further(vqgan_workdir, tmp_path):
    sharing.save_pretrained(vqgan_workdir, tmp_path / "folder", discriminator=True)
    names = load_file(tmp_path / "folder" / "model.safetensors")
    assert any(name.startswith("discriminator.batch_stats.") for name in names)
    sharing.pull(tmp_path / "folder", tmp_path / "run")
    config = load_run(tmp_path / "run").config
    assert config.vqgan.warmup_steps == 200, "new optimizer states need a warm-up"
    before = Store(tmp_path / "run", "vqgan").load_best().nets
    config = dataclasses.replace(
        replace_section(config, "vqgan", steps=2), workdir=str(tmp_path / "run"), devices=1
    )
    loop.train(VQGANStage, config)
    after = Store(tmp_path / "run", "vqgan").read(2).nets
    for name in ("generator", "discriminator"):
        old, new = before[name]["params"], after[name]["params"]
        leaves = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        moved = max(float(np.abs(x - y).max()) for x, y in leaves)
        assert moved < 1e-4, "training continued from the weights"


def test_the_card_has_the_figures_of_the_report(prior_workdir, tmp_path):
    run = load_run(prior_workdir)
    protocol = {
        "generator": "1234", "hash": run.hash_weights(), "prior_step": run.step, "images": 40,
        "split": "test",
    }  # fmt: skip
    report = {
        "features": "FD-VGG16", "reconstruction": {"psnr": 21.25, "fd": 1.5, "code_counts": [1]},
        "samples": {"fd": 2.5, "accuracy": 0.75}, "protocol": protocol,
        "warnings": ["40 images of the split are too few."],
    }  # fmt: skip
    sharing.save_pretrained(run, tmp_path / "a", report=report, license="mit", name="user/digits")
    card = (tmp_path / "a" / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: taming_jax\n")
        and "\nlicense: mit\n---\n# digits" in card
    )
    assert (
        "| reconstruction | psnr | 21.25 | dB |" in card and "| samples | FD-VGG16 | 2.5 |" in card
    )
    assert "Protocol: prior_step 2, images 40, split test." in card
    assert "Warning: 40 images of the split are too few." in card
    assert 'load_run("hf://user/digits")' in card and "![Samples" in card
    other = report | {"protocol": protocol | {"hash": "0" * 16}}
    for number, (value, reason) in enumerate(
        ((other, "the evaluation report is that of other weights"),
         (None, "the run has not been evaluated"))
    ):  # fmt: skip
        sharing.save_pretrained(run, tmp_path / str(number), report=value)
        card = (tmp_path / str(number) / "README.md").read_text()
        assert f"There are no figures here: {reason}." in card
        assert "The author has not chosen a licence" in card


@pytest.mark.slow
def test_a_discriminator_and_pictures_are_shared_only_if_they_fit(prior_workdir, tmp_path):
    with pytest.raises(UserError, match="there is no .*reconstructions.png"):
        sharing.save_pretrained(prior_workdir, tmp_path / "a", reconstructions=True)
    workdir = shutil.copytree(prior_workdir, tmp_path / "run")
    (workdir / "figures").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(workdir / "figures" / "reconstructions.png")
    sharing.save_pretrained(workdir, tmp_path / "b", reconstructions=True, discriminator=True)
    assert (tmp_path / "b" / "reconstructions.png").exists()
    sharing.save_pretrained(tmp_path / "b", tmp_path / "c", discriminator=True)
    files = [load_file(tmp_path / x / "model.safetensors") for x in "bc"]
    assert files[0].keys() == files[1].keys()
    # Stage 1 that was trained further has another generator than the prior.
    run = load_run(workdir)
    run.params = jax.tree.map(lambda x: x + 1, run.params)
    with pytest.raises(UserError, match="no discriminator that belongs to the run's generator"):
        sharing.save_pretrained(run, tmp_path / "d", discriminator=True)


def test_damaged_and_foreign_folders_are_refused(vqgan_workdir, tmp_path):
    folder = tmp_path / "folder"
    sharing.save_pretrained(vqgan_workdir, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its arrays differ from what was written"):
        load_run(folder)
    content[-1] ^= 1
    weights.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["vqgan"]["channels"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not match the settings in config.json"):
        load_run(folder)
    shutil.copy(prepare_foreign(tmp_path), weights)
    with pytest.raises(UserError, match="was not written by taming_jax"):
        load_run(folder)
    with pytest.raises(UserError, match="is not an empty folder"):
        sharing.save_pretrained(vqgan_workdir, folder)


def prepare_foreign(folder):
    from safetensors.numpy import save_file

    save_file({"encoder.weight": np.zeros(3, np.float32)}, folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


def test_what_the_hub_refuses_is_a_sentence(server, vqgan_workdir, monkeypatch):
    server.repositories["user/empty"] = [{"README.md": b"another project"}]
    server.repositories["user/private"], server.private = [{}], {"user/private"}
    for name, message in (
        ("hf://user/nothing", "the hub has no repository user/nothing, or it is private"),
        ("hf://user/empty@v2", "the repository user/empty has no revision 'v2'"),
        ("hf://user/empty", "user/empty holds no run: it has no config.json"),
        ("hf://user/a/b", "'user/a/b' is not the name of a repository; use user/name"),
        ("hf://user/gated", "user/gated asks you to accept its terms"),
        ("hf://user/broken", "the hub cannot be reached"),
    ):
        with pytest.raises(UserError, match=message):
            load_run(name)
    with pytest.raises(UserError, match="your token does not allow this for other/digits"):
        sharing.push(vqgan_workdir, "other/digits")
    with pytest.raises(UserError, match="'digits' is not the name of a repository; use user/name"):
        sharing.push(vqgan_workdir, "digits")
    commits = len(server.repositories["user/empty"])
    with pytest.raises(UserError, match="user/empty exists and is public; make it private"):
        sharing.push(vqgan_workdir, "user/empty", private=True)
    assert len(server.repositories["user/empty"]) == commits, "nothing was uploaded"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    for action in (
        lambda: sharing.push(vqgan_workdir, "user/new"), lambda: load_run("hf://user/private")
    ):  # fmt: skip
        with pytest.raises(UserError, match="log in with `hf auth login`, or set HF_TOKEN"):
            action()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="log in with `hf auth login`, or set HF_TOKEN"):
        sharing.push(vqgan_workdir, "user/new")


def test_without_a_network_the_cache_is_used_or_a_sentence_comes_soon(
    server, vqgan_workdir, monkeypatch, capsys
):
    assert hub.SECONDS < 3
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    sharing.push(vqgan_workdir, "user/digits")
    run = load_run("hf://user/digits")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, but never replies
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="the hub cannot be reached"):
            load_run("hf://user/other")
        with pytest.raises(UserError, match="the hub cannot be reached"):
            sharing.push(vqgan_workdir, "user/other")
        assert time.monotonic() - start < 2
        cached = load_run("hf://user/digits")
    assert "using the copy of hf://user/digits in the cache" in capsys.readouterr().out
    np.testing.assert_array_equal(run.reconstruct(IMAGES), cached.reconstruct(IMAGES))
