import signal

import pytest

from taming_jax.errors import Interrupted, RunFailed, UserError, report


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (UserError("name it."), 2, "error: name it.\n"),
        (RunFailed("it broke."), 1, "failed: it broke.\n"),
        (Interrupted(signal.SIGINT, "saved."), 130, "\nsaved.\n"),
        (Interrupted(signal.SIGTERM, "saved."), 143, "\nsaved.\n"),
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
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
