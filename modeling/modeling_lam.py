# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""LAM: a post-norm encoder whose tokens are mixed by two memories per head, fast and slow (dual-state delta rule).

Code symbol -> LAM's seed text: psi -> resonance flux; coupling -> cross-timescale leak; decay -> adaptive decay. Other
than the seed: psi and the decays are per token, not per chunk or batch; the short convolution sees real tokens of
its own document only and has no SiLU; the leak cannot make the memories grow (the bound is in dual_state.py).
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init

from lalm.configuration.configuration_lam import LamConfig
from lalm.modeling.layers import MLP, NORMS, RMSNorm, make_linear
from lalm.modeling.linearize import copy_weights, student_config
from lalm.modeling.mixers import Mixer, Tables
from lalm.modeling.modeling_base import Block, LalmModel
from lalm.modeling.modeling_heads import (
    LalmForCausalLM,
    LalmForMaskedLM,
    LalmForSequenceClassification,
    LalmForTokenClassification,
)
from lalm.modeling.ops.cpp_kernels import preload_heads, preload_kernel
from lalm.modeling.ops.delta.delta_rule_cpp import delta_kernel
from lalm.modeling.ops.delta.dual_state import dual_state_delta
from lalm.modeling.ops.delta.lam_gates import COMPLETE, cpp_lam_gates, plain_lam_gates
from lalm.modeling.ops.dispatch import tokens_of_segments
from lalm.modeling.ops.sequence_layout import SequenceLayout
from lalm.modeling.tensor_parallel import own_part

# Share of the other memory that a fresh leak takes in, and the most that any takes.
_LEAK_INIT, _LEAK_MAX = 0.01, 0.5


class LamGates(nn.Module):
    """The gates of every token: log decays, write strengths, read weights and coupling, for each direction of reading.

    One projection makes them all. Axes of what it gives: directions, B, T, H, and memories.
    """

    shard: tuple[int, int] | None = None  # rank and number of the processes that share the heads

    def __init__(self, config: LamConfig):
        super().__init__()
        self.config = config
        self.directions, self.heads = 1 if config.is_causal else 2, config.num_attention_heads
        memories = config.num_memories
        self.sizes = {
            "beta": 1,
            "read": memories if memories > 1 else 0,
            "decay": memories * config.use_adaptive_decay,
        }
        self.sizes |= {"leak": memories * config.use_leak}
        self.proj = make_linear(config.hidden_size, self.directions * self.heads * sum(self.sizes.values()))
        self.decay_bias = nn.Parameter(torch.empty(self.directions, self.heads, memories))
        self.flux_weight, self.flux_bias = None, None
        if config.use_flux:
            self.flux_weight = nn.Parameter(torch.empty(self.heads, config.linear_key_dim, config.linear_value_dim))
            self.flux_bias = nn.Parameter(torch.empty(self.directions, self.heads))
        self.is_complete = config.use_flux and self.sizes == COMPLETE
        if self.is_complete:
            preload_kernel("lam_gates")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays as configured, write strengths one half, even flux, read weights 1, a leak of one in a hundred."""
        decays = torch.tensor(self.config.decay_init)
        init.copy_(self.decay_bias, (decays / (1 - decays)).log().expand_as(self.decay_bias))
        init.normal_(self.proj.weight, std=self.config.initializer_range)
        bias = {"beta": 0.0, "read": 1.0, "decay": 0.0, "leak": math.log(_LEAK_INIT / (_LEAK_MAX - _LEAK_INIT))}
        start = torch.cat([torch.full((size,), bias[name]) for name, size in self.sizes.items()])
        init.copy_(self.proj.bias, start.repeat(self.directions * self.heads))
        if self.flux_weight is not None and self.flux_bias is not None:
            init.normal_(self.flux_weight, std=self.config.initializer_range)
            init.zeros_(self.flux_bias)

    def forward(self, hidden_states: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Mixer input `[B, T, D]`, unit keys and values `[B, T, H, *]` -> g, beta, read and coupling of the op."""
        x = self.proj(hidden_states)
        decay_bias: torch.Tensor = self.decay_bias
        flux_weight: torch.Tensor | None = self.flux_weight
        flux_bias: torch.Tensor | None = self.flux_bias
        if self.shard is not None:
            x = own_part(x.unflatten(-1, (self.directions, self.heads, -1)), self.shard, -2).flatten(-3)
            decay_bias = own_part(decay_bias, self.shard, 1)
            if flux_weight is not None and flux_bias is not None:
                flux_weight, flux_bias = own_part(flux_weight, self.shard, 0), own_part(flux_bias, self.shard, 1)
        inputs: Any = (x, k, v, flux_weight, decay_bias, flux_bias, _LEAK_MAX)
        gates: tuple[torch.Tensor | None, ...] | None = cpp_lam_gates(*inputs) if self.is_complete else None
        if gates is None:
            inputs += (self.sizes,)
            gates = plain_lam_gates(*inputs)
        if self.config.is_causal:
            gates = tuple(None if gate is None else gate[0] for gate in gates)
        return dict(zip(("g", "beta", "read", "coupling"), gates, strict=True))


