# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The gates of LAM's memories: in plain torch, and for two memories by a C++ kernel, in one pass over what their
projection gives."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lalm.modeling.ops.cpp_kernels import HeadKernel, pointer
from lalm.modeling.ops.dispatch import GATES_WORTH_THREADS, runs_lam_gates, threads
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.kernels.kernel_op import KernelOp, pack

# The projections per head that the kernel supports, and where the decays are among them.
COMPLETE = {"beta": 1, "read": 2, "decay": 2, "leak": 2}
_DECAY = slice(3, 5)


class LamGateTensors(NamedTuple):
    """The tensors that `cpp_lam_gates` takes."""

    x: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    flux_weight: torch.Tensor
    decay_bias: torch.Tensor
    flux_bias: torch.Tensor


class LamGateOptions(NamedTuple):
    leak_max: float


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


class _LamGates(KernelOp):
    """The kernels of lam_gates.cpp."""

    name, Tensors, Options = "lam_gates", LamGateTensors, LamGateOptions
    outputs = 4

    def kernel(self, x: LamGateTensors, options: LamGateOptions) -> HeadKernel:
        return HeadKernel("lam_gates", 0, ())

    def allocate(self, x: LamGateTensors, options: LamGateOptions, keeps: bool) -> tuple[torch.Tensor, ...]:
        directions, heads = x.flux_bias.shape
        g, beta, read = (x.x.new_empty(directions, *x.v.shape[:2], heads, 2) for _ in range(3))
        return g, beta, read, x.x.new_empty(*g.shape, 2)

    def forward(self, library, x: LamGateTensors, options: LamGateOptions, made) -> None:
        library.forward(ctypes.byref(_inputs(x, options)), ctypes.byref(_gates(made)))

    def backward(self, library, x: LamGateTensors, options: LamGateOptions, saved, gradients) -> tuple:
        shapes = self.allocate(x, options, False) if any(dy is None for dy in gradients) else gradients
        given = [
            torch.zeros_like(y) if dy is None else dy.contiguous() for y, dy in zip(shapes, gradients, strict=True)
        ]
        dx, d_flux = torch.empty_like(x.x), x.x.new_empty(*x.x.shape[:2], *x.flux_bias.shape)
        inputs, gates = _inputs(x, options), _gates(given)
        library.backward(ctypes.byref(inputs), ctypes.byref(gates), pointer(dx), pointer(d_flux))
        d_decay = dx.unflatten(-1, (*x.flux_bias.shape, -1))[..., _DECAY]  # the bias is added to what is projected
        # Of k^T W v, head by head.
        slopes, keys, values = (y.flatten(0, 1).transpose(0, 1) for y in (d_flux.sum(2)[..., None], x.k, x.v))
        dk, dv = (slopes * values) @ x.flux_weight.transpose(1, 2), slopes * (keys @ x.flux_weight)
        d_weight = (slopes * keys).transpose(1, 2) @ values
        dk, dv = (y.transpose(0, 1).reshape(like.shape) for y, like in ((dk, x.k), (dv, x.v)))
        return dx, dk, dv, d_weight, d_decay.sum((0, 1)), d_flux.sum((0, 1))

    def plain(self, x: LamGateTensors, options: LamGateOptions) -> tuple[torch.Tensor | None, ...]:
        return plain_lam_gates(*x, options.leak_max)


def _inputs(x: LamGateTensors, options: LamGateOptions) -> ctypes.Structure:
    directions, heads = x.flux_bias.shape
    return pack(
        "lam_gates",
        "Inputs",
        **{name: y.data_ptr() for name, y in zip(x._fields, x, strict=True)},
        tokens=x.x.shape[0] * x.x.shape[1],
        directions=directions,
        heads=heads,
        key_size=x.k.shape[-1],
        value_size=x.v.shape[-1],
        threads=threads(x.x.numel(), GATES_WORTH_THREADS),
        leak_max=options.leak_max,
    )


def _gates(tensors: Sequence[torch.Tensor]) -> ctypes.Structure:
    g, beta, read, coupling = (y.data_ptr() for y in tensors)
    return pack("lam_gates", "Gates", g=g, beta=beta, read=read, coupling=coupling)


_lam_gates = _LamGates()


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
    if not runs_lam_gates(*tensors):
        return None
    with without_autocast(x.device):
        return _lam_gates(LamGateTensors(*(y.float().contiguous() for y in tensors)), LamGateOptions(leak_max))
