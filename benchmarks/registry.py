# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What is measured: cases of contestants that run in turn, and the ratios between them that have a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any


class GateError(AssertionError):
    """A contestant computes something else than it should; none of its figures is reported."""


@dataclass(frozen=True)
class Contestant:
    """One thing that runs.

    Args:
        run: takes one sample: returns None to have its wall time taken, or the sample itself (s, or MiB).
        gate: the correctness check on the tensors that `run` works on; raises GateError. It also pays for what only
            the first call pays for (kernels that are compiled, say). None for other people's code that nothing here
            is to be equal to.
        facts: what the JSON keeps beside the samples: parameters, tokens, the form of an op that ran, ...
    """

    run: Callable[[], float | None]
    gate: Callable[[], None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """One line of the table. A figure is `baseline / ours` with the target as the least (how many times faster), or
    under `at_most` `ours / baseline` with the target as the most."""

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
class Contest:
    """Contestants by name, in the order of a round, and the ratios that are reported."""

    contestants: dict[str, Contestant]
    ratios: list[Ratio]
    dtype: str = "float32"
    unit: str = "ms"

    def only(self, pattern: str) -> Contest:
        """The ratios whose `ours` matches a shell pattern, and who takes part in them; everything for "*"."""
        if pattern == "*":
            return self
        ratios = [ratio for ratio in self.ratios if fnmatch(ratio.ours, pattern)]
        named = {name for ratio in ratios for name in (ratio.ours, ratio.baseline)}
        kept = {name: contestant for name, contestant in self.contestants.items() if name in named}
        return Contest(kept, ratios, self.dtype, self.unit)


@dataclass(frozen=True)
class Case:
    """A contest to be.

    Args:
        what: ours against whom, for the list and for the line of a case that cannot run.
        build: makes the models and tensors.
        budget: seconds for the samples; rounds follow from it.
        warm_up: run a round that is not counted; the contestants of long cases have their gates only.
        least_rounds: rounds that run whatever the budget.
        needs: "cpu" or "cuda".
        long: left out by --quick.
        extra: runs under --full or by its own name only: it would not fit into 20 minutes.
    """

    name: str
    what: str
    build: Callable[[], Contest]
    budget: float = 10.0
    warm_up: bool = True
    least_rounds: int = 3
    needs: str = "cpu"
    long: bool = False
    extra: bool = False


CASES: dict[str, Case] = {}


def register(name: str, what: str, build: Callable[[], Contest], **settings) -> None:
    """Add a case.

    Raises:
        ValueError: there is one of that name already.
    """
    if name in CASES:
        raise ValueError(f"There is a case {name!r} already.")
    CASES[name] = Case(name, what, build, **settings)


def select(patterns: list[str], full: bool = False, quick: bool = False) -> list[Case]:
    """The cases whose names match a shell pattern, all without patterns, in the order of registration.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in CASES):
            raise ValueError(f"No case is called {pattern!r}; --list names them.")
    if patterns:
        return [case for case in CASES.values() if any(fnmatch(case.name, pattern) for pattern in patterns)]
    return [case for case in CASES.values() if (full or not case.extra) and not (quick and case.long)]
