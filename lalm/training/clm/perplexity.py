# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Token-level perplexity and accuracy, summed over tokens: ``exp(sum of -log p / number of tokens scored)``.

Which tokens are scored is stated in lalm.training.clm.packing. A mean of batch means would weigh the tokens of short
blocks more.
"""

import math
from pathlib import Path

import evaluate
import torch
from transformers import EvalPrediction

TOKEN_ACCURACY = str(Path(__file__).with_name("token_accuracy.py"))
IGNORED = -100


def score_tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits to what the figures need, so that an evaluation never holds more than one batch of logits.

    Args:
        logits: [B, T, vocabulary], any float dtype (a tuple's first element, if a model returns more).
        labels: [B, T], not shifted, -100 where a token is not scored.

    Returns:
        predicted ids [B, T] int64 and -log p of the true token [B, T] float32 in nats, both at the position of the
        token they are about; position 0, which nothing predicts, and unscored tokens hold 0.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    predicted = torch.zeros_like(labels)
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    # row by row: a float32 copy of all logits of a batch can be larger than the model
    for row in range(labels.shape[0]):
        predicted[row, 1:] = logits[row, :-1].argmax(-1)
        losses[row, 1:] = torch.nn.functional.cross_entropy(
            logits[row, :-1].float(), labels[row, 1:], ignore_index=IGNORED, reduction="none"
        )
    return predicted, losses


def smoothed_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, *, smoothing: float) -> torch.Tensor:
    """Return the label-smoothed cross-entropy of the next tokens, in nats, a mean over the scored ones.

    The Trainer's own smoother shifts the labels of classes that it knows by name only. An evaluation's figures do
    not use it: perplexity is that of the plain cross-entropy.

    Args:
        outputs: of the model, with logits [B, T, vocabulary].
        labels: [B, T], not shifted, -100 where a token is not scored.
        num_items_in_batch: scored tokens of all batches that are accumulated; None for those of this one.
        smoothing: share of the target that is spread evenly over the vocabulary.
    """
    targets = labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(
        outputs["logits"][:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, label_smoothing=smoothing,
        reduction="sum",
    )  # fmt: skip
    return total / ((targets != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class TokenMetrics:
    """`compute_metrics` of the Trainer, called batch by batch; ``compute_result`` asks for the figures so far."""

    def __init__(self):
        self.accuracy = evaluate.load(TOKEN_ACCURACY, keep_in_memory=True)
        self.loss_sum, self.tokens = 0.0, 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict:
        predicted, losses = (torch.as_tensor(item) for item in prediction.predictions)
        labels = torch.as_tensor(prediction.label_ids).clone()
        labels[:, 0] = IGNORED
        scored = labels != IGNORED
        self.loss_sum += losses[scored].double().sum().item()
        self.tokens += int(scored.sum())
        self.accuracy.add_batch(predictions=predicted.tolist(), references=labels.tolist())
        if not compute_result:
            return {}
        loss = self.loss_sum / self.tokens if self.tokens else float("nan")
        result = {
            "nll": loss,
            "perplexity": math.exp(loss) if loss < 700 else float("inf"),
            "accuracy": self.accuracy.compute()["accuracy"],
            "tokens_scored": self.tokens,
        }
        self.loss_sum, self.tokens = 0.0, 0
        return result
