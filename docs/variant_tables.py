# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables of variants in README.md and docs/models.md, between `<!-- variants -->` marks, from the code.

    python docs/variant_tables.py           # rewrites them
    python docs/variant_tables.py --check   # exit code 1 if they are out of date

Parameters are counted on the meta device; state sizes are read from caches after forward passes of two lengths.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import DynamicCache

import lalm

ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- variants -->\n", "<!-- /variants -->\n")
WIDTH, VOCABULARY, TOKENS = 1024, 32000, 2048


def source(variant) -> str:
    """The name of a variant's files, e.g. "delta_net"."""
    return variant.config.__module__.rpartition("configuration_")[2]


def paper(variant) -> str:
    """What the variant is and its papers, from the first line of its configuration file."""
    first = (sys.modules[variant.config.__module__].__doc__ or "").splitlines()[0]
    named = first.removeprefix("Configuration of ").rstrip(".")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", named)


def overview_table() -> str:
    """For the README: every variant, its papers and its card."""
    lines = ["| `model_type` | model | card |", "|---|---|---|"]
    for variant in lalm.VARIANTS:
        card = f"[{source(variant)}.md](model_cards/{source(variant)}.md)"
        lines.append(f"| `{variant.config.model_type}` | {paper(variant)} | {card} |")
    return "\n".join(lines) + "\n"


def options_table() -> str:
    """The fields that a variant adds to those that all share, with their values if there are only a few."""
    lines = ["| `model_type` | classes | fields of its own |", "|---|---|---|"]
    shared = {field.name for field in dataclasses.fields(lalm.LalmConfig)}
    for variant in lalm.VARIANTS:
        own = [field for field in dataclasses.fields(variant.config) if field.name not in shared]
        named = ", ".join(f"`{field.name}`{values(field)}" for field in own)
        prefix = variant.config.__name__.removesuffix("Config")
        lines.append(
            f"| [`{variant.config.model_type}`](../model_cards/{source(variant)}.md) | `{prefix}...` | {named} |"
        )
    return "\n".join(lines)


def values(field) -> str:
    """ " (a, b, c)" for a field of literal strings."""
    literals = [value for value in get_args(field.type) if isinstance(value, str)]
    return f" ({', '.join(literals)})" if literals else ""


def config_of(variant, **changes):
    """The defaults of a variant at a common width, causal."""
    common = {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "is_causal": True, "num_key_value_heads": None}
    if WIDTH % variant.config().num_attention_heads:
        common["num_attention_heads"] = 16
    return variant.config(**common | changes)


def parameters(variant) -> tuple[int, int]:
    """(all, without embeddings and head) of the causal language model with 24 layers, on the meta device."""
    with torch.device("meta"):
        model = variant.models["AutoModelForCausalLM"](config_of(variant, num_hidden_layers=24))
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for layer in model.model.layers for p in layer.parameters())


def state_bytes(variant) -> list[tuple[int, bool]]:
    """Per kind of layer: the cache bytes of one sequence, and whether they are independent of its length."""
    config = config_of(variant, vocab_size=16, intermediate_size=8, num_hidden_layers=3)
    model = variant.models["AutoModel"](config).eval()
    sizes = []
    for length in (TOKENS // 2, TOKENS):
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
        sizes.append([layer_bytes(layer) for layer in cache.layers])
    return sorted({(long, short == long) for short, long in zip(*sizes, strict=True)})


def layer_bytes(layer) -> int:
    """Bytes of all tensors in a cache layer."""
    kept = [getattr(layer, name, None) for name in ("keys", "values")]
    for kind in ("conv_states", "recurrent_states"):
        kept += getattr(layer, kind, {}).values()
    return sum(x.numel() * x.element_size() for x in kept if x is not None)


def size_table() -> str:
    lines = [
        "| `model_type` | parameters, 24 layers | without embeddings and head | state per layer and sequence |",
        "|---|---|---|---|",
    ]
    for variant in lalm.VARIANTS:
        total, inner = parameters(variant)
        states = ", ".join(
            f"{size / 1024:,.0f} KiB{'' if fixed else f' at {TOKENS} tokens'}" for size, fixed in state_bytes(variant)
        )
        lines.append(f"| `{variant.config.model_type}` | {total / 1e6:.1f}M | {inner / 1e6:.1f}M | {states} |")
    softmax = 2 * TOKENS * WIDTH * 4
    lines.append(
        f"| softmax attention of the same width | | | {softmax / 1024:,.0f} KiB at {TOKENS} tokens, growing |"
    )
    return "\n".join(lines)


def accepts(variant, **fields) -> str:
    """Whether the configuration accepts these fields."""
    try:
        config_of(variant, num_hidden_layers=4, **fields)
    except ValueError:
        return ""
    return "yes"


FEATURES: dict[str, dict[str, Any]] = {
    "causal LM, classifiers": {},
    "encoder, masked LM": {"is_causal": False},
    "full softmax layers": {"full_attention_layers": [1]},
    "sliding-window layers": {"sliding_attention_layers": [1], "sliding_window": 64},
    "short convolution on q, k, v": {"use_short_conv": True},
    "rotary positions": {"position_embedding_type": "rope"},
    "learned positions": {"position_embedding_type": "learned"},
    "q and k norm": {"qk_norm": True},
}


def feature_table() -> str:
    names = [f"`{variant.config.model_type.removeprefix('lalm_')}`" for variant in lalm.VARIANTS]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for feature, fields in FEATURES.items():
        lines.append(f"| {feature} | {' | '.join(accepts(variant, **fields) for variant in lalm.VARIANTS)} |")
    return "\n".join(lines)


def tables() -> str:
    """The generated part of docs/models.md."""
    sizes = (
        f"Width {WIDTH}, a vocabulary of {VOCABULARY:,} tokens, otherwise the defaults of each variant, in float32:"
    )
    features = "Supported features, each with padding and packing, and in causal models with caches and `generate`:"
    return f"{options_table()}\n\n{sizes}\n\n{size_table()}\n\n{features}\n\n{feature_table()}\n"


def rewritten(text: str, fresh: str) -> str:
    """`text` with `fresh` between the marks."""
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"a page has no marks {MARKS[0].strip()} ... {MARKS[1].strip()}")
    return f"{before}{MARKS[0]}{fresh}{MARKS[1]}{after}"


if __name__ == "__main__":
    for page, fresh in ((ROOT / "README.md", overview_table()), (ROOT / "docs/models.md", tables())):
        current = page.read_text(encoding="utf-8")
        new = rewritten(current, fresh)
        if "--check" not in sys.argv[1:]:
            page.write_text(new, encoding="utf-8")
        elif new != current:
            sys.exit(f"{page.name} is out of date: python docs/variant_tables.py")
