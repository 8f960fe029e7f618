# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Reversible residual streams (Gomez et al., arXiv 1707.04585): the backward pass recomputes what is not kept.

From x1 = x2 = x every pair of sublayers (f, g) makes
    y1 = x1 + f(x2),    y2 = x2 + g(y1),    hence    x2 = y2 - g(y1),    x1 = y1 - f(x2),
and the result is (y1 + y2) / 2. Only the last two streams are kept, whatever the number of pairs; the others come back
up to rounding, which is why the streams should be float32 (autocast keeps them so).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states


def run_reversible(x: torch.Tensor, layers: Any, kwargs: dict[str, Any], is_random: bool) -> torch.Tensor:
    """`(y1 + y2) / 2 [B, T, D]` of the streams that leave the last layer; memory does not grow with their number.

    Args:
        x: `[B, T, D]`, both streams at the start.
        layers: a ModuleList. `layer.sublayers(**kwargs)` gives its pairs (f, g), each a function of one stream.
        kwargs: what every layer gets. Tensors among them get their gradient, as the weights of the layers do.
        is_random: whether the functions draw random numbers (dropout); the backward pass then draws them again.
    """
    inputs = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    inputs = {name: value for name, value in (inputs | dict(layers.named_parameters())).items() if value.requires_grad}
    return _Reversible.apply(layers, kwargs, tuple(inputs), is_random, x, *inputs.values())


def _pairs(layers: Any, kwargs: dict[str, Any]) -> list[tuple[Callable, Callable]]:
    return [pair for layer in layers for pair in layer.sublayers(**kwargs)]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Any, kwargs: dict, names: tuple, is_random: bool, x: torch.Tensor, *inputs):
        ctx.layers, ctx.kwargs, ctx.names = layers, kwargs, names
        ctx.autocast, ctx.random_states = _current_autocast(x.device.type), []
        x1 = x2 = x
        with ctx.autocast():
            for f, g in _pairs(layers, kwargs):
                ctx.random_states.append(_random_states(x) if is_random else None)
                x1 = x1 + f(x2)
                ctx.random_states.append(_random_states(x) if is_random else None)
                x2 = x2 + g(x1)
        ctx.save_for_backward(x1, x2, *inputs)
        return (x1 + x2) / 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        if torch.is_grad_enabled():  # that is, under create_graph=True
            raise RuntimeError(
                "A reversible model recomputes its activations in the backward pass and has no second derivatives: "
                "load it with reversible=False to use create_graph=True."
            )
        y1, y2, *inputs = ctx.saved_tensors
        # Stand-ins gather the gradients: the caller's own tensors have hooks, which are to meet the whole gradient
        # once, and a graph behind them, which is not to be entered from here.
        leaves = {name: nn.Parameter(tensor.detach()) for name, tensor in zip(ctx.names, inputs, strict=True)}
        kwargs = ctx.kwargs | {name: leaf for name, leaf in leaves.items() if name in ctx.kwargs}
        d1 = d2 = grad / 2
        states = reversed(ctx.random_states)
        with _exchanged(ctx.layers, leaves):
            for f, g in reversed(_pairs(ctx.layers, kwargs)):
                y2, d1 = _undo(ctx, g, next(states), (y1, y2), (d1, d2))
                y1, d2 = _undo(ctx, f, next(states), (y2, y1), (d2, d1))
        return None, None, None, None, d1 + d2, *(leaf.grad for leaf in leaves.values())


@contextmanager
def _exchanged(layers: nn.Module, leaves: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the weights of `layers` that `leaves` names are those in `leaves`. (functional_call of torch 2.13 leaves
    its tensors behind in a module that has two places.)"""
    new = {weight: leaves[name] for name, weight in layers.named_parameters() if name in leaves}
    places = [
        (module, name, weight)
        for module in layers.modules()
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        if weight in new
    ]
    try:
        for module, name, weight in places:
            setattr(module, name, new[weight])
        yield
    finally:
        for module, name, weight in places:
            setattr(module, name, weight)


def _undo(ctx: Any, function: Callable, states, streams, gradients) -> tuple[torch.Tensor, torch.Tensor]:
    """Take back `target = old + function(source)`: returns old, and the gradient that reaches source in both ways."""
    (source, target), (d_source, d_target) = streams, gradients
    with torch.enable_grad(), _replay(states, source.device.type), ctx.autocast():
        source = source.detach().requires_grad_()
        added = function(source)
    torch.autograd.backward(added, d_target.to(added.dtype))
    return target - added.detach(), d_source if source.grad is None else d_source + source.grad


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
