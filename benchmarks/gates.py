# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Correctness checks: a figure is only reported if its gate passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from benchmarks.registry import GateError

Tensors = Mapping[str, torch.Tensor]
# Gates that have passed, in this process or an earlier one of the same invocation.
PASSED: set[str] = set()


def once(gate: Callable[[Any], None]) -> Callable[[Any], None]:
    """Run a gate once per configuration (`models.build` gives equal configurations equal weights)."""

    def check(model: Any) -> None:
        key = f"{gate.__name__} {model.config.to_json_string()}"
        if key not in PASSED:
            gate(model)
            PASSED.add(key)

    return check


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|. NaN propagates, and fails every comparison."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def near(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Check the shape and the relative error.

    Raises:
        GateError: the shapes differ or the relative error exceeds `tolerance`; the message names `what`.
    """
    if actual.shape != expected.shape:
        raise GateError(f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}")
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise GateError(f"{what}: relative error {error:.1e} over {tolerance:.0e}")


def all_near(what: str, actual: Tensors, expected: Tensors, tolerance: float) -> None:
    """Apply `near` to each pair of tensors of the same name.

    Raises:
        GateError: as `near`, or the names differ.
    """
    if actual.keys() != expected.keys():
        raise GateError(f"{what}: {sorted(actual.keys() ^ expected.keys())} on one side only")
    for name in expected:
        near(f"{what} {name}", actual[name], expected[name], tolerance)


def gradients(function: Callable[..., torch.Tensor], inputs: Tensors, d_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of `function(**inputs)` and its gradients, given `d_out`, for every floating-point input."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    out = function(**leaves)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), d_out.to(out.dtype))
    return {"output": out.detach()} | {f"d_{name}": x for name, x in zip(wanted, found, strict=True)}


def parameter_gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and its gradient with respect to every parameter that it depends on."""
    model.zero_grad()
    loss.backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def prefix(tensors: Tensors, length: int, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The first `length` tokens of `[B, T, ...]`."""
    return {name: x[:, :length] for name, x in tensors.items() if names is None or name in names}
