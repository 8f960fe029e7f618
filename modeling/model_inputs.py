# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""From what callers pass to a model (masks, positions, packing in three forms) to one layout, once per forward.

Packed documents are recognised in every form the ecosystem uses: `seq_idx`, `cu_seq_lens_q`, or `position_ids` that
start again. Padding may stand left, right or inside, together with packing, and in every piece of a cached sequence.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)

from lalm.modeling.cache import RecurrentLayer
from lalm.modeling.ops.autograd import has_open_length, hides_values, is_transformed
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_cu_seqlens, segments_of, stable_order


def adopt_cache(cache: Cache, config: PreTrainedConfig, layer_types: list[str], device: torch.device) -> None:
    """Give the layers of `config`, of these types, to a cache made without a configuration; refuse one made for
    another model. A cache that is to wait in the memory of the CPU stays as it is where the model runs there too, or
    keeps nothing to move.

    Raises:
        ValueError: the cache has other layers than the model.
    """
    if isinstance(cache, DynamicCache) and not cache.layers:
        cache.layers.extend(DynamicCache(config=config).layers)
    for i, layer in enumerate(cast(Any, cache.layers)):
        # The stock caches know one class per type of layer: that of the checkpoint whose code was loaded last.
        foreign = getattr(layer, "_layer_type", None) == RecurrentLayer._layer_type
        if foreign and not isinstance(layer, RecurrentLayer) and not any(layer.has_previous_state.values()):
            cache.layers[i] = RecurrentLayer()
    kinds = [isinstance(layer, RecurrentLayer) for layer in cache.layers]
    if kinds != [kind == RecurrentLayer._layer_type for kind in layer_types]:
        raise ValueError(
            "past_key_values was made for another model: make it by DynamicCache(config=model.config) or "
            "StaticCache(config=model.config, max_cache_len=...)."
        )
    if cache.offloading:  # the stock cache would ask for a CUDA stream, and for a layer that it moves
        kept = {RecurrentLayer._layer_type} | ({"sliding_attention"} if cache.only_non_sliding else set())
        cache.offloading = device.type != "cpu" and not kept.issuperset(layer_types)


def refuse_sharded_tokens() -> None:
    """Refuse to run inside torch's context_parallel: it gives each process a part of the tokens, and replaces torch's
    softmax attention. Nothing hands on a state, or the tokens that a convolution or a window needs.

    Raises:
        ValueError: torch's attention has been replaced so.
    """
    if torch.compiler.is_compiling():
        return
    origin = getattr(nn.functional.scaled_dot_product_attention, "__module__", None) or ""
    if origin.startswith("torch.distributed.tensor.experimental"):
        raise ValueError(
            "context_parallel shards the tokens of a sequence over processes, and no layer but full softmax attention "
            "passes on what it has read: call lalm.modeling.sequence_parallel.sequence_parallel instead, or shard the "
            "batch (DDP) or the weights (FSDP)."
        )


def is_fresh(cache: Cache | None) -> bool:
    """Whether nothing has been written to `cache`. Asks Python flags only, so that it can be compiled."""
    if cache is None:
        return True
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            return not any(layer.has_previous_state.values())
    return not any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def current_mask(attention_mask: torch.Tensor | dict | None, batch: int, length: int, seen) -> torch.Tensor | None:
    """The bool `[B, T]` part of `attention_mask` that covers the current tokens, None when it is all ones.

    Args:
        attention_mask: `[B, seen + T]`, or the dict by layer type that generate() makes for compiled decoding.

    Raises:
        ValueError: a shape that does not fit.
    """
    if isinstance(attention_mask, dict):
        mask = attention_mask.get(RecurrentLayer._layer_type)
        return None if mask is None else mask[:, -length:].bool()
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens] with 1 for real tokens, got shape {tuple(attention_mask.shape)}: "
            "linear attention cannot mask pairs of tokens."
        )
    if not hides_values():
        expected = (batch, int(seen) + length)
        if tuple(attention_mask.shape) != expected:
            past = f" ({int(seen)} cached and {length} new tokens)" if int(seen) else ""
            raise ValueError(f"attention_mask must be {expected}{past}, got {tuple(attention_mask.shape)}.")
        if bool((attention_mask[:, -length:] != 0).all()):
            return None
    return attention_mask[:, -length:] != 0


