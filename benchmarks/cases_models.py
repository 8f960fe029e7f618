# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Language models of 6 layers, 512 wide, against a Llama of equal width, depth, heads and MLP on SDPA."""

from __future__ import annotations

import time
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch

from benchmarks import gates
from benchmarks.memory import in_rounds
from benchmarks.models import (
    LLAMA,
    LLAMA_SAME_GEMM,
    SIZES,
    VARIANTS,
    build,
    cache_bytes,
    decode,
    decodes_exactly,
    facts,
    fill,
    prefill,
    tokens,
    train_step,
    trains_exactly,
)
from benchmarks.registry import Comparison, Ratio, Run, register

STEPS = 8  # tokens decoded a sample


def against_llama(job: Any, gate: Any, length: int, target: float, what: str, baseline: str = LLAMA) -> Comparison:
    """`job(model, ids)` of every variant and of a Llama."""
    ids = tokens(length)
    runs = {}
    for name in (baseline, *VARIANTS):
        model = build(name)
        check = None if name == baseline else partial(gate, model)
        runs[name] = Run(job(model, ids), check, facts(model, length))
    return Comparison(runs, [Ratio(name, baseline, f"[1, {length}] {what}", target) for name in VARIANTS])


def against_shorter(short: int, long: int, names: tuple[str, ...]) -> Comparison:
    """Train steps of `long` against `short` sequences, with one layer (Based: three, one of each kind) and no head.

    Short steps vary most, so the mean of four is taken.
    """
    runs, ratios = {}, []
    for name in names:
        model = build(name, num_hidden_layers=3 if name == "based" else 1)
        for length in (long, short):
            run = partial(backbone_step, model.model, tokens(length), 4 if length == short else 1)
            runs[f"{name} {length}"] = Run(run, partial(trains_exactly, model), facts(model, length))
        ratios.append(Ratio(f"{name} {long}", f"{name} {short}", "one layer, fwd+bwd", 8.8, at_most=True))
    return Comparison(runs, ratios)


def backbone_step(backbone: Any, ids: torch.Tensor, times: int) -> float:
    """Seconds per forward and backward pass, averaged over `times`."""
    start = time.perf_counter()
    for _ in range(times):
        backbone.train()
        out = backbone(input_ids=ids, use_cache=False).last_hidden_state
        out.backward(torch.ones_like(out))
        backbone.zero_grad()
    return (time.perf_counter() - start) / times


def decoding(early: int, middle: int, late: int) -> Comparison:
    """Decoding after `middle` tokens against Llama, and after `late` against after `early`."""

    @cache
    def filled(name: str, length: int) -> Any:
        shorter = max((x for x in (early, middle) if x < length and name != LLAMA), default=0)
        before = deepcopy(filled(name, shorter)) if shorter else None
        return fill(build(name), tokens(length)[:, shorter:], before)

    def ready(name: str, length: int) -> None:
        filled(name, length)  # now, so that it is not timed
        if name != LLAMA:
            decodes_exactly(build(name))

    runs, ratios, shape = {}, [], f"{STEPS} tokens, one by one"
    for name in (LLAMA, *VARIANTS):
        model = build(name)
        for length in (middle,) if name == LLAMA else (early, middle, late):
            run, gate = decode(model, partial(filled, name, length), STEPS), partial(ready, name, length)
            runs[f"{name} after {length}"] = Run(run, gate, facts(model, STEPS))
        if name != LLAMA:
            ratios.append(Ratio(f"{name} after {middle}", f"{LLAMA} after {middle}", shape, 3))
            ratios.append(Ratio(f"{name} after {late}", f"{name} after {early}", shape, 1.1, at_most=True))
    return Comparison(runs, ratios)


