# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Make the training files of recipes/lam_minilm_l6.yaml from data sets of the Hub.

    python -m experiments.build_lam_data data
    python -m experiments.build_lam_data data --only stsb quora

The files have the names and formats that docs/lam_data.md lists, which also says where the Hub has another selection
of texts than the checkpoint was trained on. A file that is there is left as it is.
"""

import argparse
import csv
import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from datasets import load_dataset

from lalm.errors import UserError, exit_on_user_error, is_disk_full, one_line

Row = dict[str, Any]
# characters of the shortest article that is taken
ARTICLE = 900


class Part(NamedTuple):
    """One file.

    Attributes:
        name: of the data set on the Hub, and of its configuration, if it has several.
        split: of the data set.
        lines: makes the lines of the file from the rows.
        rows: rows to read at most; None for all.
    """

    name: tuple[str, ...]
    split: str
    lines: Callable[[Iterable[Row]], Iterable[str]]
    rows: int | None = None


def flat(text: object) -> str:
    """Return a text on one line, without tabs."""
    return " ".join(str(text).split())


def tabs(*columns: str) -> Callable[[Iterable[Row]], Iterator[str]]:
    """Lines of some columns, separated by tabs."""
    return lambda rows: ("\t".join(flat(row[name]) for name in columns) for row in rows)


def records(*columns: str) -> Callable[[Iterable[Row]], Iterator[str]]:
    """One JSON object of some columns for each row."""
    return lambda rows: (json.dumps({name: row[name] for name in columns}, ensure_ascii=False) for row in rows)


def as_csv(cells: Iterable[Iterable[object]]) -> Iterator[str]:
    """Lines of a csv file."""
    for row in cells:
        target = io.StringIO()
        csv.writer(target, lineterminator="").writerow(row)
        yield target.getvalue()


def stsb(rows: Iterable[Row]) -> Iterator[str]:
    """Two sentences and a score, which the Hub has from 0 to 1, from 0 to 5."""
    return as_csv((flat(row["sentence1"]), flat(row["sentence2"]), round(5 * row["score"], 3)) for row in rows)


def caption(number: int) -> Callable[[Iterable[Row]], Iterator[str]]:
    """The caption `number` of every picture."""
    return lambda rows: (flat(row["set"][number]) for row in rows)


def flickr8k(rows: Iterable[Row]) -> Iterator[str]:
    """Name of a picture and of a caption, and the caption."""
    for index, row in enumerate(rows):
        yield from (f"{index}.jpg#{number}\t{flat(row[f'caption_{number}'])}" for number in range(5))


def coco(rows: Iterable[Row]) -> Iterator[str]:
    """The captions as COCO's file of annotations has them."""
    found = [
        {"image_id": index, "caption": flat(text)}
        for index, row in enumerate(rows)
        for text in row["set"]
    ]  # fmt: skip
    yield json.dumps({"annotations": found}, ensure_ascii=False)


def mrpc(rows: Iterable[Row]) -> Iterator[str]:
    """The release of the Microsoft Research Paraphrase Corpus, with its header."""
    yield "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for row in rows:
        cells = (row["label"], 2 * row["idx"], 2 * row["idx"] + 1, flat(row["sentence1"]), flat(row["sentence2"]))
        yield "\t".join(map(str, cells))


def snli(rows: Iterable[Row]) -> Iterator[str]:
    """Label, label, premise, hypothesis; pairs without a label are left out."""
    return tabs("label", "label", "premise", "hypothesis")(row for row in rows if row["label"] >= 0)


def wiki_split(rows: Iterable[Row]) -> Iterator[str]:
    """A sentence, and the two sentences that say the same."""
    for row in rows:
        halves = (flat(row[name]) for name in ("simple_sentence_1", "simple_sentence_2"))
        yield f"{flat(row['complex_sentence'])}\t{' <::::> '.join(halves)}"


def articles(rows: Iterable[Row]) -> Iterator[str]:
    """Articles that are not short."""
    return records("id", "title", "text")(row for row in rows if len(row["text"]) >= ARTICLE)