class LamMixer(Mixer):
    """q, k, v and the gates -> dual-state delta rule, in both directions -> norm per head, gate -> output."""

    projection_bias, conv_activation, unit_length_qk = True, False, True
    output_gate = "sigmoid"

    def __init__(self, config: LamConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gates = LamGates(config)
        value_size = self.num_heads * self.value_dim
        self.o_norm = RMSNorm(self.value_dim, eps=1e-6) if config.use_output_norm else None
        self.g_proj = make_linear(config.hidden_size, value_size) if config.use_output_gate else None
        preload_heads(delta_kernel(self.key_dim, self.value_dim, config.num_memories, config.use_delta_rule))

    def gates_of(self, hidden_states, k, v):
        return self.gates(hidden_states, k, v)

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        return self.apply_rule(self.gates_of(hidden_states, k, v), q, k, v, state, output_final_state, layout)

    def apply_rule(self, gates, q, k, v, state, output_final_state, layout, causal=None):
        return dual_state_delta(
            q,
            k,
            v,
            **gates,
            scale=1.0,
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal if causal is None else causal,
            use_delta_rule=self.config.use_delta_rule,
            implementation=self.config.linear_attn_implementation,
        )

    def read_segment(
        self,
        hidden_states: torch.Tensor,
        start: int,
        stop: int,
        rotary: Tables,
        state: torch.Tensor | None,
        backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tokens from `start` to `stop` of a text read in one direction, `[B, stop - start, H, V]`, and the
        state after them; `state` is that of the segment before, or behind if the text is read `backward`."""
        reach = 0 if self.conv is None else self.conv.weight.shape[1] - 1
        first = max(0, start - reach)
        around = hidden_states[:, first : stop + reach]
        parts: Sequence[torch.Tensor] = (self.q_proj(around), self.k_proj(around), self.v_proj(around))
        if self.conv is not None:
            parts, _ = self.conv(parts, None, SequenceLayout(), keeps_state=False)
        q, k, v = (part[:, start - first : stop - first] for part in parts)
        tables = {size: (cos[:, start:stop], sin[:, start:stop]) for size, (cos, sin) in rotary.items()}
        q, k, v = self.split_heads(q, k, v, tables)
        gates = self.gates_of(hidden_states[:, start:stop], k, v)
        gates = {name: None if gate is None else gate[int(backward)] for name, gate in gates.items()}
        if backward:
            q, k, v = q.flip(1), k.flip(1), v.flip(1)
            gates = {name: None if gate is None else gate.flip(1) for name, gate in gates.items()}
        o, state = self.apply_rule(gates, q, k, v, state, True, SequenceLayout(), causal=True)
        return o.flip(1) if backward else o, state


class LamMLP(MLP):
    bias = True


class LamBlock(Block):
    """Post-norm residual block, as BERT's: `norm(x + mixer x)`, then `norm(x + mlp x)`."""

    mlp_class = LamMLP

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        is_encoder = isinstance(self.mixer, LamMixer) and not self.mixer.config.is_causal
        size = tokens_of_segments(hidden_states, kwargs["layout"]) if is_encoder else None
        if size is not None:
            return self._in_segments(hidden_states, kwargs["rotary"], size)
        mixed, _ = self.mixer(hidden_states, **kwargs)
        return self._add(hidden_states, mixed)

    def _add(self, hidden_states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mixer_norm(hidden_states + self.dropout(mixed))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))

    def _in_segments(self, hidden_states: torch.Tensor, rotary: Tables, size: int) -> torch.Tensor:
        """The block without gradients in segments of `size` tokens: it reads the text forwards, then backwards, and
        holds its input and its output, but never q, k and v of the whole text."""
        mixer, length = cast(LamMixer, self.mixer), hidden_states.shape[1]
        bounds = [(start, min(start + size, length)) for start in range(0, length, size)]
        result = torch.empty_like(hidden_states)
        # What is read forwards waits where the output of the same tokens will stand, if it has as many numbers.
        fits = mixer.o_proj.in_features == hidden_states.shape[2]
        read = result if fits else result.new_empty(*result.shape[:2], mixer.o_proj.in_features)
        state: torch.Tensor | None = None
        for start, stop in bounds:
            o, state = mixer.read_segment(hidden_states, start, stop, rotary, state, backward=False)
            read[:, start:stop] = o.flatten(2)
        state = None
        for start, stop in reversed(bounds):
            o, state = mixer.read_segment(hidden_states, start, stop, rotary, state, backward=True)
            o += read[:, start:stop].view_as(o)
            own = hidden_states[:, start:stop]
            result[:, start:stop] = self._add(own, mixer.o_proj(mixer.gate_output(o, own).flatten(2)))
        return result


class LamModel(LalmModel):
    """LAM's encoder, `[B, T] -> [B, T, D]`; the embedding of a sentence is the mean over its real tokens."""

    config: LamConfig
    mixer_class = LamMixer
    block_class = LamBlock

    def __init__(self, config: LamConfig):
        super().__init__(config)
        self.norm = nn.Identity()  # every block ends in its own norm
        self.embed_norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def add_positions(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_norm(super().add_positions(hidden_states, position_ids))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LamGates):
            module.reset_parameters()

    @classmethod
    def from_softmax_encoder(cls, teacher: PreTrainedModel, config: LamConfig | None = None) -> "LamModel":
        """A student with the weights of a BERT-like encoder, in its dtype. Without learned positions the mean of the
        teacher's goes into the word embeddings; `fit_output_projections` should follow (linearize.py).

        Raises:
            ValueError: the teacher is not of BERT's shape, or `config` does not fit it.
        """
        student = cls(config or student_config(teacher))
        nn.Module.to(student, teacher.dtype)
        copy_weights(student, teacher)
        return student


class LamForCausalLM(LalmForCausalLM, GenerationMixin):
    config: LamConfig
    model_class = LamModel


class LamForMaskedLM(LalmForMaskedLM):
    config: LamConfig
    model_class = LamModel


class LamForSequenceClassification(LalmForSequenceClassification):
    config: LamConfig
    model_class = LamModel


class LamForTokenClassification(LalmForTokenClassification):
    config: LamConfig
    model_class = LamModel


__all__ = [
    "LamForCausalLM",
    "LamForMaskedLM",
    "LamForSequenceClassification",
    "LamForTokenClassification",
    "LamModel",
]
