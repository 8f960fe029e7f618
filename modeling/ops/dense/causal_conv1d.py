# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The causal convolution along time of linear-attention and Mamba layers, under the names and with the arguments of
the `causal_conv1d` package. Channels come first in its shapes, `[B, D, T]`; what is computed on is `[B, T, D]`, so
that a transposed view of a projection's output costs no copy, on the way in or out."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lalm.modeling.ops.dense.short_conv import cpp_short_conv, plain_short_conv
from lalm.modeling.ops.sequence_layout import SequenceLayout, stable_order

_SILU = ("silu", "swish")


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y_t = activation(bias + sum_i weight_i x_(t - W + 1 + i)), for each channel, inside each document.

    Args:
        x: `[B, D, T]`; without a copy if it is a transposed view of `[B, T, D]`, or of a slice of wider tokens.
        weight: `[D, W]`.
        bias: `[D]`.
        seq_idx: integer `[B, T]`; where it changes a document begins, which sees nothing of the one before.
        initial_states: `[B, D, W - 1]`, the inputs before the first document of each row; None for zeros.
        return_final_states: also return the last W - 1 inputs of each row's last document.
        final_states_out: `[B, D, W - 1]`, where to write these.
        activation: None, "silu" or "swish".
        mask: bool `[B, T]`, False on padding, over which every window passes; the output there is unspecified.

    Returns:
        y `[B, D, T]`, a transposed view of `[B, T, D]`, in the dtype of x, and the final states if asked for.

    Raises:
        ValueError: a shape does not fit, or the activation is unknown; the message names the argument.
    """
    _check(x, weight, bias, activation)
    batch, channels, length = x.shape
    before = weight.shape[1] - 1
    for name, given in (("seq_idx", seq_idx), ("mask", mask)):
        if given is not None and given.shape != (batch, length):
            raise ValueError(f"{name} must be [B, T] = {(batch, length)}, got {tuple(given.shape)}.")
    for name, given in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if given is not None and given.shape != (batch, channels, before):
            raise ValueError(f"{name} must be [B, D, W - 1] = {(batch, channels, before)}, got {tuple(given.shape)}.")
    tokens = x.transpose(1, 2)
    if initial_states is not None:
        tokens = torch.cat([initial_states.transpose(1, 2).to(x.dtype), tokens], dim=1)
        mask = None if mask is None else F.pad(mask, (before, 0), value=True)
        seq_idx = None if seq_idx is None else torch.cat([seq_idx[:, :1].expand(-1, before), seq_idx], dim=1)
    order = None if mask is None else stable_order(mask)
    layout = SequenceLayout(mask, None if seq_idx is None else seq_idx.long(), order)
    found = cpp_short_conv([tokens], weight, before, activation is not None, layout, bias)
    y = (
        plain_short_conv(tokens, weight, before, activation is not None, layout, bias=bias)[0]
        if found is None
        else found[0]
    )
    y = (y if initial_states is None else y[:, before:]).to(x.dtype).transpose(1, 2)
    if not return_final_states:
        return y
    final = layout.last_inputs([tokens], before).transpose(1, 2)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """`causal_conv1d_fn` of new tokens x `[B, D]` or `[B, D, T]` behind the inputs `conv_state [B, D, S]`, S >= W - 1,
    which is moved on in place."""
    y = x[..., None] if x.ndim == 2 else x
    _check(y, weight, bias, activation)
    before, length = weight.shape[1] - 1, y.shape[2]
    if conv_state.shape[:2] != y.shape[:2] or conv_state.shape[2] < before:
        raise ValueError(
            f"conv_state must be [B, D, S] with [B, D] = {tuple(y.shape[:2])} and S >= {before}, got "
            f"{tuple(conv_state.shape)}."
        )
    window = torch.cat([conv_state.to(y.dtype), y], dim=2)
    conv_state.copy_(window[..., -conv_state.shape[2] :])
    window = window[..., -before - length :].to(weight.dtype)
    if length == 1:
        y = (window * weight).sum(-1, keepdim=True)
        y = y if bias is None else y + bias[:, None]
        y = F.silu(y) if activation is not None else y
    else:
        y = causal_conv1d_fn(window, weight, bias, activation=activation)[..., before:]  # type: ignore[call-overload]
    return y.to(x.dtype).view(x.shape) if x.ndim == 2 else y.to(x.dtype)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be [B, D, T], got {tuple(x.shape)}.")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight must be [D, W] with D = {x.shape[1]}, got {tuple(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [D] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}.")
    if activation is not None and activation not in _SILU:
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}.")
