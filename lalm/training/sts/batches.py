# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Which rows make a batch and in which order: similar lengths together, curricula of lengths, shares of data sets."""

from collections.abc import Iterator, Sequence, Sized
from typing import cast

import numpy as np
import pyarrow.compute as compute
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset

from lalm.errors import UserError
from lalm.training.curriculum import grow_p2
from lalm.training.sts.encoding import CHARACTERS_A_TOKEN

# batches that are sorted by length together
POOL = 32


def token_estimates(dataset: Dataset, max_length: int) -> np.ndarray:
    """Return for each row about how many tokens its longest text has, `max_length` at most, int64 [rows]."""
    columns = [name for name in dataset.column_names if getattr(dataset.features[name], "dtype", "") == "string"]
    table = dataset.with_format("arrow")
    characters = np.zeros(len(dataset), dtype=np.int64)
    for start in range(0, len(dataset), 100_000):
        part = table[start : start + 100_000]
        for name in columns:
            lengths = compute.utf8_length(part[name]).to_numpy()
            characters[start : start + len(lengths)] = np.maximum(characters[start : start + len(lengths)], lengths)
    return np.minimum(characters / CHARACTERS_A_TOKEN + 2, max_length).astype(np.int64)


def cut(rows: np.ndarray, lengths: np.ndarray, batch_size: int, max_tokens: int | None) -> list[np.ndarray]:
    """Cut rows, sorted by length, into batches of `batch_size` rows, fewer where they would be above `max_tokens`."""
    if max_tokens is None:
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches, start = [], 0
    while start < len(rows):
        end = min(start + batch_size, len(rows))
        while end - start > 1 and lengths[rows[end - 1]] * (end - start) > max_tokens:
            end -= 1
        batches.append(rows[start:end])
        start = end
    return batches


class LengthSampler(DefaultBatchSampler):
    """Batches of rows of similar length, which are drawn from random pools of 32 batches; little padding is left.

    Args:
        lengths: tokens of each row, about.
        max_batch_tokens: rows times longest row in a batch, at most.
        curriculum: none; grow_p2, see there; phases (LAM's): 40 % of the batches from the shorter half, 40 % mixed,
            20 % from the longer half.
        most: batches that will be used; with a curriculum, an epoch is a random part of the data of this size.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        drop_last: bool = False,
        max_batch_tokens: int | None = None,
        curriculum: str = "none",
        cycles: int = 8,
        most: int | None = None,
        seed: int = 0,
    ):
        super().__init__(range(len(lengths)), batch_size=batch_size, drop_last=drop_last, seed=seed)
        self.lengths, self.max_batch_tokens = lengths, max_batch_tokens
        self.curriculum, self.cycles, self.most = curriculum, cycles, most
        self.epoch = 0
        self._plan: tuple[int, list[np.ndarray]] | None = None
        if not len(self):
            raise UserError("the training data make no whole batch; lower --per_device_train_batch_size")

    def plan(self) -> list[np.ndarray]:
        """The batches of this epoch in their order."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, self._make())
        return self._plan[1]

    def _make(self) -> list[np.ndarray]:
        source = np.random.default_rng([self.seed or 0, self.epoch])
        rows, pool = source.permutation(len(self.lengths)), POOL * self.batch_size
        batches = []
        for start in range(0, len(rows), pool):
            part = rows[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += cut(part, self.lengths, self.batch_size, self.max_batch_tokens)
        if self.drop_last and self.max_batch_tokens is None:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        batches = [batches[index] for index in source.permutation(len(batches))]
        if self.curriculum == "none":
            return batches
        batches = batches[: self.most]
        longest = np.array([self.lengths[batch].max() for batch in batches])
        order = self._grow if self.curriculum == "grow_p2" else _phases
        return order(batches, longest, source)

    def _grow(self, batches: list[np.ndarray], longest: np.ndarray, source: np.random.Generator) -> list[np.ndarray]:
        powers = np.ceil(np.log2(np.maximum(longest, 1))).astype(int)
        kinds = sorted(set(powers.tolist()))
        buckets = [[batch for batch, power in zip(batches, powers, strict=True) if power == kind] for kind in kinds]
        odds = [2.0 ** (len(kinds) - 1 - index) for index in range(len(kinds))]
        return grow_p2(buckets, odds, min(self.cycles, len(batches)), source)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.plan():
            yield batch.tolist()

    def __len__(self) -> int:
        return len(self.plan())


def _phases(batches: list[np.ndarray], longest: np.ndarray, source: np.random.Generator) -> list[np.ndarray]:
    ranked = np.argsort(longest, kind="stable")
    half = len(batches) // 2
    shorter, longer = source.permutation(ranked[:half]), source.permutation(ranked[half:])
    first, last = min(half, round(0.4 * len(batches))), min(len(longer), round(0.2 * len(batches)))
    middle = source.permutation(np.concatenate([shorter[first:], longer[last:]]))
    return [batches[index] for index in np.concatenate([shorter[:first], middle, longer[:last]])]


class MixtureSampler(MultiDatasetDefaultBatchSampler):
    """Batches of several data sets, each from one of them, drawn with given shares; a data set that ends begins anew.

    An epoch has as many batches as the data sets together.

    Args:
        shares: one number above 0 for each data set; their sum does not matter.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        shares: Sequence[float],
        seed: int = 0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(dataset, batch_samplers, generator, seed)
        self.shares = np.array(shares, dtype=float) / sum(shares)
        self.epoch = 0
        if any(not len(sampler) for sampler in batch_samplers):
            raise UserError("a kind of data has no whole batch; lower --per_device_train_batch_size")

    def __iter__(self) -> Iterator[list[int]]:
        source = np.random.default_rng([self.seed or 0, self.epoch])
        offsets = np.cumsum([0, *(len(cast(Sized, part)) for part in self.dataset.datasets)])
        turns = [self._turns(index) for index in range(len(self.batch_samplers))]
        for index in source.choice(len(turns), size=len(self), p=self.shares):
            yield [row + int(offsets[index]) for row in next(turns[index])]

    def _turns(self, index: int) -> Iterator[list[int]]:
        sampler, turn = self.batch_samplers[index], 0
        while True:
            # turns of one epoch and of the next must differ
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(1000 * self.epoch + turn)
            yield from sampler
            turn += 1

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.batch_samplers)
