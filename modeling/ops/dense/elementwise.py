# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""RMSNorm and (gated) activations: fused C++ kernels on the CPU, each one pass over memory; plain torch elsewhere."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import apply_function, differentiable_by
from lalm.modeling.ops.cpp_kernels import pointer, preload_kernel
from lalm.modeling.ops.dispatch import activation_kernel, rms_norm_kernel, threads
from lalm.modeling.ops.kernels.kernel_op import address, pack


def _plain_rms_norm(ctx, x, weight, *_) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, ctx.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, eps, x, weight):
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1]) if any(ctx.needs_input_grad) else None
        kernel.forward(_RMSNorm.inputs(x, weight, eps), pointer(y), pointer(rstd))
        ctx.kernel, ctx.eps = kernel, eps
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @differentiable_by(_plain_rms_norm, constants=2)
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[3] else None
        inputs = _RMSNorm.inputs(x, weight, ctx.eps)
        ctx.kernel.backward(inputs, pointer(rstd), pointer(dy), pointer(dx), pointer(d_weight))
        return None, None, dx, d_weight

    @staticmethod
    def inputs(x, weight, eps):
        numbers, size = x.numel(), x.shape[-1]
        sizes = {"rows": numbers // size, "size": size, "threads": threads(numbers), "eps": eps}
        return ctypes.byref(pack("rms_norm", "Inputs", x=x.data_ptr(), weight=weight.data_ptr(), **sizes))


def _plain_activation(ctx, x, factor) -> torch.Tensor:
    return ctx.function(x) if factor is None else ctx.function(x) * factor


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, function, x, factor):
        y = torch.empty_like(x)
        kernel.forward(_Activation.inputs(x, factor), pointer(y))
        ctx.kernel, ctx.function = kernel, function
        ctx.save_for_backward(x, factor)
        return y

    @staticmethod
    @differentiable_by(_plain_activation, constants=2)
    def backward(ctx, dy):
        x, factor = ctx.saved_tensors
        dx, d_factor, dy = torch.empty_like(x), None if factor is None else torch.empty_like(x), dy.contiguous()
        ctx.kernel.backward(_Activation.inputs(x, factor), pointer(dy), pointer(dx), pointer(d_factor))
        return None, None, dx, d_factor

    @staticmethod
    def inputs(x, factor):
        sizes = {"count": x.numel(), "threads": threads(x.numel())}
        return ctypes.byref(pack("activation", "Inputs", x=x.data_ptr(), factor=address(factor), **sizes))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` along the last axis (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x: `[..., D]`.
        weight: `[D]`.

    Returns:
        `[..., D]` in the dtype of x, also under autocast; the mean is taken in float32, or in float64 if an input is.
    """
    kernel = rms_norm_kernel(x, weight)
    if kernel is None:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return apply_function(_RMSNorm, kernel, eps, x.float().contiguous(), weight.float().contiguous()).to(x.dtype)


# The number of an activation in the kernel, and what it replaces.
_ACTIVATIONS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "sigmoid": (0, torch.sigmoid),
    "silu": (1, F.silu),
    "swish": (1, F.silu),
    "gelu": (2, F.gelu),
}


def has_kernel(activation: str) -> bool:
    """Whether `activate` knows the function of this name."""
    return activation in _ACTIVATIONS


def open_activation(activation: str, gated: bool) -> None:
    """Load the kernel that `activate` will look for, if it is compiled."""
    preload_kernel("activation", ACT=_ACTIVATIONS[activation][0], GATED=int(gated))


def activate(activation: str, x: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """`act(x)`, or `act(x) * factor` for a factor of the same shape (gated linear units, Shazeer, arXiv 2002.05202).

    Args:
        activation: "sigmoid", "silu" (or "swish"), or "gelu" (Hendrycks and Gimpel, arXiv 1606.08415, with erf).
    """
    number, function = _ACTIVATIONS[activation]
    kernel = activation_kernel(x, factor, number, generates_code=activation == "gelu")
    if kernel is None:
        return function(x) if factor is None else function(x) * factor
    dtype = x.dtype if factor is None else torch.result_type(x, factor)
    factor = None if factor is None else factor.float().contiguous()
    return apply_function(_Activation, kernel, function, x.float().contiguous(), factor).to(dtype)
