# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""A diverged run ends with an error: the Trainer itself would log a loss of 0, save the weights and report figures."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lalm.errors import UserError

logger = logging.getLogger(__name__)

SKIPS = 3  # steps in a row that may be left out before a training counts as diverged
REMEDY = "lower --learning_rate or lengthen --warmup_steps, and train again with --start_over"
# The root mean square of a trained network's weights is about 0.01 to 10; Adam moves each by the rate in a step.
LARGEST_RMS = 100.0
# How far, in nats, a loss may lie above those of a guess and of the first step.
MARGIN = 0.5


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
    """Refuse to save weights that are NaN, infinite or absurdly large over those of an earlier step."""
    if broken := broken_weights(model):
        raise UserError(
            f"the training has diverged: after step {step} {broken[0]} and {len(broken) - 1} other weights hold NaN "
            f"or infinity, and are not saved; {REMEDY}"
        )
    if step and (size := root_mean_square(model)) > LARGEST_RMS:
        raise UserError(
            f"the training has diverged: after step {step} the root mean square of the weights is {size:.3g}, and "
            f"they are not saved; {REMEDY}"
        )


def root_mean_square(model: nn.Module) -> float:
    """Return the root mean square of all trained weights that lie on this process, 0 if there are none."""
    trained = [
        weight.to_local() if isinstance(weight, DTensor) else weight.detach()
        for weight in model.parameters()
        if weight.requires_grad and not weight.is_meta
    ]
    trained = [weight for weight in trained if weight.numel()]
    # norms in float64: the squares of large weights leave the range of float32
    squares = [float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2 for weight in trained]
    return math.sqrt(sum(squares) / sum(weight.numel() for weight in trained)) if trained else 0.0


def check_figures(metrics: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuse an evaluation with a figure among `names` that is NaN or infinite."""
    for name in names:
        value = metrics.get(name, 0.0)
        if not math.isfinite(value):
            shown = ", ".join(f"{name} {metrics[name]:g}" for name in names if name in metrics)
            raise UserError(f"the evaluation is not finite ({shown}): the weights are broken; {REMEDY}")


def check_learned(loss: float, vocabulary: int, history: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a trained model whose loss on a held-out split shows that the training has destroyed it.

    Its loss lies above that of a guess, log(vocabulary), and above that of the first steps. A model that has merely
    overfitted, which fits its training text, passes; so does one whose text was as strange to it before.

    Args:
        loss: of the split, in nats per token.
        history: the Trainer's log of the training.
    """
    guess = math.log(vocabulary)
    losses = [entry["loss"] for entry in history if "loss" in entry] or [guess]
    if loss > max(guess, losses[0]) + MARGIN and losses[-1] > guess - MARGIN:
        raise UserError(
            f"the training has diverged: the loss of the trained model is {loss:.3g}, that of a guess among "
            f"{vocabulary:,} tokens {guess:.3g}, and that of the first steps was {losses[0]:.3g}; {REMEDY}"
        )


def check_last_loss(vocabulary: int, history: Sequence[Mapping[str, Any]]) -> None:
    """`check_learned` for a training without a held-out split: by the last training loss that was logged."""
    if losses := [entry["loss"] for entry in history if "loss" in entry]:
        check_learned(losses[-1], vocabulary, history)


class SkippedSteps:
    """Counts steps that are left out because their gradients hold NaN or infinity, as of a batch with a bad number."""

    def __init__(self):
        self.in_a_row = 0

    def leave_out(self, norm: float, step: int) -> bool:
        """Tell whether to leave a step out, and log it; all processes see the same norm and decide alike.

        Args:
            step: steps done so far.

        Raises:
            UserError: it would be the third in a row.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        where = f"step {step + 1}: the norm of the gradients is {norm:g}"
        if self.in_a_row >= SKIPS:
            raise UserError(f"the training has diverged: {where}, as in the {SKIPS - 1} steps before; {REMEDY}")
        logger.warning("%s, the step is left out (%d in a row end the training)", where, SKIPS)
        return True
