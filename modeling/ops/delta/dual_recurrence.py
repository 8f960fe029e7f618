# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The definition of the dual-state delta rule, by tokens; what it computes stands in dual_state.py.

Shape suffixes: B batch, T time, H heads, M memories, K key size, V value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lalm.modeling.ops.chunks import by_tokens
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout


class DualInputs(NamedTuple):
    """What the rule takes of every token; both directions of reading have gates of their own, `[2, B, T, ...]`."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, H, V]
    g: torch.Tensor  # [B, T, H, M]
    beta: torch.Tensor  # [B, T, H, M]
    read: torch.Tensor  # [B, T, H, M]
    leak: torch.Tensor  # C - I, [B, T, H, M, M]


def recurrent_dual(
    x: DualInputs, scale: float, state: torch.Tensor | None, layout: SequenceLayout, use_delta_rule: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """o `[B, T, H, V]` and Z `[B, H, M, K, V]`."""
    q, k, v, g, beta, read, leak = x
    dtype = compute_dtype(*x)
    coupling = leak.to(dtype) + torch.eye(g.shape[-1], dtype=dtype, device=q.device)
    gates = (g.to(dtype).exp(), beta.to(dtype), read.to(dtype), coupling)
    state = None if state is None else state.to(dtype)
    return run_dual(q.to(dtype) * scale, k.to(dtype), v.to(dtype), *gates, state, layout.starts(), use_delta_rule)


def run_dual(
    q, k, v, decay, beta, read, coupling, state, starts_BT, use_delta_rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` of tensors of one type, after the scale, with exp(g) and C in the place of g and `leak`."""
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], beta.shape[-1], q.shape[3], v.shape[3])

    def step(state_BHMKV, q_BHK, k_BHK, v_BHV, decay_BHM, beta_BHM, read_BHM, coupling_BHMM, starts_B):
        k_BH1K = k_BHK[:, :, None, :]
        if starts_B is not None:
            state_BHMKV = state_BHMKV.masked_fill(starts_B[:, None, None, None, None], 0)
        state_BHMKV = state_BHMKV * decay_BHM[..., None, None]
        error_BHMV = v_BHV[:, :, None]
        if use_delta_rule:
            error_BHMV = error_BHMV - (k_BH1K[..., None, :] @ state_BHMKV).squeeze(-2)
        state_BHMKV = state_BHMKV + k_BH1K[..., None] * (beta_BHM[..., None] * error_BHMV)[..., None, :]
        state_BHMKV = (coupling_BHMM @ state_BHMKV.flatten(-2)).view_as(state_BHMKV)
        weights_BHMK = read_BHM[..., None] * q_BHK[:, :, None]
        return state_BHMKV, (weights_BHMK.flatten(2)[:, :, None] @ state_BHMKV.flatten(2, 3)).squeeze(-2)

    return by_tokens(step, (q, k, v, decay, beta, read, coupling, starts_BT), state)
