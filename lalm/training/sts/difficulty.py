# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Easy rows before hard ones. How hard a row is, is read from the words that its texts share; no model is asked."""

from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import BatchSampler

from lalm.training.sts.data import normalise

# rising degrees of difficulty; inside of one the order is random
DEGREES = 10
PAIRS = (("sentence1", "sentence2"), ("anchor", "positive"))


def overlap(one: str, other: str) -> float:
    """Share of the words of two texts that both have (Jaccard), from 0 to 1."""
    ours, theirs = set(normalise(one).split()), set(normalise(other).split())
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def pair_of(rows: Dataset) -> tuple[str, str] | None:
    """Return the columns of the two texts that belong together; None if rows are no pairs."""
    return next((pair for pair in PAIRS if set(pair) <= set(rows.column_names)), None)


def difficulties(rows: Dataset, pair: tuple[str, str]) -> np.ndarray:
    """Return how hard pairs are, float [rows].

    A pair that belongs together is hard if it shares few words, a negative if it shares many with its anchor, and a
    scored pair if the share of common words is far from its score.
    """
    plain = rows.with_format(None)

    def shared(one: str, other: str) -> np.ndarray:
        return np.array([overlap(*texts) for texts in zip(plain[one], plain[other], strict=True)])

    if "score" in rows.column_names:
        return np.abs(np.array(plain["score"]) - shared(*pair))
    if "negative" in rows.column_names:
        return shared(pair[0], "negative") - shared(*pair)
    return 1 - shared(*pair)


class EasyToHardSampler(DefaultBatchSampler):
    """The batches of the easiest tenth of the rows, then those of the next, up to the hardest.

    Args:
        rows: pairs.
        pair: the columns of their texts.
        make: makes the sampler of one tenth from its rows.
        batch_size: rows in a batch; with few rows there are fewer parts than ten, so that each has a batch.
    """

    def __init__(
        self,
        rows: Dataset,
        pair: tuple[str, str],
        make: Callable[[Dataset], BatchSampler],
        batch_size: int,
        seed: int = 0,
    ):
        super().__init__(rows, batch_size=batch_size, drop_last=False, seed=seed)
        ranked = np.argsort(difficulties(rows, pair), kind="stable")
        self.degrees = np.array_split(ranked, max(1, min(DEGREES, len(ranked) // batch_size)))
        self.samplers = [make(rows.select(part.tolist())) for part in self.degrees]
        self.sizes = [len(sampler) for sampler in self.samplers]
        self.epoch = 0

    def limit(self, batches: int) -> None:
        """Take no more than so many batches in a pass, an even share of them from every tenth."""
        most = max(1, round(batches / len(self.sizes)))
        self.sizes = [min(size, most) for size in self.sizes]

    def __iter__(self) -> Iterator[list[int]]:
        for rows, sampler, size in zip(self.degrees, self.samplers, self.sizes, strict=True):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
            for _, batch in zip(range(size), sampler, strict=False):
                yield [int(rows[index]) for index in batch]

    def __len__(self) -> int:
        return sum(self.sizes)
