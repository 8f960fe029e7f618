# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention over a sliding window and the first tokens, linear attention over the rest, in one head under one
normaliser (LoLCATs, Zhang et al., arXiv 2410.10254, section 3.3; attention sinks: Xiao et al., arXiv 2309.17453).

With N(i) = {j <= i : j > i - w or j is one of the first `num_sinks` tokens} and R(i) all other earlier tokens,
    o_i = (sum_N exp(s q_i . k_j) v_j + sum_R psi(q_i) . phi(k_j) v_j) / (the same sums without v)
psi and phi are feature maps, phi not negative, psi given by its logarithm. Both sums are divided by exp(c_i), c_i the
largest s q_i . k_j in N(i), which changes nothing. Under `relative`, as LoLCATs does, only the first is: far weights
are then relative to the largest near weight.

Shape suffixes: B batch, N blocks, C tokens of a block, M keys that a block meets, H heads of q, G heads of k and v,
R = H / G, F features, W = V + 1 (values, and a column of ones that makes the normaliser).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import has_open_length, hides_values
from lalm.modeling.ops.chunks import missing_tokens
from lalm.modeling.ops.dispatch import must_separate
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.local_global.local_attention import check_grouped
from lalm.modeling.ops.sequence_layout import SequenceLayout, document_by_document, document_positions, stable_order

# Label of what is no token.
_NONE = -4
# Largest log of a far weight over the largest near one: beyond it sums would overflow float32.
MAX_LOG_RATIO = 60.0


class WindowLinearState(NamedTuple):
    """What the tokens of a document leave behind; its size does not depend on their number."""

    memory: torch.Tensor  # sum of phi(k_j) [v_j, 1] over the tokens that have left the window, [B, G, F, V + 1]
    window: torch.Tensor  # keys and values side by side of the last w tokens, the latest last, [B, w, G, K + V]
    sinks: torch.Tensor  # the same of the first tokens of the document, the earliest first, [B, num_sinks, G, K + V]
    seen: torch.Tensor  # tokens of the document so far, [B]


class _Keys(NamedTuple):
    """Keys of whole rows `[B, S, ...]` or of blocks `[B, N, M, ...]`; real tokens stand next to each other."""

    k: torch.Tensor  # [..., G, K]
    v: torch.Tensor  # [..., G, W]
    labels: torch.Tensor  # number of the document in its row, or _NONE
    is_sink: torch.Tensor


class _Sinks(NamedTuple):
    """The first tokens of every document of a row, those that are cached before the others."""

    joined: torch.Tensor  # keys and values side by side [B, M, G, K + V]
    labels: torch.Tensor  # [B, M]
    place: torch.Tensor  # where in the row, [B, M]; -1 for what is cached


class _Options(NamedTuple):
    """Arguments of `window_linear_attention`."""

    window_size: int
    num_sinks: int
    scale: float
    relative: bool


