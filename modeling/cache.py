# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The cache of one linear-attention layer, known to the stock DynamicCache and StaticCache as "lalm_linear_attention".

The stock linear layer does not count tokens and treats a layer without a convolution as new, so a model
made of linear layers only could neither continue nor generate. This one does both. Its size does not depend on
the number of tokens.

A state cannot be cut as keys and values can. A cache that is to be rolled back (`activate_past_recording`, by assisted
generation) therefore notes what every forward found, and how to make the states after a part of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from lalm.modeling.ops.autograd import hides_values
from lalm.modeling.ops.sequence_layout import SequenceLayout

_KINDS = ("conv_states", "recurrent_states")
# Tokens that can still be taken back after a `crop`: a draft model with another tokenizer goes back further than it
# went on since.
_KEPT = 16


class Step(NamedTuple):
    """What one part of a layer did in one forward over `tokens` tokens: the states it found, by kind and number, and
    how to make them after the first n tokens."""

    tokens: int
    found: dict[tuple[str, int], torch.Tensor | None]
    after: Callable[[int], Sequence[torch.Tensor | None]]


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):
    """Recurrent states `[B, H, K, V]` float32, convolution states `[B, W - 1, D]` and the number of tokens seen.

    A layer keeps up to four of either kind, by `state_idx`; most use one. All are replaced in place, so that their
    addresses hold for compiled and graph-captured decoding; while gradients are recorded they are replaced by new
    tensors, so that a loss may reach back through a cache.
    """

    # accelerate refuses to shard the tokens of models that have a layer with "linear_attention" in its name.
    _layer_type = "lalm_linear_attention"
    cumulative_length: torch.Tensor  # type: ignore[assignment]  # the base class counts in an int
    device: torch.device | None  # type: ignore[assignment]
    dtype: torch.dtype | None  # type: ignore[assignment]
    supports_early_init = False
    # None rather than False: up to 5.21 transformers sizes the masks of a hybrid by the first layer that says False.
    is_sliding = None
    is_croppable = True

    def __init__(self, number_of_states: int = 4, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        # By kind: in the first forward a layer writes one kind before it reads the other.
        self.is_written = {kind: dict.fromkeys(range(number_of_states), False) for kind in _KINDS}
        # A tensor: compiled decoding would treat an int as a constant and compile anew at every step.
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        # By the first state that a part of the layer writes.
        self.history: dict[tuple[str, int], list[Step]] = {}

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
        self.is_written[kind][index] = True
        if not self.has_previous_state[index]:
            self._note_previous_state()
        if num_tokens:
            self.cumulative_length.add_(num_tokens)
        return self._replace(getattr(self, kind), index, value, given_away)

    def previous(self, kind: str, index: int, of_slice: Callable | None = None) -> torch.Tensor | None:
        """`conv_states` or `recurrent_states` number `index`, None where it has seen no token."""
        return getattr(self, kind)[index] if self.is_written[kind][index] else None

    def _replace(
        self, states: dict[int, torch.Tensor | None], index: int, value: torch.Tensor, given_away: bool
    ) -> torch.Tensor:
        current = states[index]
        is_new = current is None or current.shape != value.shape or self.record_past
        if current is None or is_new or value.requires_grad or current.requires_grad:
            eager = not hides_values()
            # A part of something larger would keep all of it.
            is_whole = eager and value.untyped_storage().nbytes() == value.numel() * value.element_size()
            keeps = value.requires_grad or (given_away and is_whole)
            current = states[index] = value if keeps else value.clone()
            if eager:
                torch._dynamo.mark_static_address(current)
        elif hides_values() or value.data_ptr() != current.data_ptr():  # else it was written where it stands
            current.copy_(value)
        return current

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError(
            "A linear-attention layer keeps no keys and values: the cache is of another model, or somebody puts a "
            "prefix of keys and values into it."
        )

    def record(self, tokens: int, names: Sequence[tuple[str, int]], after: Callable) -> None:
        """See `record`, below."""
        found = {(kind, i): getattr(self, kind)[i] if self.is_written[kind][i] else None for kind, i in names}
        self.history.setdefault(names[0], []).append(Step(tokens, found, after))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, exactly.

        Raises:
            ValueError: a positive number.
            RuntimeError: so many tokens have not been recorded since `activate_past_recording`.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {int(tokens_to_remove)}.")
        recorded = min((sum(step.tokens for step in steps) for steps in self.history.values()), default=0)
        if count > recorded:
            raise RuntimeError(
                f"Cannot take back {count} tokens of a recurrent state, of which {recorded} are recorded: call "
                "activate_past_recording() on the cache before the forward."
            )
        for steps in self.history.values():
            self._take_back(steps, count)
            while sum(step.tokens for step in steps[1:]) >= _KEPT:
                steps.pop(0)
        if count:
            self.cumulative_length.sub_(count)
            self._note_previous_state()

    def _note_previous_state(self) -> None:
        # All at once: Cache.has_previous_state asks whether all states have been written, used or not.
        found = any(any(written.values()) for written in self.is_written.values())
        self.has_previous_state = dict.fromkeys(self.has_previous_state, found)

    def _take_back(self, steps: list[Step], count: int) -> None:
        while count > 0:
            tokens, found, after = steps.pop()
            kept = max(tokens - count, 0)
            values = after(kept) if kept else list(found.values())
            for (kind, index), value in zip(found, values, strict=True):
                self.is_written[kind][index] = value is not None
                if value is not None:
                    self._replace(getattr(self, kind), index, value, given_away=True)
            if kept:
                steps.append(Step(kept, found, after))
            count -= tokens

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length.zero_()
        self.history.clear()
        for written in self.is_written.values():
            written.update(dict.fromkeys(written, False))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda x: x[indices])

    def _map_batch(self, function) -> None:
        self.history.clear()  # of other rows
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)


