# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Based (Arora et al., arXiv 2402.18668) and its two published sizes."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LARGEST_FACTOR, LalmConfig

# Layer patterns and widths of the authors' models (Pile, 10B and 50B tokens).
_PRESETS: dict[str, dict[str, Any]] = {
    "360m": {
        "hidden_size": 1024,
        "num_hidden_layers": 27,
        "linear_attention_layers": [1, 6, 11, 16, 21],
        "sliding_attention_layers": [2, 7, 12, 17, 22],
    },
    "1.3b": {
        "hidden_size": 1792,
        "num_hidden_layers": 36,
        "linear_attention_layers": [1, 6, 11, 16, 21, 27, 33],
        "sliding_attention_layers": [2, 7, 12, 17, 22, 28, 34],
    },
}


@strict
class BasedConfig(LalmConfig):
    """Based: linear attention with Taylor features, softmax over a short window, and gated convolutions elsewhere.

    The defaults are the 360M model. Every layer that no list names is a gated convolution; all of them may be.

    Args:
        linear_attention_layers: indices of the linear attention layers; None for 1, 6, 11, ..., as far as the layer
            after it exists too, or the last layer of a shorter stack, without those that another list names.
        sliding_attention_layers: indices of the layers that are softmax attention over a sliding window; None for the
            layer after each of those.
        sliding_window: tokens that such a layer sees, including the current one (the authors' `window_size` 256 is 128
            back: 129).
        feature_dim: size of q and k of a linear head, before the Taylor features; takes the place of `expand_k`.
        conv_size: width in tokens of the gated convolution layers, and of the convolution on q, k and v of the linear
            layers under `use_short_conv`, which Based does without.
        position_embedding_type: "rope" rotates the softmax layers only.

    Raises:
        ValueError: as `LalmConfig`; also a layer that is in two lists.
    """

    model_type = "lalm_based"
    base_model_tp_plan = None  # gated convolutions have channels that belong to no head

    vocab_size: int = 50264
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    hidden_ratio: float | int = 2
    position_embedding_type: Literal["none", "learned", "sinusoidal", "rope"] = "rope"
    linear_attention_layers: list[int] | None = None
    sliding_attention_layers: list[int] | None = None  # type: ignore[assignment]  # a list once initialised
    sliding_window: int | None = 129
    feature_dim: int = 16
    conv_size: int = 3
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:  # the authors' MLP is not shrunk by a third for its gate
            self.intermediate_size = int(min(self.hidden_ratio, LARGEST_FACTOR) * self.hidden_size)
        self._choose_layers()
        super().__post_init__(**kwargs)

    def _choose_layers(self) -> None:
        count = self.num_hidden_layers
        linear = list(range(1, count - 1, 5)) or list(range(count))[-1:]
        named = set(self.full_attention_layers) | set(self.linear_attention_layers or ())
        named |= set(self.sliding_attention_layers or ())
        if self.sliding_attention_layers is None:
            self.sliding_attention_layers = [i + 1 for i in linear if i + 1 < count and i + 1 not in named]
        if self.linear_attention_layers is None:
            self.linear_attention_layers = [i for i in linear if i not in named]

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "BasedConfig":
        """The configuration of a published model, "360m" or "1.3b", with the fields in `overrides` replaced.

        Raises:
            ValueError: no preset of that name, or an override that does not fit.
        """
        if name not in _PRESETS:
            raise ValueError(f"BasedConfig has no preset {name!r}; choose one of {sorted(_PRESETS)}.")
        return cls(**_PRESETS[name] | overrides)

    @property
    def linear_key_dim(self) -> int:
        """Key size of one linear head, before its feature map."""
        return self.feature_dim

    def validate_based(self) -> None:
        if self.feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, got {self.feature_dim}.")
        linear = self.linear_attention_layers or []
        wrong = [index for index in linear if not 0 <= index < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"linear_attention_layers holds {wrong}; layers are numbered 0 to {self.num_hidden_layers - 1}."
            )
        for name in ("full_attention_layers", "sliding_attention_layers"):
            both = sorted(set(linear) & set(getattr(self, name)))
            if both:
                raise ValueError(f"Layers {both} stand in linear_attention_layers and {name}; choose one.")

    def validate_positions(self) -> None:
        """The linear layers are not rotated, so that `feature_dim` may be odd."""
        if self.position_embedding_type != "rope":
            super().validate_positions()
        elif (self.full_attention_layers or self.sliding_attention_layers) and (self.head_dim or 0) % 2:
            raise ValueError(
                f"position_embedding_type='rope' needs an even softmax head size, got {self.head_dim}: change "
                "hidden_size or num_attention_heads."
            )
