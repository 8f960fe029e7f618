# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""DeltaNet (Yang et al., arXiv 2406.06484), Gated DeltaNet (Yang et al., arXiv 2412.06464) and Kimi delta attention
(Moonshot AI, arXiv 2510.26692).

Code symbol -> paper: beta -> beta_t (2406.06484, section 2.2); g -> log alpha_t (2412.06464, section 3.1; by channel,
2510.26692, eq. 1), made as Mamba-2 makes its decay: g = -exp(A_log) softplus(W_a x + dt_bias), where W_a has a low
rank for decays by channel (2510.26692, section 4), whose output gate is a sigmoid of low rank as well.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers import initialization as init

from lalm.configuration.configuration_delta_net import DeltaNetConfig
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
from lalm.modeling.ops.delta.delta_channels_cpp import channels_kernel
from lalm.modeling.ops.delta.delta_rule import delta_rule, gated_delta_rule
from lalm.modeling.ops.delta.delta_rule_cpp import delta_kernel
from lalm.modeling.ops.delta.kda import kda
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast

# Shortest and longest time step of a fresh gate, and its fastest decay rate: the defaults of Mamba-2.
_TIME_STEPS, _MAX_RATE = (1e-3, 1e-1), 16.0


class DecayGate(nn.Module):
    """Log decays of the heads, or of each of their `channels`, -exp(A_log) softplus(x + dt_bias), always in float32 or
    wider.

    Mixers call it `gate_bias`: by that word the stock Trainer keeps weight decay from both parameters.
    """

    def __init__(self, num_heads: int, channels: int | None = None):
        super().__init__()
        self.channels = channels
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads * (channels or 1)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in (0, 16], the step softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        rate = (1 - torch.rand_like(self.A_log, dtype=torch.float32)) * _MAX_RATE
        shortest, longest = (math.log(step) for step in _TIME_STEPS)
        step = (shortest + torch.rand_like(self.dt_bias, dtype=torch.float32) * (longest - shortest)).exp()
        init.copy_(self.A_log, rate.log())
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> log decay `[..., H]`, at most 0; of channels `[..., H K] -> [..., H, K]`."""
        dtype = compute_dtype(x)
        with without_autocast(x.device):
            rate, step = self.A_log.to(dtype).exp(), F.softplus(x.to(dtype) + self.dt_bias.to(dtype))
            if self.channels is not None:
                rate, step = rate[:, None], step.unflatten(-1, (-1, self.channels))
            return -rate * step


class DeltaNetMixer(Mixer):
    """q, k, v, write strength and perhaps decays -> delta rule -> norm per head, gate -> output."""

    silu_without_conv = unit_length_qk = True

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.b_proj = make_linear(config.hidden_size, self.num_heads, bias=False)
        self.a_proj: nn.Module | None = None
        self.gk_proj: nn.Module | None = None
        self.gate_bias: DecayGate | None = None
        self.rule: Callable = delta_rule
        kernel = delta_kernel(self.key_dim, self.value_dim)
        if config.decay == "head":
            self.rule = gated_delta_rule
            self.a_proj = make_linear(config.hidden_size, self.num_heads, bias=False)
            self.gate_bias = DecayGate(self.num_heads)
        elif config.decay == "channel":
            self.rule = kda
            self.gk_proj = nn.Sequential(
                make_linear(config.hidden_size, self.value_dim, bias=False),
                make_linear(self.value_dim, self.num_heads * self.key_dim, bias=False),
            )
            self.gate_bias = DecayGate(self.num_heads, self.key_dim)
            kernel = channels_kernel(self.key_dim, self.value_dim)
        self.strongest_write = 2 if config.allow_neg_eigval else 1
        self.make_output_gate(bool(config.use_output_gate))
        if config.decay == "channel" and config.use_output_gate:
            self.output_gate = "sigmoid"
            self.g_proj = nn.Sequential(
                make_linear(config.hidden_size, self.value_dim, bias=False),
                make_linear(self.value_dim, self.num_heads * self.value_dim),
            )
        preload_heads(kernel)

    def gates_of(self, hidden_states, k, v):
        beta = self.b_proj(hidden_states)
        beta = beta.to(compute_dtype(beta)).sigmoid() * self.strongest_write
        project = self.gk_proj if self.a_proj is None else self.a_proj
        if project is None or self.gate_bias is None:
            return {"beta": beta}
        return {"g": self.gate_bias(project(hidden_states)), "beta": beta}

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        return self.apply_rule(self.gates_of(hidden_states, k, v), q, k, v, state, output_final_state, layout)

    def apply_rule(self, gates, q, k, v, state, output_final_state, layout):
        return self.rule(
            q,
            k,
            v,
            **gates,
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal,
            implementation=self.config.linear_attn_implementation,
        )


class DeltaNetModel(LalmModel):
    config: DeltaNetConfig
    mixer_class = DeltaNetMixer

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        if config.decay != "none":
            self._keep_in_fp32_modules_strict = {"gate_bias"}

    def init_parallel_plans(self) -> None:
        """As the base class; an output gate of low rank is whole in every process, as the decays by channel are."""
        super().init_parallel_plans()
        if self.config.decay == "channel":
            plan = self._tp_plan or {}
            self._tp_plan = plan | {name: "lalm_own_outputs" for name in plan if name.endswith("g_proj")}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecayGate):
            module.reset_parameters()


class DeltaNetForCausalLM(LalmForCausalLM, GenerationMixin):
    config: DeltaNetConfig
    model_class = DeltaNetModel


class DeltaNetForMaskedLM(LalmForMaskedLM):
    config: DeltaNetConfig
    model_class = DeltaNetModel


class DeltaNetForSequenceClassification(LalmForSequenceClassification):
    config: DeltaNetConfig
    model_class = DeltaNetModel


class DeltaNetForTokenClassification(LalmForTokenClassification):
    config: DeltaNetConfig
    model_class = DeltaNetModel


__all__ = [
    "DeltaNetForCausalLM",
    "DeltaNetForMaskedLM",
    "DeltaNetForSequenceClassification",
    "DeltaNetForTokenClassification",
    "DeltaNetModel",
]
