# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Causal efficient attention (efficient_recurrence.py) in matrix products over chunks.

A blindspot is a matter of order: every bucket's queries are put before its keys, on a line of twice the tokens. Where
buckets stand in a grid, their sums are added up instead, and no token is compared with another.
Shape suffixes as in diagonal_recurrence.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import has_open_length
from lalm.modeling.ops.chunks import from_chunks, scan_exported, to_chunks
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal
from lalm.modeling.ops.dispatch import MAX_LOG_FEATURE, SMALLEST_GRID, must_separate, needs_no_scale
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.local_global.efficient_recurrence import (
    EPS,
    SMALLEST_SUM,
    EfficientState,
    features_of,
    in_dtype,
    log_queries,
    merge,
    quotient,
    where_rows,
)
from lalm.modeling.ops.sequence_layout import SequenceLayout, document_by_document, document_positions, stable_order


def chunk_efficient(
    q, k, v, state: EfficientState | None, blindspot_size: int, semantics: str, layout: SequenceLayout
) -> tuple[torch.Tensor, EfficientState]:
    """`recurrent_efficient` by the chunk form of the diagonal recurrence: same arguments, same results."""
    dtype = compute_dtype(q, k, v)
    q, k, v = layout.freeze(q, k, v)
    if must_separate(layout, q, k, v):

        def alone(q, k, v, state, layout):
            return chunk_efficient(q, k, v, state, blindspot_size, semantics, layout)

        return document_by_document(alone, (q, k, v), state, layout)
    state = None if state is None else in_dtype(state, dtype)
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
    return layout.zero_padding(o), final


def _is_aligned(k, size: int, state: EfficientState | None, layout: SequenceLayout, semantics: str) -> bool:
    """Whether buckets of all rows begin at the same tokens and can be summed as they are."""
    plain = state is None and layout.mask is None and layout.segments is None
    return plain and size >= SMALLEST_GRID and (semantics == "v0.2.1" or needs_no_scale(k, None))


def _read_whole_buckets(q, k, values, size: int, semantics: str) -> tuple[torch.Tensor, EfficientState]:
    """o `[B, T, H, V]` and the final state of rows that begin a bucket with their first token."""
    length, features = q.shape[1], k.exp() if semantics == "0.19" else F.elu(k) + 1
    q, features, values = (to_chunks(x, size, q.dtype) for x in (q.softmax(-1), features, values))
    sums = features.transpose(-1, -2) @ values  # [B, H, N, K, V + 1]; the tail has values of 0
    before = F.pad(sums[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(2)
    if semantics == "0.19":
        o = (q * q.shape[-1] ** -0.5) @ before
        o = o[..., :-1] / o[..., -1:].clamp(min=SMALLEST_SUM)
    else:
        o = (q / (before[..., -1] + EPS)[..., None, :]) @ before[..., :-1]
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


def _read_line(line: _Line, state: EfficientState | None, semantics: str) -> tuple[torch.Tensor, torch.Tensor]:
    """o `[B, N, H, V]` and the memory after the last key."""
    layout = SequenceLayout(segments=line.segments)
    sums = None if state is None else state.published[..., :-1]
    if semantics == "v0.2.1":
        return _read_feature_means(line, sums, layout)
    scale = None if state is None else state.published[..., -1].detach()
    if needs_no_scale(line.features, scale):
        q = line.q.softmax(-1) * line.q.shape[-1] ** -0.5
        o, sums = chunk_diagonal(q, line.features.exp(), line.values, None, 1.0, sums, layout)
        return o[..., :-1] / o[..., -1:].clamp(min=SMALLEST_SUM), F.pad(sums, (0, 1))
    m, g = _running_scale(line.features.detach(), scale, layout)
    q, largest = log_queries(line.q, m)
    o, sums = chunk_diagonal(q, (line.features - m).exp(), line.values, g, 1.0, sums, layout)
    return quotient(o, largest), torch.cat([sums, m[:, -1, :, :, None]], dim=-1)


def _read_feature_means(line: _Line, sums: torch.Tensor | None, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """ "v0.2.1": the sums of each feature are themselves a recurrence, of key size 1, and divide the query."""
    ones = torch.ones_like(line.q[..., :1, :1])
    weights = (line.features * line.values[..., -1:]).flatten(-2)[:, :, None]
    before = None if sums is None else sums[..., -1].flatten(1)[:, None, None]
    total, last = chunk_diagonal(ones, ones, weights, None, 1.0, before, layout)
    q = line.q.softmax(-1) / (total.view_as(line.q) + EPS)
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
    m = (running_max(log_features, documents) - MAX_LOG_FEATURE).clamp(min=0)
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
        pending = merge(pending, where_rows(stays, state.pending, torch.zeros_like(state.pending)))
        early_features, early_values = _as_keys(state.pending, ~stays, semantics)
        features, values = torch.cat([early_features, features], 1), torch.cat([early_values, values], 1)
        zeros = torch.zeros_like(keys[:, :1]).expand(-1, q.shape[-1])
        keys, owners = torch.cat([zeros + 1, keys], 1), torch.cat([zeros, owners], 1)
    order = stable_order(torch.cat([queries, keys], 1))
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
        features = torch.where(one_each, memory[:, None, :, :, -1].detach() + MAX_LOG_FEATURE, -torch.inf)
        values = values * math.exp(-MAX_LOG_FEATURE)
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
        m = (features.detach().amax(1) - MAX_LOG_FEATURE).clamp(min=0)
        features = (features - m[:, None]).exp()
    return torch.cat([torch.einsum("bthk,bthv->bhkv", features, values), m[..., None]], dim=-1)
