# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The short convolution: in plain torch, and for whole sequences by a C++ kernel, in one pass over the tokens, with
padding anywhere."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import apply_function, differentiable_by
from lalm.modeling.ops.cpp_kernels import pointer, preload_kernel
from lalm.modeling.ops.dispatch import short_conv_kernel
from lalm.modeling.ops.dtypes import without_autocast
from lalm.modeling.ops.kernels.kernel_op import address, fresh, pack
from lalm.modeling.ops.sequence_layout import SequenceLayout, stable_order


def plain_short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    before: int,
    activation: bool,
    layout: SequenceLayout,
    state: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve `x [B, T, D]` after `state [B, before, D]`, or after nothing; the other arguments are those of
    `cpp_short_conv`. Returns `[B, T, D]`, 0 on padding, and the next state of a causal convolution."""
    length, width = x.shape[1], weight.shape[1]
    after = width - 1 - before
    x = layout.pads_first(layout.zero_padding(x))
    window = F.pad(x, (0, 0, before, after)) if state is None else layout.slide_over_padding(state.to(x.dtype), x)
    segments = layout.segments_pads_first()
    if segments is not None:
        around = [segments[:, :1].expand(-1, before), segments, segments[:, -1:].expand(-1, after)]
        segments, own = torch.cat(around, 1), segments
    y = window[:, before : before + length] * weight[:, before]
    for offset in range(width):
        if offset == before:
            continue
        neighbour = window[:, offset : offset + length]
        if segments is not None:
            neighbour = neighbour.masked_fill((own != segments[:, offset : offset + length])[..., None], 0)
        y = torch.addcmul(y, neighbour, weight[:, offset])
    y = y if bias is None else y + bias
    state = window[:, length:]
    if segments is not None:
        state = state.masked_fill((segments[:, length:] != segments[:, -1:])[..., None], 0)
    return layout.zero_padding(layout.restore(F.silu(y) if activation else y)), state


def _plain(ctx, weight, bias, skip, documents, *parts) -> tuple[torch.Tensor, ...]:
    mask = None if skip is None else ~skip
    order = None if mask is None else stable_order(mask)
    where = SequenceLayout(mask, documents, order)
    y, _ = plain_short_conv(torch.cat(parts, dim=-1), weight, ctx.before, ctx.activation, where, bias=bias)
    return y.split([x.shape[-1] for x in parts], dim=-1)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, before, activation, weight, bias, skip, documents, *parts):
        ctx.kernel, ctx.before, ctx.activation = kernel, before, activation
        ctx.save_for_backward(weight, bias, skip, documents, *parts)
        outputs = tuple(fresh(x, skip) for x in parts)
        for y, (inputs, _) in zip(outputs, _ShortConv.inputs(weight, bias, skip, documents, parts), strict=True):
            kernel.forward(inputs, pointer(y))
        return outputs

    @staticmethod
    @differentiable_by(_plain, constants=3)
    def backward(ctx, *gradients):
        weight, bias, skip, documents, *parts = ctx.saved_tensors
        found = [fresh(x, skip) for x in parts]
        d_weight, d_bias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        inputs = _ShortConv.inputs(weight, bias, skip, documents, parts)
        for dx, dy, (part, first) in zip(found, gradients, inputs, strict=True):
            dy, own = dy.contiguous(), None if d_bias is None else d_bias[first:]  # under names, which keep them alive
            ctx.kernel.backward(part, pointer(dy), pointer(dx), pointer(d_weight[first:]), pointer(own))
        return None, None, None, d_weight, d_bias, None, None, *found

    @staticmethod
    def inputs(weight, bias, skip, documents, parts):
        """The arguments of the kernel for each part, and its first channel."""
        first, common = 0, {"skip": address(skip), "documents": address(documents), "threads": torch.get_num_threads()}
        for x in parts:
            places = {"weight": address(weight[first:]), "bias": None if bias is None else address(bias[first:])}
            batch, length, channels = x.shape
            sizes = {"batch": batch, "length": length, "channels": channels, "row": x.stride(0), "token": x.stride(1)}
            yield ctypes.byref(pack("short_conv", "Inputs", x=x.data_ptr(), **places, **sizes, **common)), first
            first += channels


def _by_channels(x: torch.Tensor) -> torch.Tensor:
    """`x [B, T, D]` in float32 with the channels of a token together; a slice of wider tokens is taken as it is."""
    x = x.float()
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _sizes(width: int, before: int, activation: bool) -> dict[str, int]:
    return {"WIDTH": width, "BEFORE": before, "SILU": int(activation)}


def open_short_conv(width: int, before: int, activation: bool) -> None:
    """Load the kernel that `cpp_short_conv` will look for, if it is compiled."""
    preload_kernel("short_conv", **_sizes(width, before, activation))


def cpp_short_conv(
    parts: Sequence[torch.Tensor],
    weight: torch.Tensor,
    before: int,
    activation: bool,
    layout: SequenceLayout,
    bias: torch.Tensor | None = None,
) -> list[torch.Tensor] | None:
    """Convolve `parts` `[B, T, D_i]`, together all D channels, with `weight [D, W]`, over `before` earlier real tokens
    of a document and later ones, and add `bias [D]`. Parts may be slices of wider tokens.

    Returns:
        As many `[B, T, D_i]`, unspecified on padding, after a SiLU if `activation`; None where no kernel runs.
    """
    kernel = short_conv_kernel(parts, weight, bias, **_sizes(weight.shape[1], before, activation))
    if kernel is None:
        return None
    skip = None if layout.mask is None else (~layout.mask).contiguous()
    documents = layout.document_ids()
    with without_autocast(weight.device):
        given = [_by_channels(x) for x in parts]
        weights = (weight.float().contiguous(), None if bias is None else bias.float().contiguous())
        outputs = apply_function(_ShortConv, kernel, before, activation, *weights, skip, documents, *given)
        return [y.to(x.dtype) for x, y in zip(parts, outputs, strict=True)]
