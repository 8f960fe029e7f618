# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The mixers of the local-global transformer: heads that attend inside windows, along with heads of linear attention.

Follows linear-attention-transformer (Wang; its versions 0.19 and 0.2.1). Shapes: B batch, T tokens, S tokens of a
context, H heads, K head size, D = hidden_size, which need not be H K.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache

from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.cache import RecurrentLayer, may_overwrite, previous_state, record
from lalm.modeling.layers import make_linear, rotate
from lalm.modeling.mixers import Tables
from lalm.modeling.ops.local_global.efficient_attention import efficient_attention
from lalm.modeling.ops.local_global.efficient_bidirectional import (
    bidirectional_efficient_attention,
    cross_efficient_attention,
)
from lalm.modeling.ops.local_global.efficient_recurrence import EfficientState
from lalm.modeling.ops.local_global.local_attention import LocalState, local_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout

# Numbers of the recurrent states.
_GLOBAL = (0, 1, 2)  # published and pending memory, tokens pending
# Where the cache keeps each part of a LocalState: (kind, number).
_LOCAL = (("conv_states", 0), ("conv_states", 1), ("recurrent_states", 3))


def rotate_pairs(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the neighbouring channels (2 j, 2 j + 1) of `x [B, T, H, K]`, which come out as channels (j, K / 2 + j).

    Treating q and k alike, nothing downstream depends on the order of their channels.
    """
    return rotate(torch.cat([x[..., ::2], x[..., 1::2]], dim=-1), tables)


class LocalGlobalMixer(nn.Module):
    """q, k, v -> the first heads attend locally, the others by efficient attention -> output projection."""

    layer_type = RecurrentLayer._layer_type
    rotates = is_windowed = True

    def __init__(self, config: LocalGlobalConfig, layer_idx: int):
        super().__init__()
        assert config.head_dim is not None  # the configuration derives it
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_local = config.local_heads(layer_idx)
        self.num_global = config.num_attention_heads - self.num_local
        # Heads of k and v: as many as of q, or one for the local and one for the global heads.
        self.local_keys = min(self.num_local, 1) if config.one_kv_head else self.num_local
        self.global_keys = min(self.num_global, 1) if config.one_kv_head else self.num_global
        size = config.num_attention_heads * self.head_dim
        key_size = (self.local_keys + self.global_keys) * self.head_dim
        self.q_proj = make_linear(config.hidden_size, size, bias=False)
        self.k_proj = make_linear(config.hidden_size, key_size, bias=False)
        self.v_proj = make_linear(config.hidden_size, key_size, bias=False)
        self.o_proj = make_linear(size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        rotary: Tables,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`[B, T, D] -> [B, T, D]`, reading and replacing this layer's states in `past_key_values`."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary:
            q, k = rotate_pairs(q, rotary[self.head_dim]), rotate_pairs(k, rotary[self.head_dim])
        (q_local, q_global), (k_local, k_global), (v_local, v_global) = (
            x.split([heads, x.shape[2] - heads], dim=2)
            for x, heads in ((q, self.num_local), (k, self.local_keys), (v, self.local_keys))
        )
        outputs = []
        if self.num_local:
            outputs.append(self._attend_locally(q_local, k_local, v_local, past_key_values, layout))
        if self.num_global:
            outputs.append(self._attend_globally(q_global, k_global, v_global, past_key_values, layout))
        return self.o_proj(torch.cat(outputs, dim=2).flatten(-2)), None

    def _attend_locally(self, q, k, v, cache: Any, layout: SequenceLayout) -> torch.Tensor:
        state, index, window_size = None, self.layer_idx, self.config.local_attn_window_size
        assert window_size is not None  # the configuration derives it
        keys, values, count = (previous_state(cache, index, *place) for place in _LOCAL)
        if keys is not None and values is not None and count is not None:
            state = LocalState(keys, values, count)
        attend = partial(
            local_attention,
            window_size=window_size,
            initial_state=state,
            output_final_state=cache is not None,
            causal=self.config.is_causal,
            dropout=float(self.config.attention_dropout) if self.training else 0.0,
        )
        record(
            cache,
            index,
            _LOCAL,
            (q, k, v),
            layout,
            lambda inputs, layout: cast(LocalState, attend(*inputs, layout=layout)[1]),
        )
        o, state = attend(q, k, v, layout=layout, overwrite_state=may_overwrite(cache, index))
        if cache is not None:
            assert state is not None
            for (_, number), part in zip(_LOCAL[:2], state[:2], strict=True):
                cache.update_conv_state(part, index, state_idx=number, given_away=True)
            tokens = 0 if self.num_global else q.shape[1]  # counted once
            cache.update_recurrent_state(state.seen, index, state_idx=_LOCAL[2][1], num_tokens=tokens)
        return o

    def _attend_globally(self, q, k, v, cache: Any, layout: SequenceLayout) -> torch.Tensor:
        k, v = (x.expand(-1, -1, self.num_global, -1) for x in (k, v))
        if not self.config.is_causal:
            return bidirectional_efficient_attention(q, k, v, semantics=self.config.semantics, layout=layout)
        attend = partial(
            efficient_attention,
            initial_state=self._recall(cache),
            output_final_state=cache is not None,
            blindspot_size=self.config.blindspot_size,
            semantics=self.config.semantics,
            implementation=self.config.linear_attn_implementation,
        )
        o, state = attend(q, k, v, layout=layout)
        if cache is not None:
            record(
                cache,
                self.layer_idx,
                [("recurrent_states", number) for number in self._memories(state)],
                (q, k, v),
                layout,
                lambda inputs, layout: [*self._memories(attend(*inputs, layout=layout)[1]).values()],
            )
            for number, value in self._memories(state).items():
                count = 0 if number else q.shape[1]
                cache.update_recurrent_state(value, self.layer_idx, state_idx=number, num_tokens=count)
        return o

    def _recall(self, cache: Any) -> EfficientState | None:
        numbers = _GLOBAL if self.config.blindspot_size > 1 else _GLOBAL[:1]  # as many as are ever written
        states = [previous_state(cache, self.layer_idx, "recurrent_states", number) for number in numbers]
        published, pending, filled = (*states, None, None)[:3]
        if published is None:
            return None
        shape = (-1, self.num_global, -1, -1)
        return EfficientState(published.expand(shape), None if pending is None else pending.expand(shape), filled)

    def _memories(self, state: EfficientState | None) -> dict[int, torch.Tensor]:
        """What is stored of a state, by number. Heads that share keys and values share their memory."""
        assert state is not None
        return {
            number: value[:, : self.global_keys] if value.ndim == 4 else value
            for number, value in zip(_GLOBAL, state, strict=True)
            if value is not None
        }


class CrossMixer(nn.Module):
    """Efficient attention of every token to a context, such as what an encoder returns."""

    def __init__(self, config: LocalGlobalConfig):
        super().__init__()
        assert config.head_dim is not None  # the configuration derives it
        self.config, self.num_heads, self.head_dim = config, config.num_attention_heads, config.head_dim
        size = config.num_attention_heads * self.head_dim
        key_size = self.head_dim if config.one_kv_head else size
        self.q_proj = make_linear(config.hidden_size, size, bias=False)
        self.k_proj = make_linear(config.hidden_size, key_size, bias=False)
        self.v_proj = make_linear(config.hidden_size, key_size, bias=False)
        self.o_proj = make_linear(size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[B, T, D]`, context `[B, S, D]` and its mask `[B, S]`, 1 for real tokens -> `[B, T, D]`.

        Raises:
            ValueError: the context or its mask does not fit; the message names it.
        """
        expected = (hidden_states.shape[0], hidden_states.shape[2])
        shape = tuple(encoder_hidden_states.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != expected:
            raise ValueError(
                f"encoder_hidden_states must be [batch, tokens, hidden_size] = ({expected[0]}, S, {expected[1]}), got "
                f"{shape}."
            )
        mask = encoder_attention_mask
        if mask is not None and tuple(mask.shape) != shape[:2]:
            raise ValueError(f"encoder_attention_mask must be [batch, tokens] = {shape[:2]}, got {tuple(mask.shape)}.")
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        k, v = (
            projection(encoder_hidden_states).unflatten(-1, (-1, self.head_dim)).expand(-1, -1, self.num_heads, -1)
            for projection in (self.k_proj, self.v_proj)
        )
        o = cross_efficient_attention(q, k, v, None if mask is None else mask != 0, semantics=self.config.semantics)
        return self.o_proj(o.flatten(-2))
