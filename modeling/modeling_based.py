# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Based (Arora et al., arXiv 2402.18668): linear attention with Taylor features, sliding windows, gated convolutions.

Code symbol -> paper: linear layers -> Taylor linear attention (section 4.1); SoftmaxAttention over `sliding_window` ->
sliding window attention (4.2); GatedConvolution -> BaseConv of Zoology (Arora et al., arXiv 2312.04927).
"""

import math
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers import initialization as init

from lalm.configuration.configuration_based import BasedConfig
from lalm.modeling.cache import previous_state, record
from lalm.modeling.feature_maps import FeatureMap
from lalm.modeling.layers import ShortConvolution, make_linear
from lalm.modeling.mixers import FeatureMixer, Mixer
from lalm.modeling.modeling_base import LalmModel
from lalm.modeling.modeling_heads import (
    LalmForCausalLM,
    LalmForSequenceClassification,
    LalmForTokenClassification,
)
from lalm.modeling.ops.sequence_layout import SequenceLayout


class BasedMixer(FeatureMixer):
    """phi(q), phi(k), v -> normalised linear attention -> output, phi the Taylor map of order 2; no gate, no norm."""

    rotates = False

    def __init__(self, config: BasedConfig, layer_idx: int):
        # A weight 1 + s + s^2 / 2 is at least 1/2, so the sum needs no help in float32. This eps is for rows that
        # begin with padding, where 0 / 0 would put NaN into the gradients.
        super().__init__(config, layer_idx, FeatureMap("taylor", config.linear_key_dim), eps=1e-12)


class GatedConvolution(nn.Module):
    """`out(silu(conv(u1)) * u2)` with (u1, u2) = `in x`, each twice as wide as x. Its memory is the convolution's."""

    layer_type = Mixer.layer_type

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.in_proj = make_linear(config.hidden_size, 4 * config.hidden_size)
        self.conv = ShortConvolution(2 * config.hidden_size, config.conv_size)
        self.o_proj = make_linear(2 * config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, layout: SequenceLayout, past_key_values: Cache | None = None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        """`[B, T, D] -> [B, T, D]`, reading and replacing this layer's state in `past_key_values`."""
        convolved, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        size = self.conv.weight.shape[1] - 1
        window = previous_state(
            past_key_values,
            self.layer_idx,
            "conv_states",
            of_slice=lambda: layout.last_inputs((convolved,), size),
        )
        record(
            past_key_values,
            self.layer_idx,
            [("conv_states", 0)],
            (convolved,),
            layout,
            lambda parts, layout: [self.conv(parts, window, layout)[1]],
        )
        (convolved,), state = self.conv((convolved,), window, layout, keeps_state=past_key_values is not None)
        if past_key_values is not None:
            past_key_values.update_conv_state(state, self.layer_idx, num_tokens=hidden_states.shape[1])
        return self.o_proj(convolved * gate), None


class BasedModel(LalmModel):
    config: BasedConfig
    mixer_class = BasedMixer

    @classmethod
    def make_mixer(cls, config: BasedConfig, layer_idx: int) -> nn.Module:  # type: ignore[override]
        """Linear and softmax layers where the configuration names them, gated convolutions elsewhere."""
        linear = config.linear_attention_layers or []
        if config.layer_types[layer_idx] == Mixer.layer_type and layer_idx not in linear:
            return GatedConvolution(config, layer_idx)
        return super().make_mixer(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # What writes to the residual stream starts smaller, by the number of writers. Asked by identity, since
        # transformers hands this method only modules with parameters of their own.
        layers: Any = self.layers
        if any(module is writer for layer in layers for writer in (layer.mixer.o_proj, layer.mlp.down_proj)):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(cast(nn.Linear, module).weight, 0.0, std)


class BasedForCausalLM(LalmForCausalLM, GenerationMixin):
    config: BasedConfig
    model_class = BasedModel


class BasedForSequenceClassification(LalmForSequenceClassification):
    config: BasedConfig
    model_class = BasedModel


class BasedForTokenClassification(LalmForTokenClassification):
    config: BasedConfig
    model_class = BasedModel


__all__ = [
    "BasedForCausalLM",
    "BasedForSequenceClassification",
    "BasedForTokenClassification",
    "BasedModel",
]
