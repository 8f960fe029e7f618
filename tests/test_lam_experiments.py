"""What the experiments with LAM start from: recipes, variations, and articles that no training sees."""

import gzip
import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from experiments import lam_documents
from experiments.lam_ablations import FULL, LONG, LONG_FLAGS, SHORT, VARIATIONS, table
from experiments.long_text_retrieval import SPLITS, read_articles
from lalm import LamConfig
from lalm.errors import UserError
from lalm.training.recipe import parse_overrides
from lalm.training.sts.arguments import parse_sts_arguments
from tests.training.sts import tiny_models as sts_tiny


def test_every_variation_can_be_made_and_every_recipe_read():
    for overrides in VARIATIONS.values():
        fields = parse_overrides(overrides, "--config_overrides") if overrides else {}
        assert {name: getattr(LamConfig(**fields), name) for name in fields} == fields
    assert parse_sts_arguments([SHORT])[2].stage == "distill"
    start = ["--model_name_or_path", "runs/start"]
    model, data, training = parse_sts_arguments([LONG, *start, *LONG_FLAGS])
    assert model.freeze == ["embed_tokens"]
    assert training.max_steps == 100
    assert "document" in data.shares


def test_test_and_validation_articles_are_apart_and_held_out():
    test, validation = (
        set((SPLITS / f"{name}.txt").read_text("utf-8").splitlines()) for name in ("test", "validation")
    )
    assert (len(test), len(validation), len(test & validation)) == (600, 150, 0)
    held_out = parse_sts_arguments([LONG])[1].held_out_file
    assert [name.rpartition("/")[2] for name in held_out] == ["test.txt", "validation.txt"]


def test_a_split_takes_its_articles_with_the_same_sentences(tmp_path):
    titles = (SPLITS / "validation.txt").read_text("utf-8").splitlines()[:2]
    body = " ".join(f"Sentence {n} has some ten words in it, all of them plain." for n in range(120))
    rows = [{"title": title, "text": f"{title}\n{body}"} for title in (titles[0], "Another article", titles[1])]
    path = tmp_path / "articles.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.write("\n".join(json.dumps(row) for row in rows))
    every, some = read_articles(path), read_articles(path, "validation")
    assert [row["title"] for row in every] == [row["title"] for row in rows]
    assert some == [every[0], every[2]]
    assert every[1]["body"] == body
    assert len({row["sentence"] for row in every}) > 1  # drawn for each
    with pytest.raises(UserError, match="no article of 1000 words of the split test"):
        read_articles(path, "test")


def test_two_runs_and_the_average_with_the_start_is_evaluated(tmp_path, monkeypatch):
    names, calls = ("start", "out/first", "out/second"), []
    for value, folder in zip((1.0, 7.0, 3.0), (tmp_path / name for name in names), strict=True):
        model = SentenceTransformer(modules=[StaticEmbedding(sts_tiny.tokenizer().backend_tokenizer, embedding_dim=4)])
        torch.nn.init.constant_(model[0].embedding.weight, value)
        model.save(str(folder))
    (tmp_path / names[1] / "eval_results.json").write_text("{}", encoding="utf-8")  # as of a run that is complete
    monkeypatch.setattr(lam_documents.run_sts, "main", calls.append)
    flags = ["--start", str(tmp_path / "start"), "--output_dir", str(tmp_path / "out"), "--share", "0.25"]
    monkeypatch.setattr("sys.argv", ["lam_documents", *flags])
    lam_documents.main()
    second, (model_flag, averaged, *_) = calls
    _, data, training = parse_sts_arguments(second)
    assert (training.seed, training.max_steps, data.document_tokens) == (2, 800, 4096)
    assert second[second.index("--model_name_or_path") + 1] == str(tmp_path / "out/first")
    assert model_flag == "--model_name_or_path"
    assert "--eval_only" in calls[1]
    assert SentenceTransformer(averaged, device="cpu")[0].embedding.weight.float().unique().tolist() == [1.5]


def test_the_table_of_variations_shows_means_and_paired_differences():
    figures = {
        FULL: [{"a": 0.1, "b": 0.5}, {"a": 0.3, "b": 0.7}],
        "less": [{"a": 0.2, "b": 0.4}, {"a": 0.2, "b": 0.5}],
    }
    lines = table(figures, {"a": "first", "b": "second"}).splitlines()
    assert lines[0].endswith("| first | second | difference in second, seed by seed |")
    assert lines[2] == "| full | 0.2000 | 0.6000 |  |"
    assert lines[3] == "| less | 0.2000 | 0.4500 | -0.1500 ± 0.6353 |"
