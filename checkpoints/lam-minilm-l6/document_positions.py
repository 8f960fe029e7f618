# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Where each token stands in its document, padding not counted: what windows and buckets are cut by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layout import SequenceLayout


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
