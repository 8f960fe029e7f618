# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Samples taken in turn, and their medians and quartiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.memory import resident

Runs = dict[str, Callable[[], float | None]]
MOST_ROUNDS = 25
_NEW, _TRIES = 1 << 22, 3  # bytes that are much to get during a sample


class Spread(NamedTuple):
    """Median, first and third quartile, and the number of samples."""

    median: float
    q1: float
    q3: float
    n: int


def spread(values: Iterable[float]) -> Spread:
    """Quartiles interpolate between neighbours, so that two samples have some too."""
    values = list(values)
    q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, q1, q3, len(values))


def sample(run: Callable[[], float | None]) -> float:
    """What one call returns, or how many seconds it takes; taken again if the process had to get memory for it.

    A step that comes after others finds its memory there. Where the system has to find it, a virtual machine may take
    14 microseconds a page: a second for 280 MiB.
    """
    for _ in range(_TRIES):
        before = resident()[0]
        _wait()
        start = time.perf_counter()
        value = run()
        _wait()
        taken = time.perf_counter() - start if value is None else value
        if resident()[0] - before < _NEW:
            break
    return taken


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now and not inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alternate(runs: Runs, budget: float, least_rounds: int = 3, warm_up: bool = True) -> dict[str, list[float]]:
    """Run A B C, A B C, ...: what disturbs the machine for a while disturbs all alike.

    Args:
        budget: seconds. After `least_rounds` a round begins only if one as long as the last fits.
        warm_up: a first round that is not counted.

    Returns:
        the samples of every run, as many of each.
    """
    for run in runs.values() if warm_up else ():
        sample(run)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = last = time.perf_counter()
    for number in range(MOST_ROUNDS):
        now = time.perf_counter()
        if number >= least_rounds and now - start + (now - last) > budget:
            break
        last = now
        with no_garbage_collection():
            for name, run in runs.items():
                samples[name].append(sample(run))
    return samples


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
