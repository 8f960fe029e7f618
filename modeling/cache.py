# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The cache of one linear-attention layer, known to the stock DynamicCache and StaticCache as "lalm_recurrent".

The stock linear layer counts no tokens and takes a layer without a convolution for one that has seen nothing, so a
model made of linear layers only could neither continue nor generate. This one does both. Its size does not depend on
the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask

from lalm.modeling.ops.transforms import hides_values

_KINDS = ("conv_states", "recurrent_states")


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):
    """Recurrent states `[B, H, K, V]` float32, convolution states `[B, W - 1, D]` and the number of tokens seen.

    A layer keeps up to four of either kind, by `state_idx`; most use one. All are replaced in place, so that their
    addresses hold for compiled and graph-captured decoding; while gradients are recorded they are replaced by new
    tensors, so that a loss may reach back through a cache.
    """

    _layer_type = "lalm_recurrent"
    cumulative_length: torch.Tensor  # type: ignore[assignment]  # the base class counts in an int
    device: torch.device | None  # type: ignore[assignment]
    dtype: torch.dtype | None  # type: ignore[assignment]
    supports_early_init = False
    # None rather than False: up to 5.21 transformers sizes the masks of a hybrid by the first layer that says False.
    is_sliding = None
    is_croppable = False

    def __init__(self, number_of_states: int = 4, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        # By kind: in the first forward a layer writes one kind before it reads the other.
        self.is_written = {kind: dict.fromkeys(range(number_of_states), False) for kind in _KINDS}
        # A tensor: compiled decoding would treat an int as a constant and compile anew at every step.
        self.cumulative_length = torch.zeros((), dtype=torch.int64)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        num_tokens: int = 0,
        given_away: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Store the window after the current tokens. A layer without a recurrent state counts its tokens here.
        `given_away`: the caller has made the tensor for the cache and does not touch it again."""
        self.is_conv_states_initialized[state_idx] = True
        return self._update("conv_states", conv_states, state_idx, num_tokens, given_away)

    def update_recurrent_state(
        self,
        recurrent_states: torch.Tensor,
        state_idx: int = 0,
        num_tokens: int = 0,
        given_away: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Store the state after `num_tokens` further tokens; `given_away` as for `update_conv_state`."""
        self.is_recurrent_states_initialized[state_idx] = True
        return self._update("recurrent_states", recurrent_states, state_idx, num_tokens, given_away)

    def _update(self, kind: str, value: torch.Tensor, index: int, num_tokens: int, given_away: bool) -> torch.Tensor:
        if self.device is None:
            self.dtype, self.device = value.dtype, value.device
        if self.cumulative_length.device != value.device:
            self.cumulative_length = self.cumulative_length.to(value.device)
        if not any(self.has_previous_state.values()) and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.has_previous_state[index] = self.is_written[kind][index] = True
        if num_tokens:
            self.cumulative_length.add_(num_tokens)
        return self._replace(getattr(self, kind), index, value, given_away)

    @staticmethod
    def _replace(
        states: dict[int, torch.Tensor | None], index: int, value: torch.Tensor, given_away: bool
    ) -> torch.Tensor:
        current = states[index]
        if current is None or current.shape != value.shape or value.requires_grad or current.requires_grad:
            eager = not hides_values()
            # A part of something larger would keep all of it.
            is_whole = eager and value.untyped_storage().nbytes() == value.numel() * value.element_size()
            keeps = value.requires_grad or (given_away and is_whole)
            current = states[index] = value if keeps else value.clone()
            if eager:
                torch._dynamo.mark_static_address(current)
        else:
            current.copy_(value)
        return current

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError("A linear-attention layer keeps no keys and values; use update_recurrent_state.")

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length.zero_()
        for written in self.is_written.values():
            written.update(dict.fromkeys(written, False))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda x: x[indices])

    def _map_batch(self, function) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)


def previous_state(cache: Cache | None, layer_idx: int, kind: str, state_idx: int = 0) -> torch.Tensor | None:
    """`conv_states` or `recurrent_states` of a layer, None where it has seen no token. (Cache.get_recurrent_state and
    get_conv_state came with transformers 5.21.)"""
    if cache is None:
        return None
    layer: Any = cache.layers[layer_idx]
    return getattr(layer, kind)[state_idx] if layer.is_written[kind][state_idx] else None


# CacheLayerMixin registers `_layer_type` for DynamicCache only.
STATIC_LAYER_TYPE_MAPPING[RecurrentLayer._layer_type] = RecurrentLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[RecurrentLayer._layer_type] = create_recurrent_attention_mask
