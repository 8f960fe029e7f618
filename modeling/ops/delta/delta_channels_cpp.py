# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The delta rule with a decay per channel of the keys by a C++ kernel for the CPU: `cpp_kda` is the float32 form of
`recurrent_delta` with such a decay. As in delta_rule_cpp.py, time and memory grow linearly."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import differentiable_by
from lalm.modeling.ops.cpp_kernels import LANES, HeadKernel, apply_function, boundaries, pointer, require_kernel
from lalm.modeling.ops.delta.delta_recurrence import recurrent_delta
from lalm.modeling.ops.delta.delta_rule_cpp import (
    SEGMENT,
    Gradients,
    arguments,
    as_rows,
    as_taken,
    fresh,
    key_gradient,
    of_groups,
)
from lalm.modeling.ops.sequence_layout import SequenceLayout


def _plain(ctx, q, k, v, g, beta, state, skip, starts, _) -> tuple[torch.Tensor, torch.Tensor]:
    layout = SequenceLayout(None if skip is None else ~skip, None if starts is None else starts.cumsum(1))
    q, k = as_taken(q, k, v, ctx.eps)
    return recurrent_delta(q, k, v, g, beta, ctx.scale, state, layout)


class _CppChannels(torch.autograd.Function):
    """The kernels of delta_channels.cpp."""

    @staticmethod
    def forward(ctx, kernel, scale, eps, wants_state, *tensors):
        q, v, skip = tensors[0], tensors[2], tensors[6]
        ctx.kernel, ctx.scale, ctx.eps = kernel, scale, eps
        ctx.set_materialize_grads(False)
        batch, length, heads, value_size = v.shape
        o, shape = fresh(v, skip), (q.shape[-1], value_size)
        final = v.new_empty(batch, heads, *shape) if wants_state else None
        kept = None  # the states that enter segments
        if any(ctx.needs_input_grad):
            kept = v.new_empty(batch, heads, max(0, length - 1) // SEGMENT, *shape)
        kernel.forward(ctypes.byref(_inputs(scale, eps, *tensors)), pointer(o), pointer(final), pointer(kept))
        ctx.save_for_backward(*tensors, kept)
        return o, final

    @staticmethod
    @differentiable_by(_plain, constants=4)
    def backward(ctx, do, d_final):
        *saved, kept = ctx.saved_tensors
        v, state, skip = saved[2], saved[5], saved[6]
        found = [*(key_gradient(x, v, skip) for x in saved[:2]), *(fresh(x, skip) for x in saved[2:5])]
        d_state = None  # in, that of the final state; out, that of the initial one
        if d_final is not None:
            d_state = d_final.clone(memory_format=torch.contiguous_format)
        elif state is not None:
            d_state = torch.zeros_like(state)
        do = torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else do.contiguous()
        gradients = Gradients(*(pointer(x) for x in (*found, None, None, d_state)))
        inputs = _inputs(ctx.scale, ctx.eps, *saved)
        ctx.kernel.backward(ctypes.byref(inputs), pointer(do), pointer(kept), ctypes.byref(gradients))
        found[:2] = (of_groups(x, saved[0]) for x in found[:2])
        return None, None, None, None, *found, None if state is None else d_state, None, None


def _inputs(scale, eps, q, k, v, g, beta, state, skip, starts):
    return arguments((q, k, v, g, beta, None, None, state, skip, starts), scale, eps)


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
    kernel = require_kernel(channels_kernel(q.shape[-1], value_size), q, k, v, g, beta, state)
    if missing := -value_size % LANES:  # columns of zeros that make whole registers
        v, state = F.pad(v, (0, missing)), None if state is None else F.pad(state, (0, missing))
    tensors: list[torch.Tensor | None] = [as_rows(x) for x in (q, k, v)]
    tensors += [None if x is None else x.float().contiguous() for x in (g, beta, state)]
    o, final = apply_function(_CppChannels, kernel, scale, norm_eps, wants_state, *tensors, *boundaries(layout))
    if missing:
        o, final = o[..., :value_size], None if final is None else final[..., :value_size]
    return o, final
