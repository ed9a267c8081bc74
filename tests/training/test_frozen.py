import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.errors import UserError
from taming_jax.training.checkpoints import Store

CONFIG = load_config("mnist_tiny")
GENERATOR = {"decoder": {"kernel": np.arange(6.0, dtype=np.float32)}, "bias": np.ones(2)}
SECTIONS = ("seed", "data", "prior")


def make_state(step):
    return {"step": np.int32(step), "nets": {"transformer": {"params": np.full(3, step)}}}


def save_checkpoints(folder, steps, generator=GENERATOR, **settings):
    store = Store(folder, "prior", frozen={"generator": generator})
    for step in steps:
        store.save(step, make_state(step), CONFIG, None, **settings)
        store.require(step)
    return store


def list_files(store):
    return sorted((store.path / "frozen").iterdir())


def assert_has_generator(checkpoint):
    read = checkpoint.generator
    np.testing.assert_array_equal(read["decoder"]["kernel"], GENERATOR["decoder"]["kernel"])
    np.testing.assert_array_equal(read["bias"], GENERATOR["bias"])
    assert checkpoint.nets["transformer"]["params"].tolist() == [checkpoint.step] * 3


def test_a_frozen_network_is_stored_once_and_read_with_every_checkpoint(tmp_path):
    store = save_checkpoints(tmp_path, [1, 2])
    (file,) = list_files(store)
    before = file.stat().st_mtime_ns
    save_checkpoints(tmp_path, [3])
    assert list_files(store) == [file] and file.stat().st_mtime_ns == before
    assert not any("generator" in str(path) for path in (store.path / "3").rglob("*"))
    for step in (2, 3):
        assert_has_generator(Store(tmp_path, "prior").read(step))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_frozen_network_is_named_and_a_copy_of_it_repairs_the_run(tmp_path, damage):
    (file,) = list_files(save_checkpoints(tmp_path, [1, 2]))
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        damaged = bytearray(content)
        damaged[content.index(GENERATOR["decoder"]["kernel"].tobytes()) + 8] ^= 1
        file.write_bytes(damaged if damage == "flip" else content[:100])
    problem = "missing" if damage == "remove" else "damaged"
    store, messages = Store(tmp_path, "prior"), []
    store.say = messages.append
    for use in (
        store.load_best, lambda: store.restore(make_state(0), CONFIG, SECTIONS, ()),
        lambda: store.read(2),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{file} is {problem}; it is the generator of"):
            use()
    assert store.steps() == [1, 2] and not messages, "the checkpoints themselves are intact"
    file.write_bytes(content)
    assert_has_generator(store.load_best())
    assert store.restore(make_state(0), CONFIG, SECTIONS, ())["step"] == 2


def test_a_frozen_network_without_a_file_is_written_again_with_the_next_checkpoint(tmp_path):
    store = save_checkpoints(tmp_path, [1])
    list_files(store)[0].unlink()
    store.save(2, make_state(2), CONFIG, None)
    store.require(2)
    assert_has_generator(store.read(1))


def test_a_damaged_file_is_written_again_by_a_new_process(tmp_path):
    """A restarted run may find the file that a damaged run has left."""
    store = save_checkpoints(tmp_path, [1])
    list_files(store)[0].write_bytes(b"PK")
    store = save_checkpoints(tmp_path, [2])
    assert_has_generator(store.read(1))


def test_a_restart_deletes_a_frozen_network_unless_a_kept_checkpoint_needs_it(tmp_path):
    other = {"bias": np.zeros(2)}
    store = save_checkpoints(tmp_path, [0], weights_only=True)
    save_checkpoints(tmp_path, [1], other)
    assert len(list_files(store)) == 2
    store.clear(CONFIG, SECTIONS)
    assert store.steps() == [0] and len(list_files(store)) == 1
    assert_has_generator(store.read(0))


def test_a_checkpoint_of_an_older_format_holds_the_network_itself(tmp_path):
    store = Store(tmp_path, "prior")
    nets = {"transformer": {"params": np.full(3, 7)}, "generator": {"params": GENERATOR}}
    store.save(7, {"step": np.int32(7), "nets": nets}, CONFIG, None)
    store.require(7)
    assert_has_generator(store.read(7))
    assert store.restore(make_state(0), CONFIG, SECTIONS, ()).keys() == {"step", "nets"}
