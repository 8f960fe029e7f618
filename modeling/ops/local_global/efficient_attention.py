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

from lalm.modeling.ops.autograd import has_open_length, hides_values
from lalm.modeling.ops.chunks import from_chunks, scan_exported, to_chunks
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.sequence_layout import (
    SequenceLayout,
    check_shapes,
    document_by_document,
    document_positions,
    must_part,
)

_SEMANTICS = ("0.19", "v0.2.1")
_SMALLEST_SUM = 1e-3  # of "0.19"
_EPS = 1e-6  # of "v0.2.1"
# Smaller buckets have more numbers in their sums than in their tokens.
_SMALLEST_GRID = 16
# Sums of numbers up to e^40 = 2e17 stay far from float32's largest, 3e38. Ordinary keys never need another scale.
_HEADROOM = 40.0


class EfficientState(NamedTuple):
    """What causal efficient attention remembers; float32, or float64 for float64 inputs.

    A memory is `[B, H, K, V + 2]`: sums of feature times value, the sum of the features, and the log m of the scale
    that both are relative to (0 in "v0.2.1").
    """

    published: torch.Tensor  # memory of the full buckets
    pending: torch.Tensor | None  # memory of the bucket being filled; None for buckets of one token
    filled: torch.Tensor | None  # tokens in it, [B]


def _check(q, k, v, state, blindspot_size, semantics, layout):
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


def _empty(q: torch.Tensor, v: torch.Tensor, blindspot_size: int, dtype: torch.dtype) -> EfficientState:
    memory = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3] + 2, dtype=dtype, device=q.device)
    if blindspot_size == 1:
        return EfficientState(memory, None, None)
    return EfficientState(memory, torch.zeros_like(memory), memory.new_zeros(q.shape[0]))


def _in_dtype(state: EfficientState, dtype: torch.dtype) -> EfficientState:
    published, *rest = (None if tensor is None else tensor.to(dtype) for tensor in state)
    assert published is not None
    return EfficientState(published, *rest)


