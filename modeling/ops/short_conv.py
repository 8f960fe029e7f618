# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The short convolution of whole texts by a C++ kernel: one pass over the tokens, wherever padding stands."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from lalm.modeling.ops.cpp import call, load_kernel, open_kernel, pointer
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


def _sizes(width: int, before: int, activation: bool) -> dict[str, int]:
    return {"WIDTH": width, "BEFORE": before, "SILU": int(activation)}


def open_short_conv(width: int, before: int, activation: bool) -> None:
    """Load the kernel that `cpp_short_conv` will look for, if it is compiled."""
    open_kernel("short_conv", **_sizes(width, before, activation))


def cpp_short_conv(
    parts: Sequence[torch.Tensor], weight: torch.Tensor, before: int, activation: bool, layout: SequenceLayout
) -> list[torch.Tensor] | None:
    """Convolve `parts` `[B, T, D_i]`, together all D channels, with `weight [D, W]`, over `before` earlier real tokens
    of a document and later ones.

    Returns:
        As many `[B, T, D_i]`, unspecified on padding, after a SiLU if `activation`; None where no kernel runs.
    """
    device = weight.device
    if device.type != "cpu" or compute_dtype(weight, *parts) != torch.float32 or torch.compiler.is_compiling():
        return None
    channels, width = weight.shape
    work = parts[0].shape[:2].numel() * channels * width
    kernel = load_kernel("short_conv", work=work, **_sizes(width, before, activation))
    if kernel is None:
        return None
    skip = None if layout.mask is None else (~layout.mask).contiguous()
    documents = layout.document_ids()
    with without_autocast(device):
        weights = weight.float().split([x.shape[-1] for x in parts])
        return [
            call(_ShortConv, kernel, x.float().contiguous(), w.T.contiguous(), skip, documents).to(x.dtype)
            for x, w in zip(parts, weights, strict=True)
        ]
