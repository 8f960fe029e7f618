# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What our Trainers share: the WSD schedule, a complete log line, saves that cannot damage a checkpoint, our card."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import Trainer

from lalm.errors import UserError, is_disk_full, one_line
from lalm.training.argument_checks import schedule_options
from lalm.training.callbacks import ThroughputCallback
from lalm.training.checkpoint_files import ChecksumCallback
from lalm.training.checkpoints import is_finished
from lalm.training.divergence import check_loss, check_norm, check_weights
from lalm.training.hub_push import push_failed

logger = logging.getLogger(__name__)

STAGING = ".saving"

if TYPE_CHECKING:

    class _Base(Trainer):
        """What the mix-in is mixed into, for the type checker."""
else:
    _Base = object


class RunTrainer(_Base):
    """Mix-in of a Trainer whose arguments are `RunArguments`; to be named before it.

    Args:
        write_card: called with the trainer to write README.md; used by `push_to_hub` in place of the stock card.
    """

    args: Any

    def __init__(self, write_card: Callable[[Any], None] | None = None, **kwargs):
        self.throughput = ThroughputCallback()
        self.write_card = write_card
        kwargs["callbacks"] = [self.throughput, *(kwargs.get("callbacks") or []), ChecksumCallback()]
        super().__init__(**kwargs)

    def is_over(self, checkpoint: str) -> bool:
        """Tell whether a checkpoint is the end of the training asked for."""
        return is_finished(checkpoint, self.args)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As in Trainer; warmup_stable_decay gets its decay from ``decay_ratio`` if it has no ``num_decay_steps``."""
        self.args.lr_scheduler_kwargs = schedule_options(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *args, **kwargs):
        """As in Trainer; a loss that is not finite ends the run (Trainer would log the mean of the others)."""
        loss = super().training_step(*args, **kwargs)
        check_loss(loss, self.state.global_step, cast(Any, self.optimizer).param_groups[0]["lr"])
        return loss

    def evaluate(self, *args, **kwargs):
        """As in Trainer; in the middle of a training the weights are looked at first."""
        if self.is_in_train and self.state.global_step:
            check_weights(cast(nn.Module, self.model), self.state.global_step)
        return super().evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        """As in Trainer, with tokens/s and the minutes left in the lines of the training loss."""
        if self.accelerator.scaler is None:  # a scaler leaves steps with such gradients out
            check_norm(logs.get("grad_norm", 0.0), self.state.global_step)
        if "loss" in logs:
            logs |= self.throughput.recent(self.state)
        super().log(logs, start_time)

    def save_model(self, output_dir=None, _internal_call=False):
        """As in Trainer; a save into the output folder itself is written aside first and then renamed.

        A full disk or a kill in the middle leaves the earlier model as it was, and so do weights that are not finite.
        """
        check_weights(cast(nn.Module, self.model), self.state.global_step)
        target = Path(output_dir or self.args.folder)
        if target.resolve() != self.args.folder.resolve():
            super().save_model(str(target), _internal_call=True)
            return
        staging = target / STAGING
        try:
            super().save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                move_files(staging, target)
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def push_to_hub(self, *args, **kwargs):
        """As in Trainer.

        Raises:
            UserError: the push failed; it tells how to push what is saved.
        """
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            # errors of the Hub's client have no common base
            if isinstance(error, UserError) or is_disk_full(error):
                raise
            raise push_failed(self.args, error) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the only place between two steps that talks to the Hub: its errors must not end a training
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:
            if is_disk_full(error):
                raise
            logger.warning("--push_to_hub: %s was not pushed: %s", checkpoint_folder, one_line(error))

    def create_model_card(self, *args, **kwargs):
        """Write our card, which tells what was run; the stock one would say 'fine-tuned' of a new model."""
        if self.write_card is not None and self.is_world_process_zero():
            self.write_card(self)


def move_files(source: Path, target: Path) -> None:
    """Move every entry of `source` into `target`, over what is there; the weights go last."""
    for entry in sorted(source.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        place = target / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
