# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Text from the Hub, from local files or from the built-in default, as rows of one text column a split."""

import gzip
import logging
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset

from lalm.errors import UserError, is_disk_full, nearest_hint, one_line
from lalm.training.clm.arguments import DataArguments, ModelArguments

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
END = 1 << 24
# rows of a stream without a validation split that are not trained on
HELD_OUT_ROWS = 1000
# characters of a word from which on the training of a tokenizer takes minutes (it is quadratic in them), and its use
LONGEST_TRAINED_WORD, LONGEST_WORD = 100_000, 10_000_000


@dataclass
class SplitRows:
    """One split: datasets with one ``text`` column, a dataset a file. `is_text_file` tells lines from records.

    Of a stream that has no other validation text, one split is the first `take` rows and the other what follows the
    first `skip`.
    """

    parts: list[Dataset | IterableDataset]
    is_text_file: bool
    source: str
    sources: list[str] = field(default_factory=list)
    skip: int = 0
    take: int | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether the rows are read one after the other and cannot be counted."""
        return any(isinstance(part, IterableDataset) for part in self.parts)

    def texts(self) -> Iterator[str]:
        """Iterate over the texts of all parts; None (an empty cell) comes as ''.

        Raises:
            UserError: a word is so long that a tokenizer would hardly ever be trained on it.
        """
        for text, _ in self.read():
            check_words(text, LONGEST_TRAINED_WORD, self.source)
            yield text

    def read(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, bool]]:
        """Iterate over (text, whether it is the first of a file).

        Args:
            share: (index, count): of `count` readers that share the rows, the one that this is. Each gets files of its
                own where there are enough of them, else every `count`-th row.
        """
        index, count = share
        end = float("inf") if self.take is None else self.skip + self.take
        row = 0
        with self.readable():
            for part in self.parts:
                by_file = count > 1 and end == float("inf") and not self.skip and files_of(part) >= count
                begins_file = True
                for batch in (part.shard(count, index) if by_file else part).iter(batch_size=1000):
                    for text in batch["text"]:
                        if row >= end:
                            return
                        if row >= self.skip and (by_file or row % count == index):
                            yield text or "", begins_file
                            begins_file = False
                        row += 1

    @contextmanager
    def readable(self) -> Iterator[None]:
        """What `datasets` raises while rows are read is a `UserError`: a broken gzip file, JSON or encoding."""
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError) or is_disk_full(error):
                raise
            raise UserError(f"cannot read {self.source}: {one_line(error)}") from error

    def digest_of_ends(self) -> str | None:
        """Sizes and checksums of the first and last 16 MiB of local files: a stream is too long to be read for that.

        None for other text.
        """
        found = []
        for source in self.sources:
            with open(source, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                value = zlib.crc32(handle.read(END))
                handle.seek(max(0, size - END))
                found.append(f"{size} bytes {zlib.crc32(handle.read(), value):08x}")
        return ", ".join(found) or None


def files_of(part: Dataset | IterableDataset) -> int:
    """Files that readers of a stream can share."""
    return part.num_shards if isinstance(part, IterableDataset) else 1


def check_words(text: str, longest: int, source: str) -> None:
    """Refuse a text with a word (letters and digits, or other signs, without a space) of `longest` characters."""
    if len(text) >= longest and (word := re.search(rf"\w{{{longest},}}|[^\w\s]{{{longest},}}", text)):
        raise UserError(
            f"{source} has {len(word[0]):,} characters without a space or a line break, on which a tokenizer would "
            f"not end; break them into lines, or leave them out ('{word[0][:20]}...')"
        )


def builder_of(path: Path) -> tuple[str, dict]:
    """Return the `datasets` builder for a file name and its options; an unknown suffix is plain text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    name = BUILDERS.get(suffixes[-1] if suffixes else "", "text")
    options: dict = {"keep_linebreaks": True} if name == "text" else {}
    if suffixes[-1:] == [".tsv"]:
        options["sep"] = "\t"
    return name, options


