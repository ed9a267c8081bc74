import io
import sys
import time

import jax

from taming_jax.config.load import load_config
from taming_jax.training.log import Log
from taming_jax.training.meter import Meter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_no_compilation(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    meter = Meter(jax.devices()[0], load_config("mnist_tiny"), print)
    log = Log(tmp_path, "vqgan", 20, 400, meter)
    time.sleep(0.5)  # compilation
    assert screen.getvalue() == ""
    log.begin()
    time.sleep(0.05)
    log.advance(21)
    log._bar.refresh()
    rate = log._bar.format_dict
    assert rate["n"] == 21 and rate["initial"] == 20 and rate["elapsed"] < 0.4
    log.close()
    assert "21/400" in screen.getvalue()
