# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Feature maps of linear attention: phi(q) . phi(k) stands in for softmax's exp(q . k).

All take and return `[B, T, H, *]`, compute in float32 (float64 for float64) and never return less, so that the small
values of a float32 feature survive a bfloat16 model.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init

from lalm.modeling.ops.diagonal.taylor import num_taylor_features, taylor_features
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast


def elu_features(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236, eq. 7), written so that exp(x) is not lost next to 1."""
    return x.clamp(max=0).exp() + x.relu()


def dpfp_features(x: torch.Tensor, nu: int) -> torch.Tensor:
    """Deterministic parameter-free projection (Schlag et al., arXiv 2102.11174, eq. 37): `2 nu K` products."""
    x = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([x * x.roll(shift, dims=-1) for shift in range(1, nu + 1)], dim=-1)


class FavorFeatures(nn.Module):
    """Positive random features of the softmax kernel (Performers, Choromanski et al., arXiv 2009.14794, lemma 1).

    The directions are random, orthogonal in blocks, fixed, and stored with the weights.
    """

    directions: torch.Tensor

    def __init__(self, size: int, num_features: int):
        super().__init__()
        self.register_buffer("directions", torch.empty(num_features, size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        count, size = self.directions.shape
        q, r = torch.linalg.qr(torch.randn(-(-count // size), size, size))
        # LAPACK fixes the signs of q; only with those of r undone is q uniform over the rotations.
        rotations = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        lengths = torch.randn(count, size).norm(dim=-1, keepdim=True)
        init.copy_(self.directions, (rotations.flatten(0, 1)[:count] * lengths).to(self.directions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / x.shape[-1] ** 0.25
        exponent = x @ self.directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.directions.shape[0])


class HedgehogFeatures(nn.Module):
    """Learned map: softmax of W x next to softmax of -W x (Zhang et al., arXiv 2402.04347); W starts as identity."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.copy_(self.weight, torch.eye(self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.weight.to(x.dtype).T
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


class ElementwiseProductFeatures(nn.Module):
    """The product of two learned affine maps, (W1 x + b1) * (W2 x + b2): features of both signs."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * size, size))
        self.bias = nn.Parameter(torch.empty(2 * size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).chunk(2, dim=-1)
        return first * second


class FeatureMap(nn.Module):
    """The map called `name`, from heads of key size `size` to `num_features` (given for "favor" alone)."""

    def __init__(self, name: str, size: int, num_features: int | None = None, dpfp_nu: int = 3):
        super().__init__()
        self.name, self.dpfp_nu = name, dpfp_nu
        self.num_features = {
            "favor": num_features or size,
            "hedgehog": 2 * size,
            "dpfp": 2 * dpfp_nu * size,
            "taylor": num_taylor_features(size),
        }.get(name, size)
        if name == "favor":
            self.map: nn.Module = FavorFeatures(size, self.num_features)
        elif name == "hedgehog":
            self.map = HedgehogFeatures(size)
        elif name == "elementwise_product":
            self.map = ElementwiseProductFeatures(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(compute_dtype(x))
        with without_autocast(x.device):
            if self.name in ("favor", "hedgehog", "elementwise_product"):
                return self.map(x)
            if self.name == "dpfp":
                return dpfp_features(x, self.dpfp_nu)
            return _FIXED[self.name](x)


_FIXED = {
    "elu": elu_features,
    "relu": torch.relu,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "taylor": taylor_features,
    "identity": lambda x: x,
}
