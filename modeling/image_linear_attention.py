# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Linear attention over the pixels of an image (Shen et al., *Efficient Attention*, arXiv 1812.01243).

As `ImageLinearAttention` of lucidrains' linear-attention-transformer 0.19.1, whose weights it loads.
"""

import torch
from torch import nn


class ImageLinearAttention(nn.Module):
    """Every pixel attends to all pixels, and to those of a context, at a cost linear in their number.

    `o = softmax_key(q) (softmax_pixels(k) v^T)`, with q and k of the image scaled by `key_dim^(-1/4)` each.

    Args:
        chan: channels of the images.
        chan_out: channels of the result; None for `chan`.
        kernel_size, padding, stride: of the convolutions that make q, k and v; `padding` is that of the last one too.
        key_dim, value_dim: of a head.
        norm_queries: take the softmax of q.
    """

    def __init__(
        self,
        chan: int,
        chan_out: int | None = None,
        kernel_size: int = 1,
        padding: int = 0,
        stride: int = 1,
        key_dim: int = 64,
        value_dim: int = 64,
        heads: int = 8,
        norm_queries: bool = True,
    ):
        super().__init__()
        self.chan, self.heads, self.key_dim, self.norm_queries = chan, heads, key_dim, norm_queries
        options = {"padding": padding, "stride": stride}
        self.to_q = nn.Conv2d(chan, key_dim * heads, kernel_size, **options)  # type: ignore[arg-type]
        self.to_k = nn.Conv2d(chan, key_dim * heads, kernel_size, **options)  # type: ignore[arg-type]
        self.to_v = nn.Conv2d(chan, value_dim * heads, kernel_size, **options)  # type: ignore[arg-type]
        self.to_out = nn.Conv2d(
            value_dim * heads, chan if chan_out is None else chan_out, kernel_size, padding=padding
        )

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """`x [B, C, H, W]`, context `[B, C, ...]` (pixels of any number) or None -> `[B, chan_out, H', W']`.

        Raises:
            ValueError: another number of channels or batch elements than expected, or sides below the kernel's.
        """
        self._check(x, context)
        q, k, v = self.to_q(x), self._pixels(self.to_k(x)), self._pixels(self.to_v(x))
        sides = q.shape[2:]
        q, k = self._pixels(q) * self.key_dim**-0.25, k * self.key_dim**-0.25
        if context is not None:
            row = context.flatten(2)[:, :, None]
            k = torch.cat([k, self._pixels(self.to_k(row))], dim=-1)  # not scaled, as upstream's
            v = torch.cat([v, self._pixels(self.to_v(row))], dim=-1)
        k = k.softmax(dim=-1)
        q = q.softmax(dim=-2) if self.norm_queries else q
        memory = torch.einsum("bhdn,bhen->bhde", k, v)
        return self.to_out(torch.einsum("bhdn,bhde->bhen", q, memory).flatten(1, 2).unflatten(-1, sides))

    def _pixels(self, x: torch.Tensor) -> torch.Tensor:
        # [B, heads * d, H, W] -> [B, heads, d, H W]
        return x.flatten(2).unflatten(1, (self.heads, -1))

    def _check(self, x: torch.Tensor, context: torch.Tensor | None) -> None:
        if x.dim() != 4 or x.shape[1] != self.chan:
            raise ValueError(f"x must be [batch, {self.chan}, height, width], got {list(x.shape)}.")
        smallest = self.to_q.kernel_size[0] - 2 * int(self.to_q.padding[0])
        if min(x.shape[2:]) < max(1, smallest):
            raise ValueError(f"The sides of x, {list(x.shape[2:])}, must be at least {max(1, smallest)}.")
        if context is not None and (context.dim() < 3 or context.shape[:2] != x.shape[:2]):
            raise ValueError(f"context must be [{len(x)}, {self.chan}, ...] like x, got {list(context.shape)}.")
        if context is not None and self.to_q.kernel_size != (1, 1):
            raise ValueError("A context has no neighbouring pixels and needs kernel_size=1.")