def build_layout(
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    shape: tuple[int, int],
    fresh: bool,
    reorder: bool = True,
) -> SequenceLayout:
    """The layout of tokens `shape = [B, T]`. Position ids tell documents apart only in a `fresh` forward, as in stock
    transformers; the explicit forms always do. With `reorder` off, padding after a row's last token may stay there.

    Raises:
        ValueError: position_ids, seq_idx or cu_seqlens of a shape that does not fit.
    """
    if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(f"position_ids must be [batch, tokens] = {shape}, got {tuple(position_ids.shape)}.")
    segments = None
    if seq_idx is not None:
        if tuple(seq_idx.shape) != shape:
            raise ValueError(f"seq_idx must be [batch, tokens] = {shape}, got {tuple(seq_idx.shape)}.")
        segments = _documents(seq_idx, mask, step=0)
    elif cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, *shape, name="cu_seq_lens_q")
        segments = _documents(segments_of(cu_seqlens, shape[1]), mask, step=0)
    elif position_ids is not None and fresh and (has_open_length() or shape[1] > 1):
        segments = _documents(position_ids.expand(shape), mask, step=1)
    if segments is not None and not hides_values() and not bool(segments.any()):
        segments = None
    order = None
    if mask is not None and (hides_values() or _must_move(mask, reorder)):
        order = stable_order(mask)
    return SequenceLayout(mask, segments, order)


def _must_move(mask: torch.Tensor, reorder: bool) -> bool:
    """Whether padding stands after real tokens or, without `reorder`, between them."""
    if reorder:
        return bool((mask[:, 1:] < mask[:, :-1]).any())
    runs = mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(1)
    return bool((runs > 1).any())


def _documents(marks: torch.Tensor, mask: torch.Tensor | None, step: int) -> torch.Tensor:
    """Number the documents of each row: a real token whose mark is not `step` more than that of the real token before
    it starts one. Padding belongs to what precedes it."""
    if mask is None:
        return (torch.diff(marks, dim=1, prepend=marks[:, :1] - step) != step).cumsum(1)
    index = torch.arange(marks.shape[1], device=marks.device)
    latest = torch.where(mask, index, -1).cummax(1).values
    previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    starts = mask & (previous >= 0) & (marks != marks.gather(1, previous.clamp(min=0)) + step)
    return starts.cumsum(1)


def positions(
    layout: SequenceLayout, attention_mask: torch.Tensor | dict | None, seen, like: torch.Tensor
) -> torch.Tensor:
    """Position of every token `[B, T]` in its document, padding not counted, going on after `seen` cached tokens."""
    batch, length = like.shape[:2]
    if layout.mask is None:
        before = torch.arange(length, device=like.device).expand(batch, -1)
    else:
        before = layout.mask.long().cumsum(1) - layout.mask.long()
    offset = seen
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[1] > length:
        offset = (attention_mask[:, :-length] != 0).sum(1, keepdim=True)
    starts = layout.starts()
    if layout.segments is None or starts is None:
        return before if isinstance(offset, int) and offset == 0 else before + offset
    begin = torch.where(starts, before, 0).cummax(1).values
    return before - begin + torch.where(layout.segments == layout.segments[:, :1], offset, 0)


def attends_in_blocks(config: PreTrainedConfig, length: int, cache: Cache | None) -> bool:
    """Whether sliding layers run `sliding_attention`, linear in T, rather than the stock interface with a mask
    `[T, T]`: where whole sequences come at once. A block meets the keys of two windows (three, if both sides count):
    up to about three windows the stock attention is as fast or faster."""
    return (
        not torch.compiler.is_compiling()
        and config._attn_implementation == "sdpa"
        and length > 3 * config.sliding_window
        and is_fresh(cache)
    )


