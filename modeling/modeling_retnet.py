# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Retentive network (Sun et al., arXiv 2307.08621).

Code symbol -> paper (section 2): retention_log_decay -> log gamma; g_proj -> W_G; o_proj -> W_O; o_norm -> GroupNorm
of the heads (RMSNorm here, as in the authors' released code); rotary positions -> e^(i n theta).
"""

import torch
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
from lalm.modeling.ops.cpp_kernels import preload_heads
from lalm.modeling.ops.diagonal.diagonal_cpp import diagonal_kernel
from lalm.modeling.ops.diagonal.retention import retention, retention_log_decay
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.tensor_parallel import own_part


class RetNetMixer(Mixer):
    """Rotated q and k, v -> retention -> norm per head -> swish gate -> output (eq. 8)."""

    def __init__(self, config: RetNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.make_output_gate(config.use_output_gate)
        preload_heads(diagonal_kernel(self.key_dim, self.value_dim, gate_size=1))

    def gates_of(self, hidden_states, k, v):
        log_decay = retention_log_decay(self.num_heads, compute_dtype(k), k.device)
        if self.shard is not None:
            log_decay = own_part(log_decay, self.shard, 0)
        return {"g": log_decay.expand(*k.shape[:2], -1)}

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        log_decay = None
        if self.shard is not None:
            log_decay = own_part(retention_log_decay(self.num_heads, torch.float64, q.device), self.shard, 0)
        return retention(
            q,
            k,
            v,
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal,
            log_decay=log_decay,
            implementation=self.config.linear_attn_implementation,
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
