# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Classic linear attention (Katharopoulos et al., arXiv 2006.16236) with a choice of feature maps.

Code symbol -> paper: feature_map -> phi; the state's first V columns -> S, its last -> Z (eq. 16-20). With a
`window_size`, heads are those of window_linear_mixer.py.
"""

import torch
from torch import nn
from transformers import GenerationMixin

from lalm.configuration.configuration_linear_attention import LinearAttentionConfig
from lalm.modeling.feature_maps import ElementwiseProductFeatures, FavorFeatures, FeatureMap, HedgehogFeatures
from lalm.modeling.mixers import FeatureMixer, Mixer
from lalm.modeling.modeling_base import LalmModel
from lalm.modeling.modeling_heads import (
    LalmForCausalLM,
    LalmForMaskedLM,
    LalmForSequenceClassification,
    LalmForTokenClassification,
)
from lalm.modeling.window_linear_mixer import HeadwiseLinear, WindowLinearMixer

_LEARNED_MAPS = (
    ElementwiseProductFeatures,
    FavorFeatures,
    HeadwiseLinear,
    HedgehogFeatures,
)


class LinearAttentionMixer(FeatureMixer):
    """phi(q), phi(k), v -> linear attention, optionally normalised by the sum of its weights -> output."""

    def __init__(self, config: LinearAttentionConfig, layer_idx: int):
        map_args = (config.feature_map, config.linear_key_dim, config.num_features, config.dpfp_nu)
        # Random features approximate softmax only if q and k share their directions; a learned map has one for each.
        k_map = None if config.feature_map == "favor" else FeatureMap(*map_args)
        super().__init__(config, layer_idx, FeatureMap(*map_args), k_map, config.normalize)
        if config.output_norm:
            self.make_output_gate(gated=False)


class LinearAttentionModel(LalmModel):
    config: LinearAttentionConfig
    mixer_class = LinearAttentionMixer

    @classmethod
    def make_mixer(cls, config: LinearAttentionConfig, layer_idx: int) -> nn.Module:  # type: ignore[override]
        """As the base class; heads with a window have a mixer of their own."""
        if config.window_size is not None and config.layer_types[layer_idx] == Mixer.layer_type:
            return WindowLinearMixer(config, layer_idx)
        return super().make_mixer(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _LEARNED_MAPS):
            module.reset_parameters()


class LinearAttentionForCausalLM(LalmForCausalLM, GenerationMixin):
    config: LinearAttentionConfig
    model_class = LinearAttentionModel


class LinearAttentionForMaskedLM(LalmForMaskedLM):
    config: LinearAttentionConfig
    model_class = LinearAttentionModel


class LinearAttentionForSequenceClassification(LalmForSequenceClassification):
    config: LinearAttentionConfig
    model_class = LinearAttentionModel


class LinearAttentionForTokenClassification(LalmForTokenClassification):
    config: LinearAttentionConfig
    model_class = LinearAttentionModel


__all__ = [
    "LinearAttentionForCausalLM",
    "LinearAttentionForMaskedLM",
    "LinearAttentionForSequenceClassification",
    "LinearAttentionForTokenClassification",
    "LinearAttentionModel",
]
