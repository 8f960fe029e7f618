# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`use_in_transformers`: puts our functions in the place of transformers' own, and those back."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from transformers.utils import logging

from lalm.errors import nearest_hint
from lalm.transformers_models.families import FAMILIES, Seam, UnknownSeam

logger = logging.get_logger("transformers.lalm")


@dataclass
class _Replaced:
    seam: Seam
    original: object
    ours: object


class _Door:
    """What is replaced now, by family, and how many users each family has."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, int] = {}
        self.replaced: dict[str, list[_Replaced]] = {}

    def open(self, name: str) -> UnknownSeam | None:
        """Returns why nothing is replaced, if so."""
        with self.lock:
            if name not in self.replaced:
                try:
                    seams = FAMILIES[name].seams()
                except UnknownSeam as problem:
                    return problem
                self.replaced[name] = [self._replace(seam) for seam in seams]
            self.users[name] = self.users.get(name, 0) + 1
            return None

    def close(self, name: str) -> None:
        with self.lock:
            self.users[name] -= 1
            if self.users[name]:
                return
            for done in self.replaced.pop(name):
                if done.seam.owner.__dict__.get(done.seam.name) is done.ours:
                    setattr(done.seam.owner, done.seam.name, done.original)
                else:
                    logger.warning(f"{done.seam.label} has been replaced by somebody else and stays as it is.")

    @staticmethod
    def _replace(seam: Seam) -> _Replaced:
        original = seam.owner.__dict__[seam.name]
        ours = seam.make(original)
        setattr(seam.owner, seam.name, ours)
        logger.info(f"{seam.label} now runs lalm's kernels on the CPU.")
        return _Replaced(seam, original, ours)


_door = _Door()


class Replacement:
    """What `use_in_transformers` has replaced: a context manager, and `undo()`.

    Attributes:
        families: the names of the families.
        refused: by the name of a family that was left alone, why.
    """

    def __init__(self, families: tuple[str, ...], refused: dict[str, str]):
        self.families, self.refused = families, refused
        self._is_open, self._lock = True, threading.Lock()

    def undo(self) -> None:
        """Put transformers' own functions back, unless another call still wants ours. A second time does nothing."""
        with self._lock:
            is_open, self._is_open = self._is_open, False
        if is_open:
            for name in self.families:
                _door.close(name)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Replacement(families={self.families}, refused={self.refused})"


def use_in_transformers(families: str | Iterable[str] | None = None) -> Replacement:
    """Run lalm's C++ kernels under the linear-attention models of transformers, for models made before or after.

    Only tensors on the CPU are concerned, and under `torch.compile` only packed documents and padding. Where there is
    no C++ compiler, plain torch runs, as before. Calls may overlap, in threads too: a family is put back when every
    call that asked for it is undone.

    Args:
        families: names as `config.model_type` has them ("qwen3_5", "olmo_hybrid"; `lalm.transformers_models.FAMILIES`
            has all); None for every family that the installed transformers has as it is known here. What is left out
            is logged as a warning and listed in `Replacement.refused`.

    Returns:
        A `Replacement`: `with lalm.use_in_transformers(): ...`, or keep it and call `undo()`.

    Raises:
        ValueError: an unknown family, or one whose functions in the installed transformers have other names or
            arguments than those known here (`UnknownSeam`). Nothing is replaced then.
    """
    wanted = tuple(FAMILIES) if families is None else (families,) if isinstance(families, str) else tuple(families)
    for name in wanted:
        if name not in FAMILIES:
            hint = nearest_hint(name, tuple(FAMILIES))
            raise ValueError(f"families: {name!r} is unknown{hint}; known are {', '.join(FAMILIES)}.")
    opened: list[str] = []
    refused: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        problem = _door.open(name)
        if problem is None:
            opened.append(name)
        elif families is None:
            refused[name] = str(problem)
            logger.warning(f"transformers keeps its own functions for {problem}")
        else:
            for done in opened:
                _door.close(done)
            raise problem
    return Replacement(tuple(opened), refused)
