# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What surrounds the matrix products, each in one pass over memory by a C++ kernel on the CPU, else in plain torch."""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional as F

from lalm.modeling.ops.cpp import call, load_kernel, pointer
from lalm.modeling.ops.diagonal_recurrence import compute_dtype

# For fewer numbers than this torch's silu and product cost no more than the call of a kernel, and threads more than
# they save.
_FEWEST = 1 << 16


class _NormInputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "threads")),
        ("eps", ctypes.c_double),
    ]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, eps, x, weight):
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1]) if any(ctx.needs_input_grad) else None
        kernel.forward(_RMSNorm.inputs(x, weight, eps), pointer(y), pointer(rstd))
        ctx.kernel, ctx.eps = kernel, eps
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[3] else None
        inputs = _RMSNorm.inputs(x, weight, ctx.eps)
        ctx.kernel.backward(inputs, pointer(rstd), pointer(dy), pointer(dx), pointer(d_weight))
        return None, None, dx, d_weight

    @staticmethod
    def inputs(x, weight, eps):
        rows, threads = x.numel() // x.shape[-1], torch.get_num_threads() if x.numel() >= _FEWEST else 1
        return ctypes.byref(_NormInputs(x.data_ptr(), weight.data_ptr(), rows, x.shape[-1], threads, eps))


class _GateInputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "factor")),
        *((name, ctypes.c_int64) for name in ("count", "threads")),
    ]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, x, factor):
        y = torch.empty_like(x)
        kernel.forward(_Gate.inputs(x, factor), pointer(y))
        ctx.kernel = kernel
        ctx.save_for_backward(x, factor)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, factor = ctx.saved_tensors
        dx, d_factor, dy = torch.empty_like(x), torch.empty_like(x), dy.contiguous()
        ctx.kernel.backward(_Gate.inputs(x, factor), pointer(dy), pointer(dx), pointer(d_factor))
        return None, dx, d_factor

    @staticmethod
    def inputs(x, factor):
        return ctypes.byref(_GateInputs(x.data_ptr(), factor.data_ptr(), x.numel(), torch.get_num_threads()))


def _kernel(name: str, x: torch.Tensor, *others: torch.Tensor, **sizes: int) -> ctypes.CDLL | None:
    if x.device.type != "cpu" or compute_dtype(x, *others) != torch.float32:
        return None
    return None if torch.compiler.is_compiling() else load_kernel(name, work=8 * x.numel(), **sizes)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` along the last axis (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x: `[..., D]`.
        weight: `[D]`.

    Returns:
        `[..., D]` in the dtype of x, also under autocast; the mean is taken in float32, or in float64 if an input is.
    """
    # Of few numbers, recording the kernel for a backward pass takes what it saves.
    is_small = x.numel() < _FEWEST and torch.is_grad_enabled()
    kernel = None if is_small else _kernel("rms_norm", x, weight)
    if kernel is None:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return call(_RMSNorm, kernel, eps, x.float().contiguous(), weight.float().contiguous()).to(x.dtype)


def silu_gate(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`silu(x) * factor` (SwiGLU, arXiv 2002.05202, equation 5), both of one shape and dtype."""
    y = _gate(x, factor, silu=True)
    return F.silu(x) * factor if y is None else y


def sigmoid_gate(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`sigmoid(x) * factor`, both of one shape and dtype."""
    y = _gate(x, factor, silu=False)
    return x.sigmoid() * factor if y is None else y


def _gate(x: torch.Tensor, factor: torch.Tensor, silu: bool) -> torch.Tensor | None:
    if x.numel() < _FEWEST or x.shape != factor.shape:
        return None
    kernel = _kernel("gate", x, factor, SILU=int(silu))
    if kernel is None:
        return None
    dtype = torch.result_type(x, factor)
    return call(_Gate, kernel, x.float().contiguous(), factor.float().contiguous()).to(dtype)
