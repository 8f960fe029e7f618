# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Retentive network (Sun et al., arXiv 2307.08621).

Code symbol -> paper (section 2): retention_log_decay -> log gamma; g_proj -> W_G; o_proj -> W_O; o_norm -> GroupNorm
of the heads (RMSNorm here, as in the authors' released code); rotary positions -> e^(i n theta).
"""

from transformers import GenerationMixin

from lalm.configuration.configuration_retnet import RetNetConfig
from lalm.modeling.mixers import Mixer
from lalm.modeling.modeling_base import LalmModel
from lalm.modeling.modeling_heads import (
    LalmForCausalLM,
    LalmForMaskedLM,
    LalmForSequenceClassification,
    LalmForTokenClassification,
)
from lalm.modeling.ops.diagonal.diagonal_cpp import compiled_diagonal
from lalm.modeling.ops.diagonal.retention import chunk_retention, cpp_retention, fla_retention, recurrent_retention
from lalm.modeling.ops.dispatch import choose


class RetNetMixer(Mixer):
    """Rotated q and k, v -> retention -> norm per head -> swish gate -> output (eq. 8)."""

    def __init__(self, config: RetNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.make_output_gate(config.use_output_gate)
        self.compiled = compiled_diagonal(cpp_retention, self.key_dim, self.value_dim, gate_size=1)

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        implementation = self.config.linear_attn_implementation
        op = choose(
            "retention",
            implementation,
            v,
            recurrent=recurrent_retention,
            chunk=chunk_retention,
            fla=fla_retention,
            cpp=self.compiled.where_had(implementation, q),
        )
        return op(
            q,
            k,
            v,
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal,
        )


class RetNetModel(LalmModel):
    config: RetNetConfig
    mixer_class = RetNetMixer


class RetNetForCausalLM(LalmForCausalLM, GenerationMixin):
    config: RetNetConfig
    model_class = RetNetModel


class RetNetForMaskedLM(LalmForMaskedLM):
    config: RetNetConfig
    model_class = RetNetModel


class RetNetForSequenceClassification(LalmForSequenceClassification):
    config: RetNetConfig
    model_class = RetNetModel


class RetNetForTokenClassification(LalmForTokenClassification):
    config: RetNetConfig
    model_class = RetNetModel


__all__ = [
    "RetNetForCausalLM",
    "RetNetForMaskedLM",
    "RetNetForSequenceClassification",
    "RetNetForTokenClassification",
    "RetNetModel",
]
