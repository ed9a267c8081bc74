"""Tests of the log writers, also on disks that are temporarily full."""

import struct

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from taming_jax.training.writers import JsonLines, TensorBoard, read_rows


def make_rows(*steps):
    return [{"step": step, "split": "train", "nll": 0.5} for step in steps]


def write_rows(writer, *steps):
    for step in steps:
        writer.scalars(step, "train", {"nll": 0.5})


def test_rows_that_could_not_be_written_are_written_later(tmp_path, limit_file_size):
    path = tmp_path / "folder" / "vqgan.jsonl"
    writer = JsonLines(path.parent, "vqgan")
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
    path = tmp_path / "vqgan.jsonl"
    write_rows(JsonLines(tmp_path, "vqgan"), 1, 2, 3)
    with path.open("ab") as stream:
        stream.write(b'{"step": 4, "nl')
    JsonLines(tmp_path, "vqgan").resume(3)
    assert read_rows(path) == make_rows(1, 2, 3) and path.read_bytes().endswith(b"}\n")
    writer = JsonLines(tmp_path, "vqgan")
    writer.resume(2)
    assert read_rows(path) == make_rows(1, 2)
    write_rows(writer, 9)
    assert read_rows(path) == make_rows(1, 2, 9)


def test_the_speed_is_written_to_a_separate_file(tmp_path):
    writer = JsonLines(tmp_path, "prior")
    writer.scalars(2, "validation", {"nll": 0.5})
    writer.scalars(2, "speed", {"steps_per_second": 3.0})
    assert read_rows(tmp_path / "prior.jsonl") == [{"step": 2, "split": "validation", "nll": 0.5}]
    assert read_rows(tmp_path / "prior_speed.jsonl") == [{"step": 2, "steps_per_second": 3.0}]


def test_tensorboard_continues_in_another_file_after_a_failure(tmp_path, limit_file_size):
    writer = TensorBoard(tmp_path / "events")
    writer.resume(10)
    writer.scalars(11, "train", {"nll": 0.5})
    (file,) = (tmp_path / "events").iterdir()
    limit_file_size(file.stat().st_size + 5)
    with pytest.raises(OSError, match="too large"):
        writer.scalars(12, "train", {"nll": 0.4})
    limit_file_size(10_000)
    writer.scalars(13, "train", {"nll": 0.3})
    writer.close()
    assert read_scalars(tmp_path / "events") == {
        ("train/nll", 11): 0.5,
        ("train/nll", 13): pytest.approx(0.3),
    }


def read_scalars(folder):
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
            values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            content = content[16 + length :]
    return values


def test_a_log_that_was_deleted_during_a_run_is_created_again(tmp_path):
    writer = JsonLines(tmp_path, "vqgan")
    write_rows(writer, 1, 2)
    (tmp_path / "vqgan.jsonl").unlink()
    write_rows(writer, 3, 4)
    assert read_rows(tmp_path / "vqgan.jsonl") == make_rows(3, 4)
