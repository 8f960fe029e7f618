# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Metrics of a run, collected from the Trainer and saved with the model."""

import json
import os
from pathlib import Path
from typing import Any

EVALUATION_KEYS = ("loss", "perplexity", "accuracy", "tokens_scored")


def training_figures(trainer: Any) -> dict[str, float]:
    """Return steps, tokens, speed and last loss of the training, and the evaluation before its first step."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    figures = {
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "tokens_per_second": round(trainer.throughput.overall(trainer.state), 1),
        "train_seconds": round(trainer.throughput.seconds, 1),
    }
    if losses:
        figures |= {"first_loss": losses[0], "final_loss": losses[-1]}
    before: dict = next((entry for entry in history if entry["step"] == 0 and "eval_loss" in entry), {})
    figures |= {f"before_{key}": before[f"eval_{key}"] for key in EVALUATION_KEYS if f"eval_{key}" in before}
    return figures


def write_json(path: Path, values: dict) -> None:
    """Write `values`, all of them or nothing."""
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(staging, path)


def read_json(path: Path) -> dict:
    """Read what `write_json` wrote; an absent or broken file is an empty dict."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def save_results(folder: Path, name: str, figures: dict) -> None:
    """Write `<name>_results.json` and add to `all_results.json`; for one process only."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}_results.json", figures)
    write_json(folder / "all_results.json", read_json(folder / "all_results.json") | figures)


def summary_lines(results: dict) -> list[str]:
    """Return the closing lines of a run."""
    lines = []
    for prefix, label in (("eval", "validation"), ("test", "test")):
        if f"{prefix}_perplexity" not in results:
            continue
        line = f"{label} perplexity {results[f'{prefix}_perplexity']:.2f}"
        if prefix == "eval" and "before_perplexity" in results:
            line += f" (before training {results['before_perplexity']:.2f})"
        scored = int(results[f"{prefix}_tokens_scored"])
        lines.append(f"{line}, accuracy {results[f'{prefix}_accuracy']:.4f} over {scored:,} tokens")
    if results.get("tokens_per_second"):
        lines.append(f"{results['tokens_seen']:,} tokens seen, {results['tokens_per_second']:,.0f} tokens/s")
    return lines
