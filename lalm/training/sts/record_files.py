# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Records of csv, tsv, json, jsonl and parquet files with their row numbers, so that an error can name the place.

What the files do not say of themselves is settled by these rules:

- A row is a record, counted from 1; a header is row 1, and blank rows are counted.
- Without a header, columns are called by their position: "1", "2", ... So is a json list in place of an object.
- The first row of a csv or tsv file is a header if it holds a column that was asked for, or if its cells are distinct
  and look like names: one or two words, no number, no punctuation at the end.
- csv has RFC 4180 quotes and the same number of cells in each row. tsv has a record a line; quotes around a whole cell
  are taken off, others are text. A csv file with two tabs or more in its first line is read as tsv, and so is a file
  of another name with a tab there.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lalm.errors import UserError, one_line
from lalm.training.text_rows import COMPRESSIONS, check_file

OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
RECORD_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
LARGEST_CELL = 2**31 - 1

Record = dict[str, Any]


def record_suffix(path: Path) -> str:
    """Return the suffix that tells the format, in lower case and without that of a compression: ``.csv``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def lines_of(path: Path) -> Iterator[str]:
    """Iterate over the lines of a UTF-8 file (a byte order mark is dropped), each with its line break.

    Raises:
        UserError: another encoding (names the line), or a broken compressed file.
    """
    opener = OPENERS.get(path.suffix.lower(), open)
    number = 1
    try:
        with opener(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: line {number} is not UTF-8 (byte 0x{error.object[error.start]:02x}); "
            f"convert the file: iconv -f <its encoding> -t utf-8"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{path}: cannot read past line {number}: {one_line(error)}") from None


def first_line(path: Path) -> str:
    """Return the first line of a file, '' if there is none."""
    return next(lines_of(path), "")


def is_table(path: Path) -> bool:
    """Tell whether a file holds records; all others are lines of text."""
    return record_suffix(path) in RECORD_SUFFIXES or "\t" in first_line(path)


def looks_like_header(cells: Sequence[str], wanted: Sequence[str]) -> bool:
    """Tell whether the cells of a first row are column names, by the rule at the top of this file."""
    names = [cell.strip() for cell in cells]
    if any(name in wanted for name in names):
        return True
    named = re.compile(r"#?[^\W\d]\w*([ _-]\w+)?|#\d+ \w+")
    return len(set(names)) == len(names) and all(named.fullmatch(name) and len(name) <= 40 for name in names)


def unquoted(cell: str) -> str:
    """Take the quotes off a tsv cell that stands in quotes as a whole; leave every other cell as it is."""
    inside = cell[1:-1]
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return cell


def tab_rows(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Split lines at tabs."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, [unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def comma_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Parse csv; a row whose number of cells differs from the first row's is refused."""
    csv.field_size_limit(LARGEST_CELL)
    number, width = 0, 0
    try:
        for number, cells in enumerate(csv.reader(lines, strict=True), 1):
            if not cells:
                continue
            width = width or len(cells)
            if len(cells) != width:
                raise UserError(
                    f"{path}: row {number} has {len(cells)} columns, the first row has {width}; "
                    'put a text that holds a comma between quotes: "..."'
                )
            yield number, cells
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1} is not valid csv: {error}") from None


def table_records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Record]]:
    """Iterate over the records of a csv or tsv file."""
    is_tab = record_suffix(path) != ".csv" or first_line(path).count("\t") >= 2
    rows = tab_rows(lines_of(path)) if is_tab else comma_rows(path, lines_of(path))
    header: list[str] | None = None
    for rank, (number, cells) in enumerate(rows):
        if rank == 0 and looks_like_header(cells, wanted):
            header = [cell.strip() for cell in cells]
            continue
        names = header if header is not None else [str(position) for position in range(1, len(cells) + 1)]
        # shorter rows of a tsv file lack their last columns, and whoever needs one says so
        yield number, dict(zip(names, cells, strict=False))


def as_record(value: object) -> Record:
    """Return an object as it is; the items of a list, or a single value, under their positions."""
    if isinstance(value, dict):
        return value
    return {str(position): item for position, item in enumerate(value if isinstance(value, list) else [value], 1)}


def json_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Iterate over the lines of a jsonl file, or over the list in a json file (anything else is one record)."""
    if record_suffix(path) == ".json":
        text = "".join(lines_of(path))
        try:
            loaded = json.loads(text)
        except ValueError as error:
            # a .json file of one object a line is common
            if not text.lstrip().startswith("{"):
                raise UserError(f"{path} is not valid json: {error}") from None
        else:
            rows = loaded if isinstance(loaded, list) else [loaded]
            yield from ((number, as_record(row)) for number, row in enumerate(rows, 1))
            return
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            try:
                yield number, as_record(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}: row {number} is not valid json: {error}") from None


def parquet_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Iterate over the rows of a parquet file."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:
        # pyarrow's errors have no common base of their own
        raise UserError(f"{path}: cannot read it as parquet: {one_line(error)}") from None
    yield from enumerate(rows, 1)


def read_records(path: Path, flag: str, wanted: Sequence[str] = ()) -> Iterator[tuple[int, Record]]:
    """Iterate over (row number, column -> value) of one file, by the rules at the top of this file.

    Args:
        path: a csv, tsv, json, jsonl or parquet file; all but parquet may be compressed (.gz, .bz2, .xz).
        flag: what the user set, named in errors about the file itself: ``--data_dir``.
        wanted: column names that make the first row of a table a header.

    Raises:
        UserError: the file is missing, empty, in another encoding or broken (names file and row).
    """
    check_file(path, flag)
    suffix = record_suffix(path)
    if suffix != ".parquet" and not is_table(path):
        raise UserError(f"{flag}: {path} is none of {', '.join(RECORD_SUFFIXES)}, and its first line has no tab")
    if suffix == ".parquet":
        yield from parquet_records(path)
    elif suffix in (".json", ".jsonl"):
        yield from json_records(path)
    else:
        yield from table_records(path, wanted)


def value_of(record: Record, column: str, path: Path, row: int) -> Any:
    """Return the value of a column; a `UserError` names file, row and column if the row has none."""
    if column not in record:
        raise UserError(f"{path}: row {row} has no column '{column}'; its columns are {', '.join(record)}")
    return record[column]


def text_of(record: Record, column: str, path: Path, row: int) -> str:
    """Return a text; null is ''. A `UserError` names file, row and column of what is no text."""
    value = value_of(record, column, path, row)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: row {row}, column '{column}': {str(value)[:60]!r} is no text")
    return whole_text(value or "", path, row)


def whole_text(text: str, path: Path, row: int) -> str:
    """Return a text as it is; one with half a surrogate pair, which JSON may hold, is no text to any tokenizer."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{path}: row {row} has half of a surrogate pair, {half}; write the whole character") from None
    return text
