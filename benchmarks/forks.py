# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Work in a process of its own that has imported everything already."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_PAGE = 4096
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # advice of madvise, since Linux 5.14


class Pages(NamedTuple):
    """Neighbouring pages of private memory that this process has touched."""

    address: int
    size: int  # bytes
    writable: bool


def touched_pages() -> list[Pages]:
    """What this process has touched of its memory; nothing where a system does not tell."""
    try:
        with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb") as pagemap:
            regions = [line.split(maxsplit=5) for line in maps]
            found = []
            for span, access, *_, name in (fields for fields in regions if len(fields) > 4):
                if access[0] != "r" or access[3] != "p" or name.startswith("[v"):
                    continue
                first, last = (int(address, 16) // _PAGE for address in span.split("-"))
                pagemap.seek(first * 8)
                entries = np.frombuffer(pagemap.read((last - first) * 8), dtype=np.uint64)
                present = np.concatenate([[0], entries >> np.uint64(63), [0]]).astype(np.int8)
                for begin, end in np.flatnonzero(np.diff(present)).reshape(-1, 2).tolist():
                    found.append(Pages((first + begin) * _PAGE, (end - begin) * _PAGE, access[1] == "w"))
            return found
    except OSError:
        return []


def make_own(pages: list[Pages]) -> None:
    """In a fork, what its parent had found or been given page by page: a copy's own first touch of each costs a fault,
    and a copy of it where it is written to, that a process which did its imports itself has behind it."""
    libc = ctypes.CDLL(None)
    for address, size, writable in pages:
        advice = _POPULATE_WRITE if writable else _POPULATE_READ
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


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
