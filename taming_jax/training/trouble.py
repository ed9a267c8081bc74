"""What Orbax says where a disk fails it: a few words for a sentence, and for the rest silence."""

import logging
import os
import re
import sys
import warnings
from typing import Any


def reason(error: Exception) -> str:
    """Why something could not be written, in a few words: the system's own, where there are any."""
    number = re.search(r"os_error_code='(\d+)'", str(error))  # as tensorstore has it
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def hush() -> None:
    """Keeps to themselves what Orbax, and tensorstore's threads, print of a failed read or save
    besides raising it, some of it much later: `Store` tells of it in a sentence."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(
        lambda record: not {"orbax", "tensorstore"} & set(re.findall(r"[a-z]+", str(record.msg)))
    )
    never = r"coroutine '(_create_paths|\w*Handler\.\w+)' was never awaited"
    warnings.filterwarnings("ignore", never, RuntimeWarning)
    hook = sys.unraisablehook

    def others(unraisable: Any) -> None:
        # An event loop is closed at the first failure, and tensorstore would tell it of the rest.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = others
