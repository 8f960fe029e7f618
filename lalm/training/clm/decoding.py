# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What decoding costs a causal language model: the memory that it holds of a text, and the time of the next tokens."""

import copy
import inspect
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache

from lalm.training.clm.peak_memory import PeakMemory

DECODED, REPEATS = 32, 3
COST_KEYS = (
    "parameters", "weight_bytes", "context", "cache_bytes", "prefill_tokens_per_second", "decode_tokens_per_second",
    "peak_memory_bytes",
)  # fmt: skip


def cache_argument(model: Any) -> str:
    """The argument by which a model takes its cache; Mamba and its kin have another name for it than the others."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names and "past_key_values" not in names else "past_key_values"


@torch.no_grad()
def read_texts(model: Any, input_ids: torch.Tensor) -> Cache:
    """The cache after `input_ids [B, T]`, of the kind that `generate` makes for the model."""
    cache = DynamicCache(config=model.config)
    model.eval()(input_ids=input_ids, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
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
    options = {cache_argument(model): copy.deepcopy(cache), "use_cache": True, "logits_to_keep": 1}
    start = time.perf_counter()
    for _ in range(steps):
        logits = model(input_ids=last, **options).logits
        last = logits[:, -1].argmax(dim=-1, keepdim=True)
    if last.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def inference_cost(model: Any, input_ids: torch.Tensor) -> dict[str, float | None]:
    """Memory and speed of one sequence: reading it, then generating 32 tokens.

    Speeds are medians of three runs after a first one that is not timed.

    Args:
        input_ids: `[1, N]`, on the model's device.

    Returns:
        `COST_KEYS`. `context` is N, `cache_bytes` what the cache holds after N tokens, `peak_memory_bytes` the weights
        and the largest amount of memory in use beside them while the N tokens are read. A figure is None where it
        cannot be measured: the peak outside Linux, cache and decoding of a model without transformers' cache.
    """
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    read_texts(model, input_ids)  # compiles kernels, and makes what libraries keep
    with PeakMemory(model.device) as peak:
        cache = read_texts(model, input_ids)
    figures: dict[str, float | None] = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "weight_bytes": weights,
        "context": input_ids.shape[1],
        "cache_bytes": None,
        "prefill_tokens_per_second": None,
        "decode_tokens_per_second": None,
        "peak_memory_bytes": None if peak.rise is None else weights + peak.rise,
    }
    seconds = [prefill_seconds(model, input_ids) for _ in range(REPEATS)]
    figures["prefill_tokens_per_second"] = round(input_ids.shape[1] / statistics.median(seconds), 1)
    try:
        figures["cache_bytes"] = state_bytes(cache)
    except ValueError:  # a state of the model's own, not of transformers' cache
        return figures
    last = input_ids[:, -1:]
    decoding_seconds(model, cache, last, 2)
    seconds = [decoding_seconds(model, cache, last, DECODED) for _ in range(REPEATS)]
    figures["decode_tokens_per_second"] = round(DECODED / statistics.median(seconds), 1)
    return figures


def prefill_seconds(model: Any, input_ids: torch.Tensor) -> float:
    """Seconds that reading `input_ids [B, T]` into a cache takes."""
    start = time.perf_counter()
    read_texts(model, input_ids)
    if input_ids.is_cuda:
        torch.cuda.synchronize()
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