def window_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_q_features: torch.Tensor,
    key_features: Callable[[torch.Tensor], torch.Tensor],
    window_size: int,
    num_sinks: int = 0,
    initial_state: WindowLinearState | None = None,
    output_final_state: bool = False,
    *,
    scale: float | None = None,
    relative: bool = False,
    layout: SequenceLayout | None = None,
) -> tuple[torch.Tensor, WindowLinearState | None]:
    """Window and linear attention of all tokens at once, or of a piece after a state.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`; G divides H, and each head serves H / G neighbouring heads of q.
        log_q_features: log psi(q), `[B, T, H, F]`.
        key_features: phi, `[B, S, G, K] -> [B, S, G, F]` float32 or wider, not negative.
        window_size: w, in real tokens, a token's own included.
        num_sinks: first tokens of each document that every later token sees by softmax attention.
        initial_state: what the tokens before left; None for nothing.
        output_final_state: also return the state after the last token.
        scale: factor s on q . k; None for `K ** -0.5`.
        relative: far weights are relative to the largest near weight (see above).
        layout: padding and document boundaries of a batch.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None. Weights, sums and memory are float32, or
        float64 if an input is.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
    """
    layout = layout or SequenceLayout()
    check_grouped(q, k, v, window_size, layout)
    if num_sinks < 0:
        raise ValueError(f"num_sinks must be at least 0, got {num_sinks}.")
    q, k, v, log_q_features = layout.freeze(q, k, v, log_q_features)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if must_separate(layout, q, k, v):

        def alone(q, k, v, log_q, state, layout):
            sizes = window_size, num_sinks, state, output_final_state
            own: dict[str, Any] = {"scale": scale, "relative": relative, "layout": layout}
            return window_linear_attention(q, k, v, log_q, key_features, *sizes, **own)

        return document_by_document(alone, (q, k, v, log_q_features), initial_state, layout)
    options = _Options(window_size, num_sinks, scale, relative)
    with without_autocast(q.device):
        o, state = _attend(q, k, v, log_q_features, key_features, initial_state, options, layout)
    return o.to(v.dtype), state if output_final_state else None


def _attend(q, k, v, log_q, key_features, state, options: _Options, layout):
    window_size, num_sinks, scale, relative = options
    dtype, length = compute_dtype(q, k, v), q.shape[1]
    documents, positions, totals = document_positions(layout, q, None if state is None else state.seen)
    labels, is_sink = documents.expand(q.shape[:2]), (positions < num_sinks).expand(q.shape[:2])
    if layout.mask is not None:
        labels, is_sink = labels.masked_fill(~layout.mask, _NONE), is_sink & layout.mask
    q, log_q, labels, is_sink = (layout.pads_first(x) for x in (q, log_q, labels, is_sink))
    kv = layout.pads_first(torch.cat([k, v], dim=-1))
    sinks = _find_sinks(kv, labels, is_sink, num_sinks, state, layout)
    past = _past(kv, window_size, num_sinks, state)
    kv, key_labels, key_is_sink = (
        layout.slide_over_padding(before, now) for before, now in zip(past, (kv, labels, is_sink), strict=True)
    )
    if layout.mask is not None:  # in front of a past that moved stands nothing
        moved = torch.arange(key_labels.shape[1], device=q.device) < (~layout.mask).sum(1, keepdim=True)
        key_labels, key_is_sink = key_labels.masked_fill(moved, _NONE), key_is_sink & ~moved
    final_window = kv[:, -window_size:]
    # A short piece is one block. Else blocks are windows, the first filled up in front.
    is_short = not has_open_length() and length <= window_size
    number = 1 if is_short else (length + missing_tokens(length, window_size)) // window_size
    front = 0 if is_short else number * window_size - length
    kv, key_labels, key_is_sink = (
        _fill_front(x, front, fill) for x, fill in ((kv, 0), (key_labels, _NONE), (key_is_sink, False))
    )
    k, v = kv.split([k.shape[-1], v.shape[-1]], dim=-1)
    # The keys that leave the window by the end of this piece: only they are ever far, each for the block after it.
    leaving = kv.shape[1] - window_size
    features = key_features(k[:, :leaving]) * ((key_labels != _NONE) & ~key_is_sink)[:, :leaving, None, None]
    features = features.to(dtype).unflatten(1, (number, -1))
    keys = _Keys(k.to(dtype), _with_ones(v.to(dtype)), key_labels, key_is_sink)
    last = labels[:, -1:].clamp(min=0)
    read, final = _memories(features, keys, last, state, layout)
    spans = _Keys(*(x[:, None] if is_short else _spans(x, number, window_size) for x in keys))
    index = torch.arange(length, device=q.device)[None]
    q, log_q, labels, index = (
        _fill_front(x, front, fill).unflatten(1, (number, -1))
        for x, fill in ((q.to(dtype) * scale, 0), (log_q.to(dtype), 0), (labels, _NONE), (index, -1))
    )
    o = _attend_blocks(q, log_q, labels, index, spans, features, sinks, read, window_size, relative)
    o = o.flatten(1, 2)[:, front:]
    o = layout.zero_padding(layout.restore(o))
    return o, _final_state(final, final_window, sinks, last, totals, num_sinks)


