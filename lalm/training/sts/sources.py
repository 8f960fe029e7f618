# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What the stages of run_sts.py are trained on: files or Hub data sets, without the strings that are scored."""

import json
import logging
import random
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, concatenate_datasets, load_dataset

from lalm.errors import UserError, is_disk_full, nearest_hint, one_line
from lalm.training.sts.arguments import KINDS, StsDataArguments
from lalm.training.sts.augmentation import augment_rows, augment_texts
from lalm.training.sts.data import (
    PAIR_NAMES,
    StsSplits,
    drop_pairs,
    drop_texts,
    forbidden_strings,
    load_pairs,
    load_texts,
    output_names,
)
from lalm.training.sts.documents import load_documents, titles_in
from lalm.training.sts.record_files import Record, read_records, text_of
from lalm.training.text_rows import check_file

logger = logging.getLogger(__name__)

HUB_TEXTS = (
    "sentence-transformers/all-nli/pair",
    "sentence-transformers/quora-duplicates/pair",
    "sentence-transformers/natural-questions",
)
HUB_PAIRS = ("sentence-transformers/all-nli/pair", "sentence-transformers/quora-duplicates/pair")
HUB_KINDS = {
    "nli": ("sentence-transformers/all-nli/triplet",),
    "qa": ("sentence-transformers/natural-questions",),
    "paraphrase": ("sentence-transformers/quora-duplicates/pair",),
    "triplet": ("sentence-transformers/quora-duplicates/triplet",),
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")
# columns that are taken without being named, the first that are all there
KNOWN_COLUMNS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("query", "answer"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("1", "2", "3"),
    ("1", "2"),
)
# a query with lists of texts, as FlagEmbedding and others write their training data
LISTS = ("query", "pos", "neg")
# columns that tell which pairs belong together; taking all rows would train on the others as well
LABEL_COLUMNS = ("label", "gold_label", "is_duplicate", "score")
# of the pairs embedded in lalm, those at least this alike stand in for paraphrases
PARAPHRASE = 0.8


@dataclass
class TrainingData:
    """What a stage is trained on; `notes` says of every part where it comes from and how much there is."""

    texts: list[str] = field(default_factory=list)
    parts: dict[str, Dataset] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Checksum of all texts, labels and names of the parts, in their order."""
        value = zlib.crc32(json.dumps(self.texts).encode())
        for name, part in self.parts.items():
            value = zlib.crc32(name.encode(), value)
            for rows in part.with_format(None).iter(1000):
                value = zlib.crc32(json.dumps(rows).encode(), value)
        return f"{value:08x}"


@dataclass
class Source:
    """One source of pairs: a file or `org/name[/config]`, then `::columns`, then `::column=value,...`."""

    name: str
    columns: tuple[str, ...] = ()
    where: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, flag: str) -> "Source":
        """Read ``name[::column,column[,column][::column=value]]``.

        Raises:
            UserError: a part is not of this form.
        """
        name, *rest = text.split("::")
        if len(rest) > 2 or not name:
            raise UserError(f"{flag}: '{text}' is not of the form name::columns::column=value")
        columns = tuple(item.strip() for item in rest[0].split(",") if item.strip()) if rest else ()
        where = {}
        for item in rest[1].split(",") if len(rest) == 2 else []:
            column, equals, value = item.partition("=")
            if not equals:
                raise UserError(f"{flag}: '{item}' in '{text}' is not of the form column=value")
            where[column.strip()] = value.strip()
        return cls(name, columns, where)

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is that of a Hub data set, and no file has it."""
        return not Path(self.name).expanduser().exists() and bool(HUB_NAME.fullmatch(self.name))


def load_from_hub(name: str, flag: str, cache_dir: str | None, token: str | None) -> Dataset:
    """Load the train split of `org/name` or `org/name/config`.

    Raises:
        UserError: it cannot be loaded.
    """
    owner, dataset, *config = name.split("/")
    try:
        return load_dataset(f"{owner}/{dataset}", *config, split="train", cache_dir=cache_dir, token=token)
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{flag}: there is no file {name}, and no such data set: {one_line(error)}") from None


def choose_columns(names: Collection[str], texts: int, place: str) -> tuple[str, ...]:
    """Return the columns of `texts` texts (of at most 3 if it is 0) that a source is known to have.

    Raises:
        UserError: there are none, or a label tells pairs apart.
    """
    fitting = (known for known in KNOWN_COLUMNS if set(known) <= set(names) and texts in (0, len(known)))
    found = next(fitting, None)
    if found is None:
        shown, example = ", ".join(names), ",".join(list(names)[: texts or 2])
        raise UserError(f"{place}: which of the columns {shown} hold the texts? Name them: {place}::{example}")
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    if label:
        raise UserError(
            f"{place}: the column '{label}' tells pairs apart; say which rows to take: "
            f"{place}::{','.join(found)}::{label}=..."
        )
    return found


def lists_of(path: Path, texts: int, flag: str) -> Dataset | None:
    """Load a file of records with lists of positives and negatives; None if its first record is no such."""
    first = next(read_records(path, flag), (1, {}))[1]
    return from_lists(read_records(path, flag), path, texts) if isinstance(first.get("pos"), list) else None


def from_lists(records: Iterable[tuple[int, Record]], path: Path, texts: int) -> Dataset:
    """Make rows of {"query": ..., "pos": [...], "neg": [...]}: one for each positive, with the negatives in turn.

    Args:
        texts: 3 for anchor, positive, negative; 2 for pairs; 0 for triplets if every record has negatives.

    Raises:
        UserError: a query or an item of a list is no text, or a record without negatives for 3 texts.
    """
    rows: list[dict[str, str]] = []
    for number, record in records:
        lists = {name: record.get(name) or [] for name in LISTS[1:]}
        if not all(isinstance(items, list) for items in lists.values()) or (texts == 3 and not lists["neg"]):
            raise UserError(f"{path}: row {number}: pos{' and neg' if texts == 3 else ''} must be a list of texts")
        for index, positive in enumerate(lists["pos"]):
            cells = {"anchor": record.get("query"), "positive": positive}
            if lists["neg"] and texts != 2:
                cells["negative"] = lists["neg"][index % len(lists["neg"])]
            rows.append({name: text_of(cells, name, path, number) for name in cells})
    columns = [name for name in PAIR_NAMES if rows and all(name in row for row in rows)]
    if not columns:
        raise UserError(f"{path} holds no row with a query and its positives")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def pairs_of(source: Source, texts: int, flag: str, cache_dir: str | None, token: str | None) -> Dataset:
    """Load a source as anchor, positive[, negative].

    Args:
        texts: texts in a row, 2 or 3; 0 for either.
    """
    if not source.is_on_hub:
        path = Path(source.name).expanduser()
        columns = source.columns
        if not columns and (lists := lists_of(path, texts, flag)) is not None:
            return lists
        if not columns:
            record = next(read_records(path, flag, [name for known in KNOWN_COLUMNS for name in known]), (1, {}))[1]
            columns = choose_columns(list(record), texts, source.name)
        return load_pairs([path], columns, source.where, flag)
    rows = load_from_hub(source.name, flag, cache_dir, token)
    if not source.columns and set(LISTS[:2]) <= set(rows.column_names):
        records = ((number, cast(Record, row)) for number, row in enumerate(rows, 1))
        return from_lists(records, Path(source.name), texts)
    columns = source.columns or choose_columns(rows.column_names, texts, source.name)
    for name in (*columns, *source.where):
        if name not in rows.column_names:
            hint = nearest_hint(name, rows.column_names)
            raise UserError(f"{flag}: {source.name} has no column '{name}'{hint}; {', '.join(rows.column_names)}")
    if source.where:
        rows = rows.filter(lambda row: all(str(row[key]) == value for key, value in source.where.items()))
    return rows.select_columns(list(columns)).rename_columns(dict(zip(columns, output_names(columns), strict=True)))


def texts_of(name: str, flag: str, cache_dir: str | None, token: str | None) -> list[str]:
    """Load every text of a file or of a Hub data set."""
    if not Source(name).is_on_hub:
        check_file(Path(name).expanduser(), flag)
        return load_texts([name], flag)
    rows = load_from_hub(name, flag, cache_dir, token)
    columns = [column for column in rows.column_names if getattr(rows.features[column], "dtype", "") == "string"]
    return [text for column in columns for text in rows[column] if text.strip()]


def thinned(count: int, weight: float, limit: int | None, seed: int) -> list[int]:
    """Return row numbers of a source: each `weight` times, a fraction of them at random, `limit` rows at most."""
    source = random.Random(seed)
    rows = list(range(count)) if limit is None or limit >= count else source.sample(range(count), limit)
    whole = int(weight)
    return rows * whole + source.sample(rows, round((weight - whole) * len(rows)))


def collect_texts(data: StsDataArguments, stsb: StsSplits, seed: int, hub: Mapping[str, Any]) -> TrainingData:
    """Return the texts of the stage distill; a text that is in several files counts for the first.

    Without files: the Hub's `HUB_TEXTS` and STS-B's training sentences, or the embedded pairs if these stand in.
    """
    found = TrainingData()
    forbidden, seen = forbidden_strings(stsb), set()
    given: Sequence[str] = data.train_file or ()
    names = [*(given or (() if stsb.is_embedded else HUB_TEXTS)), *(() if given else (f"{stsb.source}, train",))]
    weights = data.train_weights or [1.0] * len(names)
    for name, weight in zip(names, weights, strict=True):
        if name == f"{stsb.source}, train":
            loaded = [*stsb["train"]["sentence1"], *stsb["train"]["sentence2"]]
        else:
            loaded = texts_of(name, "--train_file", **hub)
        new = [text for text in dict.fromkeys(drop_texts(loaded, forbidden)) if text not in seen]
        seen.update(new)
        rows = thinned(len(new), weight, data.max_train_samples, seed)
        found.texts += [new[row] for row in rows]
        note = f"{len(rows):,} texts of {len(loaded):,} ({len(new):,} different and not in dev or test)"
        found.notes[name] = note if weight == 1 else f"{note}, weight {weight:g}"
    if not found.texts:
        raise UserError("--train_file: no text is left that is not in STS-B's validation and test splits")
    return found


def collect_pairs(
    names: Sequence[str],
    texts: int,
    flag: str,
    data: StsDataArguments,
    forbidden: Collection[str],
    seed: int,
    hub: Mapping[str, Any],
) -> tuple[Dataset, str]:
    """Return the pairs of some sources without forbidden strings, and a note on them.

    Args:
        texts: texts in a row, 2 or 3; 0 for either.
        flag: how errors call `names`.
        hub: cache_dir and token.
    """
    weights = data.train_weights if flag == "--train_file" and data.train_weights else [1.0] * len(names)
    parts, loaded = [], 0
    for name, weight in zip(names, weights, strict=True):
        rows = pairs_of(Source.parse(name, flag), texts, flag, **hub)
        loaded += len(rows)
        rows = drop_pairs(rows, forbidden)
        parts.append(rows.select(thinned(len(rows), weight, data.max_train_samples, seed)))
    columns = [name for name in PAIR_NAMES if all(name in part.column_names for part in parts)]
    whole = concatenate_datasets([part.select_columns(columns) for part in parts])
    if not len(whole):
        raise UserError(f"{flag}: no pair is left that is not in STS-B's validation and test splits")
    return whole, f"{len(whole):,} rows of {loaded:,} from {', '.join(names)}, none with a string of dev or test"


def embedded_paraphrases(stsb: StsSplits, forbidden: Collection[str]) -> Dataset:
    """Return the pairs embedded in lalm that say nearly the same, as anchor and positive."""
    pairs = stsb["train"].filter(lambda row: row["score"] >= PARAPHRASE).remove_columns("score")
    return drop_pairs(pairs.rename_columns({"sentence1": "anchor", "sentence2": "positive"}), forbidden)


def collect_relational(data: StsDataArguments, stsb: StsSplits, seed: int, hub: Mapping[str, Any]) -> TrainingData:
    """Return the pairs of the stage relational as the part ``pairs``."""
    forbidden = forbidden_strings(stsb)
    if not data.train_file and stsb.is_embedded:
        pairs = embedded_paraphrases(stsb, forbidden)
        return TrainingData(parts={"pairs": pairs}, notes={"pairs": f"{len(pairs)} of {stsb.source}"})
    names = data.train_file or HUB_PAIRS
    pairs, note = collect_pairs(names, 2, "--train_file", data, forbidden, seed, hub)
    return TrainingData(parts={"pairs": pairs}, notes={"pairs": note})


def collect_kinds(data: StsDataArguments, stsb: StsSplits, seed: int, hub: Mapping[str, Any]) -> TrainingData:
    """Return the parts of the stage finetune by kind; a kind without a share in the mixture is not loaded.

    If the embedded pairs stand in for STS-B, kinds without files are left out, but for paraphrases out of those.
    """
    found, forbidden = TrainingData(), forbidden_strings(stsb)
    for kind in data.shares:
        names = getattr(data, f"{kind}_file", None)
        if kind == "sts":
            rows = drop_pairs(stsb["train"], forbidden)
            rows = rows.select(thinned(len(rows), 1.0, data.max_train_samples, seed))
            note = f"{len(rows):,} scored pairs of {len(stsb['train']):,} from {stsb.source}, none in dev or test"
        elif kind == "text":
            texts_found = collect_texts(data, stsb, seed, hub)
            rows, note = Dataset.from_dict({"text": texts_found.texts}), "; ".join(texts_found.notes.values())
        elif kind == "document":
            if not names:
                raise UserError("--mixture has a share of 'document': give --document_file")
            held_out = titles_in(data.held_out_file or ())
            rows = load_documents(names, held_out, data.document_tokens, seed)
            note = f"{len(rows):,} articles from {', '.join(names)}, {len(held_out):,} titles held out"
        elif names or not stsb.is_embedded:
            texts = {"triplet": 3, "nli": 0}.get(kind, 2)
            rows, note = collect_pairs(names or HUB_KINDS[kind], texts, f"--{kind}_file", data, forbidden, seed, hub)
        elif kind == "paraphrase":
            rows = embedded_paraphrases(stsb, forbidden)
            note = f"{len(rows)} of {stsb.source}"
        else:
            logger.warning("no data of the kind %s: give --%s_file", kind, kind)
            continue
        found.parts[kind], found.notes[kind] = rows, note
    for kind in set(KINDS) - set(data.shares):
        if getattr(data, f"{kind}_file", None):
            logger.warning("--%s_file is not used: --mixture has no share for it", kind)
    if not found.parts:
        raise UserError("--mixture names no kind that there is data for")
    return found


def augment(found: TrainingData, names: Sequence[str], rate: float, seed: int) -> None:
    """Add altered copies of all texts and rows, but of articles, and say in the notes how many."""
    added, parts = {}, {kind: rows for kind, rows in found.parts.items() if kind != "document"}
    if found.texts:
        copies = augment_texts(found.texts, names, rate, seed)
        found.texts, added["texts"] = found.texts + copies, len(copies)
    for kind, rows in parts.items():
        found.parts[kind] = augment_rows(rows, names, rate, seed)
        added[kind] = len(found.parts[kind]) - len(rows)
    counts = ", ".join(f"{count:,} of {kind}" for kind, count in added.items())
    found.notes["augmentation"] = f"altered copies by {', '.join(names)}, {rate:g} of the words: {counts}"


def collect(stage: str, data: StsDataArguments, stsb: StsSplits, seed: int, hub: Mapping[str, Any]) -> TrainingData:
    """Return what a stage is trained on.

    Args:
        hub: cache_dir and token for data sets of the Hub.

    Raises:
        UserError: data that cannot be read (names file, row and column), or of which nothing is left.
    """
    collectors = {"distill": collect_texts, "relational": collect_relational, "finetune": collect_kinds}
    found = collectors[stage](data, stsb, seed, hub)
    if data.augmentation:
        augment(found, data.augmentation, data.augmentation_rate, seed)
    return found
