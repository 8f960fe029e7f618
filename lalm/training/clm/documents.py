# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Rows of text -> tokens with marks where documents begin."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lalm.training.clm.arguments import DataArguments
from lalm.training.text_rows import LONGEST_WORD, SplitRows, check_words

Item = TypeVar("Item")
BLANK, HEADING, TEXT = 0, 1, 2
STREAM_BATCH = 256
# ` = Title = ` but not ` = = Section = = `: WikiText's top level
ARTICLE_HEADING = re.compile(r"^\s*=\s(?!=\s).*(?<!\s=)\s=\s*$")


@dataclass(frozen=True)
class ReadingOrder:
    """How a stream is read: its pass, the share (index, count) of a reader, the rows of a shuffle buffer (0: none)."""

    turn: int = 0
    share: tuple[int, int] = (0, 1)
    buffer: int = 0
    seed: int = 0


def resolve_boundary(data: DataArguments, rows: SplitRows) -> str:
    """Return the boundary rule; ``auto`` is ``file`` for text files and ``row`` for records."""
    if data.document_boundary != "auto":
        return data.document_boundary
    return "file" if rows.is_text_file else "row"


def tokenize_rows(batch: dict, tokenizer: PreTrainedTokenizerBase, boundary: str, strip: bool) -> dict:
    """Tokenize a batch of rows without special tokens, and note which are blank or look like an article's heading.

    Rows are lines of a document in every rule but ``row``, so they end in a newline there; a line that is itself a
    document (`strip`) loses it.
    """
    texts = [text or "" for text in batch["text"]]
    for text in texts:
        check_words(text, LONGEST_WORD, "the text")
    kinds = [BLANK if not text.strip() else HEADING if ARTICLE_HEADING.match(text) else TEXT for text in texts]
    if boundary != "row":
        texts = [text if text.endswith("\n") else text + "\n" for text in texts]
    elif strip:
        texts = [text.rstrip("\r\n") for text in texts]
    # an over-long warning would be noise: blocks are cut later
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": ids, "kind": kinds}


@dataclass
class Row:
    """A tokenized row: ids [n] int32, its kind, and whether it is the first of a file."""

    ids: np.ndarray
    kind: int
    begins_file: bool


def tokenized_rows(
    rows: SplitRows, tokenizer: PreTrainedTokenizerBase, data: DataArguments, boundary: str
) -> Iterator[Row]:
    """Tokenize every part of a split that is read whole and iterate over its rows in order."""
    function = partial(tokenize_rows, tokenizer=tokenizer, boundary=boundary, strip=rows.is_text_file)
    for part in rows.parts:
        options: dict = {"load_from_cache_file": not data.overwrite_cache, "num_proc": data.preprocessing_num_workers}
        with rows.readable():
            begins_file = True
            done = part.map(function, batched=True, remove_columns=["text"], desc="Tokenizing", **options)
            for batch in done.with_format("numpy").iter(batch_size=1000):
                for ids, kind in zip(batch["input_ids"], batch["kind"], strict=True):
                    yield Row(np.asarray(ids, dtype=np.int32), int(kind), begins_file)
                    begins_file = False


def streamed_rows(
    rows: SplitRows, tokenizer: PreTrainedTokenizerBase, boundary: str, order: ReadingOrder
) -> Iterator[Row]:
    """Read rows and tokenize them a few at a time."""
    texts = rows.read(order.share)
    if order.buffer:
        texts = shuffled(texts, order.buffer, np.random.default_rng([order.seed, order.turn, *order.share]))
    while few := list(itertools.islice(texts, STREAM_BATCH)):
        batch = tokenize_rows({"text": [text for text, _ in few]}, tokenizer, boundary, rows.is_text_file)
        for ids, kind, (_, begins_file) in zip(batch["input_ids"], batch["kind"], few, strict=True):
            yield Row(np.asarray(ids, dtype=np.int32), kind, begins_file)


def shuffled(items: Iterator[Item], size: int, source: np.random.Generator) -> Iterator[Item]:
    """Hold `size` items, of which a random one comes next and is replaced by the next that is read."""
    held = list(itertools.islice(items, size))
    for item in items:
        index = int(source.integers(size))
        yield held[index]
        held[index] = item
    for index in source.permutation(len(held)):
        yield held[index]


def begins_document(boundary: str) -> Callable[[Row, Row | None, Row | None], bool]:
    """Return the rule (row, row before, row after) -> does a document begin here?"""

    def blank(row: Row | None) -> bool:
        return row is None or row.kind == BLANK

    rules = {
        "file": lambda row, before, after: row.begins_file,
        "row": lambda row, before, after: True,
        "paragraph": lambda row, before, after: row.begins_file or blank(before),
        # a heading stands between blank lines; ` = 5 = ` inside a paragraph does not
        "article": lambda row, before, after: (
            row.begins_file or (row.kind == HEADING and blank(before) and blank(after))
        ),
    }
    return rules[boundary]


def with_neighbours(rows: Iterable[Row]) -> Iterator[tuple[Row, Row | None, Row | None]]:
    """Iterate over (row, row before, row after)."""
    before = row = None
    for after in rows:
        if row is not None:
            yield row, before, after
            before = row
        row = after
    if row is not None:
        yield row, before, None


def token_pieces(
    rows: Iterable[Row], boundary: str, bos: int | None, eos: int | None
) -> Iterator[tuple[np.ndarray, bool]]:
    """Join rows to documents and yield (ids [n] int32, whether a document begins with them).

    A document is [bos] + its tokens + [eos], where the tokenizer has them. Blank rows are left out, except in the
    rule ``file``, which keeps the text as it is.
    """
    begins = begins_document(boundary)
    pending_file = started = False
    for row, before, after in with_neighbours(rows):
        pending_file |= row.begins_file
        if row.kind == BLANK and boundary != "file":
            continue
        row.begins_file, pending_file = pending_file, False
        starts = not started or begins(row, before, after)
        if starts:
            if started and eos is not None:
                yield np.array([eos], dtype=np.int32), False
            started = True
            if bos is not None:
                row.ids = np.concatenate([np.array([bos], dtype=np.int32), row.ids])
        if len(row.ids):
            yield row.ids, starts
    if started and eos is not None:
        yield np.array([eos], dtype=np.int32), False


def split_pieces(
    rows: SplitRows, tokenizer: PreTrainedTokenizerBase, data: DataArguments, order: ReadingOrder | None = None
) -> Iterator[tuple[np.ndarray, bool]]:
    """Tokenize a split and yield its documents piece by piece (see `token_pieces`).

    Concatenated text has no document starts, hence one separator between documents instead of an end and a start.

    Args:
        order: which rows of a stream, in which order; default: all as they are.
    """
    boundary = resolve_boundary(data, rows)
    bos = tokenizer.bos_token_id if data.packing == "documents" else None
    if rows.is_streamed:
        tokenized = streamed_rows(rows, tokenizer, boundary, order or ReadingOrder())
    else:
        tokenized = tokenized_rows(rows, tokenizer, data, boundary)
    return token_pieces(tokenized, boundary, bos, tokenizer.eos_token_id)
