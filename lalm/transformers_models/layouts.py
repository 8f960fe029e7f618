# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""How padding and packed documents reach the functions of a layer with a recurrence: through the keyword arguments
that a model of transformers hands down to its layers, and they to their functions.

The text model finds documents in any of the three forms in which the field describes them (`position_ids` that begin
again, `cu_seq_lens_q`, `seq_idx`) and names them `seq_idx`; the layer adds its padding mask, and keeps the state of
its convolution free of padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from lalm.modeling.ops.sequence_layout import check_cu_seqlens, segments_of, stable_order

_FORMS = ("seq_idx", "cu_seq_lens_q", "position_ids")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What a head was given that does not hand it down to its model.
_kept_by_head: ContextVar[dict[str, Any] | None] = ContextVar("kept_by_head", default=None)


def head_forward(original: Callable) -> Callable:
    """The forward of a language-model head that keeps for itself where documents begin: its model is told."""
    signature = inspect.signature(original)

    @wraps(original)
    def forward(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments.get("kwargs", {})
        before = _kept_by_head.set({name: given[name] for name in _FORMS if given.get(name) is not None})
        try:
            return original(self, *args, **kwargs)
        finally:
            _kept_by_head.reset(before)

    return forward


def model_forward(original: Callable, masks_documents: bool = True) -> Callable:
    """The forward of a text model that tells its layers where documents begin. Unless it `masks_documents`, its
    attention layers get a mask that does."""
    signature = inspect.signature(original)

    @wraps(original)
    def forward(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        given: dict[str, Any] = {**(_kept_by_head.get() or {}), **bound.arguments, **bound.arguments.get("kwargs", {})}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None or tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        documents = _documents(given, tokens)
        if documents is None:
            return original(self, *args, **kwargs)
        rest = {n: x for n, x in given.items() if n not in ("self", "kwargs", *_LENGTHS)}
        if given.get("use_cache") or _cache(given) is not None:
            raise ValueError("Packed documents have no common cache: pass use_cache=False and no cache.")
        rest |= {"seq_idx": documents, "use_cache": False}
        if rest.get("position_ids") is None and "position_ids" in signature.parameters:
            rest["position_ids"] = _positions(documents)
        if not masks_documents and given.get("attention_mask") is None:
            weight = self.get_input_embeddings().weight
            like = weight.new_empty(1).expand(*documents.shape, 1)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=like,
                attention_mask=None,
                past_key_values=None,
                position_ids=_positions(documents),
            )
            rest["attention_mask"] = {"full_attention": mask, "linear_attention": None}
        return original(self, **rest)

    return forward


def _documents(given: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Document ids `[B, T]`, None if nothing is packed."""
    batch, length = tokens.shape[:2]
    if given.get("seq_idx") is not None:
        found = given["seq_idx"]
    elif given.get("cu_seq_lens_q") is not None:
        check_cu_seqlens(given["cu_seq_lens_q"], batch, length, "cu_seq_lens_q")
        found = segments_of(given["cu_seq_lens_q"], length)
    else:
        positions = given.get("position_ids")
        if positions is not None and positions.ndim == 3 and positions.shape[0] == 4:
            positions = positions[0]  # those of text; the others are of images
        is_one = given.get("attention_mask") is not None or _cache(given) is not None
        if is_one or positions is None or positions.ndim != 2:
            return None
        found = find_packed_sequence_indices(positions)
    if found is None:
        return None
    found = found.expand(batch, -1)
    if found.shape != (batch, length):
        raise ValueError(f"seq_idx must be [B, T] = {(batch, length)}, got {tuple(found.shape)}.")
    return found if bool((found != found[:, :1]).any()) else None


def _cache(given: dict[str, Any]) -> Any:
    return given.get("past_key_values") if given.get("cache_params") is None else given["cache_params"]


def _positions(documents: torch.Tensor) -> torch.Tensor:
    """`[B, T]`, counted from the first token of each document."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.diff(documents, dim=1, prepend=documents[:, :1] - 1) != 0
    return index - torch.where(begins, index, 0).cummax(1).values


def mixer_forward(original: Callable) -> Callable:
    """The forward of a layer with a recurrence that tells its functions where padding is."""
    signature = inspect.signature(original)

    @wraps(original)
    def forward(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        hidden_states, mask = bound.arguments["hidden_states"], bound.arguments.get("attention_mask")
        is_ours = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        if not is_ours or mask is None or mask.ndim != 2 or mask.shape != hidden_states.shape[:2]:
            return original(self, *args, **kwargs)
        padding_mask = mask.bool()
        if bound.arguments.get("cache_params") is not None:
            bound.arguments["cache_params"] = _CacheWithoutPadding(bound.arguments["cache_params"], padding_mask)
        bound.arguments.setdefault("kwargs", {})["padding_mask"] = padding_mask
        return original(*bound.args, **bound.kwargs)

    return forward


class _CacheWithoutPadding:
    """A cache whose convolution states are the last real inputs, wherever padding stands in the present tokens."""

    def __init__(self, cache: Any, mask: torch.Tensor):
        self._cache, self._mask = cache, mask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs):
        is_new = not self._cache.has_previous_state(layer_idx)
        full = self._cache.update_conv_state(conv_states, layer_idx, state_idx=state_idx, **kwargs)
        layer = self._cache.layers[layer_idx]
        if getattr(layer, "record_past", False):
            return full
        kept = layer.conv_states[state_idx]
        before = full.shape[2] - self._mask.shape[1]
        mask = torch.nn.functional.pad(self._mask, (before, 0), value=not is_new)
        last = stable_order(mask)[:, -kept.shape[2] :]
        found = full.gather(2, last[:, None].expand(-1, full.shape[1], -1))
        kept.copy_(found.masked_fill(~mask.gather(1, last)[:, None], 0))
        return full
