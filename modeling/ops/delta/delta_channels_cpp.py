# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The delta rule with a decay per channel of the keys by a C++ kernel for the CPU: `cpp_kda` is the float32 form of
`recurrent_delta` with such a decay. As in delta_rule_cpp.py, time and memory grow linearly."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from lalm.modeling.ops.cpp_kernels import LANES, HeadKernel, boundaries, pointer, refuse_float64
from lalm.modeling.ops.delta.delta_recurrence import recurrent_delta
from lalm.modeling.ops.delta.delta_rule_cpp import (
    SEGMENT,
    DualTensors,
    as_rows,
    as_taken,
    key_gradient,
    of_groups,
    pack_gradients,
    pack_inputs,
    whole_gradients,
)
from lalm.modeling.ops.kernels.kernel_op import KernelOp, fresh
from lalm.modeling.ops.sequence_layout import SequenceLayout


class ChannelTensors(NamedTuple):
    """q, k `[B, T, G, K]`, v `[B, T, H, V]`, g `[B, T, H, K]`, beta `[B, T, H]`, state `[B, H, K, V]`; skip and starts
    `[B, T]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    state: torch.Tensor | None
    skip: torch.Tensor | None
    starts: torch.Tensor | None


class ChannelOptions(NamedTuple):
    scale: float
    eps: float | None  # for q and k made unit vectors
    wants_state: bool


class _DeltaChannels(KernelOp):
    """The kernels of delta_channels.cpp."""

    name, Tensors, Options = "delta_channels", ChannelTensors, ChannelOptions
    masks, outputs, extras = 2, 2, 1

    def kernel(self, x: ChannelTensors, options: ChannelOptions) -> HeadKernel:
        return channels_kernel(x.q.shape[-1], x.v.shape[-1])

    def dense(self, x: ChannelTensors) -> ChannelTensors:
        return ChannelTensors(*(as_rows(y) for y in x[:3]), *(None if y is None else y.contiguous() for y in x[3:]))

    def allocate(self, x: ChannelTensors, options: ChannelOptions, keeps: bool) -> tuple[torch.Tensor | None, ...]:
        batch, length, heads, value_size = x.v.shape
        shape = (x.q.shape[-1], value_size)
        final = x.v.new_empty(batch, heads, *shape) if options.wants_state else None
        # The states that enter segments.
        kept = x.v.new_empty(batch, heads, max(0, length - 1) // SEGMENT, *shape) if keeps else None
        return fresh(x.v, x.skip), final, kept

    def forward(self, library, x: ChannelTensors, options: ChannelOptions, made) -> None:
        library.forward(ctypes.byref(_inputs(x, options)), *(pointer(y) for y in made))

    def backward(self, library, x: ChannelTensors, options: ChannelOptions, saved, gradients) -> tuple:
        (do, d_final), (kept,) = gradients, saved
        found = [*(key_gradient(y, x.v, x.skip) for y in x[:2]), *(fresh(y, x.skip) for y in x[2:5])]
        do, d_state = whole_gradients(x.v, x.state, do, d_final)
        to = pack_gradients(self.name, (*found, None, None), d_state)
        library.backward(ctypes.byref(_inputs(x, options)), pointer(do), pointer(kept), ctypes.byref(to))
        found[:2] = (of_groups(y, x.q) for y in found[:2])
        return *found, None if x.state is None else d_state, None, None

    def plain(self, x: ChannelTensors, options: ChannelOptions) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, beta, state, skip, starts = x
        layout = SequenceLayout(None if skip is None else ~skip, None if starts is None else starts.cumsum(1))
        q, k = as_taken(q, k, v, options.eps)
        return recurrent_delta(q, k, v, g, beta, options.scale, state, layout)


def _inputs(x: ChannelTensors, options: ChannelOptions) -> ctypes.Structure:
    tensors = DualTensors(*x[:5], None, None, *x[5:])
    return pack_inputs("delta_channels", tensors, options.scale, options.eps)


_delta_channels = _DeltaChannels()


@cache
def channels_kernel(key_size: int, value_size: int) -> HeadKernel:
    """The kernel for heads of these sizes."""
    sizes = {"KEY": key_size, "VALUE": value_size + -value_size % LANES, "M": 1, "SEGMENT": SEGMENT, "DELTA": 1}
    return HeadKernel("delta_channels", key_size * value_size, tuple(sizes.items()))


def cpp_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
    wants_state: bool = True,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_delta` with g `[B, T, H, K]` in C++. q and k may have fewer heads than v, and are made unit vectors
    if `norm_eps` is given (see `as_taken`). Without `wants_state` there is no final state, nor the work for it."""
    value_size = v.shape[-1]
    refuse_float64(q, k, v, g, beta, state)
    if missing := -value_size % LANES:  # columns of zeros that make whole registers
        v, state = F.pad(v, (0, missing)), None if state is None else F.pad(state, (0, missing))
    tensors: Any = [as_rows(x) for x in (q, k, v)]
    tensors += [None if x is None else x.float().contiguous() for x in (g, beta, state)]
    x, options = ChannelTensors._make((*tensors, *boundaries(layout))), ChannelOptions(scale, norm_eps, wants_state)
    o, final = _delta_channels(x, options)
    if missing:
        o, final = o[..., :value_size], None if final is None else final[..., :value_size]
    return o, final if wants_state else None
