"""Tests of the progress of long work, on a terminal and elsewhere."""

import io
import sys
import time

from taming_jax import progress
from taming_jax.progress import Progress, say_above


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_work_writes_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    with Progress("encoding", 12, "images") as bar:
        time.sleep(0.05)
        bar.update(3)
        bar.set_postfix_str("nll 0.5", refresh=False)
        time.sleep(0.05)
        bar.update(30)  # the last batch is padded
        say_above("A sentence.")
    out, err = capsys.readouterr()
    first, last = err.splitlines()[0], err.splitlines()[-1]
    assert first == "encoding: 3 of 12 images, 00:00 left", err
    assert last == "encoding: 12 of 12 images, 00:00 left, nll 0.5", err
    assert out == "A sentence.\n"


def test_short_work_writes_nothing_to_a_file(capsys):
    with Progress("encoding", 12, "images") as bar:
        bar.update(12)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_that_ends_at_the_total(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("encoding", 12, "images") as bar:
        for _ in range(2):
            bar.update(8)  # the last batch is padded
        assert bar.n == 12
    assert "encoding: 100%" in screen.getvalue()


def test_a_silenced_process_shows_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    monkeypatch.setattr(progress, "_silenced", False)
    progress.silence()
    with Progress("encoding", 12, "images") as bar:
        time.sleep(0.1)
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_nested_work_writes_no_control_characters_to_a_file(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    with Progress("training", 4, "steps") as outer, Progress("validation", 4, "images") as inner:
        for _ in range(2):
            time.sleep(0.03)
            inner.update(2)
            outer.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("validation: ") for line in lines)
    assert all(line.startswith(("training: ", "validation: ")) for line in lines), lines
