# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Efficient attention (Shen et al., arXiv 1812.01243, eq. 2-4), with softmax as both normalisations:

    o_i = s sum_d softmax(q_i)_d sum_j softmax_j(k)_jd v_j            s = K^-1/2 ("0.19") or 1 ("v0.2.1")

over all real tokens j of the same document, or of a context. The implied weights of a token sum to s.
"""

from __future__ import annotations

import torch

from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal
from lalm.modeling.ops.dispatch import must_separate
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.local_global.efficient_chunks import running_max
from lalm.modeling.ops.local_global.efficient_recurrence import check_semantics, features_of
from lalm.modeling.ops.rules import bidirectional_diagonal, layout_both_ways
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes, document_by_document


def bidirectional_efficient_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    semantics: str = "0.19",
    layout: SequenceLayout | None = None,
) -> torch.Tensor:
    """Efficient attention to all real tokens of the same document: q, k `[B, T, H, K]`, v `[B, T, H, V]` -> o
    `[B, T, H, V]` in the dtype of v.

    Raises:
        ValueError: a shape or the semantics does not fit; the message names it.
    """
    check_shapes(q, k, v, layout)
    layout = layout or SequenceLayout()
    q, k, v = layout.freeze(q, k, v)
    if layout.segments is None:
        return layout.zero_padding(cross_efficient_attention(q, k, v, layout.mask, semantics=semantics))
    check_semantics(semantics)
    if must_separate(layout, q, k, v):

        def alone(q, k, v, _, layout):
            return bidirectional_efficient_attention(q, k, v, semantics=semantics, layout=layout), None

        return document_by_document(alone, (q, k, v), None, layout)[0]
    dtype = compute_dtype(q, k, v)
    with without_autocast(q.device):
        documents = SequenceLayout(segments=layout.document_ids())
        k = features_of(k.to(dtype), layout.mask, "0.19")
        features = (k - _document_max(k.detach(), documents)).exp()
        read = bidirectional_diagonal(chunk_diagonal)
        ones = torch.ones_like(k[..., :1, :1])
        total, _ = read(ones, ones, features.flatten(-2)[:, :, None], None, 1.0, None, documents)
        total = total.view_as(features)
        # A document of padding only has no key; its output is not looked at, but stays finite.
        q = q.to(dtype).softmax(-1) * _scale(q, semantics) / (total + (total == 0))
        o, _ = read(q, features, v.to(dtype), None, 1.0, None, documents)
        return layout.zero_padding(o).to(v.dtype)


@torch.no_grad()
def _document_max(x: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Maximum of `x [B, T, H, K]` over each document, 0 where that is -inf."""
    documents = layout_both_ways(layout).document_ids()
    forward, backward = running_max(torch.cat([x, x.flip(1)]), documents).chunk(2)
    largest = torch.maximum(forward, backward.flip(1))
    return largest.masked_fill(largest == -torch.inf, 0)


def _scale(q: torch.Tensor, semantics: str) -> float:
    return q.shape[-1] ** -0.5 if semantics == "0.19" else 1.0


def cross_efficient_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    semantics: str = "0.19",
) -> torch.Tensor:
    """Efficient attention of queries `[B, T, H, K]` to keys `[B, S, H, K]` and values `[B, S, H, V]` with `mask`
    bool `[B, S]`, True for real ones -> o `[B, T, H, V]` in the dtype of v; 0 where a row has no real key.

    Raises:
        ValueError: a shape or the semantics does not fit; the message names it.
    """
    check_semantics(semantics)
    check_shapes(k, k, v, SequenceLayout(mask=mask))
    if q.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q must be [B, T, H, K] with B, H, K of k {tuple(k.shape)}, got {tuple(q.shape)}.")
    dtype = compute_dtype(q, k, v)
    with without_autocast(q.device):
        if mask is None:
            weights = k.to(dtype).softmax(1)
        else:
            padding = ~mask[..., None, None]
            # Not -inf: a row of padding only would be NaN before it is zeroed.
            weights = k.to(dtype).masked_fill(padding, torch.finfo(dtype).min).softmax(1).masked_fill(padding, 0)
            v = v.masked_fill(padding, 0)
        memory = torch.einsum("bshk,bshv->bhkv", weights, v.to(dtype))
        q = q.to(dtype).softmax(-1) * _scale(q, semantics)
        return torch.einsum("bthk,bhkv->bthv", q, memory).to(v.dtype)
