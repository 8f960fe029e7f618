# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Heads that attend near tokens by softmax and far ones by linear attention, under one normaliser: what a pretrained
softmax head becomes (LoLCATs, Zhang et al., arXiv 2410.10254).

Code symbol -> paper: window_size -> w; exp(log_q_features), key_features -> phi_q, phi_k (section 3.1).
"""

from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache
from transformers import initialization as init

from lalm.configuration.configuration_linear_attention import LinearAttentionConfig
from lalm.modeling.cache import RecurrentLayer, previous_state, record
from lalm.modeling.layers import RMSNorm, make_linear, rotate
from lalm.modeling.mixers import Tables
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.local_global.window_linear import WindowLinearState, window_linear_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout

# Where the cache keeps each part of a WindowLinearState: (kind, number).
_SINKS = ("conv_states", 1)  # not stored where there are none
_PLACES = (("recurrent_states", 0), ("conv_states", 0), _SINKS, ("recurrent_states", 1))


class HeadwiseLinear(nn.Module):
    """`W x` with a W of its own per head, and a bias: `[B, T, H, K] -> [B, T, H, F]`, in float32 or wider.

    Without a bias, W is square and starts as the identity.
    """

    def __init__(self, heads: int, size: int, num_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, num_features, size))
        self.bias = nn.Parameter(torch.empty(heads, num_features)) if bias else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.bias is None:
            identity = torch.eye(self.weight.shape[-1], dtype=self.weight.dtype, device=self.weight.device)
            init.copy_(self.weight, identity.expand_as(self.weight))
        else:
            init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
            init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(x)
        with without_autocast(x.device):
            y = torch.einsum("bthk,hfk->bthf", x.to(dtype), self.weight.to(dtype))
        return y if self.bias is None else y + self.bias.to(dtype)


class WindowLinearMixer(nn.Module):
    """q, k, v -> softmax over a window and the first tokens, linear attention over the rest -> output projection.

    Projections, norms and positions are those of `SoftmaxAttention`, whose weights fit. Features of far tokens:
        hedgehog:  phi(x) = softmax of W x next to softmax of -W x (arXiv 2402.04347). As LoLCATs has it, a far weight
                   psi(q) . phi(k) is relative to the largest near one.
        centroids: phi(k) = softmax(W_k k + b_k), a soft choice among F centroids, and psi(q) = exp(W_q q + b_q). For
                   W_q the centroids times the scale of the scores, that is the weight exp(s q . k) which softmax
                   attention gives a token whose key is the centroid (`lalm.convert.centroids` finds them).
    """

    layer_type = RecurrentLayer._layer_type

    def __init__(self, config: LinearAttentionConfig, layer_idx: int):
        super().__init__()
        assert config.head_dim is not None  # the configuration derives it
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads or heads
        size, key_size, bias = heads * self.head_dim, self.key_heads * self.head_dim, config.attention_bias
        self.q_proj = make_linear(config.hidden_size, size, bias=bias)
        self.k_proj = make_linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = make_linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = make_linear(size, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.is_hedgehog = config.feature_map == "hedgehog"
        count = self.head_dim if self.is_hedgehog else config.num_features or 2 * self.head_dim
        self.q_map = HeadwiseLinear(heads, self.head_dim, count, bias=not self.is_hedgehog)
        self.k_map = HeadwiseLinear(self.key_heads, self.head_dim, count, bias=not self.is_hedgehog)
        self.places = [place for place in _PLACES if config.num_sink_tokens or place != _SINKS]

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        rotary: Tables,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`[B, T, D] -> [B, T, D]`, reading and replacing this layer's states in `past_key_values`."""
        cache: Any = past_key_values
        q, k, v = self.project(hidden_states, rotary)
        attend = partial(self.attend, state=self._recall(cache), output_final_state=cache is not None)
        record(
            cache,
            self.layer_idx,
            self.places,
            (q, k, v),
            layout,
            lambda inputs, layout: self._stored(attend(inputs[0], inputs[1], inputs[2], layout=layout)[1]),
        )
        o, state = attend(q, k, v, layout=layout)
        if cache is not None:
            for (kind, number), value in zip(self.places, self._stored(state), strict=True):
                update = cache.update_recurrent_state if kind == "recurrent_states" else cache.update_conv_state
                tokens = q.shape[1] if (kind, number) == _PLACES[0] else 0
                update(value, self.layer_idx, state_idx=number, num_tokens=tokens, given_away=True)
        return self.o_proj(o.flatten(-2)), None

    def project(self, hidden_states: torch.Tensor, rotary: Tables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q `[B, T, H, K]`, k and v `[B, T, G, K]` of the input `[B, T, D]`."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary:
            q, k = rotate(q, rotary[self.head_dim]), rotate(k, rotary[self.head_dim])
        return q, k, v

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: SequenceLayout,
        state: WindowLinearState | None = None,
        output_final_state: bool = False,
    ) -> tuple[torch.Tensor, WindowLinearState | None]:
        """What the op gives for q, k and v, `[B, T, H, V]`, and the state."""
        return window_linear_attention(
            q,
            k,
            v,
            self.log_q_features(q),
            self.key_features,
            cast(int, self.config.window_size),
            self.config.num_sink_tokens,
            initial_state=state,
            output_final_state=output_final_state,
            relative=self.is_hedgehog,
            layout=layout,
        )

    def log_q_features(self, q: torch.Tensor) -> torch.Tensor:
        """log psi: `[B, T, H, K] -> [B, T, H, F]`, in float32 or wider."""
        x = self.q_map(q)
        return torch.cat([x.log_softmax(-1), (-x).log_softmax(-1)], dim=-1) if self.is_hedgehog else x

    def key_features(self, k: torch.Tensor) -> torch.Tensor:
        """phi: `[B, T, G, K] -> [B, T, G, F]`, in float32 or wider, not negative."""
        x = self.k_map(k)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) if self.is_hedgehog else x.softmax(-1)

    def _recall(self, cache: Cache | None) -> WindowLinearState | None:
        memory, window, sinks, count = (previous_state(cache, self.layer_idx, *place) for place in _PLACES)
        if memory is None or window is None or count is None:
            return None
        window = window.unflatten(-1, (self.key_heads, -1))
        sinks = window[:, :0] if sinks is None else sinks.unflatten(-1, (self.key_heads, -1))
        return WindowLinearState(memory, window, sinks, count)

    def _stored(self, state: WindowLinearState | None) -> list[torch.Tensor]:
        """What the cache keeps of a state, in the order of `self.places`."""
        assert state is not None
        parts = [state.memory, state.window.flatten(-2), state.sinks.flatten(-2), state.seen]
        return [part for part, place in zip(parts, _PLACES, strict=True) if place in self.places]


__all__ = ["HeadwiseLinear", "WindowLinearMixer"]