def softmax_masks(
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    cache: Cache | None,
    layout: SequenceLayout,
) -> dict[str, torch.Tensor | None]:
    """The mask of each kind of softmax layer in `config.layer_types`, made by transformers for the attention backend.

    A sliding layer keeps rows whose padding, in the cache too, has been moved to the front, so that its window counts
    real tokens; the mask returned for it is in that order. There is none, which tells the layer, if it
    `attends_in_blocks`, as it does in a slice of a sequence that several processes share.
    """
    kinds = set(config.layer_types) - {RecurrentLayer._layer_type}
    if isinstance(attention_mask, dict):
        return {kind: attention_mask[kind] for kind in kinds}
    if not kinds:
        return {}
    is_slice = any(hasattr(layer, "extend") for layer in ([] if cache is None else cache.layers))
    if "sliding_attention" in kinds and (is_slice or attends_in_blocks(config, hidden_states.shape[1], cache)):
        kinds.remove("sliding_attention")
    if attention_mask is not None and layout.segments is not None and "flash" in (config._attn_implementation or ""):
        raise ValueError(
            "Flash attention cannot combine padding with packed documents: drop attention_mask, or load the model "
            "with attn_implementation='sdpa'."
        )
    masks: dict[str, Any] = {}
    for kind in kinds:
        make = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
        mask, segments = attention_mask, layout.segments
        if kind == "sliding_attention" and mask is not None:
            mask, segments = _window_padding(config, mask, cache), layout.segments_pads_first()
        also = None
        if segments is not None:
            also = _same_document(segments, 0 if cache is None else cache.get_seq_length())
        elif is_transformed():
            also = _anywhere  # with a function to combine, transformers does not look at the mask
        masks[kind] = make(
            config=config,
            inputs_embeds=hidden_states,
            attention_mask=mask,
            past_key_values=cache,
            and_mask_function=also,
        )
    return masks


def masks_ahead(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    **kwargs,
) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
    """The dict of masks by layer type that generate() makes before a compiled step, as `softmax_masks` makes them."""
    given: dict[str, Any] = {"config": config, "inputs_embeds": inputs_embeds, "past_key_values": past_key_values}
    masks = create_masks_for_generate(attention_mask=attention_mask, **given, **kwargs)
    if "sliding_attention" in config.layer_types and attention_mask is not None and attention_mask.ndim == 2:
        padding = _window_padding(config, attention_mask, past_key_values)
        masks["sliding_attention"] = create_sliding_window_causal_mask(attention_mask=padding, **given)
    return masks


def _window_padding(config: PreTrainedConfig, mask: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """`mask [B, S + T]` of the tokens in the order in which a sliding layer keeps them: each row's padding first."""
    if cache is not None and not hides_values():
        _refuse_gap_in_static_window(
            cache.layers[config.layer_types.index("sliding_attention")], cache.get_seq_length(), mask
        )
    return (mask != 0).long().sort(dim=1).values


def _refuse_gap_in_static_window(cached, seen, mask: torch.Tensor) -> None:
    """A growing window can move cached tokens over padding that follows them, one at fixed addresses cannot."""
    if not isinstance(cached, StaticLayer) or int(seen) == 0:
        return
    gap = (mask == 0) & ((mask != 0).cumsum(1) > 0)
    if bool(gap[:, int(seen) :].any()):
        raise ValueError(
            "attention_mask has padding after real tokens that are already in a StaticCache, and this model has "
            "sliding_attention_layers: use DynamicCache(config=model.config), or pad on the left."
        )


def _anywhere(batch, head, query, key):
    return query >= 0


def _same_document(segments: torch.Tensor, seen):
    """Mask function over absolute positions; everything cached belongs to the row's first document."""
    last = segments.shape[1] - 1

    def same(batch, head, query, key):
        query_at, key_at = (query - seen).clamp(min=0, max=last), (key - seen).clamp(min=0, max=last)
        return segments[batch, query_at] == segments[batch, key_at]

    return same
