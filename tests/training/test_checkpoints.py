import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taming_jax.config.load import load_config
from taming_jax.config.migrations import FORMAT
from taming_jax.errors import UserError
from taming_jax.storage import hash_json
from taming_jax.training.checkpoints import Store
from taming_jax.training.state import Net, TrainState
from taming_jax.weights.arrays import flatten_arrays

CONFIG = load_config("mnist_tiny")
SECTIONS = ("seed", "dtype", "data", "vqgan")


def make_state(step, seed=0):
    params = {"kernel": jax.random.normal(jax.random.key(seed + step), (40, 30)), "b": jnp.ones(3)}
    net = Net(params, optax.adam(1e-3).init(params), {"stats": jnp.arange(4.0)}, None)
    return jax.tree.map(np.asarray, TrainState(jnp.int32(step), {"generator": net}))


def save_checkpoints(folder, values):
    """Returns a store with one checkpoint per step of `values`, which maps steps to monitored
    values or None."""
    store = Store(folder, "vqgan")
    for step, value in values.items():
        store.save(step, make_state(step), CONFIG, None if value is None else {"nll": value})
    store.wait()
    return store


def restore(store, say=lambda sentence: None, config=CONFIG):
    """Restores the newest usable checkpoint of a store."""
    store.say = say
    return store.restore(make_state(0), config, SECTIONS, ())


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, array in flatten_arrays(left).items():
        other = flatten_arrays(right)[path]
        np.testing.assert_array_equal(array, other, err_msg=".".join(path))
        assert array.dtype == other.dtype


def find_largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_state_is_restored_bit_for_bit(tmp_path):
    save_checkpoints(tmp_path, {5: None})
    assert_equal(restore(Store(tmp_path, "vqgan")), make_state(5))
    assert restore(Store(tmp_path, "other")) is None


def test_a_failure_of_the_device_is_not_taken_for_one_of_the_disk(tmp_path):
    class LostArray:
        shape, dtype = (3,), np.dtype(np.float32)

        def __array__(self, *_, **__):
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is lost")

    store = Store(tmp_path, "vqgan")
    store.save(1, {"kernel": LostArray()}, CONFIG, None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is lost"):
        store.wait()


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    store = save_checkpoints(tmp_path, {1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: None, 6: 0.2})
    assert store.steps() == [2, 5, 6]
    reopened = Store(tmp_path, "vqgan")
    assert reopened.best() == (2, 0.1)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "hashes", "end"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path, damage):
    save_checkpoints(tmp_path, {1: None, 2: None})
    newest = tmp_path / "checkpoints" / "vqgan" / "2"
    file = find_largest_file(newest / "state")
    if damage == "flip":
        flip_byte(file)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "remove":
        file.unlink()
    elif damage == "end":  # without this file, Orbax ignores the checkpoint
        (newest / "_CHECKPOINT_METADATA").unlink()
    else:
        shutil.rmtree(newest / "about")
    messages = []
    store = Store(tmp_path, "vqgan")
    assert_equal(restore(store, messages.append), make_state(1))
    assert str(newest) in messages[0] and "damaged" in messages[0]
    assert any("step 1" in message for message in messages)
    # The step can be saved again, and the damaged checkpoint is kept.
    assert (tmp_path / "checkpoints" / "vqgan-damaged" / "2").exists()
    store.save(2, make_state(2), CONFIG, None)
    store.wait()
    assert_equal(restore(store), make_state(2))


def test_a_new_run_can_save_despite_a_partly_deleted_checkpoint(tmp_path):
    """A run that is killed during --restart leaves a checkpoint in this state."""
    save_checkpoints(tmp_path, {5: None, 9: None})
    (tmp_path / "checkpoints" / "vqgan" / "9" / "_CHECKPOINT_METADATA").unlink()
    store = Store(tmp_path, "vqgan")
    store.clear(CONFIG, SECTIONS)
    store.save(1, make_state(1), CONFIG, None)
    store.wait()
    assert_equal(restore(store), make_state(1))


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("about/metadata", b'"code_dim"', b'"code_dhm"'),
        ("about/metadata", b'"codebook_size": 128', b'"codebook_size": 129'),
        ("about/metadata", f'"format": {FORMAT}'.encode(), f'"format": {FORMAT + 1}'.encode()),
        ("about/metadata", b"0.25", b"0.15"),
    ],
)
def test_a_checkpoint_with_damaged_metadata_is_not_used(tmp_path, file, before, after):
    save_checkpoints(tmp_path, {1: 0.5, 2: 0.25})
    newest = tmp_path / "checkpoints" / "vqgan" / "2"
    content = (newest / file).read_bytes()
    assert before in content
    (newest / file).write_bytes(content.replace(before, after))
    messages = []
    store = Store(tmp_path, "vqgan")
    assert store.best() == (1, 0.5)
    assert_equal(restore(store, messages.append), make_state(1))
    assert str(newest) in messages[0]
    store.save(2, make_state(2), CONFIG, {"nll": 0.3})
    store.wait()
    assert store.best() == (2, 0.3)


def rewrite_metadata(folder, change):
    """Changes the metadata of a checkpoint and updates their hash."""
    file = folder / "about" / "metadata"
    metadata = json.loads(file.read_text())
    del metadata["hash"]
    change(metadata)
    file.write_text(json.dumps(metadata | {"hash": hash_json(metadata)}))


