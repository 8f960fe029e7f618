# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables between the `<!-- variants -->` marks of README.md, all of it read from the code.

    python docs/variant_tables.py           # rewrites them
    python docs/variant_tables.py --check   # exit code 1 if they are out of date

Sizes are counted on the meta device; state bytes are those of a cache after two forwards of unequal length.
"""

import sys
from pathlib import Path

import torch
from transformers import DynamicCache

import lalm

README = Path(__file__).resolve().parents[1] / "README.md"
MARKS = ("<!-- variants -->\n", "<!-- /variants -->\n")
WIDTH, VOCABULARY, TOKENS = 1024, 32000, 2048


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
    """Per kind of layer, the bytes of one sequence after `TOKENS` tokens, and whether fewer tokens take as many."""
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
    """Bytes of every tensor that a cache layer keeps."""
    kept = [getattr(layer, name, None) for name in ("keys", "values")]
    for kind in ("conv_states", "recurrent_states"):
        kept += getattr(layer, kind, {}).values()
    return sum(x.numel() * x.element_size() for x in kept if x is not None)


def size_table() -> str:
    lines = [
        "| `model_type` | parameters, 24 layers | of them in the layers | state a layer and sequence |",
        "|---|---|---|---|",
    ]
    for variant in lalm.VARIANTS:
        total, inner = parameters(variant)
        states = ", ".join(
            f"{size / 1024:,.0f} KiB{'' if fixed else f' at {TOKENS} tokens'}" for size, fixed in state_bytes(variant)
        )
        lines.append(f"| `{variant.config.model_type}` | {total / 1e6:.1f}M | {inner / 1e6:.1f}M | {states} |")
    softmax = 2 * TOKENS * WIDTH * 4
    lines.append(f"| softmax, as wide | | | {softmax / 1024:,.0f} KiB at {TOKENS} tokens, growing |")
    return "\n".join(lines)


def accepts(variant, **fields) -> str:
    """Whether the configuration takes these fields."""
    try:
        config_of(variant, num_hidden_layers=4, **fields)
    except ValueError:
        return ""
    return "yes"


FEATURES = {
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
    """The text between the marks."""
    sizes = f"At width {WIDTH}, {VOCABULARY:,} tokens of vocabulary and the other defaults of each variant, float32:"
    features = "What can be chosen, each with padding and packing, and in causal models with caches and `generate`:"
    return f"{sizes}\n\n{size_table()}\n\n{features}\n\n{feature_table()}\n"


def rewritten(text: str) -> str:
    """`text` with fresh tables between the marks."""
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"{README} has no marks {MARKS[0].strip()} ... {MARKS[1].strip()}")
    return f"{before}{MARKS[0]}{tables()}{MARKS[1]}{after}"


if __name__ == "__main__":
    current = README.read_text(encoding="utf-8")
    fresh = rewritten(current)
    if "--check" in sys.argv[1:]:
        sys.exit(f"{README.name} is out of date: python docs/variant_tables.py" if fresh != current else 0)
    README.write_text(fresh, encoding="utf-8")
