# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What autograd, torch.func, tracing and torch.export ask of an op, and gradients that can be differentiated again.

A backward pass written by hand is fast because autograd does not record it, so its result would count as a constant.
(`torch.autograd.grad` of some inputs walks past the error that torch's own `once_differentiable` raises.)
Where a gradient is to be differentiated again, autograd makes it from the plain form of the function, however slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

from lalm.modeling.ops.dtypes import without_autocast


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work. Both look into every operation, so
    that neither a kernel nor a backward pass written by hand serves them: the plain forms run."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_looked_into() -> bool:
    """Whether a transform or a tracer is at work, to which a kernel is closed."""
    return is_transformed() or torch.jit.is_tracing()


def has_open_length() -> bool:
    """Whether a program is being exported that is to serve every number of tokens: no decision may depend on it."""
    return torch.compiler.is_exporting()


def hides_values() -> bool:
    """Whether no decision may depend on the numbers in a tensor, because one computation stands for many."""
    return torch.compiler.is_compiling() or is_transformed()


class _Unrecorded:
    """A dummy context, for calling the forward of an autograd function directly when no gradient is needed."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, or its forward alone if nothing requires a gradient: with few tokens, autograd's
    own work takes longer than the kernel."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
        return function.apply(*arguments)
    return function.forward(_Unrecorded(), *arguments)


def differentiable_by(plain: Callable, constants: int) -> Callable:
    """Decorator of the backward pass of an autograd function, in the place of `once_differentiable`.

    Args:
        plain: `plain(ctx, *saved)` gives what the forward pass gives, in operations that autograd knows.
        constants: how many arguments of the forward pass come before its tensors. Those, all the others, must be the
            first that it saves, in the same order.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def either(ctx: Any, *gradients: torch.Tensor | None):
            # While the engine runs, gradients are recorded only under create_graph=True.
            recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            if recorded or is_transformed():
                return (None,) * constants + plain_gradients(plain, ctx, ctx.needs_input_grad[constants:], gradients)
            with torch.no_grad():
                return backward(ctx, *gradients)

        return either

    return decorate


def plain_gradients(
    plain: Callable, ctx: Any, needed: tuple[bool, ...], gradients: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that autograd makes from `plain(ctx, *saved)`, of those tensors that are `needed`."""
    saved, create_graph = list(ctx.saved_tensors), torch.is_grad_enabled()
    device = next(dy.device for dy in gradients if dy is not None)
    with torch.enable_grad(), without_autocast(device):
        # Siblings: inputs may be one tensor, or made from each other, and only their own uses here count.
        for index, needs in enumerate(needed):
            if needs:
                saved[index] = saved[index].view_as(saved[index])
        inputs = [x for x, needs in zip(saved, needed, strict=False) if needs]
        outputs = plain(ctx, *saved)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    ends = [
        (y, dy)
        for y, dy in zip(outputs, gradients, strict=True)
        if dy is not None and y is not None and y.requires_grad
    ]
    if not ends:
        return (None,) * len(needed)
    ys, dys = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(ys, inputs, dys, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if needs else None for needs in needed)
