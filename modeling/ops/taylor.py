# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The feature map of Based, by a C++ kernel on the CPU, else in plain torch."""

from __future__ import annotations

import ctypes

import torch

from lalm.modeling.ops.cpp import call, load_kernel, pointer


class _Inputs(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("rows", ctypes.c_int64), ("threads", ctypes.c_int64)]


class _Taylor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, x):
        y = x.new_empty(*x.shape[:-1], num_taylor_features(x.shape[-1]))
        kernel.forward(_Taylor.inputs(x), pointer(y))
        ctx.kernel = kernel
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        ctx.kernel.backward(_Taylor.inputs(x), pointer(dy), pointer(dx))
        return None, dx

    @staticmethod
    def inputs(x):
        return ctypes.byref(_Inputs(x.data_ptr(), x.numel() // x.shape[-1], torch.get_num_threads()))


def num_taylor_features(size: int) -> int:
    """Features of a head of `size`."""
    return 1 + size + size * (size + 1) // 2


def taylor_features(x: torch.Tensor) -> torch.Tensor:
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K) (Based, Arora et al., arXiv 2402.18668, section 4.1).

    Of the K^2 second-order products the K (K + 1) / 2 distinct ones are kept, those off the diagonal times sqrt 2:
    `[..., K]` -> `[..., 1 + K + K (K + 1) / 2]`.
    """
    size = x.shape[-1]
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        kernel = load_kernel("taylor", work=4 * x.numel() * size, SIZE=size)
        if kernel is not None:
            return call(_Taylor, kernel, x.contiguous())
    row, column = torch.triu_indices(size, size, device=x.device)
    weight = torch.where(row == column, x.new_tensor(0.5).sqrt(), x.new_tensor(1.0)) / size**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x / size**0.25, x[..., row] * x[..., column] * weight], dim=-1)
