"""Sources of training data: columns found or asked for, nothing of dev or test, stand-ins without a network."""

import gzip
import json

import pytest
from datasets import Dataset, load_dataset

from lalm.errors import UserError
from lalm.training.sts import sources as sts_sources
from lalm.training.sts.arguments import parse_sts_arguments
from lalm.training.sts.data import StsSplits, load_stsb
from lalm.training.sts.sources import Source, collect_kinds, collect_relational, collect_texts, pairs_of, thinned
from tests.training.sts import tiny_models as sts_tiny

HUB = {"cache_dir": None, "token": None}


def scored(first, second, scores):
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})


@pytest.fixture
def stsb():
    splits = {
        "validation": scored(["Dev one."], ["dev two"], [0.5]),
        "test": scored(["test one"], ["test two"], [1.0]),
        "train": scored(["a", "DEV  one"], ["b", "c"], [0.1, 0.9]),
    }
    return StsSplits(splits, "here")


@pytest.fixture
def embedded(monkeypatch):
    return load_stsb(None)


def data(*argv: str):
    return parse_sts_arguments(list(argv))[1]


def write(path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_source_names_columns_and_rows():
    assert Source.parse("a.tsv", "--x") == Source("a.tsv")
    assert Source.parse("a.tsv::1, 2", "--x") == Source("a.tsv", ("1", "2"))
    assert Source.parse("a::b,c::label=yes,x=1", "--x") == Source("a", ("b", "c"), {"label": "yes", "x": "1"})
    with pytest.raises(UserError, match="not of the form name::columns"):
        Source.parse("a::b::c::d", "--x")
    with pytest.raises(UserError, match="not of the form column=value"):
        Source.parse("a::b,c::yes", "--x")


def test_hub_names_are_told_from_files(tmp_path, monkeypatch):
    assert Source("some/data").is_on_hub
    assert Source("some/data/config").is_on_hub
    assert not Source("data.tsv").is_on_hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "data").write_text("x")
    assert not Source("some/data").is_on_hub


def test_columns_are_found(tmp_path):
    named = write(tmp_path / "named.tsv", "question\tanswer\tid", "who is it\tit is me\t1")
    found = pairs_of(Source(named), 2, "--qa_file", **HUB)
    assert found.to_dict() == {"anchor": ["who is it"], "positive": ["it is me"]}
    bare = write(tmp_path / "bare.tsv", "a dog runs.\tthe dog runs.\ta cat sits.", "b.\tc.\td.")
    assert pairs_of(Source(bare), 2, "--x", **HUB)["positive"] == ["the dog runs.", "c."]
    assert pairs_of(Source(bare), 3, "--x", **HUB)["negative"] == ["a cat sits.", "d."]
    other = write(tmp_path / "other.tsv", "left\tright", "one two\tthree four")
    with pytest.raises(UserError, match=r"columns left, right hold the texts\? Name them: .*::left,right"):
        pairs_of(Source(other), 2, "--x", **HUB)
    assert pairs_of(Source(other, ("right", "left")), 2, "--x", **HUB)["anchor"] == ["three four"]


def test_labelled_pairs_must_say_which_rows(tmp_path):
    path = tmp_path / "nli.jsonl.gz"
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "gold_label": label} for i, label in enumerate("enc")]
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(UserError, match=r"'gold_label' tells pairs apart; .*::sentence1,sentence2::gold_label=\.\.\."):
        pairs_of(Source(str(path)), 2, "--x", **HUB)
    source = Source.parse(f"{path}::sentence1,sentence2::gold_label=e", "--x")
    assert pairs_of(source, 0, "--x", **HUB).to_dict() == {"anchor": ["a 0"], "positive": ["b 0"]}


def test_missing_things_are_named(tmp_path):
    path = write(tmp_path / "a.tsv", "anchor\tpositive", "a b\tc d")
    with pytest.raises(UserError, match="'positiv'"):
        pairs_of(Source(path, ("anchor", "positiv")), 2, "--x", **HUB)
    with pytest.raises(UserError, match="--x: there is no file .*b.tsv"):
        pairs_of(Source(str(tmp_path / "b.tsv")), 2, "--x", **HUB)
    with pytest.raises(UserError, match="--x: there is no file no/body, and no such data set"):
        pairs_of(Source("no/body"), 2, "--x", **HUB)


def test_hub_data_sets(tmp_path, monkeypatch, stsb):
    asked = []

    def hub(name, *config, split, **_):
        asked.append((name, *config, split))
        rows = {"query": ["q one", "test  ONE!"], "answer": ["a one", "a two"], "label": [1, 0]}
        return Dataset.from_dict(rows)

    monkeypatch.setattr(sts_sources, "load_dataset", hub)
    with pytest.raises(UserError, match="'label' tells pairs apart"):
        pairs_of(Source("some/qa"), 2, "--x", **HUB)
    source = Source.parse("some/qa/pair::answer,query::label=1", "--x")
    assert pairs_of(source, 2, "--x", **HUB).to_dict() == {"anchor": ["a one"], "positive": ["q one"]}
    with pytest.raises(UserError, match=r"some/qa has no column 'quer' \(did you mean 'query'"):
        pairs_of(Source("some/qa", ("quer", "answer")), 2, "--x", **HUB)
    assert asked[:2] == [("some/qa", "train"), ("some/qa", "pair", "train")]
    found = collect_texts(data("--train_file", "some/qa"), stsb, 0, HUB)
    assert found.texts == ["q one", "a one", "a two"]
    asked.clear()
    collect_texts(data(), stsb, 0, HUB)
    assert asked == [
        ("sentence-transformers/all-nli", "pair", "train"),
        ("sentence-transformers/quora-duplicates", "pair", "train"),
        ("sentence-transformers/natural-questions", "train"),
    ]


