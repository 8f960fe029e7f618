"""STS12 to STS16 and SICK-R from SentEval's folders: read as a whole, scored, and put into the card."""

import csv
import json

import pytest
from huggingface_hub import ModelCard

import run_sts
from lalm.errors import UserError
from lalm.training.sts import tasks
from lalm.training.sts.tasks import TASKS, load_tasks

SICK = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def senteval(tmp_path):
    write(tmp_path / "STS/STS12-en-test/STS.input.MSRpar.txt", "a dog\ta cat", "a man\ta bird")
    write(tmp_path / "STS/STS12-en-test/STS.gs.MSRpar.txt", "1.5", "5")
    write(tmp_path / "STS/STS12-en-test/STS.input.SMT.txt", "one \ttwo\tthree", "not\tscored", "four\tfive")
    write(tmp_path / "STS/STS12-en-test/STS.gs.SMT.txt", "0", "", "2.5")
    write(tmp_path / "SICK/SICK_test_annotated.txt", SICK, "6\ta b\tc d\t3.5\tNEUTRAL", "7\te\tf\t1\tNEUTRAL")
    return tmp_path


def test_senteval_folders(senteval):
    found = load_tasks(["SICK-R", "STS12"], str(senteval))
    assert list(found) == ["SICK-R", "STS12"]
    assert found["STS12"].to_dict() == {
        "sentence1": ["a dog", "a man", "one", "four"],
        "sentence2": ["a cat", "a bird", "two", "five"],
        "score": [0.3, 1.0, 0.0, 0.5],
    }
    assert found["SICK-R"]["score"] == [0.7, 0.2]
    assert load_tasks(["STS12"], str(senteval / "STS"))["STS12"].to_dict() == found["STS12"].to_dict()


def test_what_is_wrong_is_named(senteval, monkeypatch):
    def fails(name, folder=senteval):
        with pytest.raises(UserError) as caught:
            load_tasks([name], str(folder))
        return str(caught.value)

    assert fails("STS12", senteval / "x").endswith("x is no folder")
    assert "holds no folder STS13-en-test" in fails("STS13")
    (senteval / "STS/STS14-en-test").mkdir()
    assert "holds no file STS.input.*.txt" in fails("STS14")
    folder = senteval / "STS/STS12-en-test"
    for lines, said in (
        (("9", "5"), "line 1: 9 is no score from 0 to 5"),
        (("x", "5"), "line 1: 'x' is no score"),
        (("1",), "STS.input.MSRpar.txt has 2 lines, STS.gs.MSRpar.txt 1"),
    ):
        write(folder / "STS.gs.MSRpar.txt", *lines)
        assert said in fails("STS12")
    (folder / "STS.gs.MSRpar.txt").unlink()
    assert "there is no file" in fails("STS12")
    write(senteval / "SICK/SICK_test_annotated.txt", SICK, "6\ta b")
    assert "line 2 holds no two sentences" in fails("SICK-R")
    write(senteval / "SICK/SICK_test_annotated.txt", SICK)
    assert "no scored pair of SICK-R" in fails("SICK-R")
    monkeypatch.setattr(tasks, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(
        UserError, match=r"mteb/sickr-sts cannot be loaded \(no network\); name a folder .*--tasks_dir"
    ):
        load_tasks(["SICK-R"])


@pytest.mark.slow
def test_tasks_are_scored_beside_the_splits(chain, sts_world, tmp_path, capsys):
    with open(sts_world.folder / "stsb" / "stsb-en-dev.csv", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    for name in ("STS12", "STS16"):
        write(tmp_path / f"{name}-en-test/STS.input.a.txt", *("\t".join(row[:2]) for row in rows))
        write(tmp_path / f"{name}-en-test/STS.gs.a.txt", *(row[2] for row in rows))
    flags = ["--data_dir", sts_world.path("stsb"), "--tasks", "STS12", "STS16", "--tasks_dir", str(tmp_path)]
    model = ["--eval_only", "--model_name_or_path", sts_world.path("distill")]
    results = run_sts.main([*model, *flags, "--output_dir", str(tmp_path / "out")])
    assert results["STS12_pearson"] == results["eval_pearson"] == results["tasks_pearson"]
    shown = capsys.readouterr().out
    assert f"mean of 2 tasks: pearson {results['eval_pearson']:.4f}, spearman" in shown
    assert json.loads((tmp_path / "out/STS16_results.json").read_text())["STS16_n"] == len(rows)
    sts_world.run("relational", *flags, "--max_steps", "1", "--eval_steps", "1", output="with tasks")
    card = ModelCard.load(sts_world.folder / "with tasks" / "README.md")
    assert "| STS12 | 32 |" in card.text
    assert tasks.CAVEAT in card.text
    assert TASKS["STS16"] in {result.dataset_type for result in card.data.eval_results}
