# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Classic linear attention (Katharopoulos et al., arXiv 2006.16236) with a choice of feature maps.

Code symbol -> paper: feature_map -> phi; the state's first V columns -> S, its last -> Z (eq. 16-20).
"""

import torch
from torch import nn

from lalm.configuration.configuration_linear_attention import LinearAttentionConfig
from lalm.modeling.feature_maps import ElementwiseProductFeatures, FavorFeatures, FeatureMap, HedgehogFeatures
from lalm.modeling.mixers import Mixer
from lalm.modeling.modeling_base import LalmModel
from lalm.modeling.modeling_heads import (
    LalmForCausalLM,
    LalmForMaskedLM,
    LalmForSequenceClassification,
    LalmForTokenClassification,
)
from lalm.modeling.ops.diagonal_cpp import compiled_diagonal
from lalm.modeling.ops.dispatch import choose
from lalm.modeling.ops.linear_attention import (
    chunk_linear_attention,
    cpp_linear_attention,
    fla_linear_attention,
    recurrent_linear_attention,
)


class LinearAttentionMixer(Mixer):
    """phi(q), phi(k), v -> linear attention, optionally normalised by the sum of its weights -> output."""

    def __init__(self, config: LinearAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        map_args = (config.feature_map, self.key_dim, config.num_features, config.dpfp_nu)
        self.q_map = FeatureMap(*map_args)
        # Random features approximate softmax only if q and k share their directions; a learned map has one for each.
        self.k_map = None if config.feature_map == "favor" else FeatureMap(*map_args)
        self.normalize = config.normalize
        self.compiled = compiled_diagonal(
            cpp_linear_attention, self.q_map.num_features, self.value_dim, normalized=self.normalize
        )
        if config.output_norm:
            self.make_output_gate(gated=False)

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        q, k = self.q_map(q), (self.k_map or self.q_map)(k)
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
        return op(
            q,
            k,
            v,
            # The paper has no scale. Without a normaliser the field's 1 / sqrt(K) keeps the output's size in check.
            scale=1.0 if self.normalize else None,
            initial_state=state,
            output_final_state=output_final_state,
            normalize=self.normalize,
            layout=layout,
            causal=self.config.is_causal,
        )


class LinearAttentionModel(LalmModel):
    config: LinearAttentionConfig
    mixer_class = LinearAttentionMixer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ElementwiseProductFeatures, FavorFeatures, HedgehogFeatures)):
            module.reset_parameters()


class LinearAttentionForCausalLM(LalmForCausalLM):
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
