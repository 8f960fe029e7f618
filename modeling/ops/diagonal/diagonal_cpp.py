# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Diagonal recurrences by a C++ kernel, in blocks of tokens that stay in the caches of a core.

`cpp_diagonal` is the float32 form of `recurrent_diagonal` on a CPU. Its time and memory grow linearly; for the
backward pass it keeps the inputs and, of normalised sums, the outputs and what they were divided by.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import cast

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import differentiable_by
from lalm.modeling.ops.cpp_kernels import LANES, HeadKernel, apply_function, boundaries, pointer, require_kernel
from lalm.modeling.ops.diagonal.diagonal_recurrence import normalized, recurrent_diagonal
from lalm.modeling.ops.diagonal.taylor import num_taylor_features, taylor_features
from lalm.modeling.ops.sequence_layout import SequenceLayout


class _Inputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "decay", "state", "skip", "starts")),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "threads")),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", "g", "state")]


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _inputs(tensors: Sequence[torch.Tensor | None], scale: float, eps: float) -> _Inputs:
    """The kernel's arguments (q, k, v, decay, state, skip, starts); valid while the tensors live."""
    q = cast(torch.Tensor, tensors[0])
    return _Inputs(*(_address(x) for x in tensors), scale, eps, *q.shape[:3], torch.get_num_threads())


def _plain(ctx, q, k, v, g, state, skip, starts, *_) -> tuple[torch.Tensor, torch.Tensor]:
    scale, eps, taylor = ctx.options
    if skip is not None:
        q, k, v = (x.masked_fill(skip[..., None, None], 0) for x in (q, k, v))
    if taylor:
        q, k = taylor_features(q), taylor_features(k)
    layout = SequenceLayout(None if skip is None else ~skip, None if starts is None else starts.cumsum(1))
    core = recurrent_diagonal if eps is None else normalized(recurrent_diagonal, eps)
    return core(q, k, v, g, scale, state, layout)


class _CppDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, taylor, scale, eps, q, k, v, g, state, skip, starts):
        tensors = (q, k, v, None if g is None else g.exp(), state, skip, starts)
        keys = num_taylor_features(q.shape[-1]) if taylor else q.shape[-1]
        o = torch.empty_like(v) if skip is None else torch.zeros_like(v)
        final = v.new_empty(q.shape[0], q.shape[2], keys, v.shape[3] + (eps is not None))
        sizes = torch.empty_like(v[..., 0]) if eps is not None and any(ctx.needs_input_grad) else None
        inputs = _inputs(tensors, scale, eps or 0.0)
        kernel.forward(ctypes.byref(inputs), pointer(o), pointer(final), pointer(sizes))
        ctx.kernel, ctx.options = kernel, (scale, eps, taylor)
        ctx.save_for_backward(q, k, v, g, state, skip, starts, None if eps is None else o, sizes)
        return o, final

    @staticmethod
    @differentiable_by(_plain, constants=4)
    def backward(ctx, do, d_final):
        *tensors, o, sizes = ctx.saved_tensors
        g, state, skip = tensors[3:6]
        tensors[3] = None if g is None else g.exp()
        fresh = torch.empty_like if skip is None else torch.zeros_like
        found = [None if x is None else fresh(x) for x in tensors[:4]]
        do, d_state = do.contiguous(), d_final.clone(memory_format=torch.contiguous_format)
        gradients = _Gradients(*(_address(x) for x in (*found, d_state)))
        scale, eps, _ = ctx.options
        inputs = _inputs(tensors, scale, eps or 0.0)
        ctx.kernel.backward(ctypes.byref(inputs), pointer(o), pointer(do), pointer(sizes), ctypes.byref(gradients))
        return None, None, None, None, *found, None if state is None else d_state, None, None


@cache
def diagonal_kernel(
    key_size: int, value_size: int, gate_size: int, normalized: bool = False, taylor: bool = False
) -> HeadKernel:
    """The kernel for heads of these sizes.

    Args:
        key_size, value_size: K and V.
        gate_size: size of the log decay per token and head: 0, 1 or the number of rows of the state.
        normalized: for sums that are divided by z . q + eps.
        taylor: for the features that `taylor_features` makes of q and k.
    """
    keys = num_taylor_features(key_size) if taylor else key_size
    sizes = {"KEY": keys, "TAYLOR": key_size if taylor else 0}
    sizes |= {"VALUE": value_size + -value_size % LANES, "NORMALIZED": int(normalized), "DECAY": min(gate_size, 2)}
    return HeadKernel("diagonal", keys * value_size, tuple(sizes.items()))


def _with_columns(state: torch.Tensor, missing: int, value_size: int) -> torch.Tensor:
    """`state` with so many columns of zeros after the first `value_size`, before that of a normaliser."""
    values, normalizer = state[..., :value_size], state[..., value_size:]
    return torch.cat([F.pad(values, (0, missing)), normalizer], -1)


def cpp_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
    eps: float | None = None,
    taylor: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` in C++; same arguments.

    With `eps` the outputs are divided by z . q + eps, where z sums the keys as S does k v^T; states are then
    `[B, H, K, V + 1]`, z their last column. With `taylor` it is that of `taylor_features(q)` and `taylor_features(k)`.
    """
    value_size, layout = v.shape[-1], layout or SequenceLayout()
    sizes = (q.shape[-1], value_size, 0 if g is None else g.shape[-1], eps is not None, taylor)
    kernel = require_kernel(diagonal_kernel(*sizes), q, k, v, g, state)
    if missing := -value_size % LANES:  # columns of zeros that make whole registers
        v = F.pad(v, (0, missing))
        state = None if state is None else _with_columns(state, missing, value_size)
    tensors = (None if x is None else x.float().contiguous() for x in (q, k, v, g, state))
    o, final = apply_function(_CppDiagonal, kernel, taylor, scale, eps, *tensors, *boundaries(layout))
    if missing:
        o, final = o[..., :value_size], torch.cat([final[..., :value_size], final[..., value_size + missing :]], -1)
    return o, final
