# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""STS12 to STS16 and SICK-R: further test sets of sentence pairs, from the Hub or from SentEval's folders.

A task is scored as a whole, over the pairs of all its parts together ("all" in SentEval, Conneau and Kiela 2018, arXiv
1803.05449; MTEB, Muennighoff et al. 2023, arXiv 2210.07316), by the correlation of cosines with the scores of people.
"""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset

from lalm.errors import UserError, is_disk_full, one_line
from lalm.training.sts.data import COLUMNS, score_of

# By name, as MTEB has them, the data set of the Hub.
TASKS = {f"STS{year}": f"mteb/sts{year}-sts" for year in range(12, 17)} | {"SICK-R": "mteb/sickr-sts"}
HIGHEST_SCORE = 5
SICK_FILE = "SICK_test_annotated.txt"
CAVEAT = (
    "STS-B took its pairs from STS12 to STS17, and SICK its sentences from Flickr8k and from the videos of STS12: a "
    "model that was trained on these has read sentences of the tests"
)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--tasks_dir: there is no file {path}; SentEval's script get_transfer_data.bash makes it")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--tasks_dir: {path} is not UTF-8: {error}") from None


def _folder(root: Path, *names: str) -> Path:
    """The folder `root`/[STS or SICK/]name, or the first that is there."""
    found = [place for name in names for place in (root / name, root / "STS" / name) if place.is_dir()]
    if not found:
        raise UserError(f"--tasks_dir: {root} holds no folder {' or '.join(names)}, SentEval's name for it")
    return found[0]


def _senteval_sts(root: Path, name: str) -> Dataset:
    """Parts `STS.input.X.txt` (two sentences a line, a tab between them) with `STS.gs.X.txt` (a score a line, or
    nothing where people gave none)."""
    folder = _folder(root, f"{name}-en-test")
    inputs = sorted(folder.glob("STS.input.*.txt"))
    if not inputs:
        raise UserError(f"--tasks_dir: {folder} holds no file STS.input.*.txt")
    data: dict[str, list] = {column: [] for column in COLUMNS}
    for path in inputs:
        pairs, scores = _lines(path), _lines(gold := path.with_name(path.name.replace(".input.", ".gs.")))
        if len(pairs) != len(scores):
            raise UserError(f"--tasks_dir: {path} has {len(pairs)} lines, {gold.name} {len(scores)}")
        for row, (pair, score) in enumerate(zip(pairs, scores, strict=True), 1):
            if score.strip():
                _add(data, pair.split("\t"), score, path, row)
    return Dataset.from_dict(data)


def _senteval_sick(root: Path) -> Dataset:
    """Columns pair_ID, sentence_A, sentence_B, relatedness_score, ..., with a header."""
    lines = _lines(_folder(root, "SICK") / SICK_FILE)
    data: dict[str, list] = {column: [] for column in COLUMNS}
    for row, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        _add(data, cells[1:3], cells[3] if len(cells) > 3 else "", Path(SICK_FILE), row)
    return Dataset.from_dict(data)


def _add(data: dict[str, list], pair: Sequence[str], score: str, path: Path, row: int) -> None:
    if len(pair) < 2 or not all(text.strip() for text in pair[:2]):
        raise UserError(f"--tasks_dir: {path}: line {row} holds no two sentences with a tab between them")
    number = score_of(score, f"--tasks_dir: {path}: line {row}")
    if not 0 <= number <= HIGHEST_SCORE:
        raise UserError(f"--tasks_dir: {path}: line {row}: {number:g} is no score from 0 to {HIGHEST_SCORE}")
    for column, value in zip(COLUMNS, (pair[0].strip(), pair[1].strip(), number / HIGHEST_SCORE), strict=True):
        data[column].append(value)


def _from_hub(name: str) -> Dataset:
    try:
        loaded = load_dataset(TASKS[name], split="test").select_columns(list(COLUMNS))
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"--tasks: {TASKS[name]} cannot be loaded ({one_line(error)}); name a folder with SentEval's data by "
            "--tasks_dir"
        ) from error
    return loaded.map(lambda row: {"score": float(row["score"]) / HIGHEST_SCORE}, desc=name)


def load_tasks(names: Sequence[str], folder: str | None = None) -> dict[str, Dataset]:
    """Load test sets of pairs.

    Args:
        names: among `TASKS`.
        folder: SentEval's `data/downstream` (its parts STS/STS12-en-test ... and SICK); None is the Hub.

    Returns:
        name -> Dataset of sentence1, sentence2 (str) and score (float in [0, 1]).

    Raises:
        UserError: a data set cannot be loaded, a file is missing or wrong (names file and line).
    """
    if folder is None:
        return {name: _from_hub(name) for name in names}
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--tasks_dir: {root} is no folder")
    found = {name: _senteval_sick(root) if name == "SICK-R" else _senteval_sts(root, name) for name in names}
    for name, dataset in found.items():
        if not len(dataset):
            raise UserError(f"--tasks_dir: {root} holds no scored pair of {name}")
    return found
