# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The stock Trainer with exact evaluation figures; the log line and the safe saves are in run_trainer.py."""

import os
from collections.abc import Callable

from transformers import Trainer, TrainerState

from lalm.modeling.modeling_heads import LalmForCausalLM
from lalm.training.arguments import ClmTrainingArguments
from lalm.training.perplexity import TokenMetrics, score_tokens
from lalm.training.run_trainer import RunTrainer


class ClmTrainer(RunTrainer, Trainer):
    """Trainer for causal language models over the blocks of lalm.training.packing.

    Args:
        write_card: called with the trainer to write README.md; used by `push_to_hub` in place of the stock card.
    """

    args: ClmTrainingArguments

    def __init__(self, write_card: Callable[["ClmTrainer"], None] | None = None, **kwargs):
        kwargs |= {"compute_metrics": TokenMetrics(), "preprocess_logits_for_metrics": score_tokens}
        super().__init__(write_card=write_card, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in Trainer; while training, our models make the loss in pieces and never hold all logits."""
        if model.training and isinstance(self.accelerator.unwrap_model(model), LalmForCausalLM):
            inputs = {**inputs, "logits_to_keep": 1}
        return super().compute_loss(model, inputs, *args, **kwargs)

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
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        source = best if best and os.path.isdir(best) else checkpoint
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(type(model).from_pretrained(source).state_dict())