def previous_state(
    cache: Cache | None, layer_idx: int, kind: str, state_idx: int = 0, of_slice: Callable | None = None
) -> torch.Tensor | None:
    """`conv_states` or `recurrent_states` of a layer, None if it has seen no token. (Cache.get_recurrent_state and
    get_conv_state came with transformers 5.21.)

    `of_slice()` tells what the current tokens do to that state, without knowing it: their last inputs, or the map of
    affine_maps.py. sequence_parallel.py joins the slices of several processes by it.
    """
    if cache is None:
        return None
    layer: Any = cache.layers[layer_idx]
    return layer.previous(kind, state_idx, of_slice)


def may_overwrite(cache: Cache | None, layer_idx: int) -> bool:
    """Whether a layer's states may be written where they stand in `cache`: nobody goes back to what they were."""
    layer: Any = None if cache is None else cache.layers[layer_idx]
    return layer is not None and not layer.record_past


def record(
    cache: Cache | None,
    layer_idx: int,
    names: Sequence[tuple[str, int]],
    inputs: Sequence[torch.Tensor],
    layout: SequenceLayout,
    redo: Callable[[Sequence[torch.Tensor], SequenceLayout], Sequence[torch.Tensor | None]],
) -> None:
    """Before a part of a layer updates the states `names` (kind and number): if `cache` may be rolled back, let it
    keep their values, and `redo(inputs, layout)`, which makes those after the first tokens of `inputs [B, T, ...]`."""
    layer: Any = None if cache is None else cache.layers[layer_idx]
    if layer is not None and layer.record_past:
        layer.record(inputs[0].shape[1], names, lambda n: redo([x[:, :n] for x in inputs], layout.first(n)))


def recurrent_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """The part of `attention_mask [B, S + T]` that covers the current T tokens, None where none of them is padding.

    The stock create_recurrent_attention_mask takes a piece of one token for a generated one, which is never padding; a
    prompt read token by token has such pieces too.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    current = attention_mask[:, -inputs_embeds.shape[1] :]
    if not torch.compiler.is_compiling() and bool((current != 0).all()):
        return None
    return current.contiguous()  # its strides stay the same from step to step, and compiled code with them


# CacheLayerMixin registers `_layer_type` for DynamicCache only.
STATIC_LAYER_TYPE_MAPPING[RecurrentLayer._layer_type] = RecurrentLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[RecurrentLayer._layer_type] = recurrent_mask
