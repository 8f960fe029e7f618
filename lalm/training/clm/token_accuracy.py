# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Share of tokens predicted right, an `evaluate` module: ``evaluate.load("<path of this file>")`` needs no network."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of the tokens whose most likely prediction is the token itself; references of -100 do not count."

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted token ids, one list a sequence, aligned with the references.
    references: true token ids, one list per sequence; tokens labelled -100 are ignored.
Returns:
    accuracy: right / counted, nan if nothing counts.
    num_tokens: how many tokens were counted.
Examples:
    >>> metric = evaluate.load("lalm/training/clm/token_accuracy.py")
    >>> metric.compute(predictions=[[1, 2, 3]], references=[[1, 5, -100]])
    {'accuracy': 0.5, 'num_tokens': 2}
"""


class TokenAccuracy(evaluate.Metric):
    """Token accuracy over ragged sequences."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions, references) -> dict:
        right = counted = 0
        for predicted, true in zip(predictions, references, strict=True):
            true = np.asarray(true)
            counts = true != -100
            counted += int(counts.sum())
            right += int((np.asarray(predicted)[counts] == true[counts]).sum())
        return {"accuracy": right / counted if counted else float("nan"), "num_tokens": counted}
