# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Product-key memory (Lample et al., arXiv 1907.05242), as an MLP: many values, of which a token reads a few.

Code symbol -> paper: queries -> q(x), cut into two halves; keys -> the two sets of sub-keys; values -> the memory.
The settings are those of lucidrains' product-key-memory, which linear-attention-transformer uses: 4 heads, sub-keys of
128 numbers, 32 values per head, queries normalised by a layer norm (the paper's batch norm would see later tokens).
"""

import torch
from torch import nn

from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.layers import make_linear

HEADS, KEY_SIZE, READ = 4, 128, 32


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
        self.values = nn.EmbeddingBag(self.num_keys**2, config.hidden_size, mode="sum")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.norm(self.to_queries(x).unflatten(-1, (2, HEADS, KEY_SIZE)))
        scores = torch.einsum("btphd,hnpd->bthpn", queries, self.keys)
        best, index = scores.topk(min(READ, self.num_keys), dim=-1)
        pairs = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        places = (index[..., 0, :, None] * self.num_keys + index[..., 1, None, :]).flatten(-2)
        top, chosen = pairs.topk(best.shape[-1], dim=-1)
        weights = top.softmax(dim=-1).flatten(0, 1).flatten(-2)
        wanted = places.gather(-1, chosen).flatten(0, 1).flatten(-2)
        return self.values(wanted, per_sample_weights=weights.to(self.values.weight.dtype)).view_as(x)
