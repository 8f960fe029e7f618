# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of one job in its own process: `python -m benchmarks.memory train_step gla 512 2048`.

The figure is the high-water mark of resident memory (VmHWM) minus the resident memory at the start. Unlike torch's
profiler it includes buffers of matrix libraries and C++ kernels, and memory that the allocator retains. It needs a
fresh process, because reused memory would not be counted, and cannot use `ru_maxrss`, which a child inherits from its
parent. A first run over a few tokens excludes weights, optimizer state and libraries from the figure.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lalm.training.clm import peak_memory

ROOT = Path(__file__).resolve().parents[1]
_WARM_UP = 64  # tokens
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def measured_apart(job: str, names: Sequence[str], lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Peak MiB of the job by name and (ascending) length. Each name has its own process; two run at a time."""

    def one(name: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.memory", job, name, *map(str, lengths)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: {run.stderr[-2000:]}")
        return json.loads(run.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def in_rounds(job: str, names: Sequence[str], lengths: Sequence[int]) -> Callable[[str, int], float]:
    """A function that returns the peak MiB for a name and a length; asking for the same pair again remeasures all."""
    found: dict[tuple[str, int], float] = {}

    def peak(name: str, length: int) -> float:
        if (name, length) not in found:
            measured = measured_apart(job, names, lengths)
            found.update({(x, int(size)): value for x, sizes in measured.items() for size, value in sizes.items()})
        return found.pop((name, length))

    return peak


def keep_freed_memory() -> None:
    """Tell glibc not to return freed memory to the system, from now on in this process.

    By default, blocks over 32 MiB are returned, and the system clears every page again for the next tensor. That takes
    about a fifth of a step of 32,768 tokens, depending on how earlier blocks are laid out.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def resident() -> tuple[int, int]:
    """Current and peak resident bytes (without /proc, the peak twice)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak_memory.resident() or (most, most)


def train_step(name: str) -> Callable[[int], Any]:
    """A function that runs a train step of a language model on the given number of tokens."""
    from benchmarks import models

    model = models.build(name)
    return lambda length: models.train_step(model, models.tokens(length))()


def encode(name: str) -> Callable[[int], Any]:
    """A function that runs a sentence encoder on one text of the given number of tokens."""
    from benchmarks import cases_encoder

    encoder = cases_encoder.encoder(name)
    for weight in encoder.parameters():
        weight.sum()  # page in the memory-mapped file: a text reads few rows of the embeddings
    return lambda length: cases_encoder.encode(encoder, *cases_encoder.batch(1, length))


def peaks(run: Callable[[int], Any], lengths: list[int]) -> dict[int, float]:
    """Peak MiB by length, above the level after a first run; in ascending order, so that each sets a new peak."""
    run(_WARM_UP)
    gc.collect()
    start, _ = resident()
    found = {}
    for length in sorted(lengths):
        run(length)
        found[length] = max(0, resident()[1] - start) / 2**20
    return found


def main() -> None:
    import torch

    torch.set_num_threads(1)
    job, name, *lengths = sys.argv[1:]
    run = {"train_step": train_step, "encode": encode}[job](name)
    print(json.dumps(peaks(run, list(map(int, lengths)))))


if __name__ == "__main__":
    main()
