# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The stock Trainer with exact evaluation figures; the log line and the safe saves are in run_trainer.py."""

import os
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from lalm.errors import UserError
from lalm.modeling.modeling_heads import LalmForCausalLM
from lalm.training.checkpoint_files import Layout, layout_of, read_weights
from lalm.training.clm.arguments import ClmTrainingArguments, DataArguments
from lalm.training.clm.block_order import BlockOrder
from lalm.training.clm.gate_log import GateLog
from lalm.training.clm.packing import StreamingPackedDataset
from lalm.training.clm.perplexity import TokenMetrics, score_tokens, smoothed_loss
from lalm.training.divergence import check_figures
from lalm.training.trainer import RunTrainer


def require_a_batch(blocks: Any, training: ClmTrainingArguments) -> None:
    """Refuse --dataloader_drop_last where it would drop all there is."""
    batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and isinstance(blocks, Sized) and len(blocks) < batch:
        raise UserError(
            f"--dataloader_drop_last: the {len(blocks)} training blocks do not fill a batch of {batch}; lower "
            f"--per_device_train_batch_size"
        )


class ClmTrainer(RunTrainer, Trainer):
    """Trainer for causal language models over the blocks of lalm.training.clm.packing.

    Args:
        data: says the order of the training blocks; default: shuffled.
        write_card: called with the trainer to write README.md; used by `push_to_hub` in place of the stock card.
    """

    args: ClmTrainingArguments

    def __init__(
        self, data: DataArguments | None = None, write_card: Callable[["ClmTrainer"], None] | None = None, **kwargs
    ):
        self.data = data
        kwargs |= {"compute_metrics": TokenMetrics(), "preprocess_logits_for_metrics": score_tokens}
        if smoothing := kwargs["args"].label_smoothing_factor:
            kwargs["compute_loss_func"] = partial(smoothed_loss, smoothing=smoothing)
        require_a_batch(kwargs.get("train_dataset"), kwargs["args"])
        super().__init__(write_card=write_card, **kwargs)
        self.gate_log = GateLog(cast(nn.Module, self.model)) if self.args.gate_logging_steps else None
        if self.gate_log and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError("--gate_logging_steps needs the whole weights in every process, unlike FSDP and DeepSpeed")

    @property
    def vocab_size(self) -> int:
        """How many different tokens the model knows."""
        return self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size

    def log(self, logs, start_time=None):
        """As in Trainer, with the gates every ``gate_logging_steps`` steps."""
        if self.gate_log and "loss" in logs:
            logs |= self.gate_log.scalars(self.state.global_step, self.args.gate_logging_steps)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        """As in Trainer, but in the order of a curriculum or a mixture, if the arguments ask for one."""
        data = self.data
        if data is None or (data.curriculum == "none" and not data.train_shares):
            return super()._get_train_sampler(train_dataset)
        args, ends = self.args, np.cumsum(data.phase_shares or []).tolist()
        seed = args.seed if args.data_seed is None else args.data_seed
        batch = args.train_batch_size * args.world_size
        blocks: Any = self.train_dataset
        return BlockOrder(blocks, batch, self._place, seed, data.curriculum_cycles, data.train_shares or (), ends)

    def _place(self) -> tuple[int, int]:
        # a resumed run begins within an epoch, of which the Trainer leaves out what was seen
        return int((self.state.epoch or 0) + 1e-6), self.state.max_steps * self.args.gradient_accumulation_steps

    def get_train_dataloader(self):
        """As in Trainer, but each of several processes reads its share of a stream, not of one that reads all."""
        dataset = self.train_dataset
        if not isinstance(dataset, StreamingPackedDataset) or self.args.world_size == 1:
            return super().get_train_dataloader()
        return DataLoader(
            dataset, self._train_batch_size, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )  # fmt: skip

    def get_eval_dataloader(self, *args, **kwargs):
        """As in Trainer, but --dataloader_drop_last is for the training: a figure is over all blocks."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in Trainer; while training, our models make the loss in pieces and never hold all logits.

        A batch without a single label has a loss of 0, not of 0 / 0.
        """
        ours = isinstance(self.accelerator.unwrap_model(model), LalmForCausalLM)
        if self.gate_log and model.training:
            self.gate_log.inputs = inputs
        if model.training and ours and not self.args.label_smoothing_factor:
            inputs = {**inputs, "logits_to_keep": 1}
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluate(self, *args, **kwargs):
        """As in Trainer.

        Raises:
            UserError: loss or perplexity is not finite.
        """
        metrics = super().evaluate(*args, **kwargs)
        check_figures(metrics, tuple(name for name in metrics if name.endswith(("_loss", "_perplexity"))))
        return metrics

    def evaluation_loop(self, *args, **kwargs):
        """As in Trainer, but the loss is the sum over tokens divided by their number, not a mean of batch means."""
        output = super().evaluation_loop(*args, **kwargs)
        metrics = output.metrics or {}
        for key in [key for key in metrics if key.endswith("_nll")]:
            metrics[key.removesuffix("_nll") + "_loss"] = metrics.pop(key)
        return output

    def restore(self, checkpoint: str) -> None:
        """Take over weights and state of a checkpoint at which training is over.

        `train(resume_from_checkpoint=...)` would do one step beyond the last.
        """
        self.state = self.read_state(checkpoint)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        source = best if best and os.path.isdir(best) else checkpoint
        if layout_of(Path(source)) is Layout.DEEPSPEED:
            raise UserError(
                f"{source} is the end of the training, in DeepSpeed's layout: its model is not read again; "
                f"train in another folder, or delete it with --start_over"
            )
        model = self.accelerator.unwrap_model(self.model)
        weights = read_weights(Path(source))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - set(getattr(model, "all_tied_weights_keys", {})):
            raise UserError(f"{source} is of another model")
