"""What long work shows of itself, on a terminal and elsewhere."""

import io
import sys
import threading
import time

import pytest

from taming_jax import progress
from taming_jax.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_for(lines, work):
    """Runs work until there are so many lines of it, and returns them."""
    enough, written = threading.Event(), []

    def write(line):
        written.append(line)
        if len(written) >= lines:
            enough.set()

    with work(write) as shown:
        shown.update(3)
        assert enough.wait(20)
    return written


def test_long_work_writes_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    first, *_ = run_for(2, lambda write: Progress("encoding", 12, "images", write=write))
    assert first == "encoding: 3 of 12 images, 0 seconds left"
    first, *_ = run_for(1, lambda write: Progress("compiling", write=write))
    assert first == "compiling: 0 seconds so far"


def test_the_first_item_may_take_long_too(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    with Progress("reading", 5 * 2**20, "B"):
        time.sleep(0.2)
    assert "reading: 0 of 5 MiB\n" in capsys.readouterr().err


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
        assert shown._bar.n == 12
    assert "encoding: 100%" in screen.getvalue()


def test_a_process_that_leaves_it_to_another_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    monkeypatch.setattr(progress, "_silenced", False)
    progress.silence()
    with Progress("encoding", 12), Progress("compiling"):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 seconds"), (119, "119 seconds"), (3600, "60 minutes"), (9000, "2 hours"),
     (432000, "5 days")],
)  # fmt: skip
def test_a_duration_is_one_number_and_its_unit(seconds, words):
    assert duration(seconds) == words
