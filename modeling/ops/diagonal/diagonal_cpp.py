# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Diagonal recurrences by a C++ kernel, in blocks of tokens that stay in the caches of a core.

`cpp_diagonal` is the float32 form of `recurrent_diagonal` on a CPU. Its time and memory grow linearly; for the
backward pass it keeps the inputs and, of normalised sums, the outputs and what they were divided by.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from lalm.modeling.ops.cpp_kernels import LANES, HeadKernel, boundaries, pointer, refuse_float64
from lalm.modeling.ops.diagonal.diagonal_recurrence import normalized, recurrent_diagonal
from lalm.modeling.ops.diagonal.taylor import num_taylor_features, taylor_features
from lalm.modeling.ops.kernels.kernel_op import KernelOp, address, fresh, pack
from lalm.modeling.ops.sequence_layout import SequenceLayout


class DiagonalTensors(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    state: torch.Tensor | None
    skip: torch.Tensor | None
    starts: torch.Tensor | None


class DiagonalOptions(NamedTuple):
    scale: float
    eps: float | None
    taylor: bool


class _Diagonal(KernelOp):
    """The kernels of diagonal.cpp."""

    name, Tensors, Options = "diagonal", DiagonalTensors, DiagonalOptions
    masks, outputs, extras, read_again = 2, 2, 1, 1

    def kernel(self, x: DiagonalTensors, options: DiagonalOptions) -> HeadKernel:
        gate_size = 0 if x.g is None else x.g.shape[-1]
        return diagonal_kernel(x.q.shape[-1], x.v.shape[-1], gate_size, options.eps is not None, options.taylor)

    def allocate(self, x: DiagonalTensors, options: DiagonalOptions, keeps: bool) -> tuple[torch.Tensor | None, ...]:
        q, v, is_normalized = x.q, x.v, options.eps is not None
        o = torch.empty_like(v) if x.skip is None else torch.zeros_like(v)
        keys = num_taylor_features(q.shape[-1]) if options.taylor else q.shape[-1]
        final = v.new_empty(q.shape[0], q.shape[2], keys, v.shape[3] + is_normalized)
        return o, final, torch.empty_like(v[..., 0]) if is_normalized and keeps else None

    def forward(self, library, x: DiagonalTensors, options: DiagonalOptions, made) -> None:
        decay = None if x.g is None else x.g.exp()
        library.forward(ctypes.byref(_inputs(x, decay, options)), *(pointer(y) for y in made))

    def saved(self, made, options: DiagonalOptions) -> tuple[torch.Tensor | None, ...]:
        return None if options.eps is None else made[0], made[2]

    def backward(self, library, x: DiagonalTensors, options: DiagonalOptions, saved, gradients) -> tuple:
        (o, sizes), (do, d_final) = saved, gradients
        decay = None if x.g is None else x.g.exp()
        found = [None if y is None else fresh(y, x.skip) for y in x[:4]]
        do = torch.zeros_like(x.v) if do is None else do.contiguous()
        if d_final is None:
            d_state = torch.zeros_like(cast(torch.Tensor, self.allocate(x, options, False)[1]))
        else:
            d_state = d_final.clone(memory_format=torch.contiguous_format)
        names = zip("qkvg", found, strict=True)
        made = pack("diagonal", "Gradients", state=address(d_state), **{name: address(y) for name, y in names})
        inputs = _inputs(x, decay, options)
        library.backward(ctypes.byref(inputs), pointer(o), pointer(do), pointer(sizes), ctypes.byref(made))
        return *found, None if x.state is None else d_state, None, None

    def plain(self, x: DiagonalTensors, options: DiagonalOptions) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, state, skip, starts = x
        if skip is not None:
            q, k, v = (y.masked_fill(skip[..., None, None], 0) for y in (q, k, v))
        if options.taylor:
            q, k = taylor_features(q), taylor_features(k)
        layout = SequenceLayout(None if skip is None else ~skip, None if starts is None else starts.cumsum(1))
        core = recurrent_diagonal if options.eps is None else normalized(recurrent_diagonal, options.eps)
        return core(q, k, v, g, options.scale, state, layout)


def _inputs(x: DiagonalTensors, decay: torch.Tensor | None, options: DiagonalOptions) -> ctypes.Structure:
    """The kernel's arguments; valid while the tensors live."""
    batch, length, heads = x.q.shape[:3]
    return pack(
        "diagonal",
        "Inputs",
        q=x.q.data_ptr(),
        k=x.k.data_ptr(),
        v=x.v.data_ptr(),
        decay=address(decay),
        state=address(x.state),
        skip=address(x.skip),
        starts=address(x.starts),
        scale=options.scale,
        eps=options.eps or 0.0,
        batch=batch,
        length=length,
        heads=heads,
        threads=torch.get_num_threads(),
    )


_diagonal = _Diagonal()


@cache
def diagonal_kernel(
    key_size: int, value_size: int, gate_size: int, normalized: bool = False, taylor: bool = False
) -> HeadKernel:
    """The kernel for heads of these sizes.

    Args:
        key_size, value_size: K and V.
        gate_size: size of the log decay per token and head: 0, 1 or the number of rows of the state.
        normalized: for sums that are divided by z . q + eps.
        taylor: for the features that `taylor_features` makes of q and k.
    """
    keys = num_taylor_features(key_size) if taylor else key_size
    sizes = {"KEY": keys, "TAYLOR": key_size if taylor else 0}
    sizes |= {"VALUE": value_size + -value_size % LANES, "NORMALIZED": int(normalized), "DECAY": min(gate_size, 2)}
    return HeadKernel("diagonal", keys * value_size, tuple(sizes.items()))


def _with_columns(state: torch.Tensor, missing: int, value_size: int) -> torch.Tensor:
    """`state` with so many columns of zeros after the first `value_size`, before that of a normaliser."""
    values, normalizer = state[..., :value_size], state[..., value_size:]
    return torch.cat([F.pad(values, (0, missing)), normalizer], -1)


def cpp_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
    eps: float | None = None,
    taylor: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` in C++; same arguments.

    With `eps` the outputs are divided by z . q + eps, where z sums the keys as S does k v^T; states are then
    `[B, H, K, V + 1]`, z their last column. With `taylor` it is that of `taylor_features(q)` and `taylor_features(k)`.
    """
    value_size, layout = v.shape[-1], layout or SequenceLayout()
    refuse_float64(q, k, v, g, state)
    if missing := -value_size % LANES:  # columns of zeros that make whole registers
        v = F.pad(v, (0, missing))
        state = None if state is None else _with_columns(state, missing, value_size)
    tensors: Any = (None if x is None else x.float().contiguous() for x in (q, k, v, g, state))
    x = DiagonalTensors._make((*tensors, *boundaries(layout)))
    o, final = _diagonal(x, DiagonalOptions(scale, eps, taylor))
    if missing:
        o, final = o[..., :value_size], torch.cat([final[..., :value_size], final[..., value_size + missing :]], -1)
    return o, final
