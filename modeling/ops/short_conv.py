# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The short convolution of whole texts by a C++ kernel: one pass over the tokens, wherever padding stands."""

from __future__ import annotations

import ctypes

import torch

from lalm.modeling.ops.cpp import call, load_kernel, pointer
from lalm.modeling.ops.diagonal_recurrence import compute_dtype
from lalm.modeling.ops.layout import SequenceLayout
from lalm.modeling.ops.products import without_autocast


class _Inputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "skip", "documents")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "threads")),
    ]


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, x, weight, skip, documents):
        ctx.kernel = kernel
        ctx.save_for_backward(x, weight, skip, documents)
        y = torch.empty_like(x) if skip is None else torch.zeros_like(x)
        kernel.forward(_ShortConv.inputs(x, weight, skip, documents), pointer(y))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, skip, documents = ctx.saved_tensors
        dx = torch.empty_like(x) if skip is None else torch.zeros_like(x)
        d_weight, dy = torch.zeros_like(weight), dy.contiguous()
        ctx.kernel.backward(_ShortConv.inputs(x, weight, skip, documents), pointer(dy), pointer(dx), pointer(d_weight))
        return None, dx, d_weight, None, None

    @staticmethod
    def inputs(x, weight, skip, documents):
        pointers = (pointer(tensor) for tensor in (x, weight, skip, documents))
        return ctypes.byref(_Inputs(*pointers, *x.shape, torch.get_num_threads()))


def cpp_short_conv(
    x: torch.Tensor, weight: torch.Tensor, before: int, activation: bool, layout: SequenceLayout
) -> torch.Tensor | None:
    """Convolve `x [B, T, D]` with `weight [D, W]`, over `before` earlier real tokens of a document and later ones.

    Returns:
        `[B, T, D]`, unspecified on padding, after a SiLU if `activation`; None where the kernel does not run.
    """
    if x.device.type != "cpu" or compute_dtype(x, weight) != torch.float32 or torch.compiler.is_compiling():
        return None
    sizes = {"WIDTH": weight.shape[1], "BEFORE": before, "SILU": int(activation)}
    kernel = load_kernel("short_conv", work=x.numel() * weight.shape[1], **sizes)
    if kernel is None:
        return None
    skip = None if layout.mask is None else (~layout.mask).contiguous()
    documents = layout.document_ids()
    with without_autocast(x.device):
        tensors = x.float().contiguous(), weight.float().T.contiguous()
        return call(_ShortConv, kernel, *tensors, skip, documents).to(x.dtype)
