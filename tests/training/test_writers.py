"""Tests of the log writers, also on disks that are temporarily full."""

import io
import json
import struct
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from taming_jax.errors import UserError
from taming_jax.training.writers import (
    JsonLines,
    Service,
    TensorBoard,
    check_destinations,
    read_rows,
)
from tests import small_runs


def make_json_lines(folder, stage="vqgan"):
    return JsonLines(small_runs.make_config(folder), stage)


def make_rows(*steps):
    return [{"step": step, "split": "train", "nll": 0.5} for step in steps]


def write_rows(writer, *steps):
    for step in steps:
        writer.scalars(step, "train", {"nll": 0.5})


def test_rows_that_could_not_be_written_are_written_later(tmp_path, limit_file_size):
    path = tmp_path / "metrics" / "vqgan.jsonl"
    writer = make_json_lines(tmp_path)
    write_rows(writer, 1, 2)
    limit_file_size(path.stat().st_size + 5)
    for step in (3, 4):
        with pytest.raises(OSError, match="too large"):
            write_rows(writer, step)
    assert read_rows(path) == make_rows(1, 2)
    limit_file_size(1000)
    write_rows(writer, 5)
    assert read_rows(path) == make_rows(1, 2, 3, 4, 5)


def test_resuming_removes_later_rows_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics" / "vqgan.jsonl"
    write_rows(make_json_lines(tmp_path), 1, 2, 3)
    with path.open("ab") as stream:
        stream.write(b'{"step": 4, "nl')
    make_json_lines(tmp_path).resume(3)
    assert read_rows(path) == make_rows(1, 2, 3) and path.read_bytes().endswith(b"}\n")
    writer = make_json_lines(tmp_path)
    writer.resume(2)
    assert read_rows(path) == make_rows(1, 2)
    write_rows(writer, 9)
    assert read_rows(path) == make_rows(1, 2, 9)


def test_the_speed_is_written_to_a_separate_file(tmp_path):
    writer = make_json_lines(tmp_path, "prior")
    writer.scalars(2, "validation", {"nll": 0.5})
    writer.scalars(2, "speed", {"steps_per_second": 3.0})
    folder = tmp_path / "metrics"
    assert read_rows(folder / "prior.jsonl") == [{"step": 2, "split": "validation", "nll": 0.5}]
    assert read_rows(folder / "prior_speed.jsonl") == [{"step": 2, "steps_per_second": 3.0}]


def test_tensorboard_continues_in_another_file_after_a_failure(tmp_path, limit_file_size):
    writer, folder = (
        TensorBoard(small_runs.make_config(tmp_path), "vqgan"),
        tmp_path / "tensorboard",
    )
    writer.resume(10)
    writer.scalars(11, "train", {"nll": 0.5})
    (file,) = (folder / "vqgan").iterdir()
    limit_file_size(file.stat().st_size + 5)
    with pytest.raises(OSError, match="too large"):
        writer.scalars(12, "train", {"nll": 0.4})
    limit_file_size(10_000)
    writer.scalars(13, "train", {"nll": 0.3})
    writer.close()
    values = {key: value.simple_value for key, value in read_events(folder / "vqgan").items()}
    assert values == {("train/nll", 11): 0.5, ("train/nll", 13): pytest.approx(0.3)}


def read_events(folder):
    """Returns the values that TensorBoard reads from complete events, by tag and step."""
    values = {}
    for file in folder.iterdir():
        content = file.read_bytes()
        while len(content) > 12:
            (length,), head = struct.unpack("<Q", content[:8]), content[8:12]
            if len(content) < 16 + length:
                break
            body, tail = content[12 : 12 + length], content[12 + length : 16 + length]
            assert struct.unpack("<I", head)[0] == masked_crc32c(content[:8])
            assert struct.unpack("<I", tail)[0] == masked_crc32c(body)
            event = event_pb2.Event.FromString(body)
            values |= {(value.tag, event.step): value for value in event.summary.value}
            content = content[16 + length :]
    return values


def test_tensorboard_receives_figures_as_images_and_the_config_as_text(tmp_path):
    writer = TensorBoard(small_runs.make_config(tmp_path), "vqgan")
    writer.resume(0)
    writer.text(0, "config", '{"seed": 0}')
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "codes.png")
    writer.image(5, "codes", tmp_path / "codes.png")
    writer.close()
    values = read_events(tmp_path / "tensorboard" / "vqgan")
    assert values["config/text_summary", 0].tensor.string_val == [b'{"seed": 0}']
    image = values["figures/codes", 5].image
    assert (image.width, image.height, image.colorspace) == (4, 2, 3)
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_a_log_that_was_deleted_during_a_run_is_created_again(tmp_path):
    writer, file = make_json_lines(tmp_path), tmp_path / "metrics" / "vqgan.jsonl"
    write_rows(writer, 1, 2)
    file.unlink()
    write_rows(writer, 3, 4)
    assert read_rows(file) == make_rows(3, 4)