def check_file(path: Path, flag: str) -> None:
    """Refuse what cannot be read: a missing, empty or broken compressed file."""
    if not path.exists():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{flag}: there is no file {path}{nearest_hint(path.name, near)}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; name its files")
    if not path.is_file():
        raise UserError(f"{flag}: {path} is no regular file (a pipe or a device), and is read several times; copy it")
    try:
        with open(path, "rb") as handle:
            if not (start := handle.read(4096)):
                raise UserError(f"{flag}: the file {path} is empty")
            if not start.strip(b"\0"):
                raise UserError(f"{flag}: {path} begins with NUL bytes and is no text; copy or download it again")
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as handle:
                if not handle.read(1):
                    raise UserError(f"{flag}: the file {path} holds no text")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{flag}: {path} is not a readable gzip file: {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path}: {error.strerror or one_line(error)}") from None


def choose_text_column(dataset: Dataset | IterableDataset, wanted: str | None, source: str) -> str:
    """Return the text column: the one asked for, 'text', or the only column of strings."""
    if dataset.features is None:
        dataset = dataset._resolve_features() if isinstance(dataset, IterableDataset) else dataset
    features = dataset.features or {}
    columns = list(features)
    if wanted is not None:
        if wanted not in columns:
            raise UserError(
                f"--text_column: {source} has no column '{wanted}'{nearest_hint(wanted, columns)}; "
                f"its columns are {', '.join(columns)}"
            )
        chosen = wanted
    elif "text" in columns:
        chosen = "text"
    else:
        strings = [name for name in columns if getattr(features[name], "dtype", None) in ("string", "large_string")]
        if len(strings) != 1:
            raise UserError(f"{source} has no column 'text'; name one with --text_column: {', '.join(columns)}")
        chosen = strings[0]
    if getattr(features[chosen], "dtype", None) not in ("string", "large_string"):
        raise UserError(f"--text_column: column '{chosen}' of {source} does not hold text")
    return chosen


def keep_text(dataset: Dataset | IterableDataset, wanted: str | None, source: str) -> Dataset | IterableDataset:
    """Reduce a dataset to one column called ``text``."""
    column = choose_text_column(dataset, wanted, source)
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def load_file(path: Path, data: DataArguments, cache_dir: str | None, flag: str) -> Dataset | IterableDataset:
    """Load one local file as rows with a ``text`` column."""
    check_file(path, flag)
    name, options = builder_of(path)
    try:
        options |= {"split": "train", "streaming": data.streaming, "cache_dir": cache_dir}
        rows = load_dataset(name, data_files={"train": str(path)}, **options)
        rows = keep_text(rows, data.text_column, str(path))
    except UserError:
        raise
    except Exception as error:
        # datasets wraps parser errors of pyarrow, pandas and json in types of its own
        if is_disk_full(error):
            raise
        raise UserError(f"{flag}: cannot read {path} as {name}: {one_line(error)}") from None
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise UserError(f"{flag}: the file {path} holds no rows")
    return rows


def load_local(data: DataArguments, cache_dir: str | None) -> dict[str, SplitRows]:
    """Load the splits given as local files."""
    splits = {}
    for split in SPLITS:  # all before the first is read
        for name in getattr(data, f"{split}_file") or []:
            check_file(Path(name).expanduser(), f"--{split}_file")
    for split in SPLITS:
        files = getattr(data, f"{split}_file")
        if not files:
            continue
        paths = [Path(name).expanduser() for name in files]
        kinds = {builder_of(path)[0] == "text" for path in paths}
        if len(kinds) > 1:
            raise UserError(f"--{split}_file mixes text files with records (csv, json, parquet); give one kind")
        parts = [load_file(path, data, cache_dir, f"--{split}_file") for path in paths]
        splits[split] = SplitRows(parts, kinds.pop(), ", ".join(path.name for path in paths), [str(p) for p in paths])
    return splits


