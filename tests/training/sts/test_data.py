"""Every way sentence pairs and texts come in, the pairs that ship with lalm, and what is said of bad files."""

import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from lalm.errors import UserError
from lalm.training.sts import data as sts_data
from lalm.training.sts.data import (
    drop_pairs,
    drop_texts,
    embedded_splits,
    forbidden_strings,
    load_pairs,
    load_scored_file,
    load_stsb,
    load_texts,
    normalise,
)

PAIRS = [("A cat, asleep.", "", 5.0), ('She said "no".', "Übergröße passt", 2.6), ("One.", "Two.", 0.0)]
UNIT_SCORES = [1.0, 0.52, 0.0]
NAMES = ["train", "dev", "test"]


def quoted(text):
    return '"' + str(text).replace('"', '""') + '"'


def pairs_text(kind, names=("sentence1", "sentence2", "score"), pairs=PAIRS):
    """The pairs as a file of some kind; `names` None leaves the header out."""
    if kind == "jsonl":
        return "".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs)
    if kind == "json":
        return json.dumps([dict(zip(names, pair, strict=True)) for pair in pairs])
    rows = ([names] if names else []) + [tuple(map(quoted, pair)) if kind == "csv" else pair for pair in pairs]
    return "".join(("\t" if kind == "tsv" else ",").join(map(str, row)) + "\n" for row in rows)


def write(path, text):
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="").write(text)
    return path


def write_folder(folder, pattern="stsb-en-{}.csv", text=None):
    for name in NAMES:
        write(folder / pattern.format(name), pairs_text("csv", None) if text is None else text)
    return folder


def check_pairs(data, scores=UNIT_SCORES):
    assert data.column_names == ["sentence1", "sentence2", "score"]
    assert list(zip(data["sentence1"], data["sentence2"], strict=True)) == [pair[:2] for pair in PAIRS]
    assert list(data["score"]) == pytest.approx(scores)


@pytest.mark.parametrize("pattern", ["stsb-en-{}.csv", "sts_{}.csv.gz", "{}-00000-of-00001.csv", "STS.{}.CSV"])
def test_folders(tmp_path, pattern):
    write(tmp_path / "latest.csv", "no split has this name")
    (tmp_path / "README.md").write_text("of the test and train data")
    splits = load_stsb(str(write_folder(tmp_path, pattern)))
    assert list(splits) == ["train", "validation", "test"]
    assert splits.source == str(tmp_path)
    assert not splits.is_embedded
    for data in splits.values():
        check_pairs(data)


