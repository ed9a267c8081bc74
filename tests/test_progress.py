"""What long work shows of itself, on a terminal and elsewhere."""

import io
import sys
import time

from taming_jax import progress
from taming_jax.progress import Progress, say_above


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_work_writes_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    with Progress("encoding", 12, "images") as shown:
        time.sleep(0.05)
        shown.update(3)
        shown.set_postfix_str("nll 0.5", refresh=False)
        time.sleep(0.05)
        shown.update(30)  # the last batch is filled up
        say_above("A sentence.")
    out, err = capsys.readouterr()
    first, last = err.splitlines()[0], err.splitlines()[-1]
    assert first == "encoding: 3 of 12 images, 00:00 left", err
    assert last == "encoding: 12 of 12 images, 00:00 left, nll 0.5", err
    assert out == "A sentence.\n"


def test_short_work_writes_nothing_to_a_file(capsys):
    with Progress("encoding", 12, "images") as shown:
        shown.update(12)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_that_ends_at_the_total(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("encoding", 12, "images") as shown:
        for _ in range(2):
            shown.update(8)  # the last batch is filled up
        assert shown.n == 12
    assert "encoding: 100%" in screen.getvalue()


def test_a_process_that_leaves_it_to_another_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    monkeypatch.setattr(progress, "_silenced", False)
    progress.silence()
    with Progress("encoding", 12, "images") as shown:
        time.sleep(0.1)
        shown.update(3)
    assert capsys.readouterr() == ("", "")
