import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taming_jax.errors import Interrupted, RunFailed, UserError, report
from tests import commands


@pytest.mark.parametrize(
    ("error", "status", "output"),
    [
        (None, 0, ""),
        (UserError("name it."), 2, "error: name it.\n"),
        (RunFailed("it broke."), 1, "failed: it broke.\n"),
        (Interrupted(signal.SIGINT, "saved."), 130, "\nsaved.\n"),
        (Interrupted(signal.SIGTERM, "saved."), 143, "\nsaved.\n"),
    ],
)
def test_every_kind_of_error_has_its_status_and_message(capsys, error, status, output):
    def command():
        if error is not None:
            raise error

    assert report(command) == status
    assert capsys.readouterr() == ("", output)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        report(lambda: 1 / 0)


PROGRAM = """
import sys
from taming_jax.errors import RunFailed, report, say

def command():
    if sys.argv[1] == "at once":
        say("started")
    else:
        print("started")
    if sys.argv[1] == "failing":
        raise RunFailed("it broke.")

sys.exit(report(command))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("mode", "expected"),
    [("at once", (0, "")), ("at the end", (0, "")), ("failing", (1, "failed: it broke.\n"))],
)
def test_output_to_a_full_disk_does_not_change_the_status(mode, expected):
    with open("/dev/full", "w") as output:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], cwd=commands.ROOT, text=True,
            stdout=output, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert (result.returncode, result.stderr) == expected


def test_a_closed_pipe_is_not_an_error(capsys):
    def command():
        raise BrokenPipeError

    assert report(command) == 0 and capsys.readouterr() == ("", "")


def test_messages_can_be_read_on_an_ascii_terminal():
    code = (
        "import sys; from taming_jax.errors import UserError, report, say\n"
        "def command():\n    say('caf\\xe9'); raise UserError('na\\xefve')\n"
        "sys.exit(report(command))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env=environment, timeout=60
    )
    assert result.returncode == 2
    assert result.stdout == b"caf\\xe9\n" and result.stderr == b"error: na\\xefve\n"