def _with_ones(v: torch.Tensor) -> torch.Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def _fill_front(x: torch.Tensor, count: int, value: float) -> torch.Tensor:
    """Lengthen the time axis of `[B, T, ...]`."""
    return F.pad(x, (*[0, 0] * (x.ndim - 2), count, 0), value=value) if has_open_length() or count else x


def _past(kv, window_size: int, num_sinks: int, state: WindowLinearState | None):
    """Keys and values `[B, w, G, K + V]` of the window before this piece, their labels, and which are sinks."""
    if state is None:
        window = kv.new_zeros(kv.shape[0], window_size, *kv.shape[2:])
        labels = torch.full(window.shape[:2], _NONE, device=kv.device)
        return window, labels, torch.zeros_like(labels, dtype=torch.bool)
    positions = state.seen.long()[:, None] + torch.arange(-window_size, 0, device=kv.device)
    return (
        state.window.to(kv.dtype),
        torch.where(positions >= 0, 0, _NONE),
        (positions >= 0) & (positions < num_sinks),
    )


def _find_sinks(kv, labels, is_sink, num_sinks: int, state: WindowLinearState | None, layout) -> _Sinks:
    length = kv.shape[1]
    most = min(num_sinks, length)
    if layout.segments is not None or state is not None:
        if not hides_values():
            most = int(is_sink.sum(1).max())
        elif layout.segments is not None:
            most = length
    if layout.mask is None and layout.segments is None and state is None:
        index = torch.arange(most, device=kv.device).expand(kv.shape[0], -1)
    else:
        index = stable_order(~is_sink)[:, :most]
    found = kv.gather(1, index[..., None, None].expand(-1, -1, *kv.shape[2:]))
    own = torch.where(is_sink.gather(1, index), labels.gather(1, index), _NONE)
    if state is None:
        return _Sinks(found, own, index)
    slots = torch.arange(num_sinks, device=kv.device)
    before = torch.where(slots < state.seen.long()[:, None], 0, _NONE)
    return _Sinks(
        torch.cat([state.sinks.to(kv.dtype), found], dim=1),
        torch.cat([before, own], dim=1),
        torch.cat([torch.full_like(before, -1), index], dim=1),
    )


def _memories(features, keys: _Keys, last, state: WindowLinearState | None, layout):
    """What each block of queries reads (memories `[B, N, G, F, W]` and whose document they hold `[B, N]`), and what
    is left at the end for the document `last [B, 1]`; `features [B, N, C, G, F]` of the first keys, which leave the
    window block by block."""
    number, size = features.shape[1:3]
    v, labels = (x[:, : number * size].unflatten(1, (number, size)) for x in (keys.v, keys.labels))
    ends = labels[..., -1].clamp(min=0)  # padding stands in front, and counts to the first document
    if layout.segments is not None:
        features = features * (labels == ends[..., None])[..., None, None]
    writes = torch.einsum("bnmgf,bnmgw->bngfw", features, v)
    first = torch.zeros_like(writes[:, :1]) if state is None else state.memory.to(writes.dtype)[:, None]
    holds = torch.cat([torch.zeros_like(ends[:, :1]), ends], dim=1)
    writes = torch.cat([first, writes], dim=1)
    if layout.segments is None:
        sums = writes.cumsum(1)
        return (sums[:, :-1], holds[:, :-1]), sums[:, -1]
    wanted = torch.cat([holds[:, :-1], last], dim=1)
    same = (wanted[:, :, None] == holds[:, None, :]).tril().to(writes.dtype)
    sums = torch.einsum("bnm,bmgfw->bngfw", same, writes)
    return (sums[:, :-1], holds[:, :-1]), sums[:, -1]