def log_and_resume(tmp_path, name):
    """Logs steps 1 to 30, resumes from step 20, and logs steps 21 to 40. Returns the run's id."""
    config = small_runs.make_config(tmp_path / "run")
    (tmp_path / "run").mkdir()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "codes.png")
    ids = []
    for start, last in ((0, 30), (20, 40)):
        writer = Service(name, config, "vqgan")
        writer.open(is_new=not start)
        writer.resume(start)
        for step in range(start + 1, last + 1):
            writer.scalars(step, "train", {"l1": step / 64})
            if step % 10 == 0:
                writer.scalars(step, "validation", {"l1": step / 32})
                writer.image(step, "codes", tmp_path / "codes.png")
        writer.close()
        state = json.loads((tmp_path / "run" / "metrics" / f"vqgan_{name}.json").read_text())
        ids.append(state["id"])
    assert ids[0] == ids[1]
    return ids[0]


def check_history(rows):
    """Checks that each step stands once, with the values of `log_and_resume`."""
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["train/l1"] for row in rows] == [step / 64 for step in range(1, 41)]
    validated = [row["step"] for row in rows if row.get("validation/l1") == row["step"] / 32]
    assert validated == [10, 20, 30, 40]
    drawn = [row["step"] for row in rows if any("figures/codes" in name for name in row)]
    assert drawn == validated


def test_wandb_offline_has_each_step_once_over_all_folders(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_id = log_and_resume(tmp_path, "wandb")
    wandb.teardown()  # waits until its process has written everything
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    check_history([row for file in files for row in read_wandb(file)])


def read_wandb(file):
    """Returns the rows of a file of Weights & Biases. The file is a LevelDB log of the service's
    messages: blocks of 32 KiB with parts of messages, each with a checksum, a length and a type."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, message, rows = file.read_bytes(), 7, b"", []
    assert content[:4] == b":W&B"
    while position < len(content):
        if 32768 - position % 32768 < 7:  # too short for another part
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the only or the last part
            record, message = Record.FromString(message), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items}
                rows.append(row | {"step": record.history.step.num})
    return rows


def test_trackio_has_each_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage")
    run_id = log_and_resume(tmp_path, "trackio")
    logs = storage.SQLiteStorage.get_logs("taming_jax", f"run vqgan {run_id}")
    rows = {}
    for log in logs:  # one per call
        rows.setdefault(log["step"], {"step": log["step"]}).update(log)
    check_history(list(rows.values()))
    assert len([log for log in logs if "train/l1" in log]) == 40


def test_a_moved_run_continues_where_it_was_logged(tmp_path, monkeypatch):
    """And tells services nothing about this machine."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    calls = []
    monkeypatch.setattr("trackio.init", lambda **settings: calls.append(settings))
    config = small_runs.make_config(tmp_path / "run", data__path="/secret", devices=2)
    Service("trackio", config, "vqgan").open(is_new=True)
    writer = Service("trackio", config, "vqgan")
    writer.open(is_new=True)
    writer._run = mock.Mock()
    writer.scalars(1, "train", {"l1": 0.5})
    (tmp_path / "run").rename(tmp_path / "moved")
    Service("trackio", small_runs.make_config(tmp_path / "moved"), "vqgan").open(is_new=False)
    first, second, third = (settings["name"] for settings in calls)
    assert first != second == third
    assert "/secret" not in str(calls) and calls[0]["config"]["devices"] is None
    (tmp_path / "moved" / "metrics" / "vqgan_trackio.json").write_text("{")
    with pytest.raises(UserError, match=r"^trackio: "):
        Service("trackio", small_runs.make_config(tmp_path / "moved"), "vqgan").open(is_new=False)


def test_an_unknown_destination_is_refused(tmp_path):
    with pytest.raises(UserError, match="no log destination 'tensorbord'; did you mean 'tensorb"):
        check_destinations(small_runs.make_config(tmp_path, log=("tensorbord",)))


def test_a_destination_whose_package_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = small_runs.make_config(tmp_path, log=("tensorboard", "wandb"))
    with pytest.raises(UserError, match="pip install wandb"):
        check_destinations(config)
    check_destinations(small_runs.make_config(tmp_path))
