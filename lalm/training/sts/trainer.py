# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""SentenceTransformerTrainer with our batches, a resumable loss and saves that cannot damage a checkpoint."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset
from transformers import EarlyStoppingCallback

from lalm.errors import UserError
from lalm.training.checkpoints import worse_evaluations
from lalm.training.sts.arguments import StsTrainingArguments
from lalm.training.sts.batches import LengthSampler, MixtureSampler, token_estimates
from lalm.training.sts.difficulty import EasyToHardSampler, pair_of
from lalm.training.sts.encoding import encode_by_length
from lalm.training.trainer import RunTrainer

LOSS_FILE = "loss.safetensors"


class DevEvaluator(EmbeddingSimilarityEvaluator):
    """Scores pairs of very unequal lengths without padding all of a batch to the longest."""

    def embed_inputs(self, model, sentences, **kwargs):
        """As in `EmbeddingSimilarityEvaluator`, by length."""
        return encode_by_length(
            model, sentences, self.batch_size, show_progress_bar=self.show_progress_bar, convert_to_numpy=True,
            precision=self.precision, normalize_embeddings=bool(self.precision), truncate_dim=self.truncate_dim,
            **kwargs,
        )  # fmt: skip


def dev_evaluator(dev: Dataset, training: StsTrainingArguments) -> EmbeddingSimilarityEvaluator | None:
    """Return what scores sentence1, sentence2, score of the validation split during the training, if anything does."""
    if training.eval_strategy == "no":
        return None
    return DevEvaluator(
        list(dev["sentence1"]), list(dev["sentence2"]), list(dev["score"]), training.per_device_eval_batch_size,
        name="sts-dev", similarity_fn_names=["cosine"], write_csv=False,
    )  # fmt: skip


class StsTrainer(RunTrainer, SentenceTransformerTrainer):
    """Trainer of the stages.

    Args:
        shares: with several data sets, the share of the batches that each has, in their order.
        row_order: random, or easy_to_hard for the data sets that are pairs.
    """

    args: StsTrainingArguments

    def __init__(self, shares: Sequence[float] = (), row_order: str = "random", **kwargs):
        self.shares, self.row_order = list(shares), row_order
        super().__init__(**kwargs)
        if self.is_fsdp_enabled:
            raise UserError(
                "FSDP cannot shard the modules of sentence-transformers: train encoders by DDP, with "
                "recipes/accelerate/ddp.yaml"
            )

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, valid_label_columns=None, generator=None, seed=0
    ) -> BatchSampler:
        """Texts of similar length together; where a row's batch mates are its negatives, none of its own texts."""
        steps = self.steps_asked

        def make(rows: Dataset) -> BatchSampler:
            if self.shares and not {"score", "label"} & set(rows.column_names):
                options = (batch_size, drop_last, valid_label_columns, torch.Generator(), seed)
                return NoDuplicatesBatchSampler(rows, *options)
            lengths = token_estimates(rows, self.args.max_seq_length)
            order = (self.args.curriculum, self.args.curriculum_cycles, steps)
            return LengthSampler(lengths, batch_size, drop_last, self.args.max_batch_tokens, *order, seed=seed)

        pair = pair_of(dataset) if self.row_order == "easy_to_hard" else None
        if pair is None:
            return make(dataset)
        sampler = EasyToHardSampler(dataset, pair, make, batch_size, seed)
        if steps is not None and not self.shares:
            sampler.limit(steps)
        return sampler

    @property
    def steps_asked(self) -> int | None:
        """Batches of all processes that `max_steps` asks for; None without it."""
        steps = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.world_size
        return steps if steps > 0 else None

    def get_multi_dataset_batch_sampler(
        self, dataset: ConcatDataset, batch_samplers: list[BatchSampler], generator=None, seed=0
    ) -> BatchSampler:
        """Draw every batch from one data set, by the shares."""
        for sampler, share in zip(batch_samplers, self.shares, strict=True):
            if self.steps_asked is not None and isinstance(sampler, EasyToHardSampler):
                sampler.limit(round(self.steps_asked * share / sum(self.shares)))
        return MixtureSampler(dataset, batch_samplers, self.shares, seed or 0, generator)

    def loss_weights(self) -> dict[str, torch.Tensor]:
        """The trained weights of the loss that are not the model's: maps to the width of another teacher."""
        loss = nn.ModuleDict(self.loss) if isinstance(self.loss, dict) else self.loss
        ours = {id(weight) for weight in self.accelerator.unwrap_model(self.model).parameters()}
        named = loss.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad and id(weight) not in ours}

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:  # sentence-transformers would let every process write the same files
            return
        super()._save(output_dir, state_dict)
        if weights := self.loss_weights():
            tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
            save_file(tensors, Path(output_dir or str(self.args.output_dir)) / LOSS_FILE)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # sentence-transformers leaves the weights of a loss out, and a resumed run would begin with new ones
        super()._load_from_checkpoint(resume_from_checkpoint)
        path = Path(resume_from_checkpoint) / LOSS_FILE
        if path.is_file():
            weights = self.loss_weights()
            for name, stored in load_file(path).items():
                weights[name].copy_(stored)

    def _find_best(self, folder: Path) -> None:
        # a run that was moved, or is resumed from elsewhere, has its best checkpoint next to the others
        best = self.state.best_model_checkpoint
        if best and (moved := folder / Path(best).name).is_dir():
            self.state.best_model_checkpoint = str(moved)

    def _load_callback_state(self) -> None:
        # the Trainer leaves the count of an early stop out, or restores the callbacks with all flags of that moment
        super()._load_callback_state()
        self._find_best(self.args.folder)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = worse_evaluations(self.state)

    def restore(self, checkpoint: str) -> None:
        """Take over weights and state of a checkpoint at which training is over."""
        self.state = self.read_state(checkpoint)
        self._find_best(Path(checkpoint).parent)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best if best and os.path.isdir(best) else checkpoint)

    def log(self, logs: dict[str, Any], start_time=None) -> None:
        """As in `RunTrainer`, with rows/s in place of tokens/s."""
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps, seconds = self.throughput.steps, self.throughput.seconds
        if "loss" in logs and seconds:
            logs |= {"rows_per_second": round(rows * steps / seconds, 1)}
        super().log(logs, start_time)