def _spans(x: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """`[B, (N + 1) size, ...] -> [B, N, 2 size, ...]`: block n has pieces n and n + 1."""
    pieces = x.unflatten(1, (number + 1, size))
    return torch.cat([pieces[:, :-1], pieces[:, 1:]], dim=2)


def _by_head(x: torch.Tensor, groups: int) -> torch.Tensor:
    """`[B, N, C, H, *] -> [B, N, G, R C, *]`: the queries that share a key head are the rows of one product."""
    return x.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)


def _each_head(mask: torch.Tensor, rows: int) -> torch.Tensor:
    """A mask `[B, N, C, M]` of queries -> `[B, N, 1, R C, M]`."""
    repeats = rows // mask.shape[2]
    return mask[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(2, 3)[:, :, None]


def _attend_blocks(q, log_q, labels, index, spans: _Keys, features, sinks: _Sinks, read, window_size, relative):
    """o `[B, N, C, H, V]` of scaled queries `[B, N, C, H, K]`, whose block meets `spans [B, N, w + C, ...]`. The first
    C of those may be far, and have `features`."""
    groups, size, heads = spans.k.shape[3], q.shape[2], q.shape[3]
    q, log_q = _by_head(q, groups), _by_head(log_q, groups)
    k, v, features = (x.transpose(2, 3) for x in (spans.k, spans.v, features))
    sink_k, sink_v = sinks.joined.to(q.dtype).split([q.shape[-1], v.shape[-1] - 1], dim=-1)
    sink_k, sink_v = (x.transpose(1, 2)[:, None] for x in (sink_k, _with_ones(sink_v)))
    same, rows = labels[..., :, None] == spans.labels[..., None, :], q.shape[3]
    near, far = same.triu(1).tril(window_size) & ~spans.is_sink[..., None, :], same[..., :size].tril(0)
    visible = (labels[..., None] == sinks.labels[:, None, None]) & (index[..., None] >= sinks.place[:, None, None])
    lowest = torch.finfo(q.dtype).min / 2
    scores = (q @ k.mT).masked_fill(~_each_head(near, rows), lowest)
    sink_scores = (q @ sink_k.mT).masked_fill(~_each_head(visible, rows), lowest)
    largest = scores.amax(-1, keepdim=True)
    if sink_scores.shape[-1]:
        largest = torch.maximum(largest, sink_scores.amax(-1, keepdim=True))
    if not relative:
        largest = largest.detach()  # the output does not depend on it
        log_q = log_q - largest
    q_features = log_q.clamp(max=MAX_LOG_RATIO).exp()
    memory, holds = read
    reads = q_features * _each_head((labels == holds[..., None])[..., None], rows)
    sums = (scores - largest).exp() @ v + (sink_scores - largest).exp() @ sink_v + reads @ memory
    sums = sums + ((q_features @ features.mT) * _each_head(far, rows)) @ v[..., :size, :]
    o = (sums[..., :-1] / sums[..., -1:]).unflatten(3, (-1, size))
    return o.permute(0, 1, 4, 2, 3, 5).reshape(*q.shape[:2], size, heads, o.shape[-1])


def _final_state(memory, window, sinks: _Sinks, last, totals, num_sinks: int) -> WindowLinearState:
    size, count = window.shape[1], totals.expand(window.shape[0])
    forgotten = torch.arange(size, device=window.device) < size - count[:, None]
    order = stable_order(sinks.labels != last)[:, :num_sinks]
    kept = sinks.joined.gather(1, order[..., None, None].expand(-1, -1, *window.shape[2:]))
    kept = kept.masked_fill((sinks.labels.gather(1, order) != last)[..., None, None], 0)
    kept = F.pad(kept, (0, 0, 0, 0, 0, num_sinks - kept.shape[1]))
    window = window.masked_fill(forgotten[..., None, None], 0)
    return WindowLinearState(memory, window, kept, count.to(memory.dtype))
