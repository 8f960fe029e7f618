# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Multi-query associative recall (MQAR): texts that ask for what stood in them, and the share of right answers.

The task of Zoology (Arora et al., arXiv 2312.04927, section 4) and of the recall figures of Based (Arora et al.,
arXiv 2402.18668). It needs no tokenizer and no training: any causal language model can be asked.

    from lalm.recall.task import evaluate_recall, multi_query_associative_recall

    texts = multi_query_associative_recall(model.config.vocab_size, num_examples=1000, length=256, num_pairs=16)
    print(evaluate_recall(model, texts))

Symbols below: V vocab_size, L length, P num_pairs (`num_kv_pairs` in the authors' code), power (their `power_a`).
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

IGNORED = -100
_DRAWN_AT_ONCE = 1 << 23  # random numbers held at a time, 64 MiB
_NUMBERS_A_CHUNK = 1 << 30


def multi_query_associative_recall(
    vocab_size: int,
    num_examples: int,
    length: int,
    num_pairs: int,
    power: float = 0.01,
    random_non_queries: bool = True,
    seed: int = 0,
) -> Dataset:
    """Texts `k1 v1 k2 v2 ... kP vP` in which every key comes once more; the model is to name its value then.

    Keys are P different tokens of 1 ... V/2 - 1, values P different tokens of V/2 ... V - 1. After the 2 P tokens of
    the pairs key i stands at position 2 P + 2 g_i. The gaps g_i are P different ones of 0 ... (L - 2 P) / 2 - 1, drawn
    one after the other without replacement with probability proportional to (g + 1) ** (power - 1): mostly soon after
    the pairs, now and then late.

    Args:
        vocab_size: V, more than `length`; a model's own, or fewer of its tokens.
        num_examples: number of texts.
        length: L, tokens of a text, an even number.
        num_pairs: P, at most a quarter of `length`. Guessing among the values of the text is right once in P.
        power: exponent of the gaps' distribution; 1 spreads the queries evenly.
        random_non_queries: fill the places that are neither pair nor query with tokens drawn from the whole
            vocabulary, which may be keys or values by chance; False fills them with token 0.
        seed: the same seed and arguments give the same texts.

    Returns:
        a data set of `input_ids` and `labels`, both `[L]`, which the stock `Trainer` takes as it is. The task has the
        answer read *at* the key: the logits at the key's position p are to predict the value. A causal language model
        of transformers compares the logits at p with `labels[p + 1]`, hence the value stands there and not at p, and
        its own loss is the loss of the task. All other labels are -100. `input_ids[p + 1]` is filling: the model never
        gets to read its answer, as it would in language modelling.

    Raises:
        ValueError: an argument does not fit; the message names it and says what would.
    """
    _check(vocab_size, num_examples, length, num_pairs, power)
    source = np.random.default_rng(seed)
    shape, half = (num_examples, num_pairs), vocab_size // 2
    keys = 1 + _distinct(source, half - 1, shape)
    values = half + _distinct(source, vocab_size - half, shape)
    asked = 2 * num_pairs + 2 * _gaps(source, length // 2 - num_pairs, power, shape)
    ids = np.zeros((num_examples, length), dtype=np.int32)
    if random_non_queries:
        ids[:] = source.integers(vocab_size, size=ids.shape, dtype=np.int32)
    ids[:, 0 : 2 * num_pairs : 2], ids[:, 1 : 2 * num_pairs : 2] = keys, values
    np.put_along_axis(ids, asked, keys, axis=1)
    labels = np.full_like(ids, IGNORED)
    np.put_along_axis(labels, asked + 1, values, axis=1)
    return Dataset(pa.table({"input_ids": _column(ids), "labels": _column(labels)}))


def _check(vocab_size: int, num_examples: int, length: int, num_pairs: int, power: float) -> None:
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}.")
    if num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}.")
    if length % 2:
        raise ValueError(f"length must be even, since queries stand at every other token: {length + 1}, not {length}.")
    if 4 * num_pairs > length:
        raise ValueError(
            f"length {length} has no room for {num_pairs} pairs and their queries: length must be at least "
            f"{4 * num_pairs}, or num_pairs at most {length // 4}."
        )
    if vocab_size <= length:
        raise ValueError(f"vocab_size must be above length: at least {length + 1}, got {vocab_size}.")
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}; 1 spreads the queries evenly.")


