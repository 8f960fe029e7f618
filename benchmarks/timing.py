# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Interleaved samples, their medians and quartiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.memory import resident

Calls = dict[str, Callable[[], float | None]]
MOST_ROUNDS = 25
_NEW, _TRIES = 1 << 22, 3  # growth in bytes that makes a sample invalid; attempts per sample


class Spread(NamedTuple):
    """Median, first and third quartile, and the number of samples."""

    median: float
    q1: float
    q3: float
    n: int


def spread(values: Iterable[float]) -> Spread:
    """Median and interpolated quartiles."""
    values = list(values)
    q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, q1, q3, len(values))


def sample(call: Callable[[], float | None]) -> float:
    """Return what the call returns, or its wall time in seconds; retry if the process grew during the call.

    In steady state a step reuses memory. Mapping new pages can take 14 microseconds per page on a virtual machine,
    which is a second for 280 MiB.
    """
    for _ in range(_TRIES):
        before = resident()[0]
        _wait()
        start = time.perf_counter()
        value = call()
        _wait()
        taken = time.perf_counter() - start if value is None else value
        if resident()[0] - before < _NEW:
            break
    return taken


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and not within this context."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alternate(calls: Calls, budget: float, least_rounds: int = 3, warm_up: bool = True) -> dict[str, list[float]]:
    """Take samples in the order A B C, A B C, ..., so that disturbances of the machine affect all alike.

    Args:
        budget: seconds. After `least_rounds`, a round only starts if one as long as the last still fits.
        warm_up: run a first round that is not counted.

    Returns:
        The samples by name, equally many of each.
    """
    for call in calls.values() if warm_up else ():
        sample(call)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = last = time.perf_counter()
    for number in range(MOST_ROUNDS):
        now = time.perf_counter()
        if number >= least_rounds and now - start + (now - last) > budget:
            break
        last = now
        with no_garbage_collection():
            for name, call in calls.items():
                samples[name].append(sample(call))
    return samples


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
