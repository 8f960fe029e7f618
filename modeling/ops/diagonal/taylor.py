# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The feature map of Based in plain torch; the C++ kernel of diagonal recurrences makes the same features itself."""

from __future__ import annotations

import torch


def num_taylor_features(size: int) -> int:
    """Number of Taylor features for head size `size`."""
    return 1 + size + size * (size + 1) // 2


def taylor_features(x: torch.Tensor) -> torch.Tensor:
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K) (Based, Arora et al., arXiv 2402.18668, section 4.1).

    Of the K^2 second-order products the K (K + 1) / 2 distinct ones are kept, those off the diagonal times sqrt 2:
    `[..., K]` -> `[..., 1 + K + K (K + 1) / 2]`.
    """
    size = x.shape[-1]
    row, column = torch.triu_indices(size, size, device=x.device)
    weight = torch.where(row == column, x.new_tensor(0.5).sqrt(), x.new_tensor(1.0)) / size**0.5
    # By slices, which take a third of the time of an index and its backward pass.
    pairs = torch.cat([x[..., i : i + 1] * x[..., i:] for i in range(size)], dim=-1)
    return torch.cat([torch.ones_like(x[..., :1]), x / size**0.25, pairs * weight], dim=-1)
