# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""One-line errors for the scripts: a mistake of the user ends with exit code 2 and no traceback."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from tqdm.auto import tqdm  # type: ignore[import-untyped]

# the last is torch.save's writer, which reports every failed write alike
DISK_FULL_SIGNS = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
)


class UserError(ValueError):
    """A mistake the user can repair; the message names the field and the fix."""


def nearest_hint(word: str, choices: Sequence[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice closest to `word`, or an empty string."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_line(error: BaseException) -> str:
    """Return what went wrong, on one line of at most 500 characters: the deepest cause, or our own text."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:500] + " ..."


def is_disk_full(error: BaseException) -> bool:
    """Tell whether `error`, or what caused it, is a full disk or an exhausted quota.

    safetensors and torch.save wrap the system's error in types of their own, hence the look at the text.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(link) for sign in DISK_FULL_SIGNS):
            return True
        link = link.__cause__ or link.__context__
    return False


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; a `UserError` or a full disk becomes one line on stderr and exit code 2.

    ``LALM_DEBUG=1`` in the environment shows the traceback instead.
    """
    try:
        main()
    except Exception as error:
        if os.environ.get("LALM_DEBUG", "0") not in ("", "0"):
            raise
        if isinstance(error, UserError):
            message = one_line(error)
        elif is_disk_full(error):
            message = f"the disk is full ({one_line(error)}); free some space and run the same command to resume"
        else:
            raise
        # not print: a progress bar may stand on the line
        tqdm.write(f"error: {message}", file=sys.stderr)
        sys.exit(2)
