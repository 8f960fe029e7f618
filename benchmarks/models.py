# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The models that are compared, of equal width, depth, heads and vocabulary, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import lalm
from benchmarks import gates

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
# Every causal variant; what is not named is its default.
VARIANTS: dict[str, tuple[type[lalm.LalmConfig], dict[str, Any]]] = {
    "linear": (lalm.LinearAttentionConfig, {}),
    "gla": (lalm.GLAConfig, {}),
    "retnet": (lalm.RetNetConfig, {}),
    "delta_net": (lalm.DeltaNetConfig, {}),
    "gated_delta_net": (lalm.DeltaNetConfig, {"use_decay_gate": True}),
    "based": (lalm.BasedConfig, {}),
    "local_global": (lalm.LocalGlobalConfig, {"num_local_heads": 4}),
    "lam": (lalm.LamConfig, {"is_causal": True}),
}
LLAMA = "llama"
CHECKED = 160  # tokens of the gates: more than two chunks
# float32. Most are within 2e-5; the norms of RetNet's fresh, tiny outputs make 3e-3 of the same rounding.
TOLERANCE = 5e-3
_SHORT = 64  # tokens of a step that only makes what later ones find


def config_of(name: str, **changes) -> Any:
    """A variant's configuration, or with the width of their MLP (3 * 512, gated) Llama's."""
    if name == LLAMA:
        return LlamaConfig(**SIZES | {"intermediate_size": 1536, "attn_implementation": "sdpa"} | changes)
    config_class, fields = VARIANTS[name]
    return config_class(**SIZES | fields | changes)


@cache
def build(name: str, **changes) -> Any:
    """The causal language model, with the weights that training starts from; one object a name and changes."""
    torch.manual_seed(0)
    config = config_of(name, **changes)
    if name == LLAMA:
        return LlamaForCausalLM(config).eval()
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(length: int, vocabulary: int = SIZES["vocab_size"]) -> torch.Tensor:
    """Ids `[1, T]`; a shorter text is the beginning of a longer one."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(1))


def facts(model: Any, count: int) -> dict[str, int]:
    """Parameters, those that multiply every token (all but the embeddings), and tokens of a sample."""
    total = sum(x.numel() for x in model.parameters())
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    tied = model.config.tie_word_embeddings
    return {"parameters": total, "matrix_parameters": total if tied else total - looked_up, "tokens": count}


def train_step(model: Any, ids: torch.Tensor, bfloat16: bool = False) -> Callable[[], None]:
    """Forward with loss, backward, AdamW; without a cache, which nobody needs for training. With `bfloat16` the
    forward pass runs under autocast, as Trainer does it. The averages of AdamW exist already."""
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
    """The cache of a text and the logits after its last token."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


@torch.no_grad()
def fill(model: Any, ids: torch.Tensor, cache: Any = None, piece: int = 4096) -> Any:
    """`ids` added to a cache, on all cores: it is not this that is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, torch.multiprocessing.cpu_count()))
    cache = DynamicCache(config=model.config) if cache is None else cache
    for part in ids.split(piece, dim=1):
        model.eval()(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    torch.set_num_threads(threads)
    return cache


def decode(model: Any, cache: Callable[[], Any], count: int) -> Callable[[], None]:
    """`count` tokens, one at a time, after what `cache()` holds, which they are added to."""
    ids = tokens(count)

    def run() -> None:
        with torch.no_grad():
            for token in ids.split(1, dim=1):
                model(input_ids=token, past_key_values=cache(), use_cache=True)

    return run


@contextmanager
def specification(model: Any) -> Iterator[None]:
    """Inside, the model steps through its recurrences."""
    chosen = model.config.linear_attn_implementation
    model.config.linear_attn_implementation = "recurrent"
    try:
        yield
    finally:
        model.config.linear_attn_implementation = chosen


@gates.once
def trains_exactly(model: Any) -> None:
    """Gate: loss and gradients of every parameter are those of the recurrent specification."""
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
    """Gate: the logits of a text in one piece, and of its last tokens one by one, are the specification's."""
    ids = tokens(CHECKED, model.config.vocab_size)
    head = CHECKED - 8
    cache = DynamicCache(config=model.config)
    model.eval()
    pieces = ids.split([head] + [1] * (CHECKED - head), dim=1)
    logits = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    with specification(model):
        expected = model(input_ids=ids, use_cache=False).logits
    gates.near("logits", torch.cat(logits, dim=1), expected, TOLERANCE)
