# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Causal efficient attention with a blindspot, as in linear-attention-transformer, by the semantics of its versions
0.19 and 0.2.1: the causal relative of Shen et al. (arXiv 1812.01243; see efficient_bidirectional.py).

Over the keys j of all earlier buckets of `blindspot_size` tokens (bucket size 1: over j <= i),
    "0.19"    o_i = sum_j (Q_i . e^k_j) v_j / max(sum_j Q_i . e^k_j, 1e-3)         Q = K^-1/2 softmax(q)
    "v0.2.1"  o_i = sum_d softmax(q_i)_d sum_j psi(k_j)_d v_j / (sum_j psi(k_j)_d + 1e-6)         psi = elu + 1

e^k overflows, so sums are kept relative to e^m, where m follows the running maximum of every feature once that leaves
the safe range: the diagonal recurrence with g_t = m_{t-1} - m_t. Nothing depends on m, hence no gradient passes
through it (docs/derivations/local_global.md).
Shape suffixes as in diagonal_recurrence.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lalm.modeling.ops.dispatch import MAX_LOG_FEATURE
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes

_SEMANTICS = ("0.19", "v0.2.1")
SMALLEST_SUM = 1e-3  # of "0.19"
EPS = 1e-6  # of "v0.2.1"


class EfficientState(NamedTuple):
    """What causal efficient attention remembers; float32, or float64 for float64 inputs.

    A memory is `[B, H, K, V + 2]`: sums of feature times value, the sum of the features, and the log m of the scale
    that both are relative to (0 in "v0.2.1").
    """

    published: torch.Tensor  # memory of the full buckets
    pending: torch.Tensor | None  # memory of the bucket being filled; None for buckets of one token
    filled: torch.Tensor | None  # tokens in it, [B]


def check_efficient(q, k, v, state, blindspot_size, semantics, layout):
    check_shapes(q, k, v, layout)
    check_semantics(semantics)
    if blindspot_size < 1:
        raise ValueError(f"blindspot_size must be at least 1 (no blindspot), got {blindspot_size}.")
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3] + 2)
    shapes = (shape, shape, tuple(q.shape[:1])) if blindspot_size > 1 else (shape, None, None)
    for name, value, expected in zip(("published", "pending", "filled"), state or (), shapes, strict=False):
        actual = None if value is None else tuple(value.shape)
        if actual != expected:
            raise ValueError(f"initial_state.{name} must be {expected} here, got {actual}.")


def check_semantics(semantics: str) -> None:
    if semantics not in _SEMANTICS:
        raise ValueError(f"semantics must be one of {_SEMANTICS}, got {semantics!r}.")


def empty_state(q: torch.Tensor, v: torch.Tensor, blindspot_size: int, dtype: torch.dtype) -> EfficientState:
    memory = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3] + 2, dtype=dtype, device=q.device)
    if blindspot_size == 1:
        return EfficientState(memory, None, None)
    return EfficientState(memory, torch.zeros_like(memory), memory.new_zeros(q.shape[0]))


def in_dtype(state: EfficientState, dtype: torch.dtype) -> EfficientState:
    published, *rest = (None if tensor is None else tensor.to(dtype) for tensor in state)
    assert published is not None
    return EfficientState(published, *rest)


