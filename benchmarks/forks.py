# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Run a task in a forked process, which has all imports done."""

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
    """A contiguous range of private pages that this process has touched."""

    address: int
    size: int  # bytes
    writable: bool


def touched_pages() -> list[Pages]:
    """The private pages that this process has touched; empty if the system does not report them."""
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
    """Pre-fault the parent's pages in the child, so that copy-on-write faults are not timed."""
    libc = ctypes.CDLL(None)
    for address, size, writable in pages:
        advice = _POPULATE_WRITE if writable else _POPULATE_READ
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


def in_a_fork(task: Callable[[], Any]) -> Any:
    """Run `task` in a forked child and return its result (which must be JSON-serialisable).

    Memory, buffer pools and threads of the task end with the child. Without os.fork, the task runs in this process.

    Raises:
        RuntimeError: the child failed; its traceback is printed.
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
        raise RuntimeError(f"A benchmark process ended with status {os.waitstatus_to_exitcode(status)}.")
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
