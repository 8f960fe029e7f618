# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Arguments -> tokenizer and packed splits, with a description of each split for the log and the model card."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase

from lalm.errors import UserError
from lalm.training.clm.arguments import ClmTrainingArguments, DataArguments, ModelArguments
from lalm.training.clm.block_order import DecomposedBlocks, PhasedBlocks
from lalm.training.clm.documents import ReadingOrder, resolve_boundary, split_pieces
from lalm.training.clm.packing import PackedDataset, Piece, StreamingPackedDataset, TokenStream, require_blocks
from lalm.training.clm.tokenizer import STREAM_SAMPLE, make_tokenizer
from lalm.training.text_rows import SplitRows, load_splits, quiet_progress_bars

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10
SHUFFLED_ROWS = 10_000


@dataclass
class RunData:
    """What a run trains and is scored on; `notes` holds a line on each split."""

    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Any] = field(default_factory=dict)  # data sets of blocks
    notes: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    digest: str | None = None  # of the training text, None where there is none or it cannot be known


def needed_splits(training: ClmTrainingArguments) -> set[str]:
    """Return the splits a run uses."""
    evaluates = training.do_eval or (training.do_train and (training.eval_on_start or training.eval_strategy != "no"))
    uses = {"train": training.do_train, "validation": evaluates, "test": training.do_test}
    return {split for split, used in uses.items() if used}


def pack_mapped(rows: SplitRows, split: str, run: RunData, data: DataArguments) -> PackedDataset:
    """Tokenize a split whole and cut it into blocks, with the evaluation stride for all but training."""
    stride = data.block_size if split == "train" else data.eval_stride
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    # one token more than the blocks hold tells that the limit left something out
    max_tokens = None if limit is None else (limit - 1) * int(stride or 0) + data.block_size + 1
    pieces = tell_progress(split_pieces(rows, run.tokenizer, data), split)
    stream = TokenStream.from_pieces(pieces, max_tokens)
    dataset = PackedDataset(stream, data.block_size, stride, data.packing == "documents", limit)
    require_blocks(dataset, split)
    run.notes[split] = describe(dataset, split, rows, data, limit)
    return dataset


def pack_mixture(rows: SplitRows, run: RunData, data: DataArguments) -> tuple[ConcatDataset, str]:
    """Pack the training files one by one, to be mixed by their shares; return the blocks and the texts' digest."""
    shares = data.train_shares or []
    if len(rows.parts) != len(shares):
        raise UserError("--train_shares: held-out rows would be of all files together; give --validation_file")
    parts, notes = [], []
    for part, source, share in zip(rows.parts, rows.sources, shares, strict=True):
        parts.append(pack_mapped(replace(rows, parts=[part], source=source, sources=[source]), "train", run, data))
        notes.append(f"{share:g} from {Path(source).name} ({run.notes['train']})")
    run.notes["train"] = "mixed: " + ", ".join(notes)
    return ConcatDataset(parts), ", ".join(part.stream.digest for part in parts)


def in_curriculum(
    packed: PackedDataset, run: RunData, data: DataArguments, training: ClmTrainingArguments
) -> PackedDataset | DecomposedBlocks:
    """Cut the documents anew for grow_p2; other blocks stay as they are."""
    if data.curriculum != "grow_p2":
        return packed
    blocks = DecomposedBlocks(packed.stream, data.block_size, training.seed)
    kinds, counts = np.unique(blocks.kinds, return_counts=True)
    found = ", ".join(f"{count:,} of {size}" for size, count in zip(kinds, counts, strict=True))
    run.notes["train"] += f"; cut by length into {len(blocks):,} blocks with pieces of one length each ({found})"
    return blocks


def tell_progress(pieces: Iterable[Piece], split: str) -> Iterator[Piece]:
    """Pass pieces on, and log now and then how many tokens have been read."""
    tokens, said = 0, time.monotonic()
    for ids, begins in pieces:
        tokens += len(ids)
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            logger.info("%s: %s tokens read so far", split, f"{tokens:,}")
        yield ids, begins


