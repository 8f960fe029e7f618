# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The models to compare, of equal width, depth, heads and vocabulary, and the steps that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import lalm
from benchmarks import gates
from lalm.modeling.layers import speed_up

SIZES: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 1 << 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Every causal variant with its defaults, plus the fields named here.
_FIELDS: dict[str, dict[str, Any]] = {"local_global": {"num_local_heads": 4}}
VARIANTS: dict[str, tuple[type[lalm.LalmConfig], dict[str, Any]]] = {
    (name := variant.config.model_type.removeprefix("lalm_")): (
        variant.config,
        {"is_causal": True} | _FIELDS.get(name, {}),
    )
    for variant in lalm.VARIANTS
}
VARIANTS["gated_delta_net"] = (lalm.DeltaNetConfig, {"is_causal": True, "decay": "head"})
# The stock Llama, and the same with our matrix products, which leaves the attention as the difference.
LLAMA, LLAMA_SAME_GEMM = "llama", "llama_same_gemm"
CHECKED = 160  # tokens that the gates check: more than two chunks
# float32. Most errors are below 2e-5; RetNet normalises tiny outputs at initialisation, which amplifies it to 3e-3.
TOLERANCE = 5e-3
_SHORT = 64  # tokens of the step that allocates the optimizer state


def config_of(name: str, **changes) -> Any:
    """The configuration of a variant, or of a Llama whose MLP is as wide as theirs (3 * 512, gated)."""
    if name in (LLAMA, LLAMA_SAME_GEMM):
        return LlamaConfig(**SIZES | {"intermediate_size": 1536, "attn_implementation": "sdpa"} | changes)
    config_class, fields = VARIANTS[name]
    return config_class(**SIZES | fields | changes)


@cache
def build(name: str, **changes) -> Any:
    """The freshly initialised causal language model; cached per name and changes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **changes)).eval()
    if name == LLAMA_SAME_GEMM:
        for layer in model.modules():
            if type(layer) is torch.nn.Linear:
                speed_up(layer)
    return model


def tokens(length: int, vocabulary: int = SIZES["vocab_size"]) -> torch.Tensor:
    """Ids `[1, T]`; a shorter sequence is the prefix of a longer one."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(1))


def facts(model: Any, count: int) -> dict[str, int]:
    """The number of parameters, of those used in matrix products (no embeddings), and of tokens per sample."""
    total = sum(x.numel() for x in model.parameters())
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    tied = model.config.tie_word_embeddings
    return {"parameters": total, "matrix_parameters": total if tied else total - looked_up, "tokens": count}


def train_step(model: Any, ids: torch.Tensor, bfloat16: bool = False) -> Callable[[], None]:
    """Forward with loss, backward, AdamW; no cache. With `bfloat16` the forward pass runs under autocast, as in
    Trainer. The state of AdamW is allocated before."""
    optimizer = _optimizer(model)

    def run(ids: torch.Tensor = ids) -> None:
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run(ids[:, :_SHORT])
    return run


@cache
def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Fill a cache with a sequence and compute the logits of its last token."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


@torch.no_grad()
def fill(model: Any, ids: torch.Tensor, cache: Any = None, piece: int = 4096) -> Any:
    """Add `ids` to a cache, using all cores because this is not timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, torch.multiprocessing.cpu_count()))
    cache = DynamicCache(config=model.config) if cache is None else cache
    for part in ids.split(piece, dim=1):
        model.eval()(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    torch.set_num_threads(threads)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys, values and states in a cache."""
    kept: list[torch.Tensor | None] = []
    for layer in cache.layers:
        kept += [getattr(layer, name, None) for name in ("keys", "values")]
        for kind in ("conv_states", "recurrent_states"):
            kept += getattr(layer, kind, {}).values()
    return sum(x.numel() * x.element_size() for x in kept if x is not None)


def decode(model: Any, cache: Callable[[], Any], count: int) -> Callable[[], None]:
    """Decode `count` tokens one at a time, appending them to `cache()`."""
    ids = tokens(count)

    def run() -> None:
        with torch.no_grad():
            for token in ids.split(1, dim=1):
                model(input_ids=token, past_key_values=cache(), use_cache=True)

    return run


@contextmanager
def specification(model: Any) -> Iterator[None]:
    """Within this context the model runs token by token, through its recurrence."""
    chosen = model.config.linear_attn_implementation
    model.config.linear_attn_implementation = "recurrent"
    try:
        yield
    finally:
        model.config.linear_attn_implementation = chosen


@gates.once
def trains_exactly(model: Any) -> None:
    """Gate: the loss and every parameter gradient equal those of the token-by-token recurrence."""
    ids = tokens(CHECKED, model.config.vocab_size)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    found = gates.parameter_gradients(model, loss())
    with specification(model):
        expected = gates.parameter_gradients(model, loss())
    gates.all_near("training", found, expected, TOLERANCE)


@gates.once
@torch.no_grad()
def decodes_exactly(model: Any) -> None:
    """Gate: prefill and then decoding one token at a time give the logits of the token-by-token recurrence."""
    ids = tokens(CHECKED, model.config.vocab_size)
    head = CHECKED - 8
    cache = DynamicCache(config=model.config)
    model.eval()
    pieces = ids.split([head] + [1] * (CHECKED - head), dim=1)
    logits = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    with specification(model):
        expected = model(input_ids=ids, use_cache=False).logits
    gates.near("logits", torch.cat(logits, dim=1), expected, TOLERANCE)