def test_only_the_splits_asked_for_are_needed(tmp_path):
    write(tmp_path / "sts-validation.jsonl", pairs_text("jsonl"))
    assert list(load_stsb(str(tmp_path), ["validation"])) == ["validation"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("score", ["score", "similarity_score", "label"])
def test_named_columns_in_any_order(tmp_path, kind, score):
    turned = [(points, second, first) for first, second, points in PAIRS]
    path = write(tmp_path / f"dev.{kind}", pairs_text(kind, (score, "sentence2", "sentence1"), turned))
    check_pairs(load_scored_file(path))


def test_parquet(tmp_path):
    first, second, scores = zip(*PAIRS, strict=True)
    pq.write_table(pa.table({"sentence1": first, "sentence2": second, "score": scores}), tmp_path / "dev.parquet")
    check_pairs(load_scored_file(tmp_path / "dev.parquet"))


def test_release_layout_and_byte_order_mark(tmp_path):
    """The release: tabs in a .csv file, no header, no quotes, sources after the sentences in some rows."""
    rows = [f"main-news\tMSRpar\t2012\t{i:04}\t{pair[2]}\t{pair[0]}\t{pair[1]}" for i, pair in enumerate(PAIRS)]
    path = write(tmp_path / "sts-dev.csv", "\ufeff" + rows[0] + "\tsource\n" + "\r\n".join(rows[1:]) + "\r\n")
    check_pairs(load_scored_file(path))


def test_glue_layout(tmp_path):
    rows = [f"{i}\t{pair[0]}\t{pair[1]}\t{pair[2]}\n" for i, pair in enumerate(PAIRS)]
    check_pairs(load_scored_file(write(tmp_path / "dev.tsv", "index\tsentence1\tsentence2\tscore\n" + "".join(rows))))


def test_quotes_of_tsv_and_of_csv(tmp_path):
    tsv = '"He said ""yes""."\t"Stop!", he said\t3\n'
    data = load_scored_file(write(tmp_path / "dev.tsv", tsv))
    assert data[0] == {"sentence1": 'He said "yes".', "sentence2": '"Stop!", he said', "score": 0.6}
    data = load_scored_file(write(tmp_path / "dev.csv", '"two\nlines","a ""b"", c",3\n\nd,e,1\n'))
    assert list(data["sentence1"]) == ["two\nlines", "d"]
    assert list(data["sentence2"]) == ['a "b", c', "e"]


def scored(scores, header=True):
    return pairs_text(
        "csv", ("sentence1", "sentence2", "score") if header else None, [("a b", "c d", s) for s in scores]
    )


@pytest.mark.parametrize(
    ("scores", "header", "expected"),
    [
        ([0, 2.5, 5], True, [0, 0.5, 1]),
        ([0, 0.5, 1], True, [0, 0.5, 1]),
        ([0, 0.5, 1], False, [0, 0.1, 0.2]),
        ([0.5] * 18 + [2.5] * 2, True, [0.1] * 18 + [0.5] * 2),
    ],
)
def test_scale_of_scores(tmp_path, scores, header, expected):
    path = write(tmp_path / "dev.csv", scored(scores, header))
    assert list(load_scored_file(path)["score"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dev.csv",
            scored([3, 5.2]),
            "row 3, column 'score': the score 5.2 is out of range: its scores run from 0 to 5",
        ),
        ("dev.csv", scored([3, 5.2], False), "row 2, column '3': the score 5.2 is out of range"),
        ("dev.csv", scored([0.5] * 30 + [1.2]), "row 32, column 'score': the score 1.2 .* only 1 of 31 are above 1"),
        ("dev.csv", scored([0.5] * 20, False), "rows 1 to 20, column '3': no score is above 1"),
        ("dev.csv", scored([3, -0.1]), "row 3, column 'score': the score -0.1 is out of range"),
        ("test.csv", scored([-1, -1]), "row 2, .*-1 stands for a hidden label"),
        ("dev.csv", scored([3, "nan"]), "row 3, column 'score': 'nan' is no score"),
        ("dev.csv", scored([3, "high"]), "row 3, column 'score': 'high' is no score"),
        ("dev.csv", scored([3, ""], False), "row 2, column '3': nothing is no score"),
        ("dev.csv", "A cat sleeps.,A dog.,high\n", "row 1, column '3': 'high' is no score"),
        (
            "dev.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": true}\n',
            "row 1, column 'score': True is no score",
        ),
        (
            "dev.csv",
            "sentence1,sentence2\na b,c d\n",
            "row 2 has no column 'score'; its columns are sentence1, sentence2",
        ),
        ("dev.csv", "sentence1,sentense2,score\na,b,1\n", r"no column 'sentence2' \(did you mean 'sentense2'\?\)"),
        ("dev.csv", "A cat sleeps.,A cat naps.\n", "row 1 has 2 columns and the file no header"),
        ("dev.csv", "A cat, a dog.,One pet.,2\nA b c.,d e f,1\n", "row 1 has 4 columns and the file no header"),
        ("dev.csv", "A b c.,d e f.,1\nA cat, a dog.,One pet.,2\n", "row 2 has 4 columns, the first row has 3; put"),
        ("dev.csv", 'A b c.,d e f.,1\n"A cat.,d,1\n', "row 2 is not valid csv: unexpected end of data"),
        ("dev.tsv", "a b.\tc d.\t1\ne f.\tg\n", "row 2 has no column '3'"),
        ("dev.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n\n{"sent', "row 3 is not valid json"),
        ("dev.jsonl", '{"sentence1": 7, "sentence2": "b", "score": 1}\n', "row 1, column 'sentence1': '7' is no text"),
        ("dev.json", "[1,", "is not valid json"),
        ("dev.csv", b"", "is empty"),
        ("dev.csv", b"sentence1,sentence2,score\n", "holds no pairs"),
        ("dev.csv", "a b.,c d.,1\ncaf\u00e9.,tea.,2\n".encode("latin-1"), "line 2 is not UTF-8 .byte 0xe9.; convert"),
        ("dev.csv", "a,b,1\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("dev.csv.gz", b"no gzip at all", "is not a readable gzip file"),
        ("dev.csv.gz", gzip.compress(os.urandom(9000))[:-900], "dev.csv.gz"),
        ("dev.parquet", b"PAR1 nonsense", "cannot read it as parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    split = "test" if name.startswith("test") else "validation"
    with pytest.raises(UserError, match=message) as caught:
        load_stsb(str(tmp_path), [split])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"--data_dir: .*/none does not exist; .* stsb-en-train.csv, stsb-en-dev.csv"):
        load_stsb(str(tmp_path / "none"))
    write(tmp_path / "stsb-en-train.csv", pairs_text("csv", None))
    with pytest.raises(
        UserError, match=r"no validation file; its name is \*dev\* or \*valid\*.*holds stsb-en-train.csv"
    ):
        load_stsb(str(tmp_path))
    with pytest.raises(UserError, match=r"stsb-en-train.csv is a file; name the folder"):
        load_stsb(str(tmp_path / "stsb-en-train.csv"))
    write(tmp_path / "stsb-de-train.csv", pairs_text("csv", None))
    with pytest.raises(UserError, match=r"more than one train file \(stsb-de-train.csv, stsb-en-train.csv\)"):
        load_stsb(str(tmp_path))


def test_a_folder_that_is_named_is_never_replaced(tmp_path):
    with pytest.raises(UserError):
        load_stsb(str(tmp_path))


def test_hub(monkeypatch):
    """The Hub's set is in [0, 1] already and is taken as it is."""
    columns = {"idx": [0, 1], "sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [0.25, 1.0]}
    hub = DatasetDict({name: Dataset.from_dict(columns) for name in ("train", "validation", "test")})
    asked = []
    monkeypatch.setattr(sts_data, "load_dataset", lambda name: asked.append(name) or hub)
    splits = load_stsb()
    assert asked == [splits.source] == ["sentence-transformers/stsb"]
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"].to_dict() == {name: columns[name] for name in ("sentence1", "sentence2", "score")}


def test_without_a_network_the_embedded_pairs_stand_in(caplog):
    with caplog.at_level(logging.WARNING):
        splits = load_stsb()
    assert splits.is_embedded
    assert {name: len(data) for name, data in splits.items()} == {"train": 160, "validation": 40, "test": 40}
    (record,) = [record for record in caplog.records if record.name == sts_data.__name__]
    assert "sentence-transformers/stsb cannot be loaded" in record.message
    assert "not STS-B's" in record.message
    assert list(load_stsb(splits=["test"])) == ["test"]


def test_a_full_disk_is_not_mistaken_for_a_missing_network(monkeypatch):
    def full(name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sts_data, "load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        load_stsb()


def test_embedded_pairs():
    splits = embedded_splits()
    texts = [text for data in splits.values() for name in ("sentence1", "sentence2") for text in data[name]]
    assert len({normalise(text) for text in texts}) == len(texts) == 480
    assert all(text == text.strip() and 5 <= len(text) <= 90 for text in texts)
    for data in splits.values():
        assert min(data["score"]) == 0
        assert max(data["score"]) == 1
        # over the whole range, a fifth of it never holds more than a third of the pairs
        fifths = [min(int(score * 5), 4) for score in data["score"]]
        assert all(len(data) / 12 < fifths.count(i) < len(data) / 3 for i in range(5))


def test_pairs_and_triplets(tmp_path):
    rows = [
        {"premise": "a b", "hypothesis": "c d", "label": "entailment"},
        {"premise": "e", "hypothesis": "", "label": "x"},
    ]
    nli = write(tmp_path / "nli.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    bare = write(tmp_path / "quora.tsv", "How so?\tHow is it so?\nWhy not?\tWhat for?\n")
    pairs = load_pairs([nli], ["premise", "hypothesis"], where={"label": "entailment"})
    assert pairs.to_dict() == {"anchor": ["a b"], "positive": ["c d"]}
    pairs = load_pairs([str(bare), bare], ["2", "1"])
    assert pairs["anchor"][:] == ["How is it so?", "What for?"] * 2
    triplets = write(tmp_path / "t.csv.gz", "negative,anchor,positive\nn,a,p\n")
    loaded = load_pairs([triplets], ["anchor", "positive", "negative"]).to_dict()
    assert loaded == {"anchor": ["a"], "positive": ["p"], "negative": ["n"]}
    lists = write(tmp_path / "l.jsonl", '["one", "two"]\n')
    assert load_pairs([lists], ["1", "2"])[0] == {"anchor": "one", "positive": "two"}
    stsb = write(tmp_path / "s.csv", pairs_text("csv"))
    assert load_pairs([stsb], ["sentence1", "sentence2", "score"])["score"][:] == UNIT_SCORES


@pytest.mark.parametrize(
    ("columns", "where", "message"),
    [
        (["sentence1", "other"], None, "row 2 has no column 'other'; its columns are sentence1, sentence2, score"),
        (["sentence1", "sentence2"], {"genre": "x"}, "row 2 has no column 'genre'"),
        (["sentence1", "sentence2"], {"score": "x"}, "holds no pairs with score = x"),
        (["sentence1"], None, "two or three text columns"),
        (["sentence1", "score"], None, "two or three text columns"),
        (["a", "b", "c", "d"], None, "two or three text columns"),
    ],
)
def test_bad_pairs(tmp_path, columns, where, message):
    path = write(tmp_path / "p.csv", pairs_text("csv"))
    with pytest.raises(UserError, match=message):
        load_pairs([path], columns, where)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n  two words \nlast", ["one", "two words", "last"]),
        ("train.1.en.gz", "A dog, a cat.\nB\n", ["A dog, a cat.", "B"]),
        ("captions.token.txt", "1.jpg#0\tA dog runs.\n1.jpg#1\tA cat naps.\n", ["A dog runs.", "A cat naps."]),
        ("a.csv", "text,category\nwhere is it?,lost_card\nhi there,other\n", ["where is it?", "hi there"]),
        ("a.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t12\t7\ta b\tc d\n", ["a b", "c d"]),
        (
            "a.jsonl",
            '{"id": "x1", "t": "a b", "more": ["c d", "e"], "n": {"in": "f g", "k": 3}}\n',
            ["a b", "c d", "e", "f g"],
        ),
        ("a.json", '{"captions": [{"id": 1, "caption": "a b"}, {"id": 2, "caption": "c d"}]}', ["a b", "c d"]),
    ],
)
def test_texts(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    assert load_texts([path]) == expected
    assert load_texts([path, str(path)]) == expected * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n\n", "holds no text"),
        ("a.csv", "1,2\n3,4\n", "holds no text"),
        ("a.txt", "fine\nna\u00efve\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("a.txt.gz", gzip.compress(os.urandom(9000).hex().encode())[:-900], "cannot read past line"),
    ],
)
def test_bad_texts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        load_texts([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UserError, match="--text_file: there is no file .*none.txt"):
        load_texts([tmp_path / "none.txt"])


def test_long_texts_are_read_whole(tmp_path):
    """csv's own limit is 131,072 characters a cell."""
    text = "word " * 100_000
    assert load_texts([write(tmp_path / "a.csv", f'"{text}",7\n')]) == [text]


def test_normalise():
    assert normalise("  A man's \u201chat\u201d,\tRED_one! ") == "a man s hat red one"
    assert normalise("a man 's \ufb01sh") == normalise("A MAN\u2019S fish.") == "a man s fish"
    assert normalise("?!") == ""


def test_forbidden_strings_are_dropped():
    splits = {
        "train": Dataset.from_dict({"sentence1": ["Seen."], "sentence2": ["In training."], "score": [1.0]}),
        "validation": Dataset.from_dict({"sentence1": ["A dog!"], "sentence2": ["..."], "score": [0.0]}),
        "test": Dataset.from_dict({"sentence1": ["One cat"], "sentence2": ["Two  cats."], "score": [0.5]}),
    }
    forbidden = forbidden_strings(splits)
    assert forbidden == {"a dog", "one cat", "two cats"}
    assert drop_texts(["a DOG", "seen", "!", "two cats"], forbidden) == ["seen", "!"]
    pairs = Dataset.from_dict(
        {"anchor": ["x", "a dog", "y"], "positive": ["z", "w", "one cat."], "score": [0.1, 0.2, 0.3]}
    )
    assert drop_pairs(pairs, forbidden).to_dict() == {"anchor": ["x"], "positive": ["z"], "score": [0.1]}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_half_of_a_surrogate_pair_is_named(tmp_path, suffix):
    path, row = tmp_path / f"a.{suffix}", '{"text": "a dog \\ud800 runs"}'
    good = '{"text": "a cat \\ud83d\\ude00 sits"}'
    path.write_text(f"{good}\n{row}\n" if suffix == "jsonl" else f"[{good}, {row}]", encoding="utf-8")
    with pytest.raises(UserError, match=r"row 2 has half of a surrogate pair, \\ud800; write the whole character"):
        load_texts([path])
    path.write_text(good, encoding="utf-8")
    assert load_texts([path]) == ["a cat 😀 sits"]
