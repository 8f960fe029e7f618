# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Arguments -> tokenizer and packed splits, with a description of each split for the log and the model card."""

import logging
from dataclasses import dataclass, field
from functools import partial

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from lalm.training.arguments import ClmTrainingArguments, DataArguments, ModelArguments
from lalm.training.documents import resolve_boundary, split_pieces
from lalm.training.errors import UserError
from lalm.training.packing import PackedDataset, StreamingPackedDataset, TokenStream, require_blocks
from lalm.training.text_rows import SplitRows, load_splits, quiet_progress_bars
from lalm.training.tokenizer import make_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class RunData:
    """What a run trains and is scored on; `notes` holds a line on each split."""

    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, PackedDataset | StreamingPackedDataset] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


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
    stream = TokenStream.from_pieces(split_pieces(rows, run.tokenizer, data), max_tokens)
    dataset = PackedDataset(stream, data.block_size, stride, data.packing == "documents", limit)
    require_blocks(dataset, split)
    run.notes[split] = describe(dataset, split, rows, data, limit)
    return dataset


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


def pack_streaming(rows: SplitRows, run: RunData, data: DataArguments) -> StreamingPackedDataset:
    """Set up blocks that are made while the text is read."""
    pieces = partial(split_pieces, rows, run.tokenizer, data)
    run.notes["train"] = f"streamed in blocks of {data.block_size}, documents by {resolve_boundary(data, rows)}"
    return StreamingPackedDataset(pieces, data.block_size, data.packing == "documents", data.max_train_samples)


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
    needed = needed_splits(training)
    if data.streaming and training.do_train and training.max_steps <= 0:
        raise UserError("--streaming does not know how long the text is; give --max_steps")
    if checkpoint and not (model.tokenizer_name or model.model_name_or_path):
        model.tokenizer_name = checkpoint
    # one process of a node fills the caches, the others read them
    with training.main_process_first(desc="data preparation"):
        rows = load_splits(data, model, needed)
        run = RunData(make_tokenizer(model, rows["train"].texts() if "train" in rows else None))
        for split in sorted(needed, key=("train", "validation", "test").index):
            run.sources[split] = rows[split].source
            streamed = any(isinstance(part, IterableDataset) for part in rows[split].parts)
            if split == "train" and streamed:
                run.splits[split] = pack_streaming(rows[split], run, data)
            else:
                run.splits[split] = pack_mapped(rows[split], split, run, data)
            logger.info("%s: %s: %s", split, run.sources[split], run.notes[split])
    return run
