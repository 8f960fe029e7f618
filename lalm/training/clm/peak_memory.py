# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""How much memory a piece of work needs at its peak, on a GPU or, on Linux, on the CPU."""

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> tuple[int, int] | None:
    """Current and peak resident bytes of this process; None without Linux's /proc."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return sizes["VmRSS"], sizes["VmHWM"]


def start_peak_anew() -> bool:
    """Give freed memory back, so that it counts when it is used again, and set the peak to the current size."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5", encoding="utf-8")
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or /proc is read-only
        return False
    return True


class PeakMemory:
    """A context manager; `rise` is by how many bytes the memory in use rose inside, None where that is not known."""

    rise: int | None = None

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self._before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif start_peak_anew() and (sizes := resident()):
            self._before = sizes[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        sizes = (0, torch.cuda.max_memory_allocated()) if self.is_cuda else resident()
        self.rise = None if sizes is None else sizes[1] - self._before
