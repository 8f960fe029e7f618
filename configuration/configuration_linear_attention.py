# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of classic linear attention (Katharopoulos et al., arXiv 2006.16236)."""

from typing import Literal, cast

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LalmConfig

# Feature maps that have one map per head, for heads with a window.
PER_HEAD = ("centroids", "hedgehog")
# Feature maps whose values may be negative, so that their sum cannot serve as a denominator.
_SIGNED_FEATURE_MAPS = {"identity", "elementwise_product"}


@strict
class LinearAttentionConfig(LalmConfig):
    """Classic linear attention; the defaults are a 6-layer, 512-wide model without positions.

    Args:
        feature_map: map on q and k: "elu" (elu + 1), "relu", "exp", "softmax" (over the head), "taylor" (second-order
            expansion of exp; of size `1 + d + d (d + 1) / 2`: choose a small `expand_k`), "identity", "dpfp", "favor"
            (random features), "hedgehog" (learned) or "elementwise_product" (of two learned maps).
            Heads with a `window_size` have one learned map each, "hedgehog", or "centroids": keys by a softmax over
            learned centroids, queries by exp of their product with them.
        num_features: random features per head of "favor", None for the key size of the head; "centroids" per head,
            None for twice that.
        dpfp_nu: number of shifted products of "dpfp"; it yields `2 * dpfp_nu` features a key channel.
        normalize: divide each output by the sum of its weights.
        output_norm: RMSNorm per head on the output; None means exactly when `normalize` is off.
        window_size: if set, the heads of the linear layers attend the last so many tokens, their own included, by
            softmax, and what lies before by linear attention, under one normaliser (LoLCATs, arXiv 2410.10254). They
            have the shape of softmax heads: `head_dim` and `num_key_value_heads` count, `expand_k` and `expand_v` not.
        num_sink_tokens: first tokens of a document that heads with a `window_size` attend by softmax for ever.
    """

    model_type = "lalm_linear"
    supports_bidirectional = True

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    hidden_act: str = "gelu"
    mlp_type: Literal["gated", "mlp"] = "mlp"
    feature_map: Literal[
        "elu", "relu", "exp", "softmax", "taylor", "identity", "dpfp", "favor", "hedgehog", "elementwise_product",
        "centroids",
    ] = "elu"  # fmt: skip
    num_features: int | None = None
    dpfp_nu: int = 3
    normalize: bool = True
    output_norm: bool | None = None
    window_size: int | None = None
    num_sink_tokens: int = 0

    def __post_init__(self, **kwargs):
        if self.output_norm is None:
            self.output_norm = not self.normalize
        super().__post_init__(**kwargs)

    def linear_size(self, factor: float | int) -> int:
        """As in the base; heads with a window have those of softmax attention, `head_dim`."""
        return super().linear_size(factor) if self.window_size is None else cast(int, self.head_dim)

    def _factors(self) -> dict[str, float | int]:
        return super()._factors() if self.window_size is None else {}

    def validate_window(self) -> None:
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens must be at least 0, got {self.num_sink_tokens}.")
        if self.window_size is None:
            if self.feature_map == "centroids" or self.num_sink_tokens:
                raise ValueError(
                    "feature_map='centroids' and num_sink_tokens belong to heads with a window: set window_size, for "
                    "example 64."
                )
            return
        if self.window_size < 1:
            raise ValueError(f"window_size must be None or at least 1, got {self.window_size}.")
        if self.feature_map not in PER_HEAD:
            raise ValueError(
                f"feature_map={self.feature_map!r} does not go with window_size: choose one of {', '.join(PER_HEAD)}."
            )
        needed = {"use_short_conv": False, "normalize": True, "output_norm": False, "is_causal": True}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)} does not go with window_size: set {name}={value}.")
        if self.linear_attn_implementation not in ("auto", "chunk"):
            raise ValueError(
                f"linear_attn_implementation={self.linear_attn_implementation!r} does not go with window_size: choose "
                "'auto'."
            )

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
