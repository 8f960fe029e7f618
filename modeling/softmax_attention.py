# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The softmax attention of hybrid models, full or over a sliding window."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.layers import RMSNorm, make_linear, rotate
from lalm.modeling.mixers import Tables
from lalm.modeling.ops.dispatch import must_separate
from lalm.modeling.ops.local_global.local_attention import sliding_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout


def _is_fresh(cache: Cache | None, layer_idx: int) -> bool:
    return cache is None or int(cache.get_seq_length(layer_idx)) == 0


class SoftmaxAttention(nn.Module):
    """Softmax attention, full or over a sliding window, for hybrid models; runs on the stock attention interface, or
    in blocks where model_inputs.attends_in_blocks says so."""

    def __init__(self, config: LalmConfig, layer_idx: int, layer_type: str):
        super().__init__()
        self.config, self.layer_idx, self.layer_type = config, layer_idx, layer_type
        assert config.head_dim is not None  # the configuration derives it
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, config.is_causal
        key_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // key_heads
        self.sliding_window = config.sliding_window if layer_type == "sliding_attention" else None
        size, key_size = config.num_attention_heads * self.head_dim, key_heads * self.head_dim
        self.q_proj = make_linear(config.hidden_size, size, bias=config.attention_bias)
        self.k_proj = make_linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = make_linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = make_linear(size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        rotary: Tables,
        masks: dict[str, torch.Tensor | None],
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, T, D] -> [B, T, D]` and the attention weights `[B, H, T, S]` where the backend gives them."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary:
            q, k = rotate(q, rotary[self.head_dim]), rotate(k, rotary[self.head_dim])
        dropout = self.config.attention_dropout if self.training else 0.0
        in_blocks = self.sliding_window is not None and self.layer_type not in masks
        if in_blocks or (must_separate(layout, q, k, v) and _is_fresh(past_key_values, self.layer_idx)):
            o = self._attend_in_blocks(q, k, v, dropout, layout, past_key_values)
            return self.o_proj(o.flatten(-2)), None
        if self.sliding_window is not None:
            q, k, v = layout.pads_first(q), layout.pads_first(k), layout.pads_first(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            if self.sliding_window is not None and layout.mask is not None:
                k, v = self._slide_cache(past_key_values.layers[self.layer_idx], k, v, layout)
            k, v = past_key_values.update(k, v, self.layer_idx)
        if hidden_states.shape[0] == 0:  # an empty batch, which the stock interface cannot reshape
            return self.o_proj(q.transpose(1, 2).flatten(-2)), None
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        o, weights = attend(
            self,
            q,
            k,
            v,
            masks[self.layer_type],
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if self.sliding_window is not None:
            # A padded token has an empty window, for which each attention backend returns something else.
            o = layout.zero_padding(layout.restore(o))
        return self.o_proj(o.flatten(-2)), weights

    def _attend_in_blocks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout: float,
        layout: SequenceLayout,
        cache: Cache | None,
    ) -> torch.Tensor:
        """o `[B, T, H, K]`, of sequences of which nothing is cached yet; q, k, v in the caller's order of tokens."""
        length = q.shape[1]
        if cache is not None and hasattr(cache.layers[self.layer_idx], "extend"):  # a slice, of sequence_parallel.py
            layer: Any = cache.layers[self.layer_idx]
            q, k, v, layout = layer.extend(q, k, v, layout, self.sliding_window)
        elif cache is not None:
            past = (k, v) if self.sliding_window is None else (layout.pads_first(k), layout.pads_first(v))
            cache.update(past[0].transpose(1, 2), past[1].transpose(1, 2), self.layer_idx)
        window = self.sliding_window or q.shape[1]
        o = sliding_attention(
            q, k, v, window, scale=self.scaling, causal=self.is_causal, dropout=dropout, layout=layout
        )
        return o[:, -length:]

    @staticmethod
    def _slide_cache(
        cached: Any, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move the keys and values `[B, H, S, K]` that a growing cache holds up to the real tokens of this piece, so
        that its padding does not push real tokens out of the window. Returns k and v in their new place."""
        if not isinstance(cached, DynamicLayer) or not cached.is_initialized:
            return k, v
        moved = []
        for name, current in (("keys", k), ("values", v)):
            past = getattr(cached, name).transpose(1, 2)
            joined = layout.slide_over_padding(past, current.transpose(1, 2)).transpose(1, 2)
            setattr(cached, name, joined[:, :, : past.shape[1]])
            moved.append(joined[:, :, past.shape[1] :])
        return moved[0], moved[1]