def decoding_by_length(lengths: tuple[int, ...], names: tuple[str, ...]) -> Comparison:
    """Decoding after contexts of these (ascending) lengths, against the Llama with our matrix products."""
    runs, ratios = {}, []
    for name in (LLAMA_SAME_GEMM, *names):
        model, cache, before = build(name), None, 0
        gate = None if name == LLAMA_SAME_GEMM else partial(decodes_exactly, model)
        for length in lengths:
            cache = fill(model, tokens(length)[:, before:], deepcopy(cache))
            context = {"context": length, "cache_bytes": cache_bytes(cache)}
            run = decode(model, partial(_same, cache), STEPS)
            runs[f"{name} after {length}"] = Run(run, gate, facts(model, STEPS) | context)
            if name != LLAMA_SAME_GEMM:
                baseline = f"{LLAMA_SAME_GEMM} after {length}"
                ratios.append(Ratio(f"{name} after {length}", baseline, f"{STEPS} tokens, one by one", 1))
            before = length
    return Comparison(runs, ratios)


def _same(cache: Any) -> Any:
    return cache


def peak_memory(lengths: tuple[int, ...]) -> Comparison:
    """Peak memory of a train step, excluding model, optimizer state and libraries; each model in its own process."""
    runs, ratios, peak = {}, [], in_rounds("train_step", (LLAMA, *VARIANTS), lengths)
    for name in (LLAMA, *VARIANTS):
        gate = None if name == LLAMA else partial(trains_exactly, build(name))
        for length in lengths:
            run = partial(peak, name, length)
            runs[f"{name} {length}"] = Run(run, gate, facts(build(name), length))
            if name != LLAMA and length == lengths[-1]:
                shape = f"[1, {length}] train step"
                ratios.append(Ratio(f"{name} {length}", f"{LLAMA} {length}", shape, 1.1, at_most=True))
    return Comparison(runs, ratios, unit="MiB")


def autocast(names: tuple[str, ...], length: int = 2048) -> Comparison:
    """A train step under bfloat16 autocast against the same in float32."""
    runs, ratios = {}, []
    for name in names:
        model = build(name)
        step, under_autocast = (train_step(model, tokens(length), bfloat16) for bfloat16 in (False, True))
        gate = None if name == LLAMA else partial(trains_exactly, model)
        runs[f"{name} float32"] = Run(step, gate, facts(model, length))
        runs[f"{name} bfloat16"] = Run(under_autocast, partial(survives_autocast, model))
        ratios.append(Ratio(f"{name} bfloat16", f"{name} float32", f"[1, {length}] train step", 1.5))
    return Comparison(runs, ratios, dtype="bfloat16 autocast")


def survives_autocast(model: Any) -> None:
    """Gate: the loss under autocast equals that of float32 to 1 %; bfloat16 has 8 bits of precision."""
    ids = tokens(160)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids, use_cache=False).loss
        with torch.autocast("cpu", torch.bfloat16):
            gates.near("loss", model(input_ids=ids, labels=ids, use_cache=False).loss, expected, 1e-2)


def against_package(blindspot: int, length: int = 2048) -> Comparison:
    """Our local-global model of 58M parameters against the package it is converted from, with the same weights."""
    from linear_attention_transformer import LinearAttentionTransformerLM

    from lalm.convert.linear_attention_transformer import from_linear_attention_transformer

    options = {"num_tokens": 20000, "dim": 512, "depth": 12, "max_seq_len": 8192, "heads": 8, "causal": True}
    options |= {"n_local_attn_heads": 4, "blindspot_size": blindspot}
    torch.manual_seed(0)
    theirs = LinearAttentionTransformerLM(**options)
    ours = from_linear_attention_transformer(theirs.state_dict(), **options)
    ids = tokens(length)

    def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
        out = model(ids)
        return out if model is theirs else out.logits

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:])

    def same() -> None:
        first = ids[:, :256]
        with torch.no_grad():
            gates.near("logits", logits(ours.eval(), first), logits(theirs.eval(), first), 1e-4)
        found, expected = (gates.parameter_gradients(model, loss(model, first)) for model in (ours, theirs))
        pairs = {"embeddings": ("model.embed_tokens.weight", "token_emb.weight"), "loss": ("loss", "loss")}
        for what, (a, b) in pairs.items():
            gates.near(f"gradient of {what}", found[a], expected[b], 1e-3)

    def step(model: Any) -> None:
        loss(model.train(), ids).backward()
        model.zero_grad()

    runs = {
        "local_global": Run(partial(step, ours), same, facts(ours, length)),
        "package": Run(partial(step, theirs), same, facts_of_package(theirs, length)),
    }
    shape = f"[1, {length}] fwd+bwd, 12 layers"
    return Comparison(runs, [Ratio("local_global", "package", shape, 1.5)])


