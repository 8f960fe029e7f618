# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What mixes tokens: the bases of every linear mixer."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import Cache

from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.affine_maps import Map, delta_map, diagonal_map
from lalm.modeling.cache import RecurrentLayer, previous_state, record
from lalm.modeling.feature_maps import FeatureMap
from lalm.modeling.layers import RMSNorm, ShortConvolution, make_linear, rotate, unit_length
from lalm.modeling.ops.cpp_kernels import preload_heads
from lalm.modeling.ops.dense.elementwise import activate
from lalm.modeling.ops.diagonal.diagonal_cpp import diagonal_kernel
from lalm.modeling.ops.diagonal.linear_attention import linear_attention
from lalm.modeling.ops.diagonal.taylor import taylor_features
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout

Tables = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Mixer(nn.Module):
    """Base of the linear mixers: projections, positions and cache; a subclass adds `attend`, its op and output.

    Shapes: B batch, T tokens, H heads, K and V key and value size per head, D = hidden_size.
    """

    layer_type: ClassVar[str] = RecurrentLayer._layer_type
    rotates: ClassVar[bool] = True  # whether rotary positions turn its q and k
    silu_without_conv: ClassVar[bool] = False  # whether q, k and v get the convolution's SiLU where there is none
    conv_activation: ClassVar[bool] = True  # whether the convolution ends in a SiLU
    unit_length_qk: ClassVar[bool] = False  # whether q and k are divided by their length, in float32 or wider
    is_windowed: ClassVar[bool] = False  # whether windows other than the convolution's begin at the first token
    projection_bias: ClassVar[bool] = False  # whether q, k, v and o have a bias
    output_gate: str = "silu"  # what opens the output gate
    shard: tuple[int, int] | None = None  # rank and number of the processes that share its heads
    o_norm: RMSNorm | None
    g_proj: nn.Module | None

    def __init__(self, config: LalmConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        self.key_dim, self.value_dim = config.linear_key_dim, config.linear_value_dim
        key_size, value_size = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        bias = self.projection_bias or config.attention_bias
        self.q_proj = make_linear(config.hidden_size, key_size, bias=bias)
        self.k_proj = make_linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = make_linear(config.hidden_size, value_size, bias=bias)
        self.o_proj = make_linear(value_size, config.hidden_size, bias=bias)
        self.conv, self.o_norm, self.g_proj = None, None, None
        if config.use_short_conv:
            channels = 2 * key_size + value_size
            self.conv = ShortConvolution(channels, config.conv_size, config.is_causal, self.conv_activation)
        self.q_norm = RMSNorm(self.key_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.key_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        rotary: Tables,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`[B, T, D] -> [B, T, D]`, reading and replacing this layer's state in `past_key_values`."""
        cache: Any = past_key_values
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        conv, attend = self.conv, cast(Callable, self.attend)
        if conv is not None:
            size = conv.weight.shape[1] - 1
            window = previous_state(
                cache,
                self.layer_idx,
                "conv_states",
                of_slice=lambda parts=(q, k, v): layout.last_inputs(parts, size),
            )
            record(
                cache,
                self.layer_idx,
                [("conv_states", 0)],
                (q, k, v),
                layout,
                lambda parts, layout: [conv(parts, window, layout)[1]],
            )
            (q, k, v), state = conv((q, k, v), window, layout, keeps_state=cache is not None)
            if cache is not None:
                cache.update_conv_state(state, self.layer_idx, given_away=True)
        elif self.silu_without_conv:
            q, k, v = (nn.functional.silu(x) for x in (q, k, v))
        q, k, v = self.split_heads(q, k, v, rotary)
        memory = previous_state(
            cache,
            self.layer_idx,
            "recurrent_states",
            of_slice=lambda k=k, v=v: self.slice_map(hidden_states, k, v, layout),
        )
        record(
            cache,
            self.layer_idx,
            [("recurrent_states", 0)],
            (hidden_states, q, k, v),
            layout,
            lambda inputs, layout: [attend(*inputs, memory, True, layout)[1]],
        )
        o, state = attend(hidden_states, q, k, v, memory, cache is not None, layout)
        if cache is not None:
            tokens = hidden_states.shape[1]
            cache.update_recurrent_state(state, self.layer_idx, num_tokens=tokens, given_away=True)
        del q, k, v  # nothing below needs them, and long sequences make them large
        return self.o_proj(self.gate_output(o, hidden_states).flatten(-2)), None

    def split_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Tables
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projections `[B, T, H * *]` -> q, k and v `[B, T, H, *]` as the rule takes them: normed, rotated, unit."""
        sizes = self.key_dim, self.key_dim, self.value_dim  # the heads are fewer under tensor parallelism
        q, k, v = (x.unflatten(-1, (-1, size)) for x, size in zip((q, k, v), sizes, strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary and self.rotates:
            q, k = rotate(q, rotary[self.key_dim]), rotate(k, rotary[self.key_dim])
        if self.unit_length_qk:
            q = unit_length(q)
            k = unit_length(k)
        return q, k, v

    def attend(
        self,
        hidden_states: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: torch.Tensor | None,
        output_final_state: bool,
        layout: SequenceLayout,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q, k `[B, T, H, K]`, v `[B, T, H, V]` -> what the op gives `[B, T, H, V]`, and the state."""
        raise NotImplementedError

    def gates_of(self, hidden_states: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
        """The gates of all tokens, as the op takes them: log decays "g" and write strengths "beta", `[B, T, H]`, or
        `[B, T, H, *]` with one per channel or memory. Empty for a mixer without gates."""
        return {}

    def slice_map(self, hidden_states: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout) -> Map:
        """What these tokens make of any state S before them, A S + B: see affine_maps.py."""
        gates = self.gates_of(hidden_states, k, v)
        if "beta" not in gates:
            return diagonal_map(k, v, gates.get("g"), layout)
        memories = gates["beta"].shape[-1] if gates["beta"].ndim == 4 else 0
        return delta_map(partial(cast(Any, self).apply_rule, gates), k, v, layout, memories)

    def make_output_gate(self, gated: bool) -> None:
        """Add what `gate_output` applies: a norm per head and, if `gated`, the projection of the swish gate."""
        hidden_size, value_size = self.config.hidden_size, self.num_heads * self.value_dim
        self.g_proj = make_linear(hidden_size, value_size, bias=False) if gated else None
        self.o_norm = RMSNorm(self.value_dim, eps=self.config.norm_eps)

    def gate_output(self, o: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`norm(o) * act(x W)`, each if the model has it: heads `o [B, T, H, V]`, the mixer's input x `[B, T, D]`."""
        o = o if self.o_norm is None else self.o_norm(o)
        return o if self.g_proj is None else activate(self.output_gate, self.g_proj(hidden_states).view_as(o), o)


class FeatureMixer(Mixer):
    """phi(q), phi(k), v -> linear attention -> output.

    Args:
        q_map, k_map: phi of queries and of keys; None for that of queries.
        normalize, eps: whether an output is divided by the sum of its weights, and what is added to the sum.
    """

    def __init__(
        self,
        config: LalmConfig,
        layer_idx: int,
        q_map: FeatureMap,
        k_map: FeatureMap | None = None,
        normalize: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__(config, layer_idx)
        self.q_map, self.k_map, self.normalize, self.eps = q_map, k_map, normalize, eps
        self.is_taylor = q_map.name == "taylor"  # the op makes the features itself
        size = self.key_dim if self.is_taylor else q_map.num_features
        preload_heads(diagonal_kernel(size, self.value_dim, 0, normalize, self.is_taylor))

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        if not self.is_taylor:
            q, k = self.q_map(q), (self.k_map or self.q_map)(k)
        return linear_attention(
            q,
            k,
            v,
            # The papers have no scale. Without a normaliser the field's 1 / sqrt(K) keeps the output's size in check.
            scale=1.0 if self.normalize else None,
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal,
            normalize=self.normalize,
            eps=self.eps,
            taylor=self.is_taylor,
            implementation=self.config.linear_attn_implementation,
        )

    def slice_map(self, hidden_states, k, v, layout):
        features = taylor_features(k.to(compute_dtype(k))) if self.is_taylor else (self.k_map or self.q_map)(k)
        return diagonal_map(features, nn.functional.pad(v, (0, 1), value=1.0) if self.normalize else v, None, layout)
