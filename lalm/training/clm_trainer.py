# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The stock Trainer with exact evaluation figures, a complete log line and saves that cannot damage a checkpoint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainerState

from lalm.training.arguments import ClmTrainingArguments
from lalm.training.callbacks import ThroughputCallback
from lalm.training.perplexity import TokenMetrics, score_tokens

STAGING = ".saving"


class ClmTrainer(Trainer):
    """Trainer for causal language models over the blocks of lalm.training.packing.

    Args:
        write_card: called with the trainer to write README.md; used by `push_to_hub` in place of the stock card.
    """

    args: ClmTrainingArguments

    def __init__(self, write_card: Callable[["ClmTrainer"], None] | None = None, **kwargs):
        self.throughput = ThroughputCallback()
        self.write_card = write_card
        kwargs["callbacks"] = [self.throughput, *(kwargs.get("callbacks") or [])]
        kwargs |= {"compute_metrics": TokenMetrics(), "preprocess_logits_for_metrics": score_tokens}
        super().__init__(**kwargs)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As in Trainer; warmup_stable_decay gets its decay from ``decay_ratio`` if it has no ``num_decay_steps``."""
        options = self.args.lr_scheduler_kwargs or {}
        if (
            isinstance(options, dict)
            and self.args.lr_scheduler_type == "warmup_stable_decay"
            and "num_decay_steps" not in options
        ):
            room = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            decay = max(0, min(round(self.args.decay_ratio * num_training_steps), room))
            self.args.lr_scheduler_kwargs = options | {"num_decay_steps": decay}
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluation_loop(self, *args, **kwargs):
        """As in Trainer, but the loss is the sum over tokens divided by their number, not a mean of batch means."""
        output = super().evaluation_loop(*args, **kwargs)
        metrics = output.metrics or {}
        for key in [key for key in metrics if key.endswith("_nll")]:
            metrics[key.removesuffix("_nll") + "_loss"] = metrics.pop(key)
        return output

    def log(self, logs, start_time=None):
        """As in Trainer, with tokens/s and the minutes left in the lines of the training loss."""
        if "loss" in logs:
            logs |= self.throughput.recent(self.state)
        super().log(logs, start_time)

    def restore(self, checkpoint: str) -> None:
        """Take over weights and state of a checkpoint at which training is over.

        `train(resume_from_checkpoint=...)` would do one step beyond the last.
        """
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        source = best if best and os.path.isdir(best) else checkpoint
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(type(model).from_pretrained(source).state_dict())

    def save_model(self, output_dir=None, _internal_call=False):
        """As in Trainer; a save into the output folder itself is written aside first and then renamed.

        A full disk or a kill in the middle leaves the earlier model as it was.
        """
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
