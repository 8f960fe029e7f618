# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Sentence pairs with similarity scores (STS-B), pairs and triplets to train on, and plain text.

Scores are similarities in [0, 1] everywhere behind this file. What a file holds is settled by this rule, file by file:
more than one score in twenty above 1 means a scale of 0 to 5, which is divided by 5; scored pairs in a file without a
header are always 0 to 5, as in STS-B. The Hub's `sentence-transformers/stsb` is 0 to 1 already.
"""

import logging
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from datasets import Dataset, load_dataset

from lalm.errors import UserError, is_disk_full, nearest_hint, one_line
from lalm.training.sts.record_files import (
    RECORD_SUFFIXES,
    Record,
    is_table,
    lines_of,
    read_records,
    record_suffix,
    text_of,
    value_of,
    whole_text,
)
from lalm.training.text_rows import check_file

logger = logging.getLogger(__name__)

HUB_NAME = "sentence-transformers/stsb"
EMBEDDED_PAIRS = Path(__file__).with_name("default_pairs.tsv")
COLUMNS = ("sentence1", "sentence2", "score")
SCORE_NAMES = ("score", "similarity_score", "similarity", "label")
PAIR_NAMES = ("anchor", "positive", "negative")
# the release of STS-B: genre, file, year, id, score, sentence1, sentence2, and in some rows sources
RELEASE_COLUMNS = {"sentence1": "6", "sentence2": "7", "score": "5"}
BARE_COLUMNS = {"sentence1": "1", "sentence2": "2", "score": "3"}
SPLIT_WORDS = {"train": ("train",), "validation": ("dev", "valid", "validation", "val"), "test": ("test",)}
SPLITS = tuple(SPLIT_WORDS)


class StsSplits(dict[str, Dataset]):
    """Split name -> Dataset of sentence1, sentence2 and score in [0, 1]. `source` says where the pairs come from."""

    def __init__(self, splits: Mapping[str, Dataset], source: str, is_embedded: bool = False):
        super().__init__(splits)
        self.source, self.is_embedded = source, is_embedded


def score_of(value: object, place: str) -> float:
    """Return a finite number, or say which place holds none."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        shown = "nothing" if value is None or value == "" else repr(value)[:60]
        raise UserError(f"{place}: {shown} is no score; scores are numbers from 0 to 5, or from 0 to 1")
    return number


def unit_scores(scores: Sequence[float], rows: Sequence[int], path: Path, column: str, is_bare: bool) -> list[float]:
    """Return the scores of one file in [0, 1], by the rule at the top of this file."""
    above = sum(score > 1 for score in scores)
    top = 5 if is_bare or above * 20 > len(scores) else 1
    if is_bare and not above and len(scores) >= 20:
        raise UserError(
            f"{path}: rows {rows[0]} to {rows[-1]}, column '{column}': no score is above 1, and without a header they "
            f"run from 0 to 5; if these run from 0 to 1, put a first row with the names: {','.join(COLUMNS)}"
        )
    for score, row in zip(scores, rows, strict=True):
        if 0 <= score <= top:
            continue
        why = f"its scores run from 0 to {top}"
        if top == 1 and 1 < score <= 5:
            why += f", since only {above} of {len(scores)} are above 1; give all of them on one scale"
        elif score == -1:
            why += "; -1 stands for a hidden label, as in GLUE's test split: take the file of the STS benchmark"
        raise UserError(f"{path}: row {row}, column '{column}': the score {score:g} is out of range: {why}")
    return [score / top for score in scores]


def sts_columns(record: Record, path: Path, row: int) -> dict[str, str]:
    """Return which columns of a file hold the two sentences and the score."""
    names = list(record)
    if names[:1] == ["1"]:
        if len(names) >= 7:
            return RELEASE_COLUMNS
        if len(names) == 3:
            return BARE_COLUMNS
        raise UserError(
            f"{path}: row {row} has {len(names)} columns and the file no header; without one the three columns are "
            f"{', '.join(COLUMNS)}"
        )
    score = next((name for name in SCORE_NAMES if name in record), None)
    missing = [name for name in COLUMNS[:2] if name not in record] + ([] if score else ["score"])
    if missing or score is None:
        hint = nearest_hint(missing[0], names)
        raise UserError(f"{path}: row {row} has no column '{missing[0]}'{hint}; its columns are {', '.join(names)}")
    return {"sentence1": "sentence1", "sentence2": "sentence2", "score": score}


def collect(
    records: Iterable[tuple[int, Record]], columns: Mapping[str, str], path: Path, is_bare: bool = False
) -> dict[str, list]:
    """Gather columns of one file under new names (new -> old); a score is checked and brought to [0, 1]."""
    data: dict[str, list] = {name: [] for name in columns}
    rows = []
    for row, record in records:
        for name, column in columns.items():
            if name == "score":
                value = value_of(record, column, path, row)
                data[name].append(score_of(value, f"{path}: row {row}, column '{column}'"))
            else:
                data[name].append(text_of(record, column, path, row))
        rows.append(row)
    if "score" in columns:
        data["score"] = unit_scores(data["score"], rows, path, columns["score"], is_bare)
    return data


