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


def state(step, seed=0):
    params = {"kernel": jax.random.normal(jax.random.key(seed + step), (40, 30)), "b": jnp.ones(3)}
    net = Net(params, optax.adam(1e-3).init(params), {"stats": jnp.arange(4.0)}, None)
    return jax.tree.map(np.asarray, TrainState(jnp.int32(step), {"generator": net}))


def saved(folder, values):
    """A store with a checkpoint a step, each with its monitored value or None."""
    store = Store(folder, "vqgan")
    for step, value in values.items():
        store.save(step, state(step), CONFIG, None if value is None else {"nll": value})
    store.wait()
    return store


def restored(store, say=lambda sentence: None, config=CONFIG):
    store.say = say
    return store.restore(state(0), config, SECTIONS, ())


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, array in flatten_arrays(left).items():
        other = flatten_arrays(right)[path]
        np.testing.assert_array_equal(array, other, err_msg=".".join(path))
        assert array.dtype == other.dtype


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path, {5: None})
    assert_equal(restored(Store(tmp_path, "vqgan")), state(5))
    assert restored(Store(tmp_path, "other")) is None


def test_the_last_two_and_the_best_are_kept(tmp_path):
    store = saved(tmp_path, {1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: None, 6: 0.2})
    assert store.steps() == [2, 5, 6]
    again = Store(tmp_path, "vqgan")
    assert again.best() == (2, 0.1)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "hashes", "end"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, harm):
    saved(tmp_path, {1: None, 2: None})
    newest = tmp_path / "checkpoints" / "vqgan" / "2"
    file = largest_file(newest / "state")
    if harm == "flip":
        flip_byte(file)
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif harm == "remove":
        file.unlink()
    elif harm == "end":  # by whose absence Orbax does not know it
        (newest / "_CHECKPOINT_METADATA").unlink()
    else:
        shutil.rmtree(newest / "about")
    sentences = []
    store = Store(tmp_path, "vqgan")
    assert_equal(restored(store, sentences.append), state(1))
    assert str(newest) in sentences[0] and "damaged" in sentences[0]
    assert any("step 1" in sentence for sentence in sentences)
    # Its step can be saved again, and nothing was thrown away.
    assert (tmp_path / "checkpoints" / "vqgan-damaged" / "2").exists()
    store.save(2, state(2), CONFIG, None)
    store.wait()
    assert_equal(restored(store), state(2))


def test_a_new_run_saves_where_a_half_deleted_checkpoint_lies(tmp_path):
    """As after a kill within --restart."""
    saved(tmp_path, {5: None, 9: None})
    (tmp_path / "checkpoints" / "vqgan" / "9" / "_CHECKPOINT_METADATA").unlink()
    store = Store(tmp_path, "vqgan")
    store.clear(CONFIG, SECTIONS)
    store.save(1, state(1), CONFIG, None)
    store.wait()
    assert_equal(restored(store), state(1))


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("about/metadata", b'"code_dim"', b'"code_dhm"'),
        ("about/metadata", b'"codebook_size": 128', b'"codebook_size": 129'),
        ("about/metadata", f'"format": {FORMAT}'.encode(), f'"format": {FORMAT + 1}'.encode()),
        ("about/metadata", b"0.25", b"0.15"),
    ],
)
def test_damage_to_what_a_checkpoint_says_of_itself_is_damage(tmp_path, file, before, after):
    saved(tmp_path, {1: 0.5, 2: 0.25})
    newest = tmp_path / "checkpoints" / "vqgan" / "2"
    content = (newest / file).read_bytes()
    assert before in content
    (newest / file).write_bytes(content.replace(before, after))
    sentences = []
    store = Store(tmp_path, "vqgan")
    assert store.best() == (1, 0.5)
    assert_equal(restored(store, sentences.append), state(1))
    assert str(newest) in sentences[0]
    store.save(2, state(2), CONFIG, {"nll": 0.3})
    store.wait()
    assert store.best() == (2, 0.3)


def rewritten(folder, change):
    """Changes what a checkpoint says of itself, hash and all."""
    file = folder / "about" / "metadata"
    about = json.loads(file.read_text())
    del about["hash"]
    change(about)
    file.write_text(json.dumps(about | {"hash": hash_json(about)}))


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    """It carried no number, and its state did not count skipped steps."""
    kernel = np.arange(6, dtype=np.float32)
    store = Store(tmp_path, "vqgan")
    store.save(3, {"step": np.int32(3), "kernel": kernel}, CONFIG, {"nll": 0.5})
    store.wait()
    rewritten(store.path / "3", lambda about: about.pop("format"))
    assert store.best() == (3, 0.5)
    template = {"step": np.int32(0), "skipped": np.int32(9), "kernel": np.zeros(6, np.float32)}
    found = store.restore(template, CONFIG, SECTIONS, ())
    assert_equal(found, {"step": np.int32(3), "skipped": np.int32(0), "kernel": kernel})
    assert store.read(3).config == CONFIG


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_where_it_is(tmp_path):
    store = saved(tmp_path, {1: 0.5, 2: 0.25})
    rewritten(store.path / "2", lambda about: about.update(format=FORMAT + 1))
    says = rf"vqgan/2 was written by a newer taming_jax \(format {FORMAT + 1}; .*update taming_jax"
    for use in (lambda: restored(store), store.best, store.load_best):
        with pytest.raises(UserError, match=says):
            use()
    assert store.steps() == [1, 2]


