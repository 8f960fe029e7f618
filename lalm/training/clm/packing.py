# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Token streams -> blocks for training and evaluation.

Block k covers the tokens [k * stride, k * stride + block_size) of the stream. Which tokens are scored (carry a label):
every token is scored at most once, in the first block that holds it, unless

- it is the first token of a block and no earlier block holds it (nothing precedes it: with stride == block_size that
  is the first token of every block, with a smaller stride only the first token of the stream), or
- documents are kept apart and it is the first token of a document (for a tokenizer with a bos token: the bos).

So no document predicts the first token of the next one, and with stride S < block_size every token of the second and
later blocks is scored with at least block_size - S tokens of context, as far as its document reaches back.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lalm.errors import UserError

Piece = tuple[np.ndarray, bool]


@dataclass
class TokenStream:
    """A split as one stream: tokens [N] int32 and starts [N] bool, true at the first token of each document."""

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_pieces(cls, pieces: Iterable[Piece], max_tokens: int | None = None) -> "TokenStream":
        """Join pieces; with `max_tokens`, stop reading once there are that many."""
        ids, starts, total = [], [], 0
        for piece, begins in pieces:
            mark = np.zeros(len(piece), dtype=bool)
            mark[0] = begins
            ids.append(piece)
            starts.append(mark)
            total += len(piece)
            if max_tokens is not None and total >= max_tokens:
                break
        if not ids:
            return cls(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))
        return cls(np.concatenate(ids)[:max_tokens], np.concatenate(starts)[:max_tokens])

    @property
    def num_documents(self) -> int:
        return int(self.starts.sum())

    @property
    def digest(self) -> str:
        """Length and checksum; another text, tokenizer or rule for documents gives another."""
        return f"{len(self.tokens)} tokens {zlib.crc32(self.starts.data, zlib.crc32(self.tokens.data)):08x}"


