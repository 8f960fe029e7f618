# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Reversible residual streams (Gomez et al., arXiv 1707.04585): the backward pass recomputes what is not kept.

From x1 = x2 = x every pair of sublayers (f, g) makes
    y1 = x1 + f(x2),    y2 = x2 + g(y1),    hence    x2 = y2 - g(y1),    x1 = y1 - f(x2),
and the result is (y1 + y2) / 2. Only the last two streams are kept, whatever the number of pairs; the others come back
up to rounding, which is why the streams should be float32 (autocast keeps them so).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

Sublayer = Callable[[torch.Tensor], torch.Tensor]
Pairs = Sequence[tuple[Sublayer, Sublayer]]


def run_reversible(x: torch.Tensor, pairs: Pairs, inputs: Sequence[torch.Tensor], is_random: bool) -> torch.Tensor:
    """`(y1 + y2) / 2 [B, T, D]` of the streams that leave the last pair; memory does not grow with their number.

    Args:
        x: `[B, T, D]`, both streams at the start.
        pairs: (f, g), each a function of one stream `[B, T, D]`.
        inputs: every other tensor that may want a gradient: weights, and what the functions close over.
        is_random: whether the functions draw random numbers (dropout); the backward pass then draws them again.
    """
    return _Reversible.apply(pairs, is_random, x, *(tensor for tensor in inputs if tensor.requires_grad))


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Pairs, is_random: bool, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        # `inputs` are the caller's own and outlive this node: kept, but not among what it saves.
        ctx.pairs, ctx.inputs, ctx.autocast = pairs, inputs, _current_autocast(x.device.type)
        ctx.random_states = []
        x1 = x2 = x
        with ctx.autocast():
            for f, g in pairs:
                ctx.random_states.append(_random_states(x) if is_random else None)
                x1 = x1 + f(x2)
                ctx.random_states.append(_random_states(x) if is_random else None)
                x2 = x2 + g(x1)
        ctx.save_for_backward(x1, x2)
        return (x1 + x2) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        y1, y2 = ctx.saved_tensors
        d1 = d2 = grad / 2
        sums: list[torch.Tensor | None] = [None] * len(ctx.inputs)
        states = reversed(ctx.random_states)
        for f, g in reversed(ctx.pairs):
            y2, d1 = _undo(ctx, g, next(states), (y1, y2), (d1, d2), sums)
            y1, d2 = _undo(ctx, f, next(states), (y2, y1), (d2, d1), sums)
        return None, None, d1 + d2, *sums


def _undo(ctx: Any, function: Sublayer, states, streams, gradients, sums) -> tuple[torch.Tensor, torch.Tensor]:
    """Take back `target = old + function(source)`: returns old, and the gradient that reaches source in both ways;
    adds to `sums` those of `ctx.inputs`."""
    (source, target), (d_source, d_target) = streams, gradients
    with torch.enable_grad(), _replay(states, source.device.type), ctx.autocast():
        source = source.detach().requires_grad_()
        added = function(source)
    found = torch.autograd.grad(added, [source, *ctx.inputs], d_target.to(added.dtype), allow_unused=True)
    for index, gradient in enumerate(found[1:]):
        if gradient is not None:
            before = sums[index]
            sums[index] = gradient if before is None else before + gradient
    return target - added.detach(), d_source if found[0] is None else d_source + found[0]


def _current_autocast(kind: str) -> Callable[[], torch.autocast]:
    """Makes the autocast that is on now, but without its cache: there weights cast while nothing is recorded could be
    met by later code that wants their gradient (torch before 2.13)."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def _random_states(x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    return torch.get_rng_state(), *get_device_states(x)


@contextmanager
def _replay(states: tuple | None, kind: str) -> Iterator[None]:
    """Inside, the random generators run from `states` again."""
    if states is None:
        yield
        return
    cpu, devices, device_states = states
    # fork_rng always takes the CPU along; it wants the name of a further device, of which there may be none.
    kind = "cuda" if kind == "cpu" else kind
    with torch.random.fork_rng(devices, device_type=kind):
        torch.set_rng_state(cpu)
        set_device_states(devices, device_states, device_type=kind)
        yield