STSB = ("sentence-transformers/stsb",)
FLICKR30K = ("embedding-data/flickr30k_captions_quintets",)
PARTS = {
    "stsb/stsb-en-train.csv": Part(STSB, "train", stsb),
    "stsb/stsb-en-dev.csv": Part(STSB, "validation", stsb),
    "stsb/stsb-en-test.csv": Part(STSB, "test", stsb),
    "flickr30k-captions/train.1.en.gz": Part(FLICKR30K, "train", caption(0), 29_000),
    "flickr30k-captions/train.2.en.gz": Part(FLICKR30K, "train", caption(1), 29_000),
    "flickr30k-captions/train.3.en.gz": Part(FLICKR30K, "train", caption(2), 29_000),
    "flickr8k-captions/Flickr8k.token.txt.gz": Part(("jxie/flickr8k",), "train+validation+test", flickr8k),
    "coco-captions/captions_val2017.json.gz": Part(("embedding-data/coco_captions_quintets",), "train", coco, 5_000),
    "quora/quora_duplicates.train.tsv.gz": Part(
        ("sentence-transformers/quora-duplicates", "pair"), "train", tabs("anchor", "positive"), 50_000
    ),
    "mrpc/msr-para-train.tsv.gz": Part(("nyu-mll/glue", "mrpc"), "train", mrpc),
    "ag-news/test.csv.gz": Part(
        ("fancyzhx/ag_news",), "test", lambda rows: as_csv((row["label"] + 1, flat(row["text"])) for row in rows)
    ),
    "nli/snli_subset.train.tsv.gz": Part(("stanfordnlp/snli",), "train", snli, 18_000),
    "nli/mnli_subset.train.jsonl.gz": Part(
        ("nyu-mll/multi_nli",), "train", records("premise", "hypothesis", "label"), 10_000
    ),
    "wiki-split/tune.tsv.gz": Part(("google-research-datasets/wiki_split",), "validation", wiki_split),
    "paws-wiki/dev.tsv.gz": Part(
        ("google-research-datasets/paws", "labeled_final"),
        "validation",
        tabs("id", "sentence1", "sentence2", "label"),
    ),
    "arxiv/arxiv_title_abstract.jsonl.gz": Part(
        ("gfissore/arxiv-abstracts-2021",), "train", records("id", "title", "abstract"), 36_000
    ),
    "wikipedia-en/articles.jsonl.gz": Part(("wikimedia/wikipedia", "20231101.en"), "train", articles, 20_000),
}


def read(part: Part) -> Iterator[Row]:
    """Iterate over the rows of a part, split after split; no more is downloaded than is read."""
    for split in part.split.split("+"):
        rows = load_dataset(*part.name, split=split, streaming=True)
        if rows.column_names and "image" in rows.column_names:
            rows = rows.remove_columns("image")
        yield from rows


def open_text(path: Path, compressed: bool) -> IO[str]:
    """Open a file for text, gzipped if asked for."""
    return cast(IO[str], (gzip.open if compressed else open)(path, "wt", encoding="utf-8"))


def write(path: Path, part: Part) -> int:
    """Write one file, whole or not at all, and return the number of its lines.

    Raises:
        UserError: the data set cannot be read, has no such column, or holds nothing; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    name, count = "/".join(part.name), 0
    try:
        with open_text(unfinished, path.suffix == ".gz") as target:
            for line in part.lines(itertools.islice(read(part), part.rows)):
                target.write(line + "\n")
                count += 1
        if not count:
            raise UserError(f"{name}: the split {part.split} gives no row for {path}")
        os.replace(unfinished, path)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{name}: it has no column {error}, which {path} is made of") from None
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{name}: it cannot be read from the Hub: {one_line(error)}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def main(argv: list[str] | None = None) -> None:
    """Write the files that are asked for and not there."""
    folders = sorted({name.split("/")[0] for name in PARTS})
    parser = argparse.ArgumentParser(prog="build_lam_data", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Where the files are written; the recipe reads data/.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"Folders to make: {', '.join(folders)}.")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only or ()) - set(folders):
        raise UserError(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(folders)}")
    for name, part in PARTS.items():
        path = arguments.folder / name
        if arguments.only and name.split("/")[0] not in arguments.only:
            continue
        if path.exists():
            print(f"{path}: is there", flush=True)
            continue
        print(f"{path}: {write(path, part):,} lines from {'/'.join(part.name)}, {part.split}", flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