def _log_queries(q: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q e^m = e^M times a tensor with largest entry 1: returns that tensor and `M [..., 1]`, detached."""
    log_q = q.log_softmax(-1) - 0.5 * math.log(q.shape[-1]) + m
    largest = log_q.detach().amax(-1, keepdim=True)
    return (log_q - largest).exp(), largest


def _quotient(sums: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Numerator over clamped denominator, both relative to e^M; M is never very negative, so the bound is finite."""
    return sums[..., :-1] / torch.maximum(sums[..., -1:], _SMALLEST_SUM * (-largest).exp())


def _merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The memory of what either memory holds."""
    scale_a, scale_b = a[..., -1:].detach(), b[..., -1:].detach()
    m = torch.maximum(scale_a, scale_b)
    return torch.cat([a[..., :-1] * (scale_a - m).exp() + b[..., :-1] * (scale_b - m).exp(), m], dim=-1)


def _one_key(k: torch.Tensor, v: torch.Tensor, semantics: str) -> torch.Tensor:
    """The memory of a single key and value `[B, H, *]`."""
    m = (k.detach() - _HEADROOM).clamp(min=0) if semantics == "0.19" else torch.zeros_like(k)
    feature = (k - m).exp() if semantics == "0.19" else F.elu(k) + 1
    return torch.cat([feature[..., None] * F.pad(v, (0, 1), value=1.0)[..., None, :], m[..., None]], dim=-1)


def _read(memory: torch.Tensor, q: torch.Tensor, semantics: str) -> torch.Tensor:
    """o `[B, H, V]` of the queries `[B, H, K]`."""
    if semantics == "v0.2.1":
        means = memory[..., :-2] / (memory[..., -2:-1] + _EPS)
        return (q.softmax(-1)[..., None, :] @ means).squeeze(-2)
    q, largest = _log_queries(q, memory[..., -1].detach())
    return _quotient((q[..., None, :] @ memory[..., :-1]).squeeze(-2), largest)


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition.reshape(-1, *[1] * (b.ndim - 1)), a, b)


def recurrent_efficient_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: EfficientState | None = None,
    output_final_state: bool = False,
    *,
    blindspot_size: int = 1,
    semantics: str = "0.19",
    layout: SequenceLayout | None = None,
) -> tuple[torch.Tensor, EfficientState | None]:
    """Causal efficient attention one token at a time: the definition, and the way to decode.

    Args:
        q, k: `[B, T, H, K]`, before any feature map; every finite k is safe.
        v: `[B, T, H, V]`.
        initial_state: what the tokens before left; None for nothing.
        output_final_state: also return the state after the last token.
        blindspot_size: tokens of a bucket. A bucket becomes visible when it is full, so that its own tokens do not see
            it and the first bucket of a document reads exactly 0; 1 makes every token see itself. Buckets count real
            tokens from the start of each document.
        semantics: "0.19" or "v0.2.1", see above.
        layout: padding and document borders of a batch.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None. States and sums are float32, or float64 if an
        input is.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
    """
    _check(q, k, v, initial_state, blindspot_size, semantics, layout)
    layout = layout or SequenceLayout()
    starts, dtype = layout.starts(), compute_dtype(q, k, v)
    q, k, v = layout.freeze(q, k, v)
    empty = _empty(q, v, blindspot_size, dtype)
    state = empty if initial_state is None else _in_dtype(initial_state, dtype)
    outputs = []
    with without_autocast(q.device):
        for t in range(q.shape[1]):
            if starts is not None:
                state = _choose_state(starts[:, t], empty, state)
            o, after = _step(q[:, t].to(dtype), k[:, t].to(dtype), v[:, t].to(dtype), state, blindspot_size, semantics)
            state = after if layout.mask is None else _choose_state(layout.mask[:, t], after, state)
            outputs.append(o)
        o = layout.zero_padding(torch.stack(outputs, dim=1))
        return o.to(v.dtype), state if output_final_state else None


def _choose_state(condition: torch.Tensor, a: EfficientState, b: EfficientState) -> EfficientState:
    """Row by row, `a` where the condition `[B]` holds."""
    published = _where(condition, a.published, b.published)
    if a.pending is None or b.pending is None or a.filled is None or b.filled is None:
        return EfficientState(published, None, None)
    return EfficientState(published, _where(condition, a.pending, b.pending), _where(condition, a.filled, b.filled))


def _step(q, k, v, state: EfficientState, blindspot_size: int, semantics: str) -> tuple[torch.Tensor, EfficientState]:
    key = _one_key(k, v, semantics)
    if state.pending is None or state.filled is None:
        published = _merge(state.published, key)
        return _read(published, q, semantics), EfficientState(published, None, None)
    o = _read(state.published, q, semantics)
    pending, filled = _merge(state.pending, key), state.filled + 1
    full = filled == blindspot_size
    published = _where(full, _merge(state.published, pending), state.published)
    pending, filled = _where(full, torch.zeros_like(pending), pending), torch.where(full, 0, filled)
    return o, EfficientState(published, pending, filled)


def chunk_efficient_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: EfficientState | None = None,
    output_final_state: bool = False,
    *,
    blindspot_size: int = 1,
    semantics: str = "0.19",
    layout: SequenceLayout | None = None,
) -> tuple[torch.Tensor, EfficientState | None]:
    """`recurrent_efficient_attention` by the chunk form of the diagonal recurrence: same arguments, same results.

    A blindspot is a matter of order: every bucket's queries are put before its keys, on a line of twice the tokens.
    Where buckets stand in a grid, their sums are added up instead, and no token is compared with another.
    """
    _check(q, k, v, initial_state, blindspot_size, semantics, layout)
    layout, dtype = layout or SequenceLayout(), compute_dtype(q, k, v)
    q, k, v = layout.freeze(q, k, v)
    if must_part(layout, q, k, v):

        def alone(q, k, v, state, layout):
            return chunk_efficient_attention(
                q,
                k,
                v,
                state,
                output_final_state,
                blindspot_size=blindspot_size,
                semantics=semantics,
                layout=layout,
            )

        return document_by_document(alone, (q, k, v), initial_state, layout)
    state = None if initial_state is None else _in_dtype(initial_state, dtype)
    with without_autocast(q.device):
        q, k, values = q.to(dtype), k.to(dtype), F.pad(v.to(dtype), (0, 1), value=1.0)
        if blindspot_size == 1:
            line = _Line(q, features_of(k, layout.mask, semantics), values, layout.segments)
            o, published = _read_line(line, state, semantics)
            final = EfficientState(published, None, None)
        elif _is_aligned(k, blindspot_size, state, layout, semantics):
            o, final = _read_whole_buckets(q, k, values, blindspot_size, semantics)
        else:
            line, slots, final = _buckets_in_line(q, k, values, state, blindspot_size, semantics, layout)
            o, published = _read_line(line, state, semantics)
            o, final = _take(o, slots), EfficientState(published, final.pending, final.filled)
        return layout.zero_padding(o).to(v.dtype), final if output_final_state else None


def _is_aligned(k, size: int, state: EfficientState | None, layout: SequenceLayout, semantics: str) -> bool:
    """Whether buckets of all rows begin at the same tokens and can be summed as they are."""
    plain = state is None and layout.mask is None and layout.segments is None
    return plain and size >= _SMALLEST_GRID and (semantics == "v0.2.1" or _is_safe(k, None))


def _read_whole_buckets(q, k, values, size: int, semantics: str) -> tuple[torch.Tensor, EfficientState]:
    """o `[B, T, H, V]` and the final state of rows that begin a bucket with their first token."""
    length, features = q.shape[1], k.exp() if semantics == "0.19" else F.elu(k) + 1
    q, features, values = (to_chunks(x, size, q.dtype) for x in (q.softmax(-1), features, values))
    sums = features.transpose(-1, -2) @ values  # [B, H, N, K, V + 1]; the tail has values of 0
    before = F.pad(sums[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(2)
    if semantics == "0.19":
        o = (q * q.shape[-1] ** -0.5) @ before
        o = o[..., :-1] / o[..., -1:].clamp(min=_SMALLEST_SUM)
    else:
        o = (q / (before[..., -1] + _EPS)[..., None, :]) @ before[..., :-1]
    full = length // size
    memories = F.pad(sums, (0, 1))
    published, pending = memories[:, :, :full].sum(2), memories[:, :, full:].sum(2)
    return from_chunks(o, length), EfficientState(published, pending, o.new_full(o.shape[:1], length % size))


class _Line(NamedTuple):
    """Queries and keys in the order in which they read and write."""

    q: torch.Tensor  # [B, N, H, K]; what stands in the place of no query does not matter
    features: torch.Tensor  # [B, N, H, K], their log in "0.19"; no key is 0, its log -inf
    values: torch.Tensor  # [B, N, H, V + 1], the last column 1
    segments: torch.Tensor | None  # documents [B, N]


def features_of(k: torch.Tensor, present: torch.Tensor | None, semantics: str) -> torch.Tensor:
    features = k if semantics == "0.19" else F.elu(k) + 1
    if present is None:
        return features
    return features.masked_fill(~present[..., None, None], -torch.inf if semantics == "0.19" else 0.0)


def _read_line(line: _Line, state: EfficientState | None, semantics: str) -> tuple[torch.Tensor, torch.Tensor]:
    """o `[B, N, H, V]` and the memory after the last key."""
    layout = SequenceLayout(segments=line.segments)
    sums = None if state is None else state.published[..., :-1]
    if semantics == "v0.2.1":
        return _read_feature_means(line, sums, layout)
    scale = None if state is None else state.published[..., -1].detach()
    if _is_safe(line.features, scale):
        q = line.q.softmax(-1) * line.q.shape[-1] ** -0.5
        o, sums = chunk_diagonal(q, line.features.exp(), line.values, None, 1.0, sums, layout)
        return o[..., :-1] / o[..., -1:].clamp(min=_SMALLEST_SUM), F.pad(sums, (0, 1))
    m, g = _running_scale(line.features.detach(), scale, layout)
    q, largest = _log_queries(line.q, m)
    o, sums = chunk_diagonal(q, (line.features - m).exp(), line.values, g, 1.0, sums, layout)
    return _quotient(o, largest), torch.cat([sums, m[:, -1, :, :, None]], dim=-1)


@torch.no_grad()
def _is_safe(log_features: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether m is 0 everywhere. One look at the data; while compiling, which allows none, the scale always runs."""
    if hides_values():
        return False
    if log_features.numel() == 0:
        return True
    outside = log_features.amax() > _HEADROOM
    return not bool(outside if scale is None else outside | scale.any())


def _read_feature_means(line: _Line, sums: torch.Tensor | None, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """ "v0.2.1": the sums of each feature are themselves a recurrence, of key size 1, and divide the query."""
    ones = torch.ones_like(line.q[..., :1, :1])
    weights = (line.features * line.values[..., -1:]).flatten(-2)[:, :, None]
    before = None if sums is None else sums[..., -1].flatten(1)[:, None, None]
    total, last = chunk_diagonal(ones, ones, weights, None, 1.0, before, layout)
    q = line.q.softmax(-1) / (total.view_as(line.q) + _EPS)
    before = None if sums is None else sums[..., :-1]
    o, sums = chunk_diagonal(q, line.features, line.values[..., :-1], None, 1.0, before, layout)
    return o, F.pad(torch.cat([sums, last.reshape(*sums.shape[:-1], 1)], dim=-1), (0, 1))


@torch.no_grad()
def _running_scale(
    log_features: torch.Tensor, entering: torch.Tensor | None, layout: SequenceLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """m, by how much the running maximum of every feature in its document exceeds the safe range, and the log decay
    m_{t-1} - m_t, both `[B, N, H, K]`."""
    documents, starts = layout.document_ids(), layout.starts()
    m = (running_max(log_features, documents) - _HEADROOM).clamp(min=0)
    first = torch.zeros_like(m[:, :1]) if entering is None else entering[:, None]
    if entering is not None:
        m = torch.maximum(m, first if documents is None else first * (documents == 0)[..., None, None])
    g = torch.cat([first, m[:, :-1]], dim=1) - m
    return m, g if starts is None else g.masked_fill_(starts[..., None, None], 0)


def running_max(x: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Maximum of `x [B, N, H, K]` over its document up to each token, in log2 N steps (`cummax` knows no documents,
    keeps indices and is several times slower)."""
    if has_open_length():
        return _running_max_exported(x, documents)
    step = 1
    while step < x.shape[1]:
        earlier = x[:, :-step]
        if documents is not None:
            other = documents[:, step:] != documents[:, :-step]
            earlier = earlier.masked_fill(other[..., None, None], -torch.inf)
        x = torch.cat([x[:, :step], torch.maximum(x[:, step:], earlier)], dim=1)
        step *= 2
    return x


def _running_max_exported(x: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    starts = x.new_zeros(x.shape[:2], dtype=torch.bool)
    if documents is not None:
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]

    def step(largest, x, start):
        return torch.maximum(x, largest.masked_fill(start[:, None, None], -torch.inf))

    before, _ = scan_exported(step, [x, starts], torch.full_like(x[:, 0], -torch.inf), dim=1)
    return step(before.flatten(0, 1), x.flatten(0, 1), starts.flatten()).view_as(x)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x [B, T, ...]` at the times `index [B, N]`, or `[1, N]` for all rows."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def _buckets_in_line(q, k, values, state, size, semantics, layout) -> tuple[_Line, torch.Tensor, EfficientState]:
    """The line of buckets of `size` tokens, queries first; the place of every query in it `[B or 1, T]`; and what is
    pending at its end. A pending bucket that gets full enters as K keys, one for each feature."""
    documents, positions, totals = document_positions(layout, q, None if state is None else state.filled)
    documents, buckets = documents.expand_as(positions), positions // size
    # Nobody sees the bucket that stays unfilled: it is kept out of the line.
    unfilled = (documents == documents[:, -1:]) & (buckets == totals[:, None] // size)
    real = torch.ones_like(unfilled) if layout.mask is None else layout.mask
    pending = _sum_of_last(k, values, real & unfilled, size, semantics, layout)
    features = features_of(k, real & ~unfilled, semantics)
    queries = 2 * (buckets + documents * (q.shape[1] // size + 2))
    keys, owners = queries + 1, documents
    if state is not None:
        stays = (documents[:, -1] == 0) & (totals < size)
        pending = _merge(pending, _where(stays, state.pending, torch.zeros_like(state.pending)))
        early_features, early_values = _as_keys(state.pending, ~stays, semantics)
        features, values = torch.cat([early_features, features], 1), torch.cat([early_values, values], 1)
        zeros = torch.zeros_like(keys[:, :1]).expand(-1, q.shape[-1])
        keys, owners = torch.cat([zeros + 1, keys], 1), torch.cat([zeros, owners], 1)
    order = torch.cat([queries, keys], 1).argsort(dim=1, stable=True)
    behind, before = (0, 0, 0, 0, 0, keys.shape[1]), (0, 0, 0, 0, q.shape[1], 0)
    line = _Line(
        _take(F.pad(q, behind), order),
        _take(F.pad(features, before, value=-torch.inf if semantics == "0.19" else 0.0), order),
        _take(F.pad(values, before), order),
        None if layout.segments is None else _take(torch.cat([documents, owners], 1), order),
    )
    filled = (totals % size).to(pending.dtype).expand(q.shape[0])
    return line, order.argsort(1)[:, : q.shape[1]], EfficientState(pending, pending, filled)


def _as_keys(memory: torch.Tensor, present: torch.Tensor, semantics: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory as the features `[B, K, H, K]` and values `[B, K, H, V + 1]` of K keys that sum up to it."""
    values = memory[..., :-1].transpose(1, 2)
    one_each = torch.eye(memory.shape[2], dtype=torch.bool, device=memory.device)[None, :, None]
    if semantics == "0.19":
        # As keys that ask for the scale m, which sums up to e^40 large are relative to.
        features = torch.where(one_each, memory[:, None, :, :, -1].detach() + _HEADROOM, -torch.inf)
        values = values * math.exp(-_HEADROOM)
    else:
        features = one_each.to(memory.dtype)
    features = features.expand(memory.shape[0], -1, memory.shape[1], -1)
    present = present[:, None].expand(-1, memory.shape[2])
    features = features.masked_fill(~present[..., None, None], -torch.inf if semantics == "0.19" else 0.0)
    return features, values


def _sum_of_last(k, values, chosen: torch.Tensor, size: int, semantics: str, layout: SequenceLayout) -> torch.Tensor:
    """The memory of the chosen keys, which are among the last `size - 1` real ones of each row."""
    if layout.mask is None and not has_open_length():
        k, values, chosen = k[:, 1 - size :], values[:, 1 - size :], chosen[:, 1 - size :]
    features = features_of(k, chosen, semantics)
    m = torch.zeros_like(features[:, 0])
    if semantics == "0.19":
        m = (features.detach().amax(1) - _HEADROOM).clamp(min=0)
        features = (features - m[:, None]).exp()
    return torch.cat([torch.einsum("bthk,bthv->bhkv", features, values), m[..., None]], dim=-1)
