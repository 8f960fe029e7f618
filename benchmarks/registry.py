# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The benchmark cases: what runs in each, and which ratios between its runs have a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any


class GateError(AssertionError):
    """A run computes a wrong result, so none of its figures is reported."""


@dataclass(frozen=True)
class Run:
    """One thing that is timed or measured.

    Args:
        call: takes one sample: returns None to have its wall time taken, or the sample itself (seconds or MiB).
        gate: checks the result of `call` on the same tensors and raises GateError if it is wrong. It also absorbs
            one-time costs such as kernel compilation. None for third-party code, which is not checked.
        facts: stored in the JSON along with the samples: parameters, tokens, context length, ...
    """

    call: Callable[[], float | None]
    gate: Callable[[], None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """One line of the table: a speedup, `baseline / ours`, that should be at least `target`; under `at_most` a cost,
    `ours / baseline`, that should be at most `target`."""

    ours: str
    baseline: str
    shape: str
    target: float
    at_most: bool = False

    def value(self, ours: float, baseline: float) -> float:
        return ours / baseline if self.at_most else baseline / ours

    def is_met(self, value: float) -> bool:
        return value <= self.target if self.at_most else value >= self.target

    @property
    def goal(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.target:g}x"


@dataclass
class Comparison:
    """Runs by name, in the order of a round, and the ratios to report."""

    runs: dict[str, Run]
    ratios: list[Ratio]
    dtype: str = "float32"
    unit: str = "ms"

    def only(self, pattern: str) -> Comparison:
        """Keep the ratios whose `ours` matches a shell pattern, and the runs they need; "*" keeps everything."""
        if pattern == "*":
            return self
        ratios = [ratio for ratio in self.ratios if fnmatch(ratio.ours, pattern)]
        needed = {name for ratio in ratios for name in (ratio.ours, ratio.baseline)}
        kept = {name: run for name, run in self.runs.items() if name in needed}
        return Comparison(kept, ratios, self.dtype, self.unit)


@dataclass(frozen=True)
class Case:
    """A benchmark case.

    Args:
        what: what is compared with what; shown by --list and when the case cannot run.
        build: creates the models and tensors.
        budget: seconds for the samples; determines the number of rounds.
        warm_up: run one uncounted round first; long cases rely on their gates instead.
        least_rounds: minimum number of rounds, regardless of the budget.
        needs: "cpu" or "cuda".
        long: skipped by --quick.
        extra: only runs under --full or when named, because it would not fit into 20 minutes.
    """

    name: str
    what: str
    build: Callable[[], Comparison]
    budget: float = 10.0
    warm_up: bool = True
    least_rounds: int = 3
    needs: str = "cpu"
    long: bool = False
    extra: bool = False


CASES: dict[str, Case] = {}


def register(name: str, what: str, build: Callable[[], Comparison], **settings) -> None:
    """Add a case.

    Raises:
        ValueError: the name is taken.
    """
    if name in CASES:
        raise ValueError(f"There is a case {name!r} already.")
    CASES[name] = Case(name, what, build, **settings)


def select(patterns: list[str], full: bool = False, quick: bool = False) -> list[Case]:
    """The cases whose names match a shell pattern, or all if there are no patterns, in the order of registration.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in CASES):
            raise ValueError(f"No case is called {pattern!r}; --list names them.")
    if patterns:
        return [case for case in CASES.values() if any(fnmatch(case.name, pattern) for pattern in patterns)]
    return [case for case in CASES.values() if (full or not case.extra) and not (quick and case.long)]