def describe(dataset: PackedDataset, split: str, rows: SplitRows, data: DataArguments, limit: int | None) -> str:
    """Say in one line what a split became and what was left out."""
    boundary = resolve_boundary(data, rows)
    text = f"{dataset.stream.num_documents:,} documents ({boundary}), " if data.packing == "documents" else ""
    text += f"{dataset.tokens_covered:,} tokens in {len(dataset):,} blocks of {data.block_size}"
    if split != "train":
        text += f", stride {data.eval_stride}"
    text += f"; {dataset.tokens_scored:,} scored"
    left = len(dataset.stream.tokens) - dataset.tokens_covered
    if left and limit:
        text += f"; only the first {limit:,} blocks are used"
    elif left:
        text += f"; {left} tokens at the end left out (nothing in them can be scored)"
    return text


def streamed_pieces(
    rows: SplitRows, tokenizer: PreTrainedTokenizerBase, data: DataArguments, buffer: int, seed: int, turn: int,
    share: tuple[int, int],
) -> Iterator[Piece]:  # fmt: skip
    """Yield the pieces of one pass over a reader's share of a stream."""
    return split_pieces(rows, tokenizer, data, ReadingOrder(turn, share, buffer, seed))


def pack_streaming(
    rows: SplitRows, run: RunData, data: DataArguments, training: ClmTrainingArguments
) -> StreamingPackedDataset:
    """Set up blocks that are made while the text is read."""
    boundary = resolve_boundary(data, rows)
    by_rows = boundary == "row"
    if data.shuffle_buffer and not by_rows:
        raise UserError(f"--shuffle_buffer: with --document_boundary {boundary} rows are parts of documents; drop it")
    buffer = data.shuffle_buffer if data.shuffle_buffer is not None else SHUFFLED_ROWS if by_rows else 0
    seed = training.data_seed if training.data_seed is not None else training.seed

    pieces = partial(streamed_pieces, rows, run.tokenizer, data, buffer, seed)
    order = f"shuffled among {buffer:,} rows" if buffer else "in the order of the text"
    run.notes["train"] = f"streamed in blocks of {data.block_size}, documents by {boundary}, {order}"
    documents, process = data.packing == "documents", (training.process_index, training.world_size)
    return StreamingPackedDataset(pieces, data.block_size, documents, data.max_train_samples, process, by_rows)


def check_streaming(training: ClmTrainingArguments) -> None:
    """Refuse what needs the length of a stream."""
    if not training.do_train:
        return
    if training.max_steps <= 0:
        raise UserError("--streaming does not know how long the text is; give --max_steps")
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        if getattr(training, name) == "epoch":
            raise UserError(f"--{name} epoch: --streaming does not know where an epoch ends; use steps")


def prepare_data(
    model: ModelArguments, data: DataArguments, training: ClmTrainingArguments, checkpoint: str | None = None
) -> RunData:
    """Load, tokenize and pack every split of the run.

    Args:
        checkpoint: a checkpoint to resume, whose tokenizer is used if the run trained its own.

    Raises:
        UserError: for text that cannot be read, is missing or too short.
    """
    quiet_progress_bars()
    if data.streaming:
        check_streaming(training)
    if checkpoint and not (model.tokenizer_name or model.model_name_or_path):
        model.tokenizer_name = checkpoint
    # one process of a node fills the caches, the others read them
    with training.main_process_first(desc="data preparation"):
        rows = load_splits(data, model, needed_splits(training))
        texts = rows["train"].texts() if "train" in rows else None
        run = RunData(make_tokenizer(model, texts, STREAM_SAMPLE if data.streaming else None))
        for split in ("train", "validation", "test"):
            if split in rows:
                pack(rows[split], split, run, data, training)
    return run


def pack(rows: SplitRows, split: str, run: RunData, data: DataArguments, training: ClmTrainingArguments) -> None:
    """Make the blocks of a split, or set up that they are made while training."""
    run.sources[split] = rows.source
    if split == "train" and rows.is_streamed:
        run.splits[split], run.digest = pack_streaming(rows, run, data, training), rows.digest_of_ends()
    else:
        logger.info("%s: reading %s", split, rows.source)
        if split == "train" and data.train_shares:
            run.splits[split], run.digest = pack_mixture(rows, run, data)
        else:
            packed = pack_mapped(rows, split, run, data)
            run.splits[split] = packed if split != "train" else in_curriculum(packed, run, data, training)
            if split == "train":
                run.digest = packed.stream.digest
        if split == "train" and data.curriculum == "phases":
            run.splits[split] = PhasedBlocks(run.splits[split], data.phase_lengths or [])
    logger.info("%s: %s: %s", split, rows.source, run.notes[split])