def load_hub(data: DataArguments, model: ModelArguments) -> dict[str, SplitRows]:
    """Load the splits of a Hub dataset (or of a dataset folder)."""
    name = str(data.dataset_name)
    try:
        loaded = load_dataset(
            name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token, streaming=data.streaming
        )
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--dataset_name: cannot load '{name}': {one_line(error)}") from None
    config = f" ({data.dataset_config_name})" if data.dataset_config_name else ""
    return {
        split: SplitRows([keep_text(loaded[split], data.text_column, name)], False, f"{name}{config}, split {split}")
        for split in SPLITS
        if split in loaded
    }


def hold_out(rows: SplitRows, percentage: float) -> tuple[SplitRows, SplitRows]:
    """Split the last `percentage` percent of the rows off for validation, of a stream its first rows."""
    if rows.is_streamed:
        return hold_out_first(rows)
    whole = concatenate_datasets(rows.parts) if len(rows.parts) > 1 else rows.parts[0]
    held = max(1, round(len(whole) * percentage / 100))
    if held >= len(whole):
        raise UserError(f"the training text has only {len(whole)} rows; give --validation_file or drop --do_eval")
    cut = len(whole) - held
    logger.warning("no validation split: the last %d of %d training rows are held out", held, len(whole))
    train = SplitRows([whole.select(range(cut))], rows.is_text_file, f"{rows.source}, first {cut} rows", rows.sources)
    source = f"{rows.source}, last {held} rows"
    return train, SplitRows([whole.select(range(cut, len(whole)))], rows.is_text_file, source, rows.sources)


def hold_out_first(rows: SplitRows) -> tuple[SplitRows, SplitRows]:
    """Split the first rows of a stream off for validation: it need not have an end."""
    held = f"first {HELD_OUT_ROWS:,} rows"
    train = replace(rows, source=f"{rows.source}, without the {held}", skip=HELD_OUT_ROWS)
    if next(train.read(), None) is None:
        raise UserError(
            f"the training text has at most {HELD_OUT_ROWS:,} rows, of which --streaming cannot hold out any for "
            f"validation; give --validation_file or drop --do_eval"
        )
    logger.warning("no validation split: the %s of the training text are held out", held)
    return train, replace(rows, source=f"{rows.source}, {held}", take=HELD_OUT_ROWS)


def load_splits(data: DataArguments, model: ModelArguments, needed: set[str]) -> dict[str, SplitRows]:
    """Load the splits a run needs.

    Raises:
        UserError: a needed split is missing, or its source cannot be read.
    """
    if data.dataset_name:
        splits = load_hub(data, model)
    elif data.train_file or data.validation_file or data.test_file:
        splits = load_local(data, model.cache_dir)
    else:
        texts = python_reference()
        source = "the Python language reference (pydoc_data.topics)"
        splits = {
            name: SplitRows([Dataset.from_dict({"text": texts[name]})], False, f"{source}, {name}") for name in SPLITS
        }
    if "validation" in needed and "validation" not in splits and "train" in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], data.validation_split_percentage)
    if data.dataset_name and "test" in needed and "test" not in splits and len(needed) > 1:
        logger.warning("--do_test: %s has no test split, and none is scored", data.dataset_name)
        needed = needed - {"test"}
    for split in sorted(needed):
        if split not in splits:
            flag = {"train": "do_train", "validation": "do_eval", "test": "do_test"}[split]
            raise UserError(f"the run needs a {split} split and there is none; give --{split}_file or drop --{flag}")
    return {split: rows for split, rows in splits.items() if split in needed}


def quiet_progress_bars() -> None:
    """Keep the bars of `datasets` out of the log; training has its own."""
    datasets.disable_progress_bars()


def python_reference() -> dict[str, list[str]]:
    """The text used when no data is named: the language reference that ships with every CPython.

    Returns the topics of `pydoc_data.topics` as documents, split into train, validation and test.

    The split is by rank in the sorted topic names: of every ten, the eighth is validation and the sixth is test. It
    depends on nothing but the Python version, whose reference differs a little from release to release.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no pydoc_data.topics (the built-in text); name text with --train_file or --dataset_name"
        ) from None
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for rank, name in enumerate(sorted(topics)):
        split = {7: "validation", 5: "test"}.get(rank % 10, "train")
        splits[split].append(topics[name])
    return splits
