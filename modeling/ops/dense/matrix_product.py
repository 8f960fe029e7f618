# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`x W^T + b` on a CPU by the fastest of torch's two libraries, or by a kernel of our own for few rows.

torch multiplies float32 matrices by MKL, which leaves half of a processor that is not Intel's idle: it does not use
its AVX-512. oneDNN, which torch brings for other dtypes, does (on a Zen 5 at twice the speed). Decoding (few rows) is
bound by memory: a kernel that streams the weights takes half of MKL's time.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import apply_function
from lalm.modeling.ops.cpp_kernels import pointer, preload_kernel
from lalm.modeling.ops.dispatch import TALL, mkl_is_slow, product_library, threads
from lalm.modeling.ops.kernels.kernel_op import address, pack


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
    if dy.shape[1] >= TALL * x.shape[1]:
        return linear(x.t(), dy.t()).t()
    return linear(dy.t(), x.t())


def preload_linear() -> None:
    """Look up what `linear` will ask for: which library is fast, and the kernel for few rows, if it is compiled."""
    mkl_is_slow()
    preload_kernel("few_rows")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x [..., D]`, `weight [N, D]`, `bias [N]` -> `x weight^T + bias [..., N]`, as `torch.nn.functional.linear`."""
    library = product_library(x, weight, bias)
    if library == "onednn":
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        return apply_function(_OneDnnLinear, _dense(rows), _dense(weight), bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias) if library is None else _few_rows(library, x, weight, bias)


def _few_rows(kernel: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` by the kernel that streams the weights; it has no backward pass."""
    (outputs, size), x = weight.shape, x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    places = {"x": x.data_ptr(), "weight": weight.data_ptr(), "bias": address(bias)}
    sizes = {"rows": x.numel() // size, "size": size, "outputs": outputs, "threads": threads(weight.numel())}
    kernel.forward(ctypes.byref(pack("few_rows", "Inputs", **places, **sizes)), pointer(y))
    return y


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The matrix x, or a copy of it where it is neither contiguous nor the transpose of what is."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
