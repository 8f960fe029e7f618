# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Numbers that are not finite end a run: the Trainer itself would log a loss of 0 and save the weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lalm.errors import UserError

REMEDY = "lower --learning_rate or lengthen --warmup_steps, and train again with --start_over"


def broken_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that hold NaN or infinity."""
    return [name for name, weight in model.named_parameters() if not is_finite(weight)]


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether every number of a tensor is finite; one without storage counts as finite."""
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def check_norm(norm: float, step: int) -> None:
    """Refuse to go on from gradients whose norm is NaN or infinite.

    Not for fp16, where a norm is infinite whenever the loss scale is too high, and that step is left out.
    """
    if not math.isfinite(norm):
        raise UserError(f"the training has diverged: the gradient's norm at step {step} is {norm:g}; {REMEDY}")


def check_loss(loss: torch.Tensor, step: int, rate: float) -> None:
    """Refuse to go on from a loss that is NaN or infinite.

    Args:
        step: steps done so far.
    """
    if not is_finite(loss):
        raise UserError(
            f"the training has diverged: the loss of step {step + 1} is {loss.item():g} (learning rate {rate:g}); no "
            f"checkpoint was made of it; {REMEDY}"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """Refuse to save weights that are NaN or infinite over those of an earlier step."""
    if broken := broken_weights(model):
        raise UserError(
            f"the training has diverged: after step {step} {broken[0]} and {len(broken) - 1} other weights hold NaN "
            f"or infinity, and are not saved; {REMEDY}"
        )


def check_figures(metrics: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuse an evaluation with a figure among `names` that is NaN or infinite."""
    for name in names:
        value = metrics.get(name, 0.0)
        if not math.isfinite(value):
            shown = ", ".join(f"{name} {metrics[name]:g}" for name in names if name in metrics)
            raise UserError(f"the evaluation is not finite ({shown}): the weights are broken; {REMEDY}")
