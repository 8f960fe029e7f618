# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What our Trainers share: the WSD schedule, a complete log line, saves that cannot damage a checkpoint, our card."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from lalm.errors import UserError, is_disk_full
from lalm.modeling.saving import UNFINISHED, commit_folder, move_files
from lalm.training.argument_checks import schedule_options
from lalm.training.callbacks import StopOnSignal, ThroughputCallback
from lalm.training.checkpoint_files import ChecksumCallback, Layout, layout_of, read_optimizer, read_weights
from lalm.training.checkpoints import is_finished
from lalm.training.divergence import SkippedSteps, check_loss, check_norm, check_weights, is_finite
from lalm.training.hub_push import push_checkpoint, push_failed

WRAPPED = "_checkpoint_wrapped_module."  # what activation checkpointing of FSDP puts into names

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
        self.throughput, self.signals = ThroughputCallback(), StopOnSignal()
        self.write_card = write_card
        self.skipped = SkippedSteps()
        self.broken_loss: torch.Tensor | None = None
        given = kwargs.get("callbacks") or []
        kwargs["callbacks"] = [self.throughput, *given, ChecksumCallback(), self.signals]
        super().__init__(**kwargs)
        self.signals.accelerator = self.accelerator

    def is_over(self, checkpoint: str) -> bool:
        """Tell whether a checkpoint is the end of the training asked for."""
        return is_finished(checkpoint, self.args)

    def read_state(self, checkpoint: str) -> TrainerState:
        """Return the state at a checkpoint, as that of this process: the first alone prints."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        state.is_world_process_zero = self.is_world_process_zero()
        state.is_local_process_zero = self.is_local_process_zero()
        return state

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As in Trainer; warmup_stable_decay gets its decay from ``decay_ratio`` if it has no ``num_decay_steps``."""
        self.args.lr_scheduler_kwargs = schedule_options(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *args, **kwargs):
        """As in Trainer; a loss that is not finite ends the run, unless its gradients are not either: see below."""
        loss = super().training_step(*args, **kwargs)
        if not is_finite(loss):
            self.broken_loss = loss
            if not self._skips_steps():
                self._refuse_loss()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """As in Trainer; a step whose gradients hold NaN or infinity is left out, and a few in a row end the run."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._skips_steps() and self.skipped.leave_out(float(norm), self.state.global_step):
            model.zero_grad(set_to_none=True)  # which the optimizer passes over, with its weight decay
            self.broken_loss = norm = None
        if self.broken_loss is not None:  # with gradients that are finite: not the mark of a bad batch
            self._refuse_loss()
        return norm

    def _skips_steps(self) -> bool:
        """A loss scaler leaves such steps out itself, and DeepSpeed has its gradients elsewhere."""
        return self.accelerator.scaler is None and self.accelerator.distributed_type != DistributedType.DEEPSPEED

    def _refuse_loss(self) -> None:
        rate = cast(Any, self.optimizer).param_groups[0]["lr"]
        check_loss(cast(torch.Tensor, self.broken_loss), self.state.global_step, rate)

    def evaluate(self, *args, **kwargs):
        """As in Trainer; in the middle of a training the weights are looked at first."""
        if self.is_in_train and self.state.global_step:
            check_weights(cast(nn.Module, self.model), self.state.global_step)
        if self.is_fsdp_enabled and self.optimizer is None:
            # without a training before, the stock Trainer would shard the model alone, which accelerate refuses
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
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
            if self.layout is Layout.FSDP_SHARDED and self.args.should_save:
                self._save_beside_shards(target)
            return
        staging = target / UNFINISHED
        try:
            if self.layout is Layout.FSDP_SHARDED:  # of which the stock one saves nothing outside of checkpoints
                self._save(str(staging), state_dict=self.accelerator.get_state_dict(self.model))
            else:
                super().save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                move_files(staging, target)
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_beside_shards(self, checkpoint: Path) -> None:
        # the stock Trainer writes the shards alone: a resumed run needs the tokenizer, a reader the configuration
        for part in (getattr(self.model, "config", None), self.processing_class):
            if part is not None:
                part.save_pretrained(checkpoint)

    @property
    def layout(self) -> Layout:
        """How this run stores weights and optimizer in a checkpoint."""
        if self.is_deepspeed_enabled:
            return Layout.DEEPSPEED
        if not self.is_fsdp_enabled:
            return Layout.PLAIN
        is_sharded = "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return Layout.FSDP_SHARDED if is_sharded else Layout.FSDP_FULL

    def _can_read(self, checkpoint: str) -> bool:
        """Whether a checkpoint is of this run's layout, which the stock Trainer reads; if not, all of it is read and
        every process takes its part.

        Raises:
            UserError: one of the two is DeepSpeed's, which reads its own only.
        """
        saved = layout_of(Path(checkpoint))
        if saved is not self.layout and Layout.DEEPSPEED in (saved, self.layout):
            raise UserError(
                f"{checkpoint} was saved by {saved.value} and this run uses {self.layout.value}: resume it as it was "
                f"saved, or train on from its model with --model_name_or_path and another folder"
            )
        return saved is self.layout

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._can_read(resume_from_checkpoint):
            # that of sentence-transformers takes no model
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))
            return
        model = cast(nn.Module, self.model if model is None else model)
        reads = not self.is_fsdp_enabled or self.is_world_process_zero()
        weights: dict[str, Any] = dict(read_weights(Path(resume_from_checkpoint))) if reads else {}
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            if source in weights:  # stored once in a plain checkpoint
                weights.setdefault(target, weights[source])
        set_model_state_dict(model, weights, options=self._whole)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._can_read(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, model = Path(checkpoint), cast(nn.Module, self.model)
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        known = {weight: name.replace(WRAPPED, "") for name, weight in model.named_parameters()}
        names = [known[weight] for group in optimizer.param_groups for weight in group["params"]]
        reads = not self.is_fsdp_enabled or self.is_world_process_zero()
        state = read_optimizer(folder, names) if reads else {}
        set_optimizer_state_dict(model, optimizer, state, options=self._whole)
        schedule = torch.load(folder / "scheduler.pt", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is loaded before a first step of the optimizer
            cast(Any, self.lr_scheduler).load_state_dict(schedule)

    @property
    def _whole(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.is_fsdp_enabled)

    def push_to_hub(self, *args, **kwargs):
        """As in Trainer, in one commit that also removes replaced weights, without the pickled arguments.

        Raises:
            UserError: the push failed; it tells how to push what is saved.
        """
        try:
            return self._push_folder(*args, **kwargs)
        except Exception as error:
            # errors of the Hub's client have no common base
            if isinstance(error, UserError) or is_disk_full(error):
                raise
            raise push_failed(self.args, error) from error

    def _push_folder(self, commit_message: str | None = "End of training", revision: str | None = None) -> Any:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        self._finish_current_push()
        return commit_folder(
            self.args.folder,
            str(self.hub_model_id),
            message=commit_message or "End of training",
            ignore=[TRAINING_ARGS_NAME],
            token=self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the stock method copies half-written weights over the model in the output folder, and pickled arguments
        running: Any = self.push_in_progress
        busy = running is not None and not running.is_done()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = push_checkpoint(self.args, str(self.hub_model_id), Path(checkpoint_folder), self.state.global_step)
        jobs: Any = [*(running.jobs if busy else []), job]
        self.push_in_progress = cast(Any, PushInProgress(jobs))

    def create_model_card(self, *args, **kwargs):
        """Write our card, which tells what was run; the stock one would say 'fine-tuned' of a new model."""
        if self.write_card is not None and self.is_world_process_zero():
            self.write_card(self)
