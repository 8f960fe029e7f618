"""A data set in C4's layout: many files, a validation split, no test split, read while training."""

import gzip
import itertools
import json
import re

import numpy as np
import pytest
from torch.utils.data import DataLoader

import run_clm
from lalm.errors import UserError
from lalm.training.clm.arguments import DataArguments, ModelArguments, parse_arguments
from lalm.training.clm.data import prepare_data
from lalm.training.clm.documents import shuffled
from lalm.training.clm.packing import PackingCollator, StreamingPackedDataset
from lalm.training.text_rows import load_splits
from tests.training.conftest import SIZES, sentences

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""
DOCUMENTS = sentences(48, 0)


def write(path, texts):
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z"}) + "\n" for text in texts)


@pytest.fixture
def c4(tmp_path):
    """Arguments for a folder with three files of 16 documents, and a fourth for validation."""
    folder = tmp_path / "c4"
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for index in range(3):
        part = DOCUMENTS[16 * index : 16 * index + 16]
        write(folder / "en" / f"c4-train.{index:05d}-of-01024.json.gz", part)
    write(folder / "en" / "c4-validation.00000-of-00008.json.gz", sentences(9, 1))
    return ["--dataset_name", str(folder), "--dataset_config_name", "en", "--streaming", "--block_size", "16"]


def test_the_command_of_the_documentation_runs(c4, tmp_path, caplog):
    argv = [*c4, "--do_train", "--do_eval", "--do_test", "--max_steps", "3", "--config_overrides", SIZES]
    argv += ["--tokenizer_vocab_size", "300", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    results = run_clm.main(argv)
    assert results["steps"] == 3
    assert results["eval_tokens_scored"] > 0
    assert not [key for key in results if key.startswith("test_")]
    assert re.search("--do_test: .*c4 has no test split", caplog.text)
    assert "streamed in blocks of 16, documents by row, shuffled among 10,000 rows" in caplog.text


def read(rows, share=(0, 1)):
    return [text for text, _ in rows.read(share)]


def load(flags, tmp_path, needed=("train",), **options):
    data = DataArguments(**options) if options else parse_arguments([*flags, "--max_steps", "1"])[1]
    return load_splits(data, ModelArguments(cache_dir=str(tmp_path / "cache")), set(needed))


@pytest.mark.parametrize("readers", [2, 3, 5])
def test_readers_share_the_rows(c4, tmp_path, readers):
    """Whole files for up to three readers, rows for more."""
    rows = load(c4, tmp_path)["train"]
    found = [read(rows, (index, readers)) for index in range(readers)]
    assert sorted(itertools.chain(*found)) == sorted(DOCUMENTS)
    assert all(found)
    assert (found[0] == DOCUMENTS[:16]) == (readers == 3)


def test_the_first_rows_are_held_out_where_nothing_else_is(tmp_path, monkeypatch):
    monkeypatch.setattr("lalm.training.text_rows.HELD_OUT_ROWS", 7)
    write(tmp_path / "train.jsonl.gz", DOCUMENTS)
    options = {"train_file": [str(tmp_path / "train.jsonl.gz")], "streaming": True}
    rows = load((), tmp_path, ("train", "validation"), **options)
    assert read(rows["validation"]) == DOCUMENTS[:7]
    assert read(rows["train"]) == DOCUMENTS[7:]
    assert read(rows["train"], (1, 2)) == DOCUMENTS[7::2]
    monkeypatch.setattr("lalm.training.text_rows.HELD_OUT_ROWS", 48)
    with pytest.raises(UserError, match="at most 48 rows.*give --validation_file or drop --do_eval"):
        load((), tmp_path, ("train", "validation"), **options)


def blocks(dataset, count):
    return [block["input_ids"].tolist() for block in itertools.islice(dataset, count)]


def test_passes_differ_and_repeat_with_the_seed(c4, tmp_path):
    flags = [*c4, "--max_steps", "1", "--tokenizer_vocab_size", "300", "--output_dir", str(tmp_path), "--do_train"]

    def prepared(*more):
        return prepare_data(*parse_arguments([*flags, *more])).splits["train"]

    dataset = prepared()
    whole = sum(1 for _ in dataset.one_pass())
    both = blocks(dataset, 2 * whole)
    assert blocks(prepared(), 2 * whole) == both
    assert blocks(prepared("--seed", "1"), whole) != both[:whole]
    assert both[whole:] != both[:whole]
    tokens = [sorted(itertools.chain(*part)) for part in (both[:whole], both[whole:])]
    assert tokens[0] == tokens[1], "every pass has every document"
    ordered = blocks(prepared("--shuffle_buffer", "0"), whole)
    assert sorted(itertools.chain(*ordered)) == tokens[0]
    assert ordered != both[:whole]


def test_processes_and_workers_get_documents_of_their_own(c4, tmp_path):
    """Two processes of two workers each: together one pass, each document once."""
    flags = [*c4, "--max_steps", "1", "--tokenizer_vocab_size", "300", "--output_dir", str(tmp_path), "--do_train"]
    dataset = prepare_data(*parse_arguments(flags)).splits["train"]
    # without the ends of documents (0), one of which may be left over after the last block
    whole = sorted(token for block in blocks(dataset.one_pass(), None) for token in block if token)
    found = []
    for rank in range(2):
        share = StreamingPackedDataset(dataset.pieces, 16, process=(rank, 2), shares_rows=True)
        counts = [sum(1 for _ in share.one_pass(0, (2 * rank + worker, 4))) for worker in range(2)]
        loader = iter(DataLoader(share, batch_size=1, num_workers=2, collate_fn=PackingCollator(16, -1)))
        for turn in range(max(counts)):
            for worker in range(2):
                block = next(loader)["input_ids"].flatten()
                found += block[block > 0].tolist() if turn < counts[worker] else []
    assert sorted(found) == whole


def test_every_item_leaves_the_buffer_once():
    order = list(shuffled(iter(range(50)), 8, np.random.default_rng(0)))
    assert sorted(order) == list(range(50))
    assert order != list(range(50))
    assert all(item <= place + 8 for place, item in enumerate(order)), "an item cannot come before it is read"
    assert list(shuffled(iter(range(3)), 8, np.random.default_rng(0))) != []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shuffle_buffer", "5"], "--shuffle_buffer is 5; it must be at least 0, with --streaming"),
        (["--streaming", "--shuffle_buffer", "-1"], "--shuffle_buffer is -1; it must be at least 0"),
    ],
)
def test_a_buffer_without_a_stream(flags, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(flags)


def test_parts_of_documents_are_not_shuffled(tiny_run):
    with pytest.raises(UserError, match="--shuffle_buffer: with --document_boundary article rows are parts"):
        tiny_run("--do_train", "--streaming", "--shuffle_buffer", "5", "--document_boundary", "article")
