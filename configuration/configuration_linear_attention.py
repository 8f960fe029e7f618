# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of classic linear attention (Katharopoulos et al., arXiv 2006.16236)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LalmConfig

# Feature maps whose values may be negative, so that their sum cannot serve as a denominator.
_SIGNED_FEATURE_MAPS = {"identity", "elementwise_product"}


@strict
class LinearAttentionConfig(LalmConfig):
    """Classic linear attention; the defaults are a 6-layer, 512-wide model without positions.

    Args:
        feature_map: map on q and k: "elu" (elu + 1), "relu", "exp", "softmax" (over the head), "taylor" (second-order
            expansion of exp; of size `1 + d + d (d + 1) / 2`: choose a small `expand_k`), "identity", "dpfp", "favor"
            (random features), "hedgehog" (learned) or "elementwise_product" (of two learned maps).
        num_features: random features per head of "favor"; None for the key size of the head.
        dpfp_nu: number of shifted products of "dpfp"; it yields `2 * dpfp_nu` features a key channel.
        normalize: divide each output by the sum of its weights.
        output_norm: RMSNorm per head on the output; None means exactly when `normalize` is off.
    """

    model_type = "lalm_linear"
    supports_bidirectional = True

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    hidden_act: str = "gelu"
    mlp_type: Literal["gated", "mlp"] = "mlp"
    feature_map: Literal[
        "elu", "relu", "exp", "softmax", "taylor", "identity", "dpfp", "favor", "hedgehog", "elementwise_product"
    ] = "elu"
    num_features: int | None = None
    dpfp_nu: int = 3
    normalize: bool = True
    output_norm: bool | None = None

    def __post_init__(self, **kwargs):
        if self.output_norm is None:
            self.output_norm = not self.normalize
        super().__post_init__(**kwargs)

    def validate_feature_map(self) -> None:
        if self.normalize and self.feature_map in _SIGNED_FEATURE_MAPS:
            raise ValueError(
                f"feature_map={self.feature_map!r} can be negative, so its weights have no usable sum: set "
                "normalize=False or choose another feature_map."
            )
        for name in ("num_features", "dpfp_nu"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.feature_map == "dpfp" and self.dpfp_nu >= 2 * self.linear_key_dim:
            raise ValueError(
                f"dpfp_nu = {self.dpfp_nu} must stay below twice the key size per head, {self.linear_key_dim}."
            )
