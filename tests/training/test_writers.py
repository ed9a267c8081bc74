"""Where the rows of a log go, also on disks that are full for a while."""

import struct

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from taming_jax.training.writers import JsonLines, TensorBoard, read_rows


def rows(*steps):
    return [{"step": step, "nll": 0.5} for step in steps]


def test_rows_that_could_not_be_written_are_written_later(tmp_path, limited):
    path = tmp_path / "folder" / "rows.jsonl"
    file = JsonLines(path, 0)
    for row in rows(1, 2):
        file.write(row)
    limited(path.stat().st_size + 5)
    for row in rows(3, 4):
        with pytest.raises(OSError, match="too large"):
            file.write(row)
    assert read_rows(path) == rows(1, 2) and file.rows == rows(1, 2, 3, 4)
    limited(1000)
    file.write(rows(5)[0])
    assert read_rows(path) == rows(1, 2, 3, 4, 5)


def test_a_resumed_run_cuts_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = JsonLines(path, 0)
    for row in rows(1, 2, 3):
        file.write(row)
    with path.open("ab") as stream:
        stream.write(b'{"step": 4, "nl')
    assert JsonLines(path, 3).rows == rows(1, 2, 3)
    assert path.read_bytes().endswith(b"}\n")
    again = JsonLines(path, 2)
    assert again.rows == rows(1, 2) == read_rows(path)
    again.write(rows(9)[0])
    assert read_rows(path) == rows(1, 2, 9)


def test_tensorboard_goes_on_in_another_file_after_a_failure(tmp_path, limited):
    writer = TensorBoard(tmp_path / "events")
    writer.resume(10)
    writer.scalars(11, "train", {"nll": 0.5})
    (file,) = (tmp_path / "events").iterdir()
    limited(file.stat().st_size + 5)
    with pytest.raises(OSError, match="too large"):
        writer.scalars(12, "train", {"nll": 0.4})
    limited(10_000)
    writer.scalars(13, "train", {"nll": 0.3})
    writer.close()
    assert scalars(tmp_path / "events") == {
        ("train/nll", 11): 0.5,
        ("train/nll", 13): pytest.approx(0.3),
    }


def scalars(folder):
    """What TensorBoard reads: (tag, step) -> value, of events that are whole."""
    found = {}
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
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            content = content[16 + length :]
    return found


def test_a_file_that_was_deleted_meanwhile_begins_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = JsonLines(path, 0)
    for row in rows(1, 2):
        file.write(row)
    path.unlink()
    for row in rows(3, 4):
        file.write(row)
    assert read_rows(path) == rows(3, 4) and file.complete