def _distinct(source: np.random.Generator, count: int, shape: tuple[int, int]) -> np.ndarray:
    """Rows of different numbers below `count`, all rows equally likely (Floyd's algorithm, then shuffled).

    Time and memory follow the numbers drawn, not `count`, which is thousands where they are a few.
    """
    drawn = np.empty(shape, dtype=np.int32)
    for column, last in enumerate(range(count - shape[1], count)):
        new = source.integers(last + 1, size=shape[0], dtype=np.int32)
        taken = (drawn[:, :column] == new[:, None]).any(axis=1)
        drawn[:, column] = np.where(taken, last, new)
    return source.permuted(drawn, axis=1, out=drawn)


def _gaps(source: np.random.Generator, space: int, power: float, shape: tuple[int, int]) -> np.ndarray:
    """Rows of different gaps below `space`, in the order in which they were drawn.

    Exponential times with rates p(g): whoever comes first is gap g with probability p(g), and so on among those that
    are left, so the first P to come are P draws without replacement.
    """
    rates = np.arange(1, space + 1) ** (power - 1)
    rows = max(1, _DRAWN_AT_ONCE // space)
    gaps = np.empty(shape, dtype=np.int64)
    for start in range(0, shape[0], rows):
        part = gaps[start : start + rows]
        times = source.standard_exponential((len(part), space)) / rates
        part[:] = times.argsort(axis=1)[:, : shape[1]]
    return gaps


def _column(rows: np.ndarray) -> pa.ChunkedArray:
    """`[N, L]` as N lists, without passing through Python's. The offsets of one chunk are 32 bits wide."""
    length, at_once = rows.shape[1], max(1, _NUMBERS_A_CHUNK // rows.shape[1])
    chunks = []
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        offsets = pa.array(np.arange(0, part.size + 1, length, dtype=np.int32))
        chunks.append(pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1))))
    return pa.chunked_array(chunks)


def predicted_tokens(logits: Any, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The most likely next token at every position, `[B, T, V] -> [B, T]`; `preprocess_logits_for_metrics` of Trainer.

    Trainer hands over a tuple where a model returns more than logits; they come first.
    """
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def recall_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers of each text, averaged over the texts: every text counts alike.

    Args:
        predictions: `[N, L]`, at position p the token predicted to come next.
        labels: `[N, L]`, as `multi_query_associative_recall` gives them: at p + 1 what was to be predicted at p.

    Raises:
        ValueError: a text without labels, or unequal shapes.
    """
    if np.shape(predictions) != np.shape(labels):
        raise ValueError(f"predictions {np.shape(predictions)} and labels {np.shape(labels)} must have one shape.")
    predictions, labels = np.asarray(predictions)[:, :-1], np.asarray(labels)[:, 1:]
    counted = labels != IGNORED
    if not len(labels) or not counted.any(axis=1).all():
        raise ValueError("labels must name at least one token in each of at least one text.")
    return float((((predictions == labels) & counted).sum(axis=1) / counted.sum(axis=1)).mean())


@torch.no_grad()
def evaluate_recall(model: Any, texts: Dataset, batch_size: int = 64) -> float:
    """`recall_accuracy` of a causal language model of transformers on `texts`, which lie in batches as they come.

    Nothing is trained; the model is left in the mode, training or evaluation, in which it came.
    """
    was_training, rows = model.training, texts.with_format("torch", device=str(model.device))
    model.eval()
    predictions, labels = [], []
    for batch in rows.iter(batch_size):
        predictions.append(predicted_tokens(model(batch["input_ids"], use_cache=False).logits).cpu())
        labels.append(batch["labels"].cpu())
    model.train(was_training)
    return recall_accuracy(torch.cat(predictions).numpy(), torch.cat(labels).numpy())
