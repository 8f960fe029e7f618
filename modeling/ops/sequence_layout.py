# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Where padding is and where documents begin: the one description of a batch that every op and layer reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import hides_values


@dataclass
class SequenceLayout:
    """Padding and document boundaries of a batch `[B, T]`. All fields are None for a plain batch, which costs nothing.

    Args:
        mask: bool `[B, T]`, False on padding. Padding is inert: the state passes through it unchanged, whatever
            stands there and wherever it stands; the output at a padded token is unspecified.
        segments: int64 `[B, T]`. A change of id between neighbouring tokens starts a new document from an empty
            state. An initial state belongs to the first document of a row, the final state to its last.
        order: int64 `[B, T]`, for layers that look at neighbours: the permutation that moves each row's padding to
            its front and keeps everything else in order; None where nothing has to move.
    """

    mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def to(self, *args, **kwargs) -> SequenceLayout:
        """Every tensor by `Tensor.to`; accelerate calls this when the layers of a model lie on several devices."""
        tensors = (self.mask, self.segments, self.order)
        return SequenceLayout(*(None if tensor is None else tensor.to(*args, **kwargs) for tensor in tensors))

    def first(self, length: int) -> SequenceLayout:
        """The layout of the first `length` tokens."""
        mask, segments = (None if x is None else x[:, :length] for x in (self.mask, self.segments))
        order = None if mask is None or self.order is None else stable_order(mask)
        return SequenceLayout(mask, segments, order)

    def pads_first(self, x: torch.Tensor) -> torch.Tensor:
        """Apply `order` along the time axis of `x [B, T, ...]`."""
        return x if self.order is None else _gather_time(x, self.order)

    def segments_pads_first(self) -> torch.Tensor | None:
        """`document_ids` in that order; the padding at the front counts to the row's first document."""
        segments = self.document_ids()
        if segments is None or self.mask is None:
            return segments
        return self.pads_first(segments).masked_fill(~self.pads_first(self.mask), 0)

    def slide_over_padding(self, past: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """Join `past [B, S, ...]` and `current [B, T, ...]`, whose padding stands first, so that the past follows that
        padding and nothing parts it from the real tokens. What fills the front is unspecified."""
        joined = torch.cat([past, current], dim=1)
        if self.mask is None:
            return joined
        padding = (~self.mask).sum(1, keepdim=True)
        slots = torch.arange(joined.shape[1], device=joined.device)[None]
        source = torch.where(slots < padding + past.shape[1], (slots - padding).clamp(min=0), slots)
        return _gather_time(joined, source)

    def last_inputs(self, parts: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """The last `count` real inputs of each row's last document: `parts` `[B, T, D_i]` -> `[B, count, D]`; zeros
        stand first where there are fewer."""
        length = parts[0].shape[1]
        recent = slice(max(length - count, 0), None)  # [-0:] would be everything
        index = None if self.order is None else self.order[:, recent]
        last = [x[:, recent] if index is None else _gather_time(x, index) for x in parts]
        x = torch.cat(last, dim=-1)
        if self.mask is not None:
            x = x.masked_fill(~self.pads_first(self.mask)[:, recent, None], 0)
        segments = self.segments_pads_first()
        if segments is not None:
            x = x.masked_fill((segments[:, recent] != segments[:, -1:])[..., None], 0)
        return F.pad(x, (0, 0, count - x.shape[1], 0)) if x.shape[1] < count else x

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `pads_first`."""
        return x if self.order is None else _gather_time(x, self.order.argsort(1))

    def zero_padding(self, x: torch.Tensor) -> torch.Tensor:
        """`x [B, T, ...]` with 0 at padded tokens: selected, for 0 times NaN is NaN, in a gradient too."""
        return x if self.mask is None else x.masked_fill(~_broadcast(self.mask, x.ndim), 0)

    def freeze(self, *tensors: Any) -> tuple[Any, ...]:
        """Zero what an op takes (`[B, T, ...]` each, or None) on padding, log decays too: it neither writes nor
        forgets, and whatever stands there reaches nothing."""
        return tuple(None if x is None else self.zero_padding(x) for x in tensors)

    def document_ids(self) -> torch.Tensor | None:
        """`segments` renumbered 0, 1, ... along each row, so that an id which comes back is a new document."""
        starts = self.starts()
        return None if starts is None else starts.cumsum(1)

    def starts(self) -> torch.Tensor | None:
        """bool `[B, T]`, True where a document begins inside the row (never at the row's first token)."""
        if self.segments is None:
            return None
        return torch.diff(self.segments, dim=1, prepend=self.segments[:, :1]) != 0


class DocumentPositions(NamedTuple):
    """`[B, T]`, or `[1, T]` where all rows are alike."""

    documents: torch.Tensor  # int64, 0, 1, ... along each row
    positions: torch.Tensor  # int64, real tokens of the document before this one
    totals: torch.Tensor  # int64 [B], real tokens of each row's last document up to the end of the row


def document_positions(
    layout: SequenceLayout | None, like: torch.Tensor, offset: torch.Tensor | None = None
) -> DocumentPositions:
    """Positions of the tokens of `like [B, T, ...]`; `offset [B]` tokens of each row's first document came before."""
    layout = layout or SequenceLayout()
    length, device = like.shape[1], like.device
    real = torch.ones(1, length, dtype=torch.int64, device=device) if layout.mask is None else layout.mask.long()
    before = real.cumsum(1) - real
    documents, starts = layout.document_ids(), layout.starts()
    if documents is None or starts is None:
        documents = torch.zeros_like(real)
    else:
        before = before - torch.where(starts, before, 0).cummax(1).values
    if offset is not None:
        before = before + torch.where(documents == 0, offset.long()[:, None], 0)
    return DocumentPositions(documents, before, before[:, -1] + real[:, -1])


def stable_order(keys: torch.Tensor) -> torch.Tensor:
    """The permutation int64 `[B, T]` that sorts whole numbers (or bool) `[B, T]` and keeps equal ones in order. ONNX
    has no stable sort, so that no two numbers are left equal."""
    length = keys.shape[1]
    return (keys.long() * length + torch.arange(length, device=keys.device)).argsort(1)


def _gather_time(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, _broadcast(index, x.ndim).expand(-1, -1, *x.shape[2:]))


def _broadcast(x: torch.Tensor, ndim: int) -> torch.Tensor:
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


def document_by_document(
    op: Callable, tensors: Sequence[torch.Tensor | None], state: Any, layout: SequenceLayout
) -> tuple[torch.Tensor, Any]:
    """`op(*tensors, state, layout)`, which gives outputs `[B, T, ...]` and the next state, one document after another:
    slower, but nothing passes between them. A state is None, a tensor or a tuple of these, by rows."""
    starts, rows, states = cast(torch.Tensor, layout.starts()), [], []
    for b in range(len(starts)):
        outputs, after = [], _each(lambda x, b=b: x[b : b + 1], state)
        cuts = [0, *starts[b].nonzero().flatten().tolist(), starts.shape[1]]
        for start, stop in itertools.pairwise(cuts):
            here = slice(b, b + 1), slice(start, stop)
            mask = None if layout.mask is None else layout.mask[here]
            own = SequenceLayout(mask, None, None if mask is None else stable_order(mask))
            o, after = op(*(None if x is None else x[here] for x in tensors), None if start else after, own)
            outputs.append(o)
        rows.append(torch.cat(outputs, dim=1))
        states.append(after)
    return torch.cat(rows), _each(lambda *x: torch.cat(x), *states)


def _each(function: Callable, *states: Any) -> Any:
    """`function` of corresponding tensors of states."""
    if isinstance(states[0], tuple):
        return type(states[0])(*(_each(function, *parts) for parts in zip(*states, strict=True)))
    return None if states[0] is None else function(*states)


def check_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout | None = None,
    shares_heads: bool = False,
) -> None:
    """Raise ValueError unless q, k are `[B, T, H, K]`, v is `[B, T, H, V]` and the layout is `[B, T]`. With
    `shares_heads`, v may have a multiple of the heads of q."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k and v must be [B, T, H, D], got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q [B, T, H, K] = {tuple(q.shape)}, got {tuple(k.shape)}.")
    if shares_heads and v.shape[:2] == q.shape[:2] and v.shape[2] != q.shape[2]:
        if q.shape[2] == 0 or v.shape[2] % q.shape[2]:
            raise ValueError(
                f"v must have a multiple of the {q.shape[2]} heads of q, [B, T, H, V] with H % {q.shape[2]} == 0, got "
                f"{tuple(v.shape)}."
            )
    elif v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with [B, T, H] = {tuple(q.shape[:3])}, got {tuple(v.shape)}.")
    if q.shape[1] == 0:
        raise ValueError("q, k and v hold no token (T = 0); pass at least one.")
    check_layout(layout, q)


def check_layout(layout: SequenceLayout | None, q: torch.Tensor) -> None:
    """Raise ValueError unless the layout is one of the tokens of `q [B, T, ...]`."""
    if layout is None or (layout.mask is None and layout.segments is None):
        return
    for name in ("mask", "segments"):
        value = getattr(layout, name)
        if value is not None and value.shape != q.shape[:2]:
            raise ValueError(f"layout.{name} must be [B, T] = {tuple(q.shape[:2])}, got {tuple(value.shape)}.")
    if layout.mask is not None and layout.mask.dtype != torch.bool:
        raise ValueError(f"layout.mask must be bool, got {layout.mask.dtype}; pass attention_mask.bool().")


def check_state(state: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `state` is None or has `shape`."""
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"initial_state must be {shape}, got {tuple(state.shape)}.")


def segments_of(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Document ids `[1, T]` of `length` tokens packed with boundaries `cu_seqlens [N + 1]`; documents may be empty."""
    positions = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)[None]


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, length: int, name: str = "cu_seqlens") -> None:
    """Raise ValueError unless `cu_seqlens` is a valid list of boundaries of one packed row of `length` tokens."""
    if batch != 1:
        raise ValueError(f"{name} describes one packed row: flatten the batch to B = 1 first, got B = {batch}.")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must be a vector [N + 1] with N >= 1, got shape {tuple(cu_seqlens.shape)}.")
    if cu_seqlens.dtype.is_floating_point or cu_seqlens.dtype is torch.bool:
        raise ValueError(f"{name} must hold integers, got {cu_seqlens.dtype}.")
    if hides_values():
        return
    boundaries = cu_seqlens.tolist()
    if boundaries[0] != 0 or boundaries[-1] != length or any(a > b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"{name} must rise from 0 to T = {length}, got {boundaries}.")


def per_document(
    op: Callable,
    tensors: tuple[torch.Tensor | None, ...],
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run `op` on one packed row `[1, T, ...]` so that each document has its own initial and final state `[N, ...]`.

    Without states the row stays packed. With states, documents whose lengths round up to the same power of two lie
    side by side in a padded batch, so that at most twice the tokens are computed.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    length = first.shape[1]
    check_cu_seqlens(cu_seqlens, first.shape[0], length)
    segments = segments_of(cu_seqlens.to(first.device), length)
    if initial_state is None and not output_final_state:
        return op(*tensors, layout=SequenceLayout(segments=segments), **kwargs)
    if initial_state is not None and initial_state.shape[0] != cu_seqlens.numel() - 1:
        raise ValueError(
            f"initial_state must have one row for each of the {cu_seqlens.numel() - 1} documents of cu_seqlens, got "
            f"shape {tuple(initial_state.shape)}."
        )
    starts, lengths = cu_seqlens[:-1].to(first.device).long(), cu_seqlens.to(first.device).long().diff()
    sizes = [int(length - 1).bit_length() if length else -1 for length in lengths.tolist()]
    tokens, outputs, documents, states = [], [], [], []
    for size in sorted(set(sizes)):
        group = torch.tensor([i for i, other in enumerate(sizes) if other == size], device=first.device)
        steps = torch.arange(max(int(lengths[group].max()), 1), device=first.device)
        index, mask = (starts[group, None] + steps).clamp(max=length - 1), steps < lengths[group, None]
        batch = [None if tensor is None else tensor[0][index] for tensor in tensors]
        entering = None if initial_state is None else initial_state[group]
        o, state = op(
            *batch,
            initial_state=entering,
            output_final_state=output_final_state,
            layout=SequenceLayout(mask=mask),
            **kwargs,
        )
        tokens.append(index[mask])
        outputs.append(o[mask])
        documents.append(group)
        states.append(state)
    o = torch.cat(outputs)[torch.cat(tokens).argsort()][None]
    return o, torch.cat(states)[torch.cat(documents).argsort()] if output_final_state else None
