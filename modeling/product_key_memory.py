# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Product-key memory (Lample et al., arXiv 1907.05242), as an MLP: many values, of which a token reads a few.

Code symbol -> paper: queries -> q(x), cut into two halves; keys -> the two sets of sub-keys; values -> the memory.
The settings are those of lucidrains' product-key-memory, which linear-attention-transformer uses: 4 heads, sub-keys of
128 numbers, 32 values per head, queries normalised by a layer norm (the paper's batch norm would see later tokens).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.layers import make_linear
from lalm.modeling.ops.autograd import differentiable_by, is_transformed

HEADS, KEY_SIZE, READ = 4, 128, 32


def gathered_sum(values: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_r weights[n, r] values[index[n, r]]` in plain operations: `[M, D]` and twice `[N, R]` -> `[N, D]`."""
    return torch.einsum("nr,nrd->nd", weights, F.embedding(index, values))


class _WeightedSum(torch.autograd.Function):
    """`gathered_sum` without the gathered rows in memory; embedding_bag has no second derivative of its own."""

    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, weights)
        ctx.index = index
        return F.embedding_bag(index, values, per_sample_weights=weights, mode="sum")

    @staticmethod
    @differentiable_by(lambda ctx, values, weights: gathered_sum(values, ctx.index, weights), 1)
    def backward(ctx: Any, dy: torch.Tensor):
        values, weights = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.embedding_bag(ctx.index, values, per_sample_weights=weights, mode="sum")
        return None, *torch.autograd.grad(y, (values, weights), dy)


def weighted_sum(values: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`gathered_sum` in the way that is fastest here."""
    if is_transformed():
        return gathered_sum(values, index, weights)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.embedding_bag(index, values, per_sample_weights=weights, mode="sum")
    return _WeightedSum.apply(index, values, weights)


class ProductKeyMemory(nn.Module):
    """`[B, T, D] -> [B, T, D]`: the sum of the values whose pairs of sub-keys fit a token best, weighted by softmax.

    The score of value (i, j) is the sum of the scores of the sub-keys i and j; the best of all K x K pairs lie among
    the pairs of the best sub-keys of both sets, so that 2 K scores per head suffice.
    """

    def __init__(self, config: LocalGlobalConfig):
        super().__init__()
        self.num_keys = config.pkm_num_keys
        self.to_queries = make_linear(config.hidden_size, 2 * HEADS * KEY_SIZE, bias=False)
        self.norm = nn.LayerNorm(KEY_SIZE)
        self.keys = nn.Parameter(torch.empty(HEADS, self.num_keys, 2, KEY_SIZE))
        self.values = nn.Parameter(torch.empty(self.num_keys**2, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.norm(self.to_queries(x).unflatten(-1, (2, HEADS, KEY_SIZE)))
        scores = torch.einsum("btphd,hnpd->bthpn", queries, self.keys)
        best, index = scores.topk(min(READ, self.num_keys), dim=-1)
        pairs = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        places = (index[..., 0, :, None] * self.num_keys + index[..., 1, None, :]).flatten(-2)
        top, chosen = pairs.topk(best.shape[-1], dim=-1)
        weights = top.softmax(dim=-1).flatten(0, 1).flatten(-2)
        wanted = places.gather(-1, chosen).flatten(0, 1).flatten(-2)
        return weighted_sum(self.values, wanted, weights.to(self.values.dtype)).view_as(x)
