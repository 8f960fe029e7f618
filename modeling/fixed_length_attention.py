# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Attention for encoders of sequences of one length: Linformer, and attention along one axis of a folded sequence.

As `LinformerSelfAttention` of linformer 0.2.1 and `FoldAxially` of linear-attention-transformer 0.19.1 (lucidrains);
the weights of both load. They are modules, and no layers of `LocalGlobalConfig`: a weight per position can be neither
causal nor padded, and the states of a folded sequence would be those of every place of a row.
"""

import torch
from torch import nn


class LinformerAttention(nn.Module):
    """Softmax attention over k mixtures of all positions (Wang et al., *Linformer*, arXiv 2006.04768, eq. 7).

    `o = softmax(q (E^T K)^T / sqrt(dim_head)) F^T V`, with E and F learned, `[seq_len, k]`.

    Args:
        dim: width of the input and of the result.
        seq_len: positions of what is attended to, exactly so many in every call.
        k: mixtures of positions.
        dim_head: of a head; None for `dim // heads`.
        one_kv_head: one key and value head for all queries.
        share_kv: take the keys, and E, for the values too.
        dropout: of the attention weights.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        k: int = 256,
        heads: int = 8,
        dim_head: int | None = None,
        one_kv_head: bool = False,
        share_kv: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim, {dim}, must be a multiple of heads, {heads}.")
        self.dim, self.seq_len, self.heads, self.share_kv = dim, seq_len, heads, share_kv
        self.dim_head = dim // heads if dim_head is None else dim_head
        kv_size = self.dim_head * (1 if one_kv_head else heads)
        self.to_q = nn.Linear(dim, self.dim_head * heads, bias=False)
        self.to_k = nn.Linear(dim, kv_size, bias=False)
        self.proj_k = nn.Parameter(torch.empty(seq_len, k).uniform_(-(k**-0.5), k**-0.5))
        if not share_kv:
            self.to_v = nn.Linear(dim, kv_size, bias=False)
            self.proj_v = nn.Parameter(torch.empty(seq_len, k).uniform_(-(k**-0.5), k**-0.5))
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(self.dim_head * heads, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """`x [B, T, dim]` attends to itself (T = seq_len) or to `context [B, seq_len, dim]` -> `[B, T, dim]`.

        Raises:
            ValueError: another length or width than the weights are made for.
        """
        source, name = (x, "x") if context is None else (context, "context")
        if x.dim() != 3 or x.shape[-1] != self.dim or source.shape != (len(x), self.seq_len, self.dim):
            raise ValueError(
                f"{name} must be [batch, {self.seq_len}, {self.dim}] (seq_len positions, each with its own weights), "
                f"got {list(source.shape)}."
            )
        keys = self.to_k(source)
        values, proj_v = (keys, self.proj_k) if self.share_kv else (self.to_v(source), self.proj_v)
        queries = self._heads(self.to_q(x))
        keys, values = self._heads(self.proj_k.T @ keys), self._heads(proj_v.T @ values)
        scores = queries @ keys.transpose(-1, -2) * self.dim_head**-0.5
        o = self.dropout(scores.softmax(dim=-1)) @ values
        return self.to_out(o.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        # [B, T, heads * d] -> [B, heads, T, d]
        return x.unflatten(-1, (-1, self.dim_head)).transpose(1, 2)


class FoldAxially(nn.Module):
    """`fn` along the columns of a sequence that is folded into rows of `axial_dim` tokens (`attend_axially`).

    Token t stands in row `t // axial_dim`, column `t % axial_dim`, and meets the tokens of its column only.

    Args:
        fn: a module, `[B, T, D] -> [B, T, D]`; further arguments of a call are passed on to it.
    """

    def __init__(self, axial_dim: int, fn: nn.Module):
        super().__init__()
        self.axial_dim, self.fn = axial_dim, fn

    def forward(self, x: torch.Tensor, input_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """`x [B, T, D]` -> `[B, T, D]`; with `input_mask [B, T]` its columns are passed to `fn` as `input_mask`.

        Raises:
            ValueError: the rows are not whole.
        """
        if x.dim() != 3 or x.shape[1] % self.axial_dim:
            raise ValueError(
                f"x must be [batch, multiple of axial_dim = {self.axial_dim}, width], got {list(x.shape)}."
            )
        if input_mask is not None:
            kwargs["input_mask"] = self._columns(input_mask)
        return self.fn(self._columns(x), **kwargs).unflatten(0, (len(x), -1)).transpose(1, 2).flatten(1, 2)

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, self.axial_dim)).transpose(1, 2).flatten(0, 1)
