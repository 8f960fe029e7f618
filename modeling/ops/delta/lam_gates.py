# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The gates of LAM's memories: in plain torch, and for two memories by a C++ kernel, in one pass over what their
projection gives."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import apply_function, differentiable_by
from lalm.modeling.ops.cpp_kernels import pointer
from lalm.modeling.ops.dispatch import GATES_WORTH_THREADS, lam_gates_kernel, threads
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast

# The projections per head that the kernel supports, and where the decays are among them.
COMPLETE = {"beta": 1, "read": 2, "decay": 2, "leak": 2}
_DECAY = slice(3, 5)


class _Inputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "k", "v", "flux_weight", "decay_bias", "flux_bias")),
        *((name, ctypes.c_int64) for name in ("tokens", "directions", "heads", "key_size", "value_size", "threads")),
        ("leak_max", ctypes.c_double),
    ]


class _Gates(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("g", "beta", "read", "coupling")]


def plain_lam_gates(
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    flux_weight: torch.Tensor | None,
    decay_bias: torch.Tensor,
    flux_bias: torch.Tensor | None,
    leak_max: float,
    sizes: Mapping[str, int] = COMPLETE,
) -> tuple[torch.Tensor | None, ...]:
    """As `cpp_lam_gates`, of M memories and of those gates that `sizes` gives numbers: without flux every memory takes
    all of a write, without decays `decay_bias` decides alone, without read weights they are 1, without leak there is
    no coupling."""
    x = x.to(compute_dtype(x)).unflatten(-1, (*decay_bias.shape[:2], -1)).movedim(2, 0)
    parts = dict(zip(sizes, x.split(list(sizes.values()), dim=-1), strict=True))
    decay = decay_bias[:, None, None].to(x.dtype).expand(*x.shape[:-1], -1)
    g = F.logsigmoid(decay + parts["decay"] if sizes["decay"] else decay)
    beta = parts["beta"].sigmoid()
    if flux_weight is not None and flux_bias is not None:
        written = torch.einsum("bthk,hkv->bthv", k.to(x.dtype), flux_weight.to(x.dtype))
        psi = ((written * v).sum(-1) + flux_bias[:, None, None].to(x.dtype)).sigmoid()[..., None]
        beta = beta * torch.cat([psi, 1 - psi], dim=-1)
    beta = beta.expand_as(g)
    read = parts["read"] if sizes["read"] else torch.ones_like(g)
    coupling = None
    if sizes["leak"]:
        fast, slow = (parts["leak"].sigmoid() * leak_max).unbind(-1)
        coupling = torch.stack([1 - fast, fast, slow, 1 - slow], dim=-1).unflatten(-1, (2, 2))
    return g, beta, read, coupling


def _plain(ctx, *tensors: Any) -> tuple[torch.Tensor | None, ...]:
    arguments: Any = (*tensors, ctx.leak_max)
    return plain_lam_gates(*arguments)


class _LamGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, leak_max, x, k, v, flux_weight, decay_bias, flux_bias):
        tensors = (x, k, v, flux_weight, decay_bias, flux_bias)
        directions, heads = flux_bias.shape
        g, beta, read = (x.new_empty(directions, *v.shape[:2], heads, 2) for _ in range(3))
        coupling = x.new_empty(*g.shape, 2)
        gates = _Gates(*(gate.data_ptr() for gate in (g, beta, read, coupling)))
        kernel.forward(_LamGates.inputs(tensors, leak_max), ctypes.byref(gates))
        ctx.kernel, ctx.leak_max = kernel, leak_max
        ctx.save_for_backward(*tensors)
        return g, beta, read, coupling

    @staticmethod
    @differentiable_by(_plain, constants=2)
    def backward(ctx, *gradients):
        tensors = ctx.saved_tensors
        x, k, v, flux_weight, _, flux_bias = tensors
        given = [gradient.contiguous() for gradient in gradients]
        dx, d_flux = torch.empty_like(x), x.new_empty(*x.shape[:2], *flux_bias.shape)
        gates = _Gates(*(gradient.data_ptr() for gradient in given))
        ctx.kernel.backward(_LamGates.inputs(tensors, ctx.leak_max), ctypes.byref(gates), pointer(dx), pointer(d_flux))
        d_decay = dx.unflatten(-1, (*flux_bias.shape, -1))[..., _DECAY]  # the bias is added to what is projected
        # Of k^T W v, head by head.
        slopes, keys, values = (y.flatten(0, 1).transpose(0, 1) for y in (d_flux.sum(2)[..., None], k, v))
        dk, dv = (slopes * values) @ flux_weight.transpose(1, 2), slopes * (keys @ flux_weight)
        d_weight = (slopes * keys).transpose(1, 2) @ values
        dk, dv = (y.transpose(0, 1).reshape(like.shape) for y, like in ((dk, k), (dv, v)))
        return None, None, dx, dk, dv, d_weight, d_decay.sum((0, 1)), d_flux.sum((0, 1))

    @staticmethod
    def inputs(tensors, leak_max):
        x, k, v, _, _, flux_bias = tensors
        sizes = (x.shape[0] * x.shape[1], *flux_bias.shape, k.shape[-1], v.shape[-1])
        sizes += (threads(x.numel(), GATES_WORTH_THREADS),)
        return ctypes.byref(_Inputs(*(tensor.data_ptr() for tensor in tensors), *sizes, leak_max))


def cpp_lam_gates(
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    flux_weight: torch.Tensor,
    decay_bias: torch.Tensor,
    flux_bias: torch.Tensor,
    leak_max: float,
) -> tuple[torch.Tensor, ...] | None:
    """The gates of two memories, D directions and H heads.

    Args:
        x: what is projected, `[B, T, D H 7]`; per head the write strength, two read weights, two decays and two leaks.
        k, v: unit keys and values, `[B, T, H, K]` and `[B, T, H, V]`.
        flux_weight: `[H, K, V]`; k^T W v + flux_bias is what the first memory's share of a write is the sigmoid of.
        decay_bias, flux_bias: `[D, H, 2]` and `[D, H]`.
        leak_max: what a leak is at most.

    Returns:
        g, beta and read `[D, B, T, H, 2]` and the coupling `[D, B, T, H, 2, 2]`, float32; None where no kernel runs.
    """
    tensors = (x, k, v, flux_weight, decay_bias, flux_bias)
    kernel = lam_gates_kernel(*tensors)
    if kernel is None:
        return None
    with without_autocast(x.device):
        return apply_function(_LamGates, kernel, leak_max, *(tensor.float().contiguous() for tensor in tensors))