def facts_of_package(model: torch.nn.Module, length: int) -> dict[str, int]:
    return {"parameters": sum(x.numel() for x in model.parameters()), "tokens": length}


_LENGTHS = (512, 2048, 8192)
_CONTEXTS = (*_LENGTHS, 16384)
# One per recurrence.
_KINDS = ("based", "gla", "gated_delta_net", "local_global", "lam")
_LONG: dict[str, Any] = {"warm_up": False, "least_rounds": 2, "long": True}
_MODEL = f"{SIZES['num_hidden_layers']} x {SIZES['hidden_size']}"
# One round of the longest: two would take four of the twenty minutes.
for _length, _target, _rounds in zip(_LENGTHS, (0.9, 1.1, 2.0), (3, 2, 1), strict=True):
    register(
        f"train_{_length}",
        f"train step, {_MODEL}, every causal variant against Llama on SDPA, T = {_length}",
        partial(against_llama, train_step, trains_exactly, _length, _target, "train step"),
        budget=15,
        **_LONG | {"least_rounds": _rounds, "long": _length > 512},
    )
for _length, _rounds in zip(_LENGTHS, (3, 2, 1), strict=True):
    register(
        f"same_gemm_train_{_length}",
        f"train step, {_MODEL}, every causal variant against Llama on SDPA with our matrix products, T = {_length}",
        partial(against_llama, train_step, trains_exactly, _length, 1, "train step", LLAMA_SAME_GEMM),
        budget=15,
        **_LONG | {"least_rounds": _rounds, "extra": True},
    )
register(
    "same_gemm_decode",
    f"decoding, {_MODEL}, after 512 to {_CONTEXTS[-1]:,} tokens, against Llama with our matrix products",
    partial(decoding_by_length, _CONTEXTS, _KINDS),
    budget=30,
    long=True,
    extra=True,
)
for _length, _target, _budget in zip(_LENGTHS, (0.9, 1.15, 2.0), (10, 20, 30), strict=True):
    register(
        f"prefill_{_length}",
        f"prefill, {_MODEL}, every causal variant against Llama on SDPA, T = {_length}",
        partial(against_llama, prefill, decodes_exactly, _length, _target, "prefill"),
        budget=_budget,
        **_LONG if _length > 2048 else {},
    )
register(
    "decode",
    f"decoding, {_MODEL}, after 8,192 tokens against Llama with its cache; after 32,768 against after 512",
    partial(decoding, 512, 8192, 32768),
    budget=15,
    long=True,
)
for _name, _variants, _extra in (("linear_time", _KINDS, False), ("linear_time_all", tuple(VARIANTS), True)):
    register(
        _name,
        f"train step of one layer, T = 32,768 against T = 4,096: {', '.join(_variants)}",
        partial(against_shorter, 4096, 32768, _variants),
        budget=30,
        warm_up=False,
        least_rounds=1,
        long=True,
        extra=_extra,
    )
register(
    "memory",
    f"peak memory of a train step, {_MODEL}, against Llama on SDPA, T = {_LENGTHS[-1]}",
    partial(peak_memory, _LENGTHS),
    budget=0,
    warm_up=False,
    least_rounds=1,
    long=True,
)
register(
    "autocast",
    "train step under bfloat16 autocast against float32, T = 2,048: GLA",
    partial(autocast, ("gla",)),
    budget=20,
    **_LONG,
)
register(
    "autocast_all",
    "train step under bfloat16 autocast against float32, T = 2,048: every variant and Llama",
    partial(autocast, (LLAMA, *VARIANTS)),
    budget=60,
    extra=True,
    **_LONG,
)
for _name, _blindspot in (("package", 1), ("package_blindspot", 64)):
    register(
        _name,
        f"local-global model of 12 x 512 against linear-attention-transformer, T = 2,048, blindspot {_blindspot}",
        partial(against_package, _blindspot),
        budget=20,
        **_LONG | {"least_rounds": 1},
    )
