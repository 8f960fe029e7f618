# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The loss curve of a run as a PNG."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def loss_points(log_history: list[dict]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return (step, training loss) and (step, validation loss) from the Trainer's log."""
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    return train, sorted(set(validation))


def write_loss_curve(log_history: list[dict], path: Path, title: str, unit: str = " (nats per token)") -> bool:
    """Draw the training and validation loss of one run, as `write_loss_curves` does."""
    train, validation = loss_points(log_history)
    return bool(train) and write_loss_curves({"training": train, "validation": validation}, path, title, unit)


def write_loss_curves(
    curves: dict[str, list[tuple[int, float]]], path: Path, title: str, unit: str = " (nats per token)"
) -> bool:
    """Draw losses over the steps; False if there is nothing to draw or matplotlib is absent."""
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed: no loss curve is drawn (pip install 'lalm[plot]')")
        return False
    # no pyplot: its global state and window backends have no place in a training process
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        # a few points say nothing of the way between them
        few = "o" if len(points) < 3 else "o-"
        axes.plot(*zip(*points, strict=True), few if len(points) < 10 else "-", label=name, linewidth=1)
    axes.set(xlabel="step", ylabel=f"loss{unit}", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    return True
