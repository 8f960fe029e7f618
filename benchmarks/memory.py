# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of one thing in a process of its own: `python -m benchmarks.memory train_step gla 512 2048`.

What counts is the high-water mark of resident memory (VmHWM) over what was resident before: it sees the buffers of
matrix libraries and C++ kernels and what the allocator does not give back, which torch's profiler does not. It must be
a fresh process, as memory that was freed before would be used again unseen; and it is not `ru_maxrss`, which a child
inherits from the parent that started it. A first run over few tokens comes before, so that weights, the optimizer's
averages and libraries are no part of the figure.
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

ROOT = Path(__file__).resolve().parents[1]
_WARM_UP = 64  # tokens
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def measured_apart(job: str, names: Sequence[str], lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """MiB that the job takes with each name, at each length (ascending); every name has a process of its own, and two
    of them run at a time."""

    def one(name: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.memory", job, name, *map(str, lengths)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: {run.stderr[-2000:]}")
        return json.loads(run.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def in_rounds(job: str, names: Sequence[str], lengths: Sequence[int]) -> Callable[[str, int], float]:
    """What the job takes with a name at a length, MiB; asked for the same once more, all are measured anew."""
    found: dict[tuple[str, int], float] = {}

    def peak(name: str, length: int) -> float:
        if (name, length) not in found:
            measured = measured_apart(job, names, lengths)
            found.update({(x, int(size)): value for x, sizes in measured.items() for size, value in sizes.items()})
        return found.pop((name, length))

    return peak


def keep_freed_memory() -> None:
    """From now on in this process, where it runs on glibc: what is freed stays for the next tensor.

    By default blocks of over 32 MiB go back to the system each time, and it clears every page again before the next
    tensor gets it: a fifth of a step at 32,768 tokens, more or less as the blocks before it happen to lie.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def resident() -> tuple[int, int]:
    """Bytes resident now, and the most there ever were. (Where there is no /proc, the latter twice.)"""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return sizes["VmRSS"], sizes["VmHWM"]


def train_step(name: str) -> Callable[[int], Any]:
    """Runs a train step of a language model over so many tokens."""
    from benchmarks import models

    model = models.build(name)
    return lambda length: models.train_step(model, models.tokens(length))()


def encode(name: str) -> Callable[[int], Any]:
    """Runs a sentence encoder over a text of so many tokens."""
    from benchmarks import cases_encoder

    encoder = cases_encoder.encoder(name)
    for weight in encoder.parameters():
        weight.sum()  # of a file mapped to memory each page comes when it is first read, and texts read few words
    return lambda length: cases_encoder.encode(encoder, *cases_encoder.batch(1, length))


def peaks(run: Callable[[int], Any], lengths: list[int]) -> dict[int, float]:
    """MiB by length over what the first run left, ascending, so that each sets the mark anew."""
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
