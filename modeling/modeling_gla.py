# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Gated linear attention (Yang et al., arXiv 2312.06635).

Code symbol -> paper (section 4.4): g -> log alpha; gk_proj -> W_alpha^1, W_alpha^2, b_alpha; gate_logit_normalizer ->
tau; g_proj -> W_r; o_proj -> W_O; o_norm -> LN (RMSNorm here, as in the authors' released code).
"""

from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin

from lalm.configuration.configuration_gla import GLAConfig
from lalm.modeling.layers import make_linear
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
from lalm.modeling.ops.diagonal.gla import gla
from lalm.modeling.ops.dtypes import compute_dtype


class GLAMixer(Mixer):
    """q, k, v and a decay per key channel -> gated linear attention -> norm per head -> swish gate -> output."""

    def __init__(self, config: GLAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        key_size = self.num_heads * self.key_dim
        self.gk_proj = nn.Sequential(
            make_linear(config.hidden_size, config.gate_low_rank_dim, bias=False),
            make_linear(config.gate_low_rank_dim, key_size),
        )
        self.make_output_gate(config.use_output_gate)
        self.gate_logit_normalizer = config.gate_logit_normalizer
        preload_heads(diagonal_kernel(self.key_dim, self.value_dim, gate_size=self.key_dim))

    def gates_of(self, hidden_states, k, v):
        gate = self.gk_proj(hidden_states)
        g = F.logsigmoid(gate.to(compute_dtype(gate))) / self.gate_logit_normalizer
        return {"g": g.unflatten(-1, (-1, self.key_dim))}

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        return gla(
            q,
            k,
            v,
            **self.gates_of(hidden_states, k, v),
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal,
            implementation=self.config.linear_attn_implementation,
        )


class GLAModel(LalmModel):
    config: GLAConfig
    mixer_class = GLAMixer


class GLAForCausalLM(LalmForCausalLM, GenerationMixin):
    config: GLAConfig
    model_class = GLAModel


class GLAForMaskedLM(LalmForMaskedLM):
    config: GLAConfig
    model_class = GLAModel


class GLAForSequenceClassification(LalmForSequenceClassification):
    config: GLAConfig
    model_class = GLAModel


class GLAForTokenClassification(LalmForTokenClassification):
    config: GLAConfig
    model_class = GLAModel


__all__ = [
    "GLAForCausalLM",
    "GLAForMaskedLM",
    "GLAForSequenceClassification",
    "GLAForTokenClassification",
    "GLAModel",
]
