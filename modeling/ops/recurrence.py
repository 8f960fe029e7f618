# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Diagonal recurrences and the delta rule by C++ kernels that keep the state of a head in the cache of a core.

`cpp_diagonal` and `cpp_delta` are the float32 forms of `recurrent_diagonal` and `recurrent_delta` on a CPU. Their time
and memory grow linearly; for the backward pass they keep the inputs and, of the delta rule, the errors v - S^T k, of
normalised sums the outputs and what they were divided by.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.nn import functional as F

from lalm.modeling.ops.cpp import call, load_kernel, pointer
from lalm.modeling.ops.diagonal_recurrence import compute_dtype
from lalm.modeling.ops.layout import SequenceLayout

# Values a head: the kernel works in registers of this many.
_LANES = 16
# A head of fewer numbers is not worth a compilation.
_SMALLEST_STATE = 512


class _Inputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "decay", "beta", "state", "skip", "starts")),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "threads")),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", "g", "beta", "state")]


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _inputs(tensors: Sequence[torch.Tensor | None], scale: float, eps: float) -> _Inputs:
    """The kernel's arguments (q, k, v, decay, beta, state, skip, starts); valid while the tensors live."""
    q = cast(torch.Tensor, tensors[0])
    return _Inputs(*(_address(x) for x in tensors), scale, eps, *q.shape[:3], torch.get_num_threads())


class _CppRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, scale, eps, g, q, k, v, beta, state, skip, starts):
        decay = None if g is None else g.exp()
        tensors = (q, k, v, decay, beta, state, skip, starts)
        o = torch.empty_like(v) if skip is None else torch.zeros_like(v)
        final = v.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3] + (eps is not None))
        kept = None
        if any(ctx.needs_input_grad):
            kept = torch.empty_like(v) if beta is not None else None if eps is None else torch.empty_like(v[..., 0])
        inputs = _inputs(tensors, scale, eps or 0.0)
        kernel.forward(ctypes.byref(inputs), pointer(o), pointer(final), pointer(kept))
        ctx.kernel, ctx.scalars = kernel, (scale, eps or 0.0)
        ctx.save_for_backward(*tensors, None if eps is None else o, kept)
        return o, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, d_final):
        *tensors, o, kept = ctx.saved_tensors
        fresh = torch.empty_like if tensors[6] is None else torch.zeros_like
        found = [None if x is None else fresh(x) for x in tensors[:4]]
        found.append(None if tensors[4] is None else torch.zeros_like(tensors[4]))
        do, d_state = do.contiguous(), d_final.clone(memory_format=torch.contiguous_format)
        gradients = _Gradients(*(_address(x) for x in (*found, d_state)))
        inputs = _inputs(tensors, *ctx.scalars)
        ctx.kernel.backward(ctypes.byref(inputs), pointer(o), pointer(do), pointer(kept), ctypes.byref(gradients))
        dq, dk, dv, dg, d_beta = found
        return None, None, None, dg, dq, dk, dv, d_beta, None if tensors[5] is None else d_state, None, None


def cpp_kernel(
    q: torch.Tensor,
    value_size: int,
    gate_size: int,
    delta: bool = False,
    normalized: bool = False,
    work: int | None = None,
) -> ctypes.CDLL | None:
    """The compiled kernel for `q [B, T, H, K]`, or None where there is none or it is no use.

    Args:
        value_size: V.
        gate_size: numbers of a token's log decay in a head: 0, 1 or K.
        delta: for the delta rule.
        normalized: for sums that are divided by z . q + eps; not with `delta`.
        work: as for `load_kernel`.
    """
    fits = q.device.type == "cpu" and q.dtype != torch.float64 and q.shape[-1] * value_size >= _SMALLEST_STATE
    if not fits or torch.compiler.is_compiling():
        return None
    sizes = {"KEY": q.shape[-1], "VALUE": value_size + -value_size % _LANES, "DECAY": min(gate_size, 2)}
    if delta:
        return load_kernel("delta_rule", work=work, **sizes)
    return load_kernel("diagonal", work=work, **sizes, NORMALIZED=int(normalized))


def if_compiled(
    form: Callable,
    implementation: str,
    q: torch.Tensor,
    value_size: int,
    gate_size: int,
    delta: bool = False,
    normalized: bool = False,
) -> Callable | None:
    """`form`, a function on top of `cpp_diagonal` or `cpp_delta`, where `cpp_kernel` has a kernel for it; unless
    `implementation` is "cpp", a short text must find it compiled."""
    work = None if implementation == "cpp" else q.numel() * value_size
    return form if cpp_kernel(q, value_size, gate_size, delta, normalized, work) else None


def _run(kernel, q, k, v, g, beta, scale, state, layout: SequenceLayout, eps=None):
    value_size = v.shape[-1]
    if missing := -value_size % _LANES:  # columns of zeros that make whole registers
        v = F.pad(v, (0, missing))
        state = None if state is None else _with_columns(state, missing, value_size)
    q, k, v, g, beta, state = (None if x is None else x.float().contiguous() for x in (q, k, v, g, beta, state))
    skip = None if layout.mask is None else (~layout.mask).contiguous()
    starts = layout.starts()
    starts = None if starts is None else starts.contiguous()
    o, final = call(_CppRecurrence, kernel, scale, eps, g, q, k, v, beta, state, skip, starts)
    if missing:
        o, final = o[..., :value_size], torch.cat([final[..., :value_size], final[..., value_size + missing :]], -1)
    return o, final


def _with_columns(state: torch.Tensor, missing: int, value_size: int) -> torch.Tensor:
    """`state` with so many columns of zeros after the first `value_size`, before that of a normaliser."""
    values, normalizer = state[..., :value_size], state[..., value_size:]
    return torch.cat([F.pad(values, (0, missing)), normalizer], -1)


def _needed(kernel: ctypes.CDLL | None, *tensors: torch.Tensor | None) -> ctypes.CDLL:
    if kernel is None or compute_dtype(*tensors) == torch.float64:
        raise RuntimeError(
            "There is no C++ kernel for these tensors: it needs the CPU, a C++ compiler, float32 or less, and heads "
            f"with a state of at least {_SMALLEST_STATE} numbers. Use linear_attn_implementation='auto'."
        )
    return kernel


def cpp_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` in C++; same arguments.

    With `eps` the outputs are divided by z . q + eps, where z sums the keys as S does k v^T; states are then
    `[B, H, K, V + 1]`, z their last column.
    """
    gate_size = 0 if g is None else g.shape[-1]
    kernel = cpp_kernel(q, v.shape[-1], gate_size, normalized=eps is not None)
    return _run(_needed(kernel, q, k, v, g, state), q, k, v, g, None, scale, state, layout or SequenceLayout(), eps)


def cpp_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_delta` in C++; same arguments."""
    kernel = _needed(cpp_kernel(q, v.shape[-1], 0 if g is None else 1, delta=True), q, k, v, g, beta, state)
    return _run(kernel, q, k, v, None if g is None else g[..., None], beta, scale, state, layout)