def test_a_checkpoint_in_the_first_format_can_be_read(tmp_path):
    """The first format has no format number, and its states do not count skipped steps."""
    kernel = np.arange(6, dtype=np.float32)
    store = Store(tmp_path, "vqgan")
    store.save(3, {"step": np.int32(3), "kernel": kernel}, CONFIG, {"nll": 0.5})
    store.wait()
    rewrite_metadata(store.path / "3", lambda metadata: metadata.pop("format"))
    assert store.best() == (3, 0.5)
    template = {"step": np.int32(0), "skipped": np.int32(9), "kernel": np.zeros(6, np.float32)}
    restored_state = store.restore(template, CONFIG, SECTIONS, ())
    assert_equal(restored_state, {"step": np.int32(3), "skipped": np.int32(0), "kernel": kernel})
    assert store.read(3).config == CONFIG


def test_a_checkpoint_in_a_newer_format_is_refused_and_kept(tmp_path):
    store = save_checkpoints(tmp_path, {1: 0.5, 2: 0.25})
    rewrite_metadata(store.path / "2", lambda metadata: metadata.update(format=FORMAT + 1))
    message = (
        rf"vqgan/2 was written by a newer taming_jax \(format {FORMAT + 1}; .*update taming_jax"
    )
    for use in (lambda: restore(store), store.best, store.load_best):
        with pytest.raises(UserError, match=message):
            use()
    assert store.steps() == [1, 2]


def test_the_last_config_comes_from_the_newest_undamaged_training_checkpoint(tmp_path):
    assert Store(tmp_path, "vqgan").read_last_config() is None
    store = save_checkpoints(tmp_path, {1: None})
    longer = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, steps=99))
    store.save(2, make_state(2), longer, None)
    store.wait()
    assert store.read_last_config() == longer
    (store.path / "2" / "about" / "metadata").write_text("{")
    assert store.read_last_config() == CONFIG
    rewrite_metadata(store.path / "1", lambda metadata: metadata["config"].update(new=1))
    with pytest.raises(UserError, match="written by another version of this program: .* 'new'"):
        store.read_last_config()
    imported = Store(tmp_path / "imported", "vqgan")
    imported.save(0, {"step": np.zeros((), np.int32)}, CONFIG, None, weights_only=True)
    imported.require(0)
    assert imported.read_last_config() is None


def test_a_damaged_older_checkpoint_does_not_stop_a_run(tmp_path):
    save_checkpoints(tmp_path, {1: 0.25, 2: 0.5})
    (tmp_path / "checkpoints" / "vqgan" / "1" / "about" / "metadata").write_text("{")
    store = Store(tmp_path, "vqgan")
    assert_equal(restore(store), make_state(2))
    store.save(3, make_state(3), CONFIG, {"nll": 0.4})
    store.wait()
    assert store.steps() == [2, 3]


def test_if_the_best_checkpoint_is_damaged_the_next_best_is_used_with_a_warning(tmp_path, capsys):
    save_checkpoints(tmp_path, {1: 0.2, 2: 0.5, 3: 0.4})
    store = Store(tmp_path, "vqgan")
    assert store.load_best().step == 1
    flip_byte(find_largest_file(store.path / "1" / "state"))
    assert store.load_best().step == 3
    assert f"{store.path / '1'} is damaged" in capsys.readouterr().out


def test_if_every_checkpoint_is_damaged_the_run_stops_and_suggests_restart(tmp_path):
    save_checkpoints(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        flip_byte(find_largest_file(tmp_path / "checkpoints" / "vqgan" / str(step) / "state"))
    store = Store(tmp_path, "vqgan")
    with pytest.raises(UserError, match="every checkpoint .* damaged.*--restart"):
        restore(store)
    assert store.steps() == [1, 2]


def test_a_different_architecture_is_refused_and_the_setting_is_named(tmp_path):
    store = save_checkpoints(tmp_path, {1: None})
    other = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, code_dim=8))
    with pytest.raises(UserError, match="--vqgan.code-dim is 8, not 4") as error:
        restore(store, config=other)
    # The preset may have changed since the run was created.
    assert f"with --config {tmp_path / 'config.json'} --workdir {tmp_path}." in str(error.value)
    longer = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, steps=99))
    assert_equal(restore(store, config=longer), make_state(1))


def test_clear_deletes_checkpoints_and_moves_other_files_aside(tmp_path):
    store = save_checkpoints(tmp_path, {1: None, 2: None})
    notes = tmp_path / "checkpoints" / "vqgan" / "2024" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    store.clear(CONFIG, SECTIONS)
    assert store.steps() == [] and not notes.exists()
    moved_notes = tmp_path / "checkpoints" / "vqgan-damaged" / "2024" / "notes.txt"
    assert moved_notes.read_text() == "mine"


def test_clear_keeps_imported_weights_if_they_fit_and_otherwise_moves_them_aside(tmp_path):
    """A restarted run starts from the imported weights, and no setting can delete them."""
    imported = Store(tmp_path, "vqgan")
    imported.save(0, {"step": np.zeros((), np.int32)}, CONFIG, None, weights_only=True)
    imported.require(0)
    store = save_checkpoints(tmp_path, {1: None})
    assert store.steps() == [0, 1]
    store.clear(CONFIG, SECTIONS)
    assert store.steps() == [0]
    other = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, code_dim=8))
    store.clear(other, SECTIONS)
    assert store.steps() == []
    assert (tmp_path / "checkpoints" / "vqgan-weights-only" / "0").is_dir()


def test_reading_does_not_remove_an_unfinished_save(tmp_path):
    save_checkpoints(tmp_path, {1: 0.1})
    unfinished = tmp_path / "checkpoints" / "vqgan" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert Store(tmp_path, "vqgan").best() == (1, 0.1)
    assert unfinished.exists()
