# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`x W^T + b` by the faster of the two libraries that torch has for it on a CPU.

torch multiplies float32 matrices by MKL, which leaves half of a processor that is not Intel's idle: it does not use
its AVX-512. oneDNN, which torch brings for other types, does (on a Zen 5 at twice the speed).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from lalm.modeling.ops.cpp import call, is_looked_into

# oneDNN makes code for every new shape, in 0.2 to 1 ms; fewer multiply-adds than this do not earn that back at once.
_EARNS_ONEDNN = 1 << 25
# Fewer rows than this wait for the weights to come from memory, by MKL for a shorter time.
_LEAST_ROWS = 16
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# A gradient of a weight with so many times more rows than columns is made transposed: oneDNN copies its first factor.
_TALL = 4


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN is the faster one on this processor, as far as is known."""
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()
    idle = found.get("avx512_f") and "AMD" in found.get("cpu_name", "") and torch.backends.mkl.is_available()
    return bool(idle and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = linear(dy, weight.t())
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(dy, x)
        if ctx.needs_input_grad[2]:
            db = dy.sum(0)
        return dx, dw, db


def weight_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`dy^T x [N, D]`: the gradient of the weight from the inputs `x [M, D]` and that of the outputs, `dy [M, N]`."""
    if dy.shape[1] >= _TALL * x.shape[1]:
        return linear(x.t(), dy.t()).t()
    return linear(dy.t(), x.t())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x [..., D]`, `weight [N, D]`, `bias [N]` -> `x weight^T + bias [..., N]`, as `torch.nn.functional.linear`."""
    if not _pays(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return call(_OneDnnLinear, _dense(rows), _dense(weight), bias).view(*x.shape[:-1], weight.shape[0])


def _pays(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if torch.compiler.is_compiling() or x.numel() * weight.shape[0] < _EARNS_ONEDNN:
        return False
    if x.numel() < _LEAST_ROWS * x.shape[-1] or not prefers_onednn():
        return False
    given = [y for y in (x, weight, bias) if y is not None]
    # Subclasses (quantised or distributed weights) have products of their own.
    fits = all(type(y) in _PLAIN and y.dtype == torch.float32 and y.device.type == "cpu" for y in given)
    switched_off = not torch._C._get_mkldnn_enabled()  # by torch.backends.mkldnn.flags
    return fits and not (switched_off or is_looked_into() or torch.is_autocast_enabled("cpu"))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The matrix x, or a copy of it where it is neither contiguous nor the transpose of what is."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