def test_texts_have_weights_and_none_of_dev_and_test(tmp_path, stsb):
    lines = sts_tiny.sentences(20)
    first = write(tmp_path / "a.txt", *lines, lines[0], "DEV one", "Test, two")
    second = write(tmp_path / "b.txt", lines[3], "only here")
    found = collect_texts(data("--train_file", first, second), stsb, 0, HUB)
    assert found.texts == [*lines, "only here"]
    assert "20 texts of 23 (20 different" in found.notes[first]
    found = collect_texts(data("--train_file", first, second, "--train_weights", "0.5", "2"), stsb, 0, HUB)
    assert found.texts.count("only here") == 2
    assert len(found.texts) == 12
    assert len(set(found.texts)) == 11
    assert len(collect_texts(data("--train_file", first, "--max_train_samples", "5"), stsb, 0, HUB).texts) == 5
    with pytest.raises(UserError, match="no text is left"):
        collect_texts(data("--train_file", write(tmp_path / "c.txt", "dev one")), stsb, 0, HUB)


def test_thinned_rows():
    assert thinned(4, 1.0, None, 0) == [0, 1, 2, 3]
    assert sorted(thinned(4, 2.5, None, 0))[:4] == [0, 0, 0, 1] or len(thinned(4, 2.5, None, 0)) == 10
    assert len(set(thinned(100, 0.3, None, 1))) == 30
    assert len(set(thinned(100, 2.0, 7, 1))) == 7


def test_pairs_of_the_relational_stage(tmp_path, stsb):
    path = write(tmp_path / "a.tsv", "anchor\tpositive\tnegative", "a b\tc d\te f", "g h\tDEV TWO\ti j")
    found = collect_relational(data("--train_file", path), stsb, 0, HUB)
    assert found.parts["pairs"].to_dict() == {"anchor": ["a b"], "positive": ["c d"]}
    assert "1 rows of 2" in found.notes["pairs"]


def test_kinds_of_the_mixture(tmp_path, stsb, caplog):
    triplets = write(tmp_path / "t.tsv", "anchor\tpositive\tnegative", "a b\tc d\te f")
    pairs = write(tmp_path / "p.tsv", "anchor\tpositive", "a b\tc d")
    argv = ("--nli_file", triplets, "--triplet_file", triplets, "--qa_file", pairs, "--mixture", "nli=1", "sts=1")
    found = collect_kinds(data(*argv), stsb, 0, HUB)
    assert list(found.parts) == ["nli", "sts"]
    assert found.parts["nli"].column_names == ["anchor", "positive", "negative"]
    assert found.parts["sts"].to_dict() == {"sentence1": ["a"], "sentence2": ["b"], "score": [0.1]}
    with pytest.raises(UserError, match="t.tsv: .*'nothing'"):
        collect_kinds(
            data("--mixture", "triplet=1", "--triplet_file", f"{triplets}::anchor,positive,nothing"), stsb, 0, HUB
        )


def test_embedded_pairs_stand_in(embedded, caplog):
    with pytest.raises(Exception, match="."):
        load_dataset("sentence-transformers/stsb")
    assert embedded.is_embedded
    texts = collect_texts(data(), embedded, 0, HUB).texts
    assert len(texts) > 200
    pairs = collect_relational(data(), embedded, 0, HUB).parts["pairs"]
    assert pairs.column_names == ["anchor", "positive"]
    assert len(pairs) >= 8
    kinds = collect_kinds(data(), embedded, 0, HUB)
    assert set(kinds.parts) == {"sts", "paraphrase"}
    assert "give --qa_file" in caplog.text


@pytest.mark.parametrize("texts", [0, 2, 3])
def test_lists_of_positives_and_negatives(tmp_path, texts):
    rows = [{"query": "q", "pos": ["p1", "p2", "p3"], "neg": ["n1", "n2"]}, {"query": "r", "pos": ["s"], "neg": ["m"]}]
    path = write(tmp_path / "lists.jsonl", *map(json.dumps, rows))
    found = pairs_of(Source(path), texts, "--triplet_file", **HUB)
    expected = [("q", "p1", "n1"), ("q", "p2", "n2"), ("q", "p3", "n1"), ("r", "s", "m")]
    names = ("anchor", "positive", "negative")[: texts or 3]
    assert found.column_names == list(names)
    assert list(zip(*(found[name] for name in names), strict=True)) == [row[: len(names)] for row in expected]


def test_lists_that_are_none(tmp_path):
    path = write(tmp_path / "lists.jsonl", '{"query": "q", "pos": ["p"]}')
    assert pairs_of(Source(path), 0, "--nli_file", **HUB).column_names == ["anchor", "positive"]
    with pytest.raises(UserError, match="row 1: pos and neg must be a list of texts"):
        pairs_of(Source(path), 3, "--triplet_file", **HUB)
    path = write(tmp_path / "numbers.jsonl", '{"query": "q", "pos": [7]}')
    with pytest.raises(UserError, match="row 1, column 'positive': '?7'? is no text"):
        pairs_of(Source(path), 2, "--qa_file", **HUB)
