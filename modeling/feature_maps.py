# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Feature maps of linear attention: phi(q) . phi(k) stands in for softmax's exp(q . k).

All take and return `[B, T, H, *]`, compute in float32 (float64 for float64) and never return less, so that the small
values of a float32 feature survive a bfloat16 model. `FeatureMixer` is the mixer that has one.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init

from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.mixers import Mixer
from lalm.modeling.ops.diagonal_cpp import compiled_diagonal
from lalm.modeling.ops.diagonal_recurrence import compute_dtype
from lalm.modeling.ops.dispatch import choose
from lalm.modeling.ops.linear_attention import (
    chunk_linear_attention,
    cpp_linear_attention,
    cpp_taylor_attention,
    fla_linear_attention,
    recurrent_linear_attention,
)
from lalm.modeling.ops.products import without_autocast
from lalm.modeling.ops.taylor import num_taylor_features, taylor_features


def elu_features(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236, eq. 7), written so that exp(x) is not lost beside 1."""
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
    """Learned map: softmax of W x beside softmax of -W x (Zhang et al., arXiv 2402.04347); W starts as identity."""

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


class FeatureMixer(Mixer):
    """phi(q), phi(k), v -> linear attention -> output.

    Args:
        q_map, k_map: phi of queries and of keys; None for that of queries.
        normalize, eps: whether an output is divided by the sum of its weights, and what is added to the sum.
    """

    def __init__(
        self,
        config: LalmConfig,
        layer_idx: int,
        q_map: FeatureMap,
        k_map: FeatureMap | None = None,
        normalize: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__(config, layer_idx)
        self.q_map, self.k_map, self.normalize, self.eps = q_map, k_map, normalize, eps
        is_taylor = q_map.name == "taylor"  # whose kernel makes the features itself
        form, size = (cpp_taylor_attention, self.key_dim) if is_taylor else (cpp_linear_attention, q_map.num_features)
        self.compiled = compiled_diagonal(form, size, self.value_dim, normalized=normalize, taylor=is_taylor)

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        implementation = self.config.linear_attn_implementation
        op = choose(
            "linear_attention",
            implementation,
            v,
            recurrent=recurrent_linear_attention,
            chunk=chunk_linear_attention,
            fla=fla_linear_attention,
            cpp=self.compiled.where_had(implementation, q),
        )
        if op is not cpp_taylor_attention:
            q, k = self.q_map(q), (self.k_map or self.q_map)(k)
        return op(
            q,
            k,
            v,
            # The papers have no scale. Without a normaliser the field's 1 / sqrt(K) keeps the output's size in check.
            scale=1.0 if self.normalize else None,
            initial_state=state,
            output_final_state=output_final_state,
            normalize=self.normalize,
            eps=self.eps,
            layout=layout,
            causal=self.config.is_causal,
        )
