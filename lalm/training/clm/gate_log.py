# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What the gates of a model do while it trains, for the training log (`--gate_logging_steps`)."""

import logging
from typing import Any

from torch import nn

from lalm.errors import UserError
from lalm.inspection import inspect
from lalm.modeling.modeling_base import LalmModel

logger = logging.getLogger(__name__)


class GateLog:
    """Inspects a model on the first row of the last training batch, and warns once of each saturated gate.

    Attributes:
        inputs: the last batch, set by the trainer.

    Raises:
        UserError: the model is none of lalm's.
    """

    def __init__(self, model: nn.Module):
        if not any(isinstance(module, LalmModel) for module in model.modules()):
            raise UserError(f"--gate_logging_steps needs one of lalm's models, {type(model).__name__} is none")
        self.model, self.logged = model, 0
        self.inputs: dict[str, Any] | None = None
        self.warned: set[str] = set()

    def scalars(self, step: int, every: int) -> dict[str, float]:
        """Return `Inspection.scalars` if a multiple of `every` steps was passed since the last time, else nothing."""
        if self.inputs is None or step // every == self.logged // every:
            return {}
        self.logged = step
        rest = {name: self.inputs[name][:1] for name in ("position_ids", "attention_mask") if name in self.inputs}
        inspection = inspect(self.model, self.inputs["input_ids"][:1], **rest)
        for warning in inspection.warnings():
            head = warning.split(":")[0]
            if head not in self.warned:
                self.warned.add(head)
                logger.warning("step %d: %s", step, warning)
        return {name: round(value, 4) for name, value in inspection.scalars().items()}
