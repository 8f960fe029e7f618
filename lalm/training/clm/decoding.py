# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What decoding costs a causal language model: the memory that it holds of a text, and the time of the next tokens."""

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache


@torch.no_grad()
def read_texts(model: Any, input_ids: torch.Tensor) -> Cache:
    """The cache after `input_ids [B, T]`, of the kind that `generate` makes for the model."""
    cache = DynamicCache(config=model.config)
    model.eval()(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def state_bytes(cache: Cache) -> int:
    """Bytes that a cache holds of one text: keys and values, recurrent and convolution states.

    Counted over the tensors themselves, whatever the layers call them. What has no batch dimension, the number of
    tokens seen, is not part of a text's memory.

    Raises:
        ValueError: the cache has read nothing yet.
    """
    states = [state for layer in cache.layers for state in _states(layer)]
    if not states:
        raise ValueError("The cache is empty: run the model with past_key_values=cache first.")
    return sum(state[0].numel() * state.element_size() for state in states)


def _states(layer: Any) -> Iterator[torch.Tensor]:
    for value in vars(layer).values():
        for item in value.values() if isinstance(value, dict) else [value]:
            if isinstance(item, torch.Tensor) and item.ndim > 1:
                yield item


@torch.no_grad()
def decoding_seconds(model: Any, cache: Cache, last: torch.Tensor, steps: int) -> float:
    """Seconds that `steps` greedy tokens take after `cache`, for all B texts of the batch together.

    Args:
        cache: of `read_texts`; a copy of it is continued, made before the clock starts.
        last: `[B, 1]`, the token that comes next, whose successors are generated.
    """
    cache = copy.deepcopy(cache)
    start = time.perf_counter()
    for _ in range(steps):
        logits = model(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        last = logits[:, -1].argmax(dim=-1, keepdim=True)
    return time.perf_counter() - start


@torch.no_grad()
def decoding_error(model: Any, input_ids: torch.Tensor, steps: int) -> float:
    """How far decoding is from one forward pass: the largest difference of logits over the largest logit.

    Compared are the last `steps` positions of `input_ids [B, T]`, read at once and one by one through the cache. A
    figure of speed is worth nothing without it.
    """
    expected = model.eval()(input_ids=input_ids, use_cache=False).logits[:, -steps:]
    cache = read_texts(model, input_ids[:, :-steps])
    pieces = input_ids[:, -steps:].split(1, dim=1)
    found = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    return ((torch.cat(found, dim=1) - expected).abs().max() / expected.abs().max()).item()