def load_scored_file(path: Path, flag: str = "--data_dir") -> Dataset:
    """Load one file of scored pairs.

    Three columns without a header are sentence1, sentence2, score; seven or more are the release of STS-B. With a
    header, or in json and parquet, they are sentence1, sentence2 and score (or similarity_score, similarity, label).

    Raises:
        UserError: a column is missing, a score is no number or out of range (names file, row and column).
    """
    records = read_records(path, flag, COLUMNS)
    first = next(records, None)
    if first is None:
        raise UserError(f"{flag}: the file {path} holds no pairs")
    columns = sts_columns(first[1], path, first[0])
    is_bare = columns["score"].isdigit()
    return Dataset.from_dict(collect(chain([first], records), columns, path, is_bare))


def split_file(folder: Path, split: str, flag: str = "--data_dir") -> Path:
    """Return the one file of a folder whose name tells the split: stsb-en-dev.csv, sts_validation.jsonl.gz."""
    words = SPLIT_WORDS[split]
    pattern = re.compile(rf"(?<![a-z])({'|'.join(words)})(?![a-z])")
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    found = [
        entry for entry in entries if record_suffix(entry) in RECORD_SUFFIXES and pattern.search(entry.name.lower())
    ]
    if not found:
        looked_for = " or ".join(f"*{word}*" for word in words[:2])
        held = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        raise UserError(
            f"{flag}: {folder} has no {split} file; its name is {looked_for} with one of {', '.join(RECORD_SUFFIXES)} "
            f"(also .gz); the folder holds {held}"
        )
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise UserError(f"{flag}: {folder} has more than one {split} file ({names}); leave one of them there")
    return found[0]


