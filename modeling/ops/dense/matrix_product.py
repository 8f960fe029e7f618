# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`x W^T + b` on a CPU by what is fastest there: one of torch's two libraries, or a kernel of our own for few rows.

torch multiplies float32 matrices by MKL, which leaves half of a processor that is not Intel's idle: it does not use
its AVX-512. oneDNN, which torch brings for other types, does (on a Zen 5 at twice the speed). A few rows, the tokens
that decoding is at, wait for the weights to come from memory: a kernel that reads them in one stream takes half of
MKL's time.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import is_looked_into
from lalm.modeling.ops.cpp_kernels import call, load_kernel, open_kernel, pointer

# With fewer rows than these our kernel streams the weights: a text's next tokens; where MKL is slow, a short text too.
_FEW_ROWS, _SHORT_TEXT = 16, 64
# Fewer multiply-adds than this are not worth the call.
_WORTH_A_CALL = 1 << 13
# oneDNN makes code for every new shape, in 0.2 to 1 ms; fewer multiply-adds than this do not earn that back at once.
_EARNS_ONEDNN = 1 << 25
# A gradient of a weight with so many times more rows than columns is made transposed: oneDNN copies its first factor.
_TALL = 4
# Fewer numbers of a weight are not worth another thread.
_FEWEST = 1 << 16
_ROWS_TO_COME = 8
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _FewRowsInputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "outputs", "threads")),
    ]


@cache
def mkl_is_slow() -> bool:
    """Whether MKL leaves this processor's widest registers idle and oneDNN is at hand, as far as is known."""
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


def open_linear() -> None:
    """Find out what `linear` will ask: which library is fast, and the kernel for a few rows, if it is compiled."""
    mkl_is_slow()
    open_kernel("few_rows")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x [..., D]`, `weight [N, D]`, `bias [N]` -> `x weight^T + bias [..., N]`, as `torch.nn.functional.linear`."""
    y = None
    if not torch.compiler.is_compiling():
        numbers, work = x.numel(), x.numel() * weight.shape[0]
        if work >= _EARNS_ONEDNN and numbers >= _FEW_ROWS * x.shape[-1] and mkl_is_slow():
            y = _by_onednn(x, weight, bias)
        elif work >= _WORTH_A_CALL and numbers < (_SHORT_TEXT if mkl_is_slow() else _FEW_ROWS) * x.shape[-1]:
            y = _by_kernel(x, weight, bias)
    return F.linear(x, weight, bias) if y is None else y


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`linear` by oneDNN; None where it does not run."""
    switched_off = not torch._C._get_mkldnn_enabled()  # by torch.backends.mkldnn.flags
    if switched_off or is_looked_into() or not _are_plain(x, weight, bias):
        return None
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return call(_OneDnnLinear, _dense(rows), _dense(weight), bias).view(*x.shape[:-1], weight.shape[0])


def _are_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the product is one of float32 numbers in this machine's memory, and nothing else: subclasses of Tensor
    (quantised or distributed weights) have products of their own, and so has autocast."""
    for y in (x, weight) if bias is None else (x, weight, bias):
        if type(y) not in _PLAIN or y.dtype != torch.float32 or y.device.type != "cpu":
            return False
    return not torch.is_autocast_enabled("cpu")


def _by_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`linear` of a few rows by the kernel, which has no backward pass; None where it does not run."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return None
    outputs, size = weight.shape
    if not _are_plain(x, weight, bias) or not weight.is_contiguous() or x.shape[-1] != size:
        return None
    numbers = x.numel()
    # A large weight earns the compiler, however few the rows: it will be read again and again.
    kernel = load_kernel("few_rows", work=_ROWS_TO_COME * size * outputs)
    if kernel is None:
        return None
    x, threads = x.contiguous(), torch.get_num_threads() if size * outputs >= _FEWEST else 1
    y = x.new_empty(*x.shape[:-1], outputs)
    places = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()
    kernel.forward(ctypes.byref(_FewRowsInputs(*places, numbers // size, size, outputs, threads)), pointer(y))
    return y


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The matrix x, or a copy of it where it is neither contiguous nor the transpose of what is."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