class PackedDataset(Dataset):
    """Blocks of a `TokenStream`, by index.

    Items: ``input_ids`` [n] int32, ``scored`` [n] bool, ``starts`` [n] bool or None (concatenated text); n is
    `block_size`, less in the last block. Nothing is dropped but a last block in which nothing can be scored.

    Args:
        stride: tokens from one block to the next, 1 .. block_size.
        separate_documents: False treats the stream as one text.
        max_blocks: keep the first blocks only.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        stride: int | None = None,
        separate_documents: bool = True,
        max_blocks: int | None = None,
    ):
        self.stream, self.block_size, self.stride = stream, block_size, stride or block_size
        self.separate_documents = separate_documents
        total = len(stream.tokens)
        blocks = 1 + max(0, -(-(total - block_size) // self.stride)) if total else 0
        self.scored = self._scored(blocks)
        if blocks and not self.scored[self._first_new(blocks - 1) :].any():
            blocks -= 1
        self.num_blocks = min(blocks, max_blocks) if max_blocks else blocks

    def _first_new(self, index: int) -> int:
        """Position of the first token of block `index` that no earlier block holds."""
        return 0 if index == 0 else (index - 1) * self.stride + self.block_size

    def _scored(self, blocks: int) -> np.ndarray:
        scored = np.ones(len(self.stream.tokens), dtype=bool)
        if self.separate_documents:
            scored &= ~self.stream.starts
        if self.stride == self.block_size:
            scored[:: self.block_size] = False
        scored[:1] = False
        return scored

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_blocks:
            raise IndexError(index)
        begin = index * self.stride
        block = slice(begin, min(begin + self.block_size, len(self.stream.tokens)))
        scored = self.scored[block].copy()
        scored[: self._first_new(index) - begin] = False
        starts = self.stream.starts[block] if self.separate_documents else None
        return {"input_ids": self.stream.tokens[block], "scored": scored, "starts": starts}

    @property
    def tokens_covered(self) -> int:
        """Tokens of the stream that the blocks hold, each counted once."""
        return min(self._first_new(self.num_blocks), len(self.stream.tokens)) if self.num_blocks else 0

    @property
    def tokens_scored(self) -> int:
        """Tokens that carry a label, over all blocks."""
        return int(self.scored[: self.tokens_covered].sum())


class StreamingPackedDataset(IterableDataset):
    """The blocks of `PackedDataset` with stride == block_size, made while the text is read, pass after pass.

    It does not end: the Trainer, which knows no length, would take the pass for an epoch of `max_steps` steps, skip
    within one pass what a resumed run has seen in several, and leave the gradients of a last, incomplete accumulation
    to the first step of the next pass.

    The processes of a run and the workers of their loaders are its readers, each of which gives its share of the
    blocks: those of documents that it alone reads, or some of those that all of them make.

    Args:
        pieces: called at the start of each pass with its number and with (index, count), the share of the rows that a
            reader wants; returns the pieces.
        max_blocks: a pass is the first blocks only.
        process: (rank, number of processes).
        shares_rows: whether readers may share the rows; not if a document has several.
    """

    def __init__(
        self,
        pieces: Callable[[int, tuple[int, int]], Iterable[Piece]],
        block_size: int,
        separate_documents: bool = True,
        max_blocks: int | None = None,
        process: tuple[int, int] = (0, 1),
        shares_rows: bool = False,
    ):
        self.pieces, self.block_size, self.max_blocks = pieces, block_size, max_blocks
        self.separate_documents, self.process, self.shares_rows = separate_documents, process, shares_rows

    def _item(self, tokens: np.ndarray, starts: np.ndarray) -> dict:
        scored = ~starts if self.separate_documents else np.ones(len(tokens), dtype=bool)
        scored[0] = False
        return {"input_ids": tokens, "scored": scored, "starts": starts if self.separate_documents else None}

    def one_pass(self, turn: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[dict]:
        """Iterate over the blocks of a share of the text once."""
        index, count = share
        most = None if self.max_blocks is None else (self.max_blocks - index + count - 1) // count
        return itertools.islice(self._blocks(turn, share), most)

    def _blocks(self, turn: int, share: tuple[int, int]) -> Iterator[dict]:
        size = self.block_size
        tokens, starts = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
        for piece, begins in self.pieces(turn, share):
            mark = np.zeros(len(piece), dtype=bool)
            mark[0] = begins
            tokens, starts = np.concatenate([tokens, piece]), np.concatenate([starts, mark])
            while len(tokens) >= size:
                yield self._item(tokens[:size], starts[:size])
                tokens, starts = tokens[size:], starts[size:]
        if len(tokens):
            last = self._item(tokens, starts)
            if last["scored"].any():
                yield last

    def _passes(self, share: tuple[int, int]) -> Iterator[dict]:
        for turn in itertools.count():
            block = None
            for block in self.one_pass(turn, share):
                yield block
            if block is None:
                shared = f" for each of {share[1]} readers (processes x workers)" if share[1] > 1 else ""
                raise UserError(f"the train text is too short to score one token{shared}; give more text")

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        (rank, processes), (number, workers) = self.process, (worker.id, worker.num_workers) if worker else (0, 1)
        share = (rank * workers + number, processes * workers)
        if self.shares_rows:
            return self._passes(share)
        return itertools.islice(self._passes((0, 1)), share[0], None, share[1])


@dataclass
class PackingCollator:
    """Makes ``input_ids``, ``labels`` and, with documents kept apart, ``position_ids``, each [B, block_size] int64.

    Positions restart at 0 at each document and at the start of the block. Short blocks are padded on the right; the
    padding is a document of its own without labels, so no attention mask is needed, and none is given: with one, the
    attention of transformers would not look for document boundaries.
    """

    block_size: int
    pad_token_id: int

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        shape = (len(items), self.block_size)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, -100, dtype=np.int64)
        starts = np.zeros(shape, dtype=bool)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            ids[row, :length] = item["input_ids"]
            labels[row, :length] = np.where(item["scored"], item["input_ids"], -100)
            if item["starts"] is not None:
                starts[row, :length] = item["starts"]
            starts[row, length : length + 1] = True
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if items[0]["starts"] is not None:
            columns = np.arange(self.block_size)
            last_start = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
            batch["position_ids"] = torch.from_numpy(columns - last_start)
        return batch


def require_blocks(dataset: PackedDataset, split: str) -> None:
    """Refuse a split too short to score a single token."""
    if len(dataset) == 0:
        tokens = len(dataset.stream.tokens)
        raise UserError(f"the {split} text has {tokens} tokens: too few to score one; give more text")
