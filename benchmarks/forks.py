# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Work in a process of its own that has imported everything already."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def in_a_fork(task: Callable[[], Any]) -> Any:
    """What `task` returns (anything JSON holds) in a copy of this process, which keeps nothing of it: no memory, no
    pool of buffers, no thread. Where a system has no fork, in this process.

    Raises:
        RuntimeError: the copy died, after it said why.
    """
    if not hasattr(os, "fork"):
        return task()
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _answer(task, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"A process of a benchmark ended with status {os.waitstatus_to_exitcode(status)}.")
    return json.loads(answer)


def _answer(task: Callable[[], Any], writer: int) -> None:
    status = 1
    try:
        with os.fdopen(writer, "w") as pipe:
            json.dump(task(), pipe)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
