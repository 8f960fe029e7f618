"""experiments.build_lam_data: every file is what the recipe reads, from a stand-in with the columns of the Hub."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from experiments import build_lam_data
from lalm.errors import UserError
from lalm.training.sts.data import load_stsb, load_texts

RECIPE = Path(build_lam_data.__file__).parents[1] / "recipes/lam_minilm_l6.yaml"

WORDS = "A text with words"
SETS = {"set": [[f"picture {index} caption {number}" for number in range(5)] for index in range(3)]}
PAIRS = {
    "sentence1": ["one sentence\there", "a second"],
    "sentence2": ["another one", "and, a comma"],
    "label": [1, 0],
    "idx": [4, 5],
    "id": [1, 2],
}
NLI = {"premise": ["a premise here", "dropped in snli"], "hypothesis": ["so it is", "or not"], "label": [0, -1]}
HUB = {
    "sentence-transformers/stsb": {**PAIRS, "score": [0.76, 1.0]},
    "embedding-data/flickr30k_captions_quintets": SETS,
    "embedding-data/coco_captions_quintets": SETS,
    "jxie/flickr8k": {"image": [b"0"], **{f"caption_{number}": [f"caption {number}"] for number in range(5)}},
    "sentence-transformers/quora-duplicates/pair": {"anchor": ["who is it"], "positive": ["who might it be"]},
    "nyu-mll/glue/mrpc": PAIRS,
    "fancyzhx/ag_news": {"text": ['News, with "quotes" and a comma'], "label": [2]},
    "stanfordnlp/snli": NLI,
    "nyu-mll/multi_nli": NLI,
    "google-research-datasets/wiki_split": {
        "complex_sentence": ["all of it"],
        "simple_sentence_1": ["a half ."],
        "simple_sentence_2": ["the rest ."],
    },
    "google-research-datasets/paws/labeled_final": PAIRS,
    "gfissore/arxiv-abstracts-2021": {"id": ["1"], "title": ["On a title"], "abstract": ["It is\nproved."]},
    "wikimedia/wikipedia/20231101.en": {
        "id": ["1", "2"],
        "title": ["A long one", "A short one"],
        "text": [WORDS * 60, WORDS],
    },
}


@pytest.fixture
def hub(monkeypatch):
    def load(*name, split, streaming):
        assert streaming
        return Dataset.from_dict(HUB["/".join(name)]).to_iterable_dataset()

    monkeypatch.setattr(build_lam_data, "load_dataset", load)


def test_the_recipe_reads_every_file(hub, tmp_path, capsys):
    build_lam_data.main([str(tmp_path)])
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    expected = {
        "stsb-en-train.csv": ["one sentence here", "another one", "a second", "and, a comma"],
        "train.1.en.gz": ["picture 0 caption 0", "picture 1 caption 0", "picture 2 caption 0"],
        "train.3.en.gz": ["picture 0 caption 2", "picture 1 caption 2", "picture 2 caption 2"],
        "Flickr8k.token.txt.gz": [f"caption {number}" for number in range(5)] * 3,
        "captions_val2017.json.gz": [text for captions in SETS["set"] for text in captions],
        "quora_duplicates.train.tsv.gz": ["who is it", "who might it be"],
        "msr-para-train.tsv.gz": ["one sentence here", "another one", "a second", "and, a comma"],
        "test.csv.gz": ['News, with "quotes" and a comma'],
        "snli_subset.train.tsv.gz": ["a premise here", "so it is"],
        "mnli_subset.train.jsonl.gz": ["a premise here", "so it is", "dropped in snli", "or not"],
        "tune.tsv.gz": ["all of it", "a half . <::::> the rest ."],
        "dev.tsv.gz": ["one sentence here", "another one", "a second", "and, a comma"],
        "arxiv_title_abstract.jsonl.gz": ["On a title", "It is\nproved."],
        "articles.jsonl.gz": ["A long one", WORDS * 60],
    }
    for name in recipe["train_file"]:
        texts = load_texts([tmp_path / name.removeprefix("data/")])
        wanted = expected.get(name.split("/")[-1])
        assert wanted is None or texts == wanted, name
    splits = load_stsb(str(tmp_path / "stsb"))
    assert splits["test"]["score"] == [0.76, 1.0], "the Hub's scores are 0 to 1, the file's 0 to 5"
    capsys.readouterr()
    build_lam_data.main([str(tmp_path)])
    assert capsys.readouterr().out.count("is there") == len(build_lam_data.PARTS)


def test_a_failed_file_leaves_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(HUB, "fancyzhx/ag_news", {"headline": ["News"], "label": [2]})
    with pytest.raises(UserError, match="fancyzhx/ag_news: it has no column 'text'"):
        build_lam_data.main([str(tmp_path), "--only", "ag-news"])
    assert list((tmp_path / "ag-news").iterdir()) == []
    with pytest.raises(UserError, match="--only: there is no agnews; there are ag-news, arxiv"):
        build_lam_data.main([str(tmp_path), "--only", "agnews"])


def test_without_a_network_one_line_says_so(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(build_lam_data, "load_dataset", fail)
    with pytest.raises(UserError, match="sentence-transformers/stsb: it cannot be read from the Hub: no network"):
        build_lam_data.main([str(tmp_path)])
