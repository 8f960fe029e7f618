# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Reversible residual streams (Gomez et al., arXiv 1707.04585) whose backward pass recomputes what the forward dropped.

From x1 = x2 = x every pair of sublayers (f, g) makes
    y1 = x1 + f(x2),    y2 = x2 + g(y1),    hence    x2 = y2 - g(y1),    x1 = y1 - f(x2),
and the result is (y1 + y2) / 2. Only the last two streams are kept, whatever the number of pairs; the others come back
up to rounding, which is why the streams should be float32 (weights and autocast are free).
"""

from collections.abc import Callable, Sequence
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
        inputs: every other tensor that wants a gradient: weights, and what the functions close over.
        is_random: whether the functions draw random numbers (dropout); the backward pass then draws them again.
    """
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    return _Reversible.apply(pairs, is_random, x, *inputs)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Pairs, is_random: bool, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        # Not saved: they are the caller's own, and outlive this.
        ctx.pairs, ctx.inputs = pairs, inputs
        ctx.replays = []
        x1 = x2 = x
        with _autocast_of(x)():
            for f, g in pairs:
                ctx.replays.append(Replay(x, is_random))
                x1 = x1 + f(x2)
                ctx.replays.append(Replay(x, is_random))
                x2 = x2 + g(x1)
        ctx.autocast = _autocast_of(x)
        ctx.save_for_backward(x1, x2)
        return (x1 + x2) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        y1, y2 = ctx.saved_tensors
        d1 = d2 = grad / 2
        sums = dict.fromkeys(range(len(ctx.inputs)))
        replays = iter(reversed(ctx.replays))
        for f, g in reversed(ctx.pairs):
            y2, d1 = _undo(ctx, g, next(replays), y1, y2, d1, d2, sums)
            y1, d2 = _undo(ctx, f, next(replays), y2, y1, d2, d1, sums)
        return None, None, d1 + d2, *sums.values()


def _undo(ctx, function, replay, source, target, d_source, d_target, sums):
    """Take back `target = old + function(source)`: old, and the gradient that reaches `source` through both."""
    with torch.enable_grad(), replay, ctx.autocast():
        source = source.detach().requires_grad_()
        added = function(source)
    wanted = [source, *ctx.inputs]
    found = torch.autograd.grad(added, wanted, d_target.to(added.dtype), allow_unused=True)
    for index, gradient in enumerate(found[1:]):
        if gradient is not None:
            sums[index] = gradient if sums[index] is None else sums[index] + gradient
    return target - added.detach(), d_source if found[0] is None else d_source + found[0]


def _autocast_of(x: torch.Tensor) -> Callable[[], torch.autocast]:
    """Makes the autocast that is on now. Without its cache: weights cast while nothing is recorded would be taken, in
    the same region, for weights that need no gradient."""
    kind = x.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


class Replay:
    """Takes down the state of the random generators when made; inside `with`, they run from there again."""

    def __init__(self, x: torch.Tensor, is_random: bool):
        self.cpu = torch.get_rng_state() if is_random else None
        self.kind = x.device.type
        self.devices, self.states = get_device_states(x) if is_random else ([], [])

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(self.devices, enabled=self.cpu is not None, device_type=self.fork_kind())
        self.fork.__enter__()
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.fork_kind())

    def fork_kind(self) -> str:
        """fork_rng always keeps the CPU's generator and wants the name of a further device."""
        return "cuda" if self.kind == "cpu" else self.kind

    def __exit__(self, *error) -> None:
        self.fork.__exit__(*error)