def log_queries(q: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q e^m = e^M times a tensor with largest entry 1: returns that tensor and `M [..., 1]`, detached."""
    log_q = q.log_softmax(-1) - 0.5 * math.log(q.shape[-1]) + m
    largest = log_q.detach().amax(-1, keepdim=True)
    return (log_q - largest).exp(), largest


def quotient(sums: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Numerator over clamped denominator, both relative to e^M; M is never very negative, so the bound is finite."""
    return sums[..., :-1] / torch.maximum(sums[..., -1:], SMALLEST_SUM * (-largest).exp())


def merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The memory of what either memory holds."""
    scale_a, scale_b = a[..., -1:].detach(), b[..., -1:].detach()
    m = torch.maximum(scale_a, scale_b)
    return torch.cat([a[..., :-1] * (scale_a - m).exp() + b[..., :-1] * (scale_b - m).exp(), m], dim=-1)


def _one_key(k: torch.Tensor, v: torch.Tensor, semantics: str) -> torch.Tensor:
    """The memory of a single key and value `[B, H, *]`."""
    m = (k.detach() - MAX_LOG_FEATURE).clamp(min=0) if semantics == "0.19" else torch.zeros_like(k)
    feature = (k - m).exp() if semantics == "0.19" else F.elu(k) + 1
    return torch.cat([feature[..., None] * F.pad(v, (0, 1), value=1.0)[..., None, :], m[..., None]], dim=-1)


def _read(memory: torch.Tensor, q: torch.Tensor, semantics: str) -> torch.Tensor:
    """o `[B, H, V]` of the queries `[B, H, K]`."""
    if semantics == "v0.2.1":
        means = memory[..., :-2] / (memory[..., -2:-1] + EPS)
        return (q.softmax(-1)[..., None, :] @ means).squeeze(-2)
    q, largest = log_queries(q, memory[..., -1].detach())
    return quotient((q[..., None, :] @ memory[..., :-1]).squeeze(-2), largest)


def where_rows(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition.reshape(-1, *[1] * (b.ndim - 1)), a, b)


def recurrent_efficient(
    q, k, v, state: EfficientState | None, blindspot_size: int, semantics: str, layout: SequenceLayout
) -> tuple[torch.Tensor, EfficientState]:
    """Definition, by tokens: q, k `[B, T, H, K]`, v `[B, T, H, V]` -> o `[B, T, H, V]` and the state."""
    starts, dtype = layout.starts(), compute_dtype(q, k, v)
    q, k, v = layout.freeze(q, k, v)
    empty = empty_state(q, v, blindspot_size, dtype)
    state = empty if state is None else in_dtype(state, dtype)
    outputs = []
    for t in range(q.shape[1]):
        if starts is not None:
            state = _choose_state(starts[:, t], empty, state)
        o, after = _step(q[:, t].to(dtype), k[:, t].to(dtype), v[:, t].to(dtype), state, blindspot_size, semantics)
        state = after if layout.mask is None else _choose_state(layout.mask[:, t], after, state)
        outputs.append(o)
    return layout.zero_padding(torch.stack(outputs, dim=1)), state


def _choose_state(condition: torch.Tensor, a: EfficientState, b: EfficientState) -> EfficientState:
    """Row by row, `a` where the condition `[B]` holds."""
    published = where_rows(condition, a.published, b.published)
    if a.pending is None or b.pending is None or a.filled is None or b.filled is None:
        return EfficientState(published, None, None)
    return EfficientState(
        published, where_rows(condition, a.pending, b.pending), where_rows(condition, a.filled, b.filled)
    )


def _step(q, k, v, state: EfficientState, blindspot_size: int, semantics: str) -> tuple[torch.Tensor, EfficientState]:
    key = _one_key(k, v, semantics)
    if state.pending is None or state.filled is None:
        published = merge(state.published, key)
        return _read(published, q, semantics), EfficientState(published, None, None)
    o = _read(state.published, q, semantics)
    pending, filled = merge(state.pending, key), state.filled + 1
    full = filled == blindspot_size
    published = where_rows(full, merge(state.published, pending), state.published)
    pending, filled = where_rows(full, torch.zeros_like(pending), pending), torch.where(full, 0, filled)
    return o, EfficientState(published, pending, filled)


def features_of(k: torch.Tensor, present: torch.Tensor | None, semantics: str) -> torch.Tensor:
    features = k if semantics == "0.19" else F.elu(k) + 1
    if present is None:
        return features
    return features.masked_fill(~present[..., None, None], -torch.inf if semantics == "0.19" else 0.0)
