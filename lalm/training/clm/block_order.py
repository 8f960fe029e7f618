# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Curricula and mixtures of packed blocks: what a training block is, and in which order blocks come.

Blocks keep their size throughout a run, so that every update covers the same number of tokens and no tensor changes
its shape. What a curriculum changes is how far a token can look back inside of a block: documents, or pieces of
them, are kept apart as always, by positions that restart.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Sampler

from lalm.errors import UserError
from lalm.training.clm.packing import TokenStream
from lalm.training.curriculum import grow_p2

# lengths of grow_p2, each half of the next: those of the paper are 256 ... 8192
BUCKETS = 6


def binary_pieces(length: int, shortest: int, longest: int) -> list[int]:
    """The powers of two, largest first and none above `longest`, of which a length is the sum; rests are dropped.

    Dataset Decomposition (arXiv 2405.13226), section 2: a document is cut along its binary expansion.
    """
    pieces = [longest] * (length // longest)
    rest, size = length % longest, longest // 2
    while size >= shortest:
        if rest & size:
            pieces.append(size)
        size //= 2
    return pieces


class DecomposedBlocks(Dataset):
    """Blocks of pieces of one length each, cut from single documents.

    Args:
        stream: whose documents are cut.
        block_size: a power of two, the longest length; the shortest is a 32nd of it, and at least 2.
        seed: of the order in which pieces of a length share blocks.

    Attributes:
        kinds: int64 [blocks], the length of the pieces of each block, rising.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        if block_size & (block_size - 1):
            raise UserError(f"--block_size is {block_size}; --curriculum grow_p2 needs a power of two")
        self.stream, self.block_size = stream, block_size
        shortest = max(2, block_size >> (BUCKETS - 1))
        begins: dict[int, list[int]] = {}
        edges = [*np.flatnonzero(stream.starts).tolist(), len(stream.tokens)]
        for start, end in itertools.pairwise(edges):
            for size in binary_pieces(end - start, shortest, block_size):
                begins.setdefault(size, []).append(start)
                start += size
        self.blocks: list[np.ndarray] = []
        kinds: list[int] = []
        source = np.random.default_rng(seed)
        for size in sorted(begins):
            places, count = source.permutation(begins[size]), block_size // size
            whole = len(places) // count
            self.blocks += list(places[: whole * count].reshape(whole, count))
            kinds += [size] * whole
        self.kinds = np.array(kinds, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict:
        size = int(self.kinds[index])
        tokens = np.concatenate([self.stream.tokens[place : place + size] for place in self.blocks[index]])
        starts = np.arange(self.block_size) % size == 0
        return {"input_ids": tokens, "scored": ~starts, "starts": starts}


class PhasedBlocks(Dataset):
    """The blocks of another data set, in which a token looks back over no more than the length of a phase.

    Args:
        lengths: of the phases; the item `phase * len(blocks) + i` is block i cut into pieces of `lengths[phase]`.
    """

    def __init__(self, blocks: Dataset, lengths: Sequence[int]):
        self.blocks, self.lengths = blocks, list(lengths)

    def __len__(self) -> int:
        return len(self.blocks)  # type: ignore[arg-type]

    def __getitem__(self, key: int) -> dict:
        phase, index = divmod(key, len(self))
        item = self.blocks[index]
        cuts = np.arange(len(item["input_ids"])) % self.lengths[phase] == 0
        starts = cuts if item["starts"] is None else item["starts"] | cuts
        return {**item, "scored": item["scored"] & ~cuts, "starts": starts}


class BlockOrder(Sampler[int]):
    """The order of the blocks of an epoch: shuffled, or as a curriculum and a mixture have it.

    Args:
        blocks: `DecomposedBlocks` come by grow_p2, those of `PhasedBlocks` in phases.
        batch: blocks of one step of all processes; a batch of grow_p2 has pieces of one length.
        shares: of the parts of a `ConcatDataset`, 1 together; every block comes from a part drawn with them. A part
            that ends begins anew.
        phase_ends: share of the run at which each phase ends.
        place: returns the epoch and the batches of the run.
    """

    def __init__(
        self,
        blocks: Dataset,
        batch: int,
        place: Callable[[], tuple[int, int]],
        seed: int,
        cycles: int = 8,
        shares: Sequence[float] = (),
        phase_ends: Sequence[float] = (),
    ):
        self.blocks, self.batch, self.place, self.seed = blocks, batch, place, seed
        self.cycles, self.shares, self.phase_ends = cycles, list(shares), list(phase_ends)
        if not len(self):
            raise UserError("no batch can be made of documents of one length; lower --per_device_train_batch_size")

    def __len__(self) -> int:
        if isinstance(self.blocks, DecomposedBlocks):
            counts = np.unique(self.blocks.kinds, return_counts=True)[1]
            return int((counts // self.batch).sum()) * self.batch
        return len(self.blocks)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        epoch, batches = self.place()
        source = np.random.default_rng([self.seed, epoch])
        order = self._order(source)
        if not self.phase_ends:
            yield from order
            return
        for count, index in enumerate(order):
            done = (epoch * -(-len(self) // self.batch) + count // self.batch) / max(1, batches)
            phase = min(int(np.searchsorted(self.phase_ends, done, side="right")), len(self.phase_ends) - 1)
            yield phase * len(self) + index

    def _order(self, source: np.random.Generator) -> list[int]:
        blocks = self.blocks.blocks if isinstance(self.blocks, PhasedBlocks) else self.blocks
        if isinstance(blocks, DecomposedBlocks):
            return self._grown(blocks, source)
        if self.shares and isinstance(blocks, ConcatDataset):
            return self._mixed(blocks, source)
        return source.permutation(len(self)).tolist()

    def _grown(self, blocks: DecomposedBlocks, source: np.random.Generator) -> list[int]:
        buckets = []
        for kind in np.unique(blocks.kinds):
            rows = source.permutation(np.flatnonzero(blocks.kinds == kind))
            whole = len(rows) // self.batch
            buckets.append(rows[: whole * self.batch].reshape(whole, self.batch).tolist())
        odds = [2.0 ** (len(buckets) - 1 - index) for index in range(len(buckets))]
        return [index for batch in grow_p2(buckets, odds, self.cycles, source) for index in batch]

    def _mixed(self, blocks: ConcatDataset, source: np.random.Generator) -> list[int]:
        sizes = [len(part) for part in blocks.datasets]  # type: ignore[arg-type]
        turns = [endless(size, source) for size in sizes]
        offsets = np.cumsum([0, *sizes])
        drawn = source.choice(len(sizes), size=len(self), p=np.array(self.shares) / sum(self.shares))
        return [int(offsets[part]) + next(turns[part]) for part in drawn.tolist()]


def endless(size: int, source: np.random.Generator) -> Iterator[int]:
    """Iterate over 0 .. size - 1 in a random order, again and again."""
    while True:
        yield from source.permutation(size).tolist()
