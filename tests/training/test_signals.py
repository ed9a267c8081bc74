"""Tests of signals, also outside of training."""

import signal
import subprocess
import sys

import pytest

from taming_jax.training.signals import Signals
from tests.commands import ROOT

PROGRAM = """
import sys, time
from taming_jax.errors import report

def work():
    print("started", flush=True)
    time.sleep(60)

sys.exit(report(work))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_that_does_not_train_immediately_and_without_output(signum):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "started\n"
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signum and not err


def test_a_signal_that_is_repeated_within_a_second_counts_once(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("taming_jax.training.signals.time.monotonic", lambda: clock[0])
    arrived = []
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: arrived.append(clock[0]))
    signals = Signals()
    try:
        signal.raise_signal(signal.SIGTERM)
        assert arrived == [100.0] and signals.received is None, "signals are not handled yet"
        signals.listen()
        for clock[0] in (100.0, 100.2, 100.9):
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM and len(arrived) == 1
        clock[0] = 101.5
        signal.raise_signal(signal.SIGTERM)
        assert arrived == [100.0, 101.5]
    finally:
        signals.restore()
        signal.signal(signal.SIGTERM, previous_handler)
    assert capsys.readouterr().err.count("Stopping after this step") == 1