def load_folder(folder: Path, splits: Sequence[str], flag: str = "--data_dir") -> StsSplits:
    """Load the splits of a local folder."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        names = ", ".join(f"stsb-en-{word}.csv" for word in ("train", "dev", "test"))
        raise UserError(f"{flag}: {folder} {what}; name the folder that holds {names}")
    files = {split: split_file(folder, split, flag) for split in splits}
    return StsSplits({split: load_scored_file(path, flag) for split, path in files.items()}, str(folder))


def embedded_splits() -> StsSplits:
    """Return the pairs that come with lalm: 160 to train on, 40 for validation, 40 for test."""
    data: dict[str, dict[str, list]] = {split: {name: [] for name in COLUMNS} for split in SPLITS}
    for _, record in read_records(EMBEDDED_PAIRS, "the embedded pairs", COLUMNS):
        for name in COLUMNS[:2]:
            data[record["split"]][name].append(record[name])
        data[record["split"]]["score"].append(float(record["score"]) / 5)
    splits = {split: Dataset.from_dict(columns) for split, columns in data.items()}
    return StsSplits(splits, "the sentence pairs embedded in lalm", is_embedded=True)


def load_stsb(data_dir: str | None = None, splits: Sequence[str] = SPLITS, flag: str = "--data_dir") -> StsSplits:
    """Load STS-B.

    Args:
        data_dir: a folder with a file for each split, such as stsb-en-{train,dev,test}.csv; None is the Hub's
            `sentence-transformers/stsb` and, if that cannot be loaded, the pairs that lalm contains, with a warning.
        splits: the splits that are needed: train, validation, test.
        flag: how errors call `data_dir`.

    Returns:
        split -> Dataset of sentence1, sentence2 (str) and score (float in [0, 1]); `source` names the origin.

    Raises:
        UserError: the folder or one of its files is missing or wrong (names file, row and column).
    """
    if data_dir is not None:
        return load_folder(Path(data_dir).expanduser(), splits, flag)
    try:
        loaded = load_dataset(HUB_NAME)
        return StsSplits({split: loaded[split].select_columns(list(COLUMNS)) for split in splits}, HUB_NAME)
    except Exception as error:
        if is_disk_full(error):
            raise
        logger.warning(
            "%s cannot be loaded (%s): a small set of sentence pairs inside lalm is used instead; its figures are "
            "not STS-B's; name a folder with the STS-B files by %s",
            *(HUB_NAME, one_line(error), flag),
        )
    embedded = embedded_splits()
    return StsSplits({split: embedded[split] for split in splits}, embedded.source, is_embedded=True)


def output_names(columns: Sequence[str]) -> list[str]:
    """Return what `load_pairs` calls its columns: score where it was asked for, else anchor, positive, negative."""
    texts = iter(PAIR_NAMES)
    names = ["score" if column in SCORE_NAMES else next(texts, "") for column in columns]
    if "" in names or len(names) - names.count("score") < 2 or names.count("score") > 1:
        raise UserError(f"pairs have two or three text columns and at most one score, not: {', '.join(columns)}")
    return names


def is_wanted(record: Record, where: Mapping[str, str], path: Path, row: int) -> bool:
    """Tell whether a record holds the asked values, compared as strings."""
    return all(str(value_of(record, column, path, row)) == value for column, value in where.items())


def load_pairs(
    files: Sequence[str | Path],
    columns: Sequence[str] = ("sentence1", "sentence2"),
    where: Mapping[str, str] | None = None,
    flag: str = "--pairs_file",
) -> Dataset:
    """Load pairs or triplets of texts, with a score if `columns` asks for one, from one or more files.

    Args:
        files: csv, tsv, json, jsonl, parquet; .gz and the like too.
        columns: the columns to take, in this order; "1", "2", ... in files without a header.
        where: keep the rows whose columns hold these values: {"label": "entailment"}.
        flag: how errors call `files`.

    Returns:
        Dataset of anchor, positive, [negative] (str), and score (float in [0, 1], by the rule at the top of this file)
        at the place of a column called score, similarity_score, similarity or label.

    Raises:
        UserError: a column is missing, a cell is no text or no score (names file, row and column); no row is left.
    """
    names = output_names(columns)
    data: dict[str, list] = {name: [] for name in names}
    for path in (Path(name).expanduser() for name in files):
        records = read_records(path, flag, columns)
        wanted = (item for item in records if not where or is_wanted(item[1], where, path, item[0]))
        found = collect(wanted, dict(zip(names, columns, strict=True)), path)
        if not found[names[0]]:
            asked = " and ".join(f"{column} = {value}" for column, value in (where or {}).items())
            raise UserError(f"{flag}: the file {path} holds no pairs{' with ' + asked if asked else ''}")
        for name in names:
            data[name] += found[name]
    return Dataset.from_dict(data)


def strings_in(value: object, column: str = "") -> Iterator[tuple[str, str]]:
    """Iterate over (column, text) of a record, however deep: the key of a string inside is ``outer.inner``."""
    if isinstance(value, str):
        yield column, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(item, f"{column}.{key}" if column else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item, column)


def record_texts(path: Path, flag: str) -> list[str]:
    """Return the text columns of a file of records: those of which half of the first 200 cells hold a space."""
    cells = [
        (column, whole_text(text, path, row))
        for row, record in read_records(path, flag)
        for column, text in strings_in(record)
        if text.strip()
    ]
    spaces: dict[str, list[bool]] = defaultdict(list)
    for column, text in cells:
        if len(spaces[column]) < 200:
            spaces[column].append(" " in text.strip())
    is_text = {column: 2 * sum(seen) >= len(seen) for column, seen in spaces.items()}
    return [text for column, text in cells if is_text[column]]


def load_texts(files: Sequence[str | Path], flag: str = "--text_file") -> list[str]:
    """Load texts: the lines of text files, every text column of csv, tsv (also by another name), json, jsonl, parquet.

    Which columns are text is decided file by file: those of which at least half of the first 200 cells hold a space.
    Blank texts are left out.

    Raises:
        UserError: a file is missing, empty or broken (names file and row), or holds no text.
    """
    texts: list[str] = []
    for path in (Path(name).expanduser() for name in files):
        check_file(path, flag)
        if is_table(path):
            found = record_texts(path, flag)
        else:
            found = [line.strip() for line in lines_of(path) if line.strip()]
        if not found:
            raise UserError(f"{flag}: the file {path} holds no text")
        texts += found
    return texts


def normalise(text: str) -> str:
    """Return a text by which copies are found: compatibility forms, no case, letters and digits with single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", folded).split())


def forbidden_strings(stsb: Mapping[str, Dataset]) -> set[str]:
    """Return the normalised sentences of the validation and test splits, which no training may see."""
    held_out = [stsb[split] for split in ("validation", "test") if split in stsb]
    return {normalise(text) for data in held_out for name in COLUMNS[:2] for text in data[name]} - {""}


def drop_texts(texts: Sequence[str], forbidden: Collection[str]) -> list[str]:
    """Return the texts whose normalised form is not in `forbidden`."""
    return [text for text in texts if normalise(text) not in forbidden]


def drop_pairs(pairs: Dataset, forbidden: Collection[str]) -> Dataset:
    """Return the rows of which no text is in `forbidden`, compared as in `drop_texts`."""
    texts = [pairs[name] for name in pairs.column_names if getattr(pairs.features[name], "dtype", "") == "string"]
    kept = [
        row for row, cells in enumerate(zip(*texts, strict=True)) if not any(normalise(c) in forbidden for c in cells)
    ]
    return pairs.select(kept)