def test_the_last_config_is_that_of_the_newest_undamaged_checkpoint_of_training(tmp_path):
    assert Store(tmp_path, "vqgan").read_last_config() is None
    store = saved(tmp_path, {1: None})
    longer = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, steps=99))
    store.save(2, state(2), longer, None)
    store.wait()
    assert store.read_last_config() == longer
    (store.path / "2" / "about" / "metadata").write_text("{")
    assert store.read_last_config() == CONFIG
    rewritten(store.path / "1", lambda about: about["config"].update(new=1))
    with pytest.raises(UserError, match="written by another version of this program: .* 'new'"):
        store.read_last_config()
    imported = Store(tmp_path / "imported", "vqgan")
    imported.save(0, {"step": np.zeros((), np.int32)}, CONFIG, None, weights_only=True)
    imported.require(0)
    assert imported.read_last_config() is None


def test_older_damage_does_not_stop_a_run(tmp_path):
    saved(tmp_path, {1: 0.25, 2: 0.5})
    (tmp_path / "checkpoints" / "vqgan" / "1" / "about" / "metadata").write_text("{")
    store = Store(tmp_path, "vqgan")
    assert_equal(restored(store), state(2))
    store.save(3, state(3), CONFIG, {"nll": 0.4})
    store.wait()
    assert store.steps() == [2, 3]


def test_the_choice_falls_back_with_a_sentence(tmp_path, capsys):
    saved(tmp_path, {1: 0.2, 2: 0.5, 3: 0.4})
    store = Store(tmp_path, "vqgan")
    assert store.load_best().step == 1
    flip_byte(largest_file(store.path / "1" / "state"))
    assert store.load_best().step == 3
    assert f"{store.path / '1'} is damaged" in capsys.readouterr().out


def test_when_every_checkpoint_is_damaged_the_user_is_asked(tmp_path):
    saved(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        flip_byte(largest_file(tmp_path / "checkpoints" / "vqgan" / str(step) / "state"))
    store = Store(tmp_path, "vqgan")
    with pytest.raises(UserError, match="every checkpoint .* damaged.*--restart"):
        restored(store)
    assert store.steps() == [1, 2]


def test_another_architecture_is_refused_by_name(tmp_path):
    store = saved(tmp_path, {1: None})
    other = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, code_dim=8))
    with pytest.raises(UserError, match="--vqgan.code-dim is 8, not 4") as error:
        restored(store, config=other)
    # As where a preset has changed since.
    assert f"with --config {tmp_path / 'config.json'} --workdir {tmp_path}." in str(error.value)
    longer = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, steps=99))
    assert_equal(restored(store, config=longer), state(1))


def test_clear_deletes_checkpoints_and_nothing_else(tmp_path):
    store = saved(tmp_path, {1: None, 2: None})
    notes = tmp_path / "checkpoints" / "vqgan" / "2024" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    store.clear(CONFIG, SECTIONS)
    assert store.steps() == [] and not notes.exists()
    aside = tmp_path / "checkpoints" / "vqgan-damaged" / "2024" / "notes.txt"
    assert aside.read_text() == "mine"


def test_clear_keeps_imported_weights_or_moves_them_aside(tmp_path):
    """Anew is from them, which no setting can delete."""
    imported = Store(tmp_path, "vqgan")
    imported.save(0, {"step": np.zeros((), np.int32)}, CONFIG, None, weights_only=True)
    imported.require(0)
    store = saved(tmp_path, {1: None})
    assert store.steps() == [0, 1]
    store.clear(CONFIG, SECTIONS)
    assert store.steps() == [0]
    other = dataclasses.replace(CONFIG, vqgan=dataclasses.replace(CONFIG.vqgan, code_dim=8))
    store.clear(other, SECTIONS)
    assert store.steps() == []
    assert (tmp_path / "checkpoints" / "vqgan-weights-only" / "0").is_dir()


def test_a_reader_leaves_a_save_under_way_alone(tmp_path):
    saved(tmp_path, {1: 0.1})
    under_way = tmp_path / "checkpoints" / "vqgan" / "2.orbax-checkpoint-tmp"
    under_way.mkdir()
    assert Store(tmp_path, "vqgan").best() == (1, 0.1)
    assert under_way.exists()
