"""Every way text comes in, and what is said when it does not."""

import gzip
import json
import os
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from lalm.errors import UserError
from lalm.network import go_offline_without_network
from lalm.training.clm.arguments import DataArguments, ModelArguments
from lalm.training.clm.tokenizer import make_tokenizer
from lalm.training.text_rows import (
    LONGEST_TRAINED_WORD,
    LONGEST_WORD,
    check_words,
    load_splits,
)

DOCUMENTS = ["one, two", 'a "quoted" text', "übergröße\nsecond line", "last"]
LINES = ["first line", "", "  third  ", "last"]


def write_records(path, column="text"):
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table({column: DOCUMENTS, "id": range(len(DOCUMENTS))}), path)
        return
    rows = [{column: text, "id": i} for i, text in enumerate(DOCUMENTS)]
    if kind == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == "json":
        content = json.dumps(rows)
    else:
        separator = "\t" if kind == "tsv" else ","
        quoted = ['"' + text.replace('"', '""') + '"' for text in DOCUMENTS]
        content = "".join(f"{a}{separator}{b}\n" for a, b in [(column, "id"), *zip(quoted, range(9))])  # noqa: B905
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(content)


def load(tmp_path, needed=("train",), **data):
    return load_splits(DataArguments(**data), ModelArguments(cache_dir=str(tmp_path / "cache")), set(needed))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet", "json.gz", "jsonl.gz", "csv.gz"])
def test_records(tmp_path, suffix, streaming):
    path = tmp_path / f"records.{suffix}"
    write_records(path)
    rows = load(tmp_path, train_file=[str(path)], streaming=streaming)["train"]
    assert list(rows.texts()) == DOCUMENTS
    assert not rows.is_text_file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "wiki.train.tokens.gz", "wiki.valid.raw", "plain"])
def test_text_files_keep_every_character(tmp_path, name, streaming):
    path = tmp_path / name
    content = "\n".join(LINES)
    (gzip.open if name.endswith(".gz") else open)(path, "wt", encoding="utf-8").write(content)
    rows = load(tmp_path, train_file=[str(path)], streaming=streaming)["train"]
    assert "".join(rows.texts()) == content
    assert rows.is_text_file


def test_several_files_and_splits(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n", encoding="utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    splits = load(tmp_path, ("train", "test"), train_file=files, test_file=[str(tmp_path / "c.txt")])
    assert [list(part["text"]) for part in splits["train"].parts] == [["a\n"], ["b\n"]]
    assert list(splits["test"].texts()) == ["c\n"]


def test_other_column_names(tmp_path):
    path = tmp_path / "records.jsonl"
    write_records(path, column="body")
    assert list(load(tmp_path, train_file=[str(path)])["train"].texts()) == DOCUMENTS
    with pytest.raises(UserError, match=r"no column 'bodi' \(did you mean 'body'\?\); its columns are body, id"):
        load(tmp_path, train_file=[str(path)], text_column="bodi")
    with pytest.raises(UserError, match="column 'id' of .* does not hold text"):
        load(tmp_path, train_file=[str(path)], text_column="id")


def test_held_out_rows_are_the_last_and_leave_training(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i}\n" for i in range(40)), encoding="utf-8")
    splits = load(tmp_path, ("train", "validation"), train_file=[str(path)], validation_split_percentage=10)
    assert list(splits["train"].texts()) == [f"{i}\n" for i in range(36)]
    assert list(splits["validation"].texts()) == [f"{i}\n" for i in range(36, 40)]


def test_the_default_text_is_split_without_overlap(tmp_path):
    splits = load(tmp_path, ("train", "validation", "test"))
    train, validation, test = (set(splits[name].texts()) for name in ("train", "validation", "test"))
    assert min(len(validation), len(test)) >= 5
    assert len(train) > 40
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), "holds no text"),
        ("broken.txt.gz", b"this is no gzip", "is not a readable gzip file"),
        ("cut.txt.gz", gzip.compress(bytes(range(256)) * 400, mtime=0)[:-200], "cut.txt.gz"),
        ("broken.json", b'{"text": "a', "cannot read .*broken.json as json"),
        ("broken.parquet", b"PAR1 nonsense", "cannot read .*broken.parquet as parquet"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--train_file.*{message}") as caught:
        load(tmp_path, train_file=[str(tmp_path / name)])
    assert "\n" not in str(caught.value)


def test_missing_file_names_a_neighbour(tmp_path):
    (tmp_path / "train.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match=r"there is no file .*/trian.txt \(did you mean 'train.txt'\?\)"):
        load(tmp_path, train_file=[str(tmp_path / "trian.txt")])


def test_missing_split(tmp_path):
    (tmp_path / "a.txt").write_text("a\n", encoding="utf-8")
    with pytest.raises(UserError, match="needs a test split and there is none; give --test_file or drop --do_test"):
        load(tmp_path, ("train", "test"), train_file=[str(tmp_path / "a.txt")])


def test_unreachable_dataset(tmp_path):
    with pytest.raises(UserError, match="--dataset_name: cannot load 'nobody/nothing'"):
        load(tmp_path, dataset_name="nobody/nothing")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_nul_bytes(tmp_path, suffix, streaming):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"\0" * 5000)
    with pytest.raises(UserError, match=f"--train_file: {path} begins with NUL bytes and is no text"):
        load(tmp_path, train_file=[str(path)], streaming=streaming)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="--train_file: .*pipe is no regular file"):
        load(tmp_path, train_file=[str(tmp_path / "pipe")])


def test_all_files_are_looked_at_before_the_first_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a\n", encoding="utf-8")
    monkeypatch.setattr("lalm.training.text_rows.load_dataset", None)
    with pytest.raises(UserError, match="--test_file: there is no file missing.txt"):
        load(tmp_path, train_file=[str(tmp_path / "a.txt")], test_file=["missing.txt"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_word_that_no_tokenizer_ends_on(tmp_path, streaming):
    path = tmp_path / "dna.txt"
    path.write_text("some words\n" + "acgt" * 30_000 + "\n", encoding="utf-8")
    rows = load(tmp_path, train_file=[str(path)], streaming=streaming)["train"]
    with pytest.raises(UserError, match=r"dna.txt has 120,000 characters without a space .* break them into lines"):
        make_tokenizer(ModelArguments(), rows.texts())
    check_words("acgt" * 30_000, LONGEST_WORD, "a named tokenizer takes longer ones")
    check_words("a word, and " * 30_000, LONGEST_TRAINED_WORD, "a long text")
    with pytest.raises(UserError, match="characters without a space"):
        check_words("-" * LONGEST_TRAINED_WORD, LONGEST_TRAINED_WORD, "other signs")


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch, caplog):
    monkeypatch.setattr(constants, "ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setattr("lalm.network.getproxies", dict)
    for module, name in ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(module, name, False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    with caplog.at_level("INFO"):
        go_offline_without_network()
    assert constants.HF_HUB_OFFLINE
    assert "no-such-host.invalid cannot be reached" in caplog.text
    begin = time.monotonic()
    with pytest.raises(UserError, match="--dataset_name: cannot load 'org/nothing'"):
        load(Path("nowhere"), dataset_name="org/nothing")
    assert time.monotonic() - begin < 5
