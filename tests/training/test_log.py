import io
import sys
import time

import jax

from taming_jax.config.load import load_config
from taming_jax.training.log import Log
from taming_jax.training.meter import Meter
from taming_jax.training.writers import Writer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_log(rows=(), writers=()):
    meter = Meter(jax.devices()[0], load_config("mnist_tiny"), print)
    return Log("vqgan", 20, 400, rows, writers, meter)


def test_the_progress_bar_does_not_count_compilation(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    log = make_log()
    time.sleep(0.5)  # compilation
    assert screen.getvalue() == ""
    log.start_progress()
    time.sleep(0.05)
    log.advance(21)
    bar = log._progress
    bar.refresh()
    rate = bar.format_dict
    assert rate["n"] == 21 and rate["initial"] == 20 and rate["elapsed"] < 0.4
    log.close()
    assert "21/400" in screen.getvalue()


def test_rows_after_the_resumed_step_are_left_out():
    log = make_log([{"step": 10, "nll": 1.0}, {"step": 30, "nll": 0.5}])
    assert log.rows == [{"step": 10, "nll": 1.0}]


def test_a_new_metric_is_shown_and_written_to_every_destination():
    class ListWriter(Writer):
        def __init__(self):
            self.lines = []

        def resume(self, step):
            assert step == 20

        def scalars(self, step, group, values):
            self.lines.append((step, group, values.get("sharpness")))

        def close(self):
            self.lines.append("closed")

    writers = [ListWriter(), ListWriter()]
    log = make_log(writers=writers)
    log.start_progress()
    log.log_metrics(30, 1.0, "train", {"sharpness": 0.25, "loss": 2.0})
    assert log._progress.postfix == "sharpness 0.25"
    log.close()
    for writer in writers:
        assert writer.lines == [(30, "train", 0.25), (30, "speed", None), "closed"]
