# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a piece of a sequence makes of the state S that enters it: A S + B, for every rule that is linear in its state.

Pieces that different processes hold are joined by these maps (sequence_parallel.py): the map of two pieces is
(A_2 A_1, A_2 B_1 + B_2), so that a scan over P pieces takes log2(P) steps (Blelloch, CMU-CS-90-190).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.sequence_layout import SequenceLayout

Map = tuple[torch.Tensor, torch.Tensor]


def diagonal_map(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, layout: SequenceLayout) -> Map:
    """The map of S <- exp(g_t) S + k_t v_t^T: A `[B, H, D, 1]`, one factor per key channel (D = K) or per head
    (D = 1), and B `[B, H, K, V]`.

    Args:
        k, v: `[B, T, H, K]` and `[B, T, H, V]`.
        g: log decay `[B, T, H]` or `[B, T, H, K]`; None for none.
        layout: padding and documents; where a document begins, A is 0.
    """
    dtype = compute_dtype(k, v, g)
    with without_autocast(k.device):
        k, v, g = layout.freeze(k.to(dtype), v.to(dtype), None if g is None else g.to(dtype))
        documents, kept = layout.document_ids(), k.new_ones(len(k), 1, 1, 1)
        if documents is not None:
            k = k.masked_fill((documents != documents[:, -1:])[..., None, None], 0)
            kept = (documents[:, -1] == 0).to(dtype).view_as(kept)
        if g is not None:
            g = g if g.ndim == 4 else g[..., None]
            later = g.flip(1).cumsum(1).flip(1)  # from every token to the last
            k = k * F.pad(later[:, 1:], (0, 0, 0, 0, 0, 1)).exp()
            kept = kept * later[:, 0, ..., None].exp()
        return kept, torch.einsum("bthk,bthv->bhkv", k, v)


def delta_map(rule: Callable, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, memories: int = 0) -> Map:
    """The map of a delta rule: A `[B, H, R, R]` on the R rows of all memories, and B of the shape of the state.

    One call of the rule makes both: further columns of the values, which are 0, begin from the identity.

    Args:
        rule: `rule(q, k, v, state, output_final_state, layout) -> (o, state)`.
        k, v: `[B, T, H, K]` and `[B, T, H, V]`.
        layout: padding and documents; where a document begins, A is 0.
        memories: M of a state `[B, H, M, K, V]`; 0 for a state `[B, H, K, V]`.
    """
    batch, _, heads, keys = k.shape
    rows, values = keys * max(memories, 1), v.shape[-1]
    identity = F.pad(torch.eye(rows, dtype=compute_dtype(k, v), device=k.device), (values, 0))
    state = identity.expand(batch, heads, -1, -1)
    after = rule(k, k, F.pad(v, (0, rows)), state.unflatten(2, (memories, keys)) if memories else state, True, layout)
    added, factor = after[1].split([values, rows], dim=-1)
    return factor.flatten(2, -2), added


def apply_factor(factor: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A S, of a state or of another factor."""
    if factor.shape[-1] == 1:
        return factor * state
    return (factor @ state.flatten(2, -2)).view_as(state)
