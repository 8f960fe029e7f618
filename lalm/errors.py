# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""One-line errors for the scripts: a mistake of the user ends with exit code 2 and no traceback."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import HfHubHTTPError
from tqdm.auto import tqdm  # type: ignore[import-untyped]

# the last three are torch.save's writer, which reports every failed write alike
DISK_FULL_SIGNS = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)


class UserError(ValueError):
    """A mistake the user can repair; the message names the field and the fix."""


class Terminated(BaseException):
    """SIGTERM has come; the message, if any, tells what is saved."""


def nearest_hint(word: str, choices: Sequence[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice closest to `word`, or an empty string."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_line(error: BaseException) -> str:
    """Return what went wrong, on one line of at most 500 characters: the deepest cause, or our own text.

    Of an answer of the Hub it is the error above the HTTP client's, which has the reason that the server gave.
    """
    while error.__cause__ is not None and not isinstance(error, (UserError, HfHubHTTPError)):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:500] + " ..."


def refusal(name: str, kind: str, error: BaseException) -> str:
    """Return why a folder or Hub name gives no `kind`: what is wrong in it, or that it is nowhere."""
    if Path(name).expanduser().exists():
        return one_line(error)
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        return f"there is no folder {name}"
    return f"there is no folder {name}, and the Hub gives no such {kind}: {one_line(error)}"


def is_debugging() -> bool:
    """Whether tracebacks are asked for."""
    return os.environ.get("LALM_DEBUG", "0") not in ("", "0")


def is_disk_full(error: BaseException) -> bool:
    """Tell whether `error`, or what caused it, is a full disk, an exhausted quota or a limit on the size of files.

    safetensors and torch.save wrap the system's error in types of their own, hence the look at the text.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in str(link) for sign in DISK_FULL_SIGNS):
            return True
        link = link.__cause__ or link.__context__
    return False


def is_lost_process(error: BaseException) -> bool:
    """Tell whether `error` is the end of the connection to another process of the same run."""
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "remote process exited")
    return type(error).__name__.startswith("Dist") or any(sign in str(error) for sign in signs)


def on_sigterm(action: Callable[[], None]) -> Any:
    """Let SIGTERM do `action` in this process, not in its forks; return the handler before.

    Pools of workers are ended by SIGTERM, silently by its default.
    """
    owner = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() == owner:
            action()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    return signal.signal(signal.SIGTERM, handle)


def terminate() -> NoReturn:
    """Leave with `Terminated`."""
    raise Terminated


def exit_with(message: str, code: int = 2) -> NoReturn:
    """Say one line on stderr and leave."""
    # tqdm has no public list of its bars; one that is left open would be drawn again below the message
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def extra_needed(script: str, extra: str) -> Iterator[None]:
    """Leave with one line if an import of the block misses a package of one of our extras."""
    try:
        yield
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "lalm":
            raise
        missing = isinstance(error, ModuleNotFoundError)
        reason = f"{error.name}, which is not installed" if missing else f"a newer {error.name.partition('.')[0]}"
        exit_with(f"{script} needs {reason}: pip install{'' if missing else ' -U'} 'lalm[{extra}]'")


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; a `UserError` or a full disk becomes one line on stderr and exit code 2, Ctrl-C one and 130, SIGTERM
    one and 143, the end of another process of the run one and 1.

    ``LALM_DEBUG=1`` in the environment shows the traceback instead.
    """
    before = on_sigterm(terminate) if threading.current_thread() is threading.main_thread() else None
    resume = "saved checkpoints stay, and the same command resumes from the last of them"
    code = 2
    try:
        main()
        return
    except (KeyboardInterrupt, Terminated) as error:
        if is_debugging():
            raise
        message, code = f"interrupted; {resume}", 130
        if isinstance(error, Terminated):
            message, code = f"terminated; {error if error.args else resume}", 143
    except Exception as error:
        if is_debugging():
            raise
        if isinstance(error, UserError):
            message = one_line(error)
        elif is_disk_full(error):
            message = f"the disk is full ({one_line(error)}); free some space and run the same command to resume"
        elif is_lost_process(error):
            message, code = f"another process of this run has ended ({one_line(error)}); {resume}", 1
        else:
            raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    exit_with(message, code)
