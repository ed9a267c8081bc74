import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taming_jax.errors import Interrupted, RunFailed, UserError, report
from tests import commands


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (UserError("name it."), 2, "error: name it.\n"),
        (RunFailed("it broke."), 1, "failed: it broke.\n"),
        (Interrupted(signal.SIGINT, "saved."), 130, "\nsaved.\n"),
        (Interrupted(signal.SIGTERM, "saved."), 143, "\nsaved.\n"),
    ],
)
def test_each_kind_of_end_has_its_status_and_sentence(capsys, error, status, said):
    def command():
        if error is not None:
            raise error

    assert report(command) == status
    assert capsys.readouterr() == ("", said)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        report(lambda: 1 / 0)


PROGRAM = """
import sys
from taming_jax.errors import RunFailed, report, say

def command():
    if sys.argv[1] == "at once":
        say("begun")
    else:
        print("begun")
    if sys.argv[1] == "failing":
        raise RunFailed("it broke.")

sys.exit(report(command))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("how", "ends"),
    [("at once", (0, "")), ("at the end", (0, "")), ("failing", (1, "failed: it broke.\n"))],
)
def test_an_output_on_a_full_disk_changes_no_status(how, ends):
    with open("/dev/full", "w") as output:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], cwd=commands.ROOT, text=True,
            stdout=output, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == ends


def test_a_pipe_whose_reader_has_gone_is_no_failure(capsys):
    def command():
        raise BrokenPipeError

    assert report(command) == 0 and capsys.readouterr() == ("", "")
