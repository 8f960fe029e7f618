# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention inside windows (Roy et al., arXiv 2003.05997, section 3.1, as in lucidrains' local-attention).

Tokens of a document lie in windows of w. With W(i) = floor(i / w), token i attends token j of its document if
    causal:         W(j) is W(i) - 1 or W(i), and j <= i            (w to 2 w - 1 tokens back, not a sliding window)
    bidirectional:  W(j) is W(i) - 1, W(i) or W(i) + 1
The cost is linear in T: blocks of w queries meet blocks of 2 w or 3 w keys. Where documents, padding or a past move
the boundaries of the windows, blocks of w queries meet every key that could matter, 3 w or 5 w, and a mask picks.

`sliding_attention` has windows that slide with the token; there too blocks of w queries meet 2 w or 3 w keys.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import has_open_length, hides_values
from lalm.modeling.ops.chunks import missing_tokens
from lalm.modeling.ops.dispatch import may_hold, must_separate
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes, document_by_document, document_positions

# Label of what is no token: no neighbour of any window, which are numbered from 0.
_NONE = -4


class LocalState(NamedTuple):
    """What causal local attention remembers: the last tokens of the document, back to the start of the window before
    the one that the next token falls into. A token keeps its place, so that the next one is written, and nothing
    moved."""

    keys: torch.Tensor  # [B, H, 2 w, K], token i in slot i mod 2 w; 0 where nothing is remembered
    values: torch.Tensor  # [B, H, 2 w, V], likewise
    seen: torch.Tensor  # tokens of the document so far, [B]; from 4 w on, 2 w are taken off


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_size: int,
    initial_state: LocalState | None = None,
    output_final_state: bool = False,
    *,
    scale: float | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    layout: SequenceLayout | None = None,
    overwrite_state: bool = False,
) -> tuple[torch.Tensor, LocalState | None]:
    """Local attention over all tokens at once, or over a piece after a state.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`; G divides H, and each head serves H / G neighbouring heads of q.
        window_size: w, in real tokens from the start of each document; T need not be a multiple.
        initial_state: what the tokens before left; None for nothing.
        output_final_state: also return the state after the last token, whose size does not depend on T.
        scale: factor on q . k; None for `K ** -0.5`.
        causal: False attends both sides, without states.
        dropout: probability, on the attention weights.
        layout: padding and document boundaries of a batch.
        overwrite_state: a single token may be written into the tensors of `initial_state`, which the final state then
            shares. Nobody else may need them; where gradients are recorded they stay as they are.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state (keys and values in the dtype of k) or None.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
    """
    layout = layout or SequenceLayout()
    _check(q, k, v, window_size, initial_state, output_final_state, causal, layout)
    plain = layout.mask is None and layout.segments is None
    if plain and initial_state is None and not has_open_length() and q.shape[1] <= window_size:
        return _one_window(q, k, v, window_size, output_final_state, scale, causal, dropout)
    if plain and initial_state is not None and q.shape[1] == 1:
        overwrites = overwrite_state and _is_free(k, v, initial_state)
        step = _aligned_token if overwrites and _is_aligned(initial_state) else partial(_one_token, overwrites)
        o, state = step(q, k, v, window_size, initial_state, scale, dropout)
        return o, state if output_final_state else None
    q, k, v = layout.freeze(q, k, v)
    if must_separate(layout, q, k, v):

        def alone(q, k, v, state, layout):
            options = {"scale": scale, "causal": causal, "dropout": dropout, "layout": layout}
            return local_attention(q, k, v, window_size, state, output_final_state, **options)

        return document_by_document(alone, (q, k, v), initial_state, layout)
    documents, positions, totals = document_positions(layout, q, None if initial_state is None else initial_state.seen)
    # Equal or neighbouring labels: equal or neighbouring windows of one document.
    labels = positions // window_size + documents * (q.shape[1] // window_size + 6)
    if layout.mask is not None:
        labels = labels.masked_fill(~layout.mask, _NONE)
    q, k, v, labels = (layout.pads_first(x) for x in (q, k, v, labels))
    key_labels = labels
    if initial_state is not None:
        past = _past(initial_state, k.dtype, window_size)
        now = k, v, labels.expand(q.shape[0], -1)
        k, v, key_labels = (layout.slide_over_padding(*pair) for pair in zip(past, now, strict=True))
    aligned = plain and initial_state is None
    blocks = _blocks(q, k, v, labels, key_labels, window_size, aligned, causal)
    o = layout.zero_padding(layout.restore(_attend(blocks, q.shape[1], scale, dropout)))
    return o, _final_state(k, v, totals, window_size) if output_final_state else None


