# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation alone prints: a row for each model, of its quality on one text and of its memory and speed."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Trainer

from lalm.errors import one_line
from lalm.training.clm.decoding import DECODED, inference_cost
from lalm.training.clm.packing import PackedDataset
from lalm.training.results import write_json

logger = logging.getLogger(__name__)

SPLITS = {"eval": "validation", "test": "test"}


def bits_per_byte(loss: float, dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """The loss (nats per token) as bits per byte of UTF-8 text, which can be compared between tokenizers."""
    tokens = dataset.stream.tokens[: dataset.tokens_covered]
    text: Any = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return loss / math.log(2) * len(tokens) / max(1, len(text.encode()))


def measured_ids(dataset: PackedDataset, config: Any, length: int) -> torch.Tensor:
    """The first tokens of a split, repeated if it has fewer: [1, length], less for a shorter position table."""
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        length = max(1, min(length, positions - DECODED))
    return torch.from_numpy(np.resize(dataset.stream.tokens, length).astype(np.int64))[None]


def cost_figures(trainer: Trainer, dataset: PackedDataset, length: int) -> dict[str, float | None]:
    """`inference_cost` of a Trainer's model on the text of a split, by the first process.

    Only the number of parameters for a model that cannot be measured so: one in pieces, or with another interface.
    """
    if not trainer.is_world_process_zero():
        return {}
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    parameters = sum(weight.numel() for weight in model.parameters())
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.warning("speed and memory are not measured: the weights are spread over the processes")
        return {"parameters": parameters}
    ids = measured_ids(dataset, model.config, length).to(model.device)
    try:
        return inference_cost(model.eval(), ids)
    except (TypeError, NotImplementedError, RuntimeError) as error:
        logger.warning("%s: speed and memory are not measured: %s", type(model).__name__, one_line(error))
        return {"parameters": parameters}


def size(count: float) -> str:
    """Bytes in the unit of their size."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def cells(results: Mapping[str, Any]) -> dict[str, str]:
    """The columns of one model, those without a figure left out."""
    found = {"parameters": f"{results['parameters'] / 1e6:,.3g}M"} if results.get("parameters") else {}
    for prefix, split in SPLITS.items():
        if f"{prefix}_perplexity" in results:
            found[f"{split} perplexity"] = f"{results[f'{prefix}_perplexity']:,.2f}"
            found[f"{split} accuracy"] = f"{results[f'{prefix}_accuracy']:.4f}"
            found[f"{split} bits per byte"] = f"{results[f'{prefix}_bits_per_byte']:.3f}"
    if results.get("cache_bytes") is not None:
        found["cache per sequence"] = f"{size(results['cache_bytes'])} ({int(results['context']):,} tokens)"
    for name, column in (("prefill", "prefill tokens/s"), ("decode", "decoding tokens/s")):
        if results.get(f"{name}_tokens_per_second") is not None:
            speed = results[f"{name}_tokens_per_second"]
            found[column] = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    if results.get("peak_memory_bytes") is not None:
        found["peak memory"] = size(results["peak_memory_bytes"])
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a row for each model.

    Args:
        rows: the figures of a model, with its name as "model" and its type as "model_type".
    """
    shown = [cells(row) for row in rows]
    columns = list(dict.fromkeys(name for row in shown for name in row))
    lines = [f"| model | type | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for row, found in zip(rows, shown, strict=True):
        texts = [str(row["model"]), f"`{row['model_type']}`", *(found.get(name, "") for name in columns)]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def write_comparison(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table, and write it and its figures as comparison.md and comparison.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", {str(row["model"]): dict(row) for row in rows})
    (folder / "comparison.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows), flush=True)
