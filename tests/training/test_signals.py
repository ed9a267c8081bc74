"""Signals, sent to a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

from taming_jax.errors import Interrupted
from taming_jax.training.signals import Signals
from tests.commands import ROOT

# What is called for seconds hears of no signal meanwhile, as a compilation does not.
PROGRAM = """
import hashlib, sys
from taming_jax.errors import report
from taming_jax.training.signals import Signals

def work():
    with Signals(own_process={own}) as signals:
        with signals.ending():
            print("begun", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        print("over", flush=True)
        signals.check()

sys.exit(report(work))
"""


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_commands_process_within_a_long_call(own, signum):
    """And of a notebook's it waits for the call to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(own=own)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert out == ("" if own else "over\n")
    name = signal.Signals(signum).name
    assert err.count(f"Stopped by {name} before the next step") == 1
    assert err.count("\n") == (2 if own else 4)


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("taming_jax.training.signals.time.monotonic", lambda: clock[0])
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(clock[0]))
    try:
        with Signals() as signals:
            for clock[0] in (100.0, 100.2, 100.9):
                signal.raise_signal(signal.SIGTERM)
            assert signals.received == signal.SIGTERM and not arrived
            clock[0] = 101.5
            signal.raise_signal(signal.SIGTERM)
            assert arrived == [101.5]
            with pytest.raises(Interrupted, match="Stopped by SIGTERM"):
                signals.check()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.count("Stopping after this step") == 1


def test_a_signal_in_a_call_that_lets_nothing_out_ends_what_comes_next():
    class Ends:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    reached = []
    with pytest.raises(Interrupted), Signals() as signals, signals.at_once():
        Ends()
        time.sleep(5)
        reached.append(True)
    assert not reached