def _past(state: LocalState, dtype: torch.dtype, window_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[B, 2 w, H, *]` of a state in the order of their tokens, and their labels."""
    k, v = (_rolled(x.to(dtype), state.seen).transpose(1, 2) for x in (state.keys, state.values))
    return k, v, _labels_of_past(state.seen, window_size)


def _one_window(q, k, v, window_size, output_final_state, scale, causal, dropout):
    """Whole sequences that fit into the first window: every query sees all before it, or all."""
    length = q.shape[1]
    o = _attend(_Blocks(q[:, None], k[:, None], v[:, None], None, causal), length, scale, dropout)
    if not output_final_state:
        return o, None
    slots = (0, 0, 0, 2 * window_size - length)
    keys, values = (F.pad(x.to(k.dtype).transpose(1, 2), slots) for x in (k, v))
    return o, LocalState(keys, values, k.new_full(k.shape[:1], length, dtype=compute_dtype(k)))


def _is_free(k: torch.Tensor, v: torch.Tensor, state: LocalState) -> bool:
    """Whether a state may be written to: it has the dtype of what is written, and nobody asks for gradients."""
    is_recorded = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    fits = state.keys.dtype == state.values.dtype == k.dtype == v.dtype
    return fits and not (hides_values() or is_recorded or any(x.requires_grad for x in state))


def _is_aligned(state: LocalState) -> bool:
    """Whether all rows have seen as many tokens."""
    count = state.seen
    return count.device.type == "cpu" and (len(count) == 1 or bool((count == count[0]).all()))


def _aligned_token(q, k, v, window_size, state, scale, dropout):
    """`_one_token` of rows that have seen as many tokens, written into their state: one slot for all."""
    keys, values, count = state
    size, seen = 2 * window_size, int(count[0])
    slot, shape = seen % size, (q.shape[0], k.shape[2], -1, q.shape[-1])
    keys[:, :, slot], values[:, :, slot] = k[:, 0], v[:, 0]
    if slot < window_size <= seen:  # the window before stands behind
        slots = torch.arange(size, device=q.device)
        near, mask = size, ((slots <= slot) | (slots >= window_size))[None]
    else:
        near, mask = slot + 1, None
    options = {"attn_mask": mask, "dropout_p": dropout, "scale": scale}
    o = F.scaled_dot_product_attention(q.reshape(shape), keys[:, :, :near], values[:, :, :near], **options)
    seen += 1
    if seen % window_size == 0:  # as in `_one_token`
        start = seen // window_size % 2 * window_size
        for x in (keys, values):
            x[:, :, start : start + window_size] = 0
    bounded = seen if seen < size else size + seen % size
    return o.flatten(1, 2)[:, None], LocalState(keys, values, torch.full_like(count, bounded))


def _one_token(overwrites, q, k, v, window_size, state, scale, dropout):
    """The next token of every row sees all that the state remembers, and itself."""
    size, groups, count = 2 * window_size, k.shape[2], state.seen.long()
    slot = count % size
    places, write = slot[:, None, None, None], torch.Tensor.scatter_ if overwrites else torch.scatter
    keys, values = (
        write(past.to(k.dtype), 2, places.expand(-1, groups, -1, x.shape[-1]), x.to(k.dtype).transpose(1, 2))
        for past, x in ((state.keys, k), (state.values, v))
    )
    slots = torch.arange(size, device=q.device)
    age = (slot[:, None] - slots) % size
    visible = age <= _remembered(count, window_size)[:, None]
    # The heads of q that share one of k are the rows of one product.
    q = q.reshape(q.shape[0], groups, -1, q.shape[-1])
    options = {"attn_mask": visible[:, None, None], "dropout_p": dropout, "scale": scale}
    o = F.scaled_dot_product_attention(q, keys, values, **options).flatten(1, 2)[:, None]
    count = count + 1
    # With a window full, the one before it is of no further use: its half is the next to be filled.
    ends = count % window_size == 0
    if may_hold(ends):
        forgotten = ends[:, None] & (slots // window_size == (count // window_size % 2)[:, None])
        forget = torch.Tensor.masked_fill_ if overwrites else torch.masked_fill
        keys, values = (forget(x, forgotten[:, None, :, None], 0) for x in (keys, values))
    return o, LocalState(keys, values, _bounded(count, window_size).to(compute_dtype(k)))


def sliding_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_size: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    layout: SequenceLayout | None = None,
) -> torch.Tensor:
    """Softmax attention over a sliding window, all tokens at once. Token i attends token j of its document if
        causal:         i - w < j <= i
        bidirectional:  i - w <= j <= i + w
    counted in real tokens. These are the masks that transformers makes for `sliding_window` = w, and the result is
    that of `F.scaled_dot_product_attention` under the whole mask `[T, T]`.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`; G divides H, and each head serves H / G neighbouring heads of q.
        window_size: w, in tokens; T need not be a multiple.
        scale: factor on q . k; None for `K ** -0.5`.
        causal: False attends both sides.
        dropout: probability, on the attention weights.
        layout: padding and document boundaries of a batch.

    Returns:
        o `[B, T, H, V]` in the dtype of v.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
    """
    layout = layout or SequenceLayout()
    _check(q, k, v, window_size, None, False, causal, layout)
    q, k, v = layout.freeze(q, k, v)
    if must_separate(layout, q, k, v):

        def alone(q, k, v, _, layout):
            options = {"scale": scale, "causal": causal, "dropout": dropout, "layout": layout}
            return sliding_attention(q, k, v, window_size, **options), None

        return document_by_document(alone, (q, k, v), None, layout)[0]
    documents, length = layout.document_ids(), q.shape[1]
    labels = q.new_zeros((1, length), dtype=torch.int64) if documents is None else documents
    if layout.mask is not None:
        labels = labels.masked_fill(~layout.mask, _NONE)
    q, k, v, labels = (layout.pads_first(x) for x in (q, k, v, labels))
    size = _block_size(window_size, length)
    reach = size if has_open_length() or length > size else 0
    ahead = 0 if causal else reach
    q, k, v, q_labels, k_labels = _cut(q, k, v, labels, labels, size, reach, ahead)
    # Key c of a block stands c - reach tokens after the first query.
    nearest, farthest = (0, window_size - 1) if causal else (window_size, window_size)
    visible = q_labels[..., :, None] == k_labels[..., None, :]
    visible = visible.tril(reach + nearest).triu(reach - farthest)
    o = _attend(_Blocks(q, k, v, visible, False), length, scale, dropout)
    return layout.zero_padding(layout.restore(o))


def check_grouped(q, k, v, window_size: int, layout: SequenceLayout) -> None:
    """Raise ValueError unless the heads of k and v serve those of q, and there is a window."""
    if q.ndim != 4 or k.ndim != 4 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q must be [B, T, H, K] and k [B, T, G, K] with a number of heads G that divides H, got q "
            f"{tuple(q.shape)} and k {tuple(k.shape)}."
        )
    check_shapes(q[:, :, : k.shape[2]], k, v, layout)
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}.")


def _check(q, k, v, window_size, state, output_final_state, causal, layout):
    check_grouped(q, k, v, window_size, layout)
    if not causal and (state is not None or output_final_state):
        raise ValueError("causal=False reads both sides and has no state: drop initial_state and output_final_state.")
    size, rows = 2 * window_size, k.shape[0]
    expected = [(rows, x.shape[2], size, x.shape[3]) for x in (k, v)] + [(rows,)]
    found = [tuple(x.shape) for x in state or ()]
    if state is not None and found != expected:
        raise ValueError(f"initial_state must hold keys, values and a count of shapes {expected}, got {found}.")


def _remembered(count: torch.Tensor, window_size: int) -> torch.Tensor:
    """How many tokens the next one sees: those of its window, and of the one before."""
    return torch.where(count >= window_size, window_size + count % window_size, count)


def _bounded(count: torch.Tensor, window_size: int) -> torch.Tensor:
    """As small a number that says the same, exact in float32."""
    size = 2 * window_size
    return torch.where(count < size, count, size + count % size)


def _rolled(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """`[B, H, 2 w, *]`, each row rolled to the front by its `count [B]`: from slots to the order of time, the latest
    last. By minus the count, from that order to slots."""
    order = (torch.arange(x.shape[2], device=x.device) + count.long()[:, None]) % x.shape[2]
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _labels_of_past(count: torch.Tensor, window_size: int) -> torch.Tensor:
    """`[B, 2 w]`, in the order of time: the windows of what is remembered, counted as the row's next token does."""
    size, count = 2 * window_size, count.long()[:, None]
    positions = count + torch.arange(-size, 0, device=count.device)
    known = positions >= count - _remembered(count, window_size)
    return torch.where(known, positions // window_size, _NONE)


def _final_state(k, v, totals: torch.Tensor, window_size: int) -> LocalState:
    size, count = 2 * window_size, _bounded(totals, window_size).expand(k.shape[0])
    old = torch.arange(size, device=k.device) < size - _remembered(count, window_size)[:, None]
    keys, values = (F.pad(x[:, -size:], (0, 0, 0, 0, max(size - x.shape[1], 0), 0)).to(k.dtype) for x in (k, v))
    keys, values = (
        _rolled(x.masked_fill(old[..., None, None], 0).transpose(1, 2), -count).contiguous() for x in (keys, values)
    )
    return LocalState(keys, values, count.to(compute_dtype(k)))


def _block_size(window_size: int, length: int) -> int:
    return window_size if has_open_length() else min(window_size, length)


class _Blocks(NamedTuple):
    q: torch.Tensor  # [B, N, S, H, K]: N blocks of S queries
    k: torch.Tensor  # [B, N, C, G, K]: all keys that a block could see
    v: torch.Tensor  # [B, N, C, G, V]
    visible: torch.Tensor | None  # bool [B or 1, N, S, C]; None for all
    is_causal: bool  # where `visible` is None


def _blocks(q, k, v, q_labels, k_labels, window_size: int, aligned: bool, causal: bool) -> _Blocks:
    """Cut into blocks of a window. Blocks that are windows look one window back (and ahead), others two; the keys of
    a past, 2 w of them, stand in front already."""
    past, size = k.shape[1] - q.shape[1], _block_size(window_size, q.shape[1])
    reach = (1 if aligned else 2) * size if has_open_length() or q.shape[1] > size else 0
    back, ahead = max(past, reach), 0 if causal else reach
    q, k, v, q_labels, k_labels = _cut(q, k, v, q_labels, k_labels, size, back - past, ahead)
    visible = (q_labels[..., :, None] - k_labels[..., None, :]).abs() <= 1
    return _Blocks(q, k, v, visible.tril(back) if causal else visible, False)


def _cut(q, k, v, q_labels, k_labels, size: int, front: int, ahead: int):
    """Blocks of `size` queries, and for each the keys around it, of which `front` are missing before the first and
    `ahead` after the last. What fills up has the label of no token."""
    tail = missing_tokens(q.shape[1], size)
    number = (q.shape[1] + tail) // size
    q, q_labels = _pad(q, 0, tail), _pad(q_labels, 0, tail, _NONE)
    k, v = _pad(k, front, tail + ahead), _pad(v, front, tail + ahead)
    k_labels = _pad(k_labels, front, tail + ahead, _NONE)
    q, q_labels = (x.unflatten(1, (number, size)) for x in (q, q_labels))
    k, v, k_labels = (_spans(x, number, size) for x in (k, v, k_labels))
    return q, k, v, q_labels, k_labels


def _pad(x: torch.Tensor, front: int, end: int, value: int = 0) -> torch.Tensor:
    """Lengthen the time axis of `[B, T, ...]`."""
    return F.pad(x, (*[0, 0] * (x.ndim - 2), front, end), value=value) if has_open_length() or front or end else x


def _spans(x: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """`[B, T, ...] -> [B, N, C, ...]`: block n has what starts at n S and leaves N - 1 - n blocks behind it."""
    if not has_open_length() and number == 1:
        return x[:, None]
    cut = x.unflatten(1, (-1, size))
    return torch.cat([cut[:, i : i + number] for i in range(cut.shape[1] - number + 1)], dim=2)


def _attend(blocks: _Blocks, length: int, scale: float | None, dropout: float) -> torch.Tensor:
    """o `[B, T, H, V]`. A query of padding sees padding, so that no row of weights is empty."""
    batch, number, _, heads, _ = blocks.q.shape
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in blocks[:3])
    k, v = (x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    mask = None
    if blocks.visible is not None:
        mask = blocks.visible.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=blocks.is_causal, scale=scale
    )
    return o.transpose(1, 2).unflatten(0, (batch, number)).flatten(1, 2)[:, :length]
