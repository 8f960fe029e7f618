"""run_sts.py end to end: the three stages from their recipes, resumed runs, and what the options change."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from lalm.errors import UserError
from lalm.training.sts import evaluation as sts_evaluation
from lalm.training.sts.data import load_stsb
from lalm.training.sts.evaluation import evaluate_split
from tests.training.sts import tiny_models as sts_tiny
from tests.training.sts.tiny_world import STEPS, assert_same_weights, losses, scores

pytestmark = pytest.mark.slow

STAGES = ("distill", "relational", "finetune")
TEXTS = ["", "a dog runs", "Собака бежит 犬が走る", *sts_tiny.sentences(5, seed=9)]
WITHOUT_LALM = """
import json, sys
sys.modules["lalm"] = None
import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
texts, out, *folders = json.loads(sys.argv[1])
models = [SentenceTransformer(folder, device="cpu", trust_remote_code=True) for folder in folders]
np.save(out, np.stack([model.encode(texts) for model in models]))
"""


@pytest.fixture(autouse=True)
def no_plots(chain, monkeypatch):
    """The runs of `chain` draw theirs; others would spend a third of their time on it."""
    monkeypatch.setattr("lalm.training.sts.run.write_loss_curve", lambda *_: None)
    monkeypatch.setattr(sts_evaluation, "scatter_plot", lambda *_: None)


def interrupted(straight: Path, target: Path, step: int) -> None:
    """Leave in `target` what a kill of the run in `straight` after its checkpoint `step` leaves behind."""
    target.mkdir()
    shutil.copy(straight / "run.json", target)
    shutil.copytree(straight / f"checkpoint-{step}", target / f"checkpoint-{step}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_model_figures_plots_and_card(chain, sts_world, stage):
    folder, results = sts_world.folder / stage, chain[stage]
    assert results["steps"] == STEPS
    assert results["stage"] == stage
    for name in ("loss_curve.png", "sts_validation.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for name in ("all", "train", "eval"):
        assert (folder / f"{name}_results.json").is_file()
    # only the recipe of the last stage asks for test
    assert ("test_pearson" in results) == (folder / "sts_test.png").is_file() == (stage == "finetune")
    assert len(losses(folder)) == STEPS
    assert not (folder / "eval").exists()


def test_a_stage_begins_where_the_one_before_ended(chain):
    for earlier, later in (STAGES[:2], STAGES[1:]):
        assert chain[later]["before_pearson"] == pytest.approx(chain[earlier]["eval_pearson"], abs=1e-5)


def test_frozen_weights_stay(chain, sts_world):
    """The recipe of the first stage trains the mixers alone."""
    state = load_file(sts_world.folder / "distill" / "model.safetensors")
    start = dict(sts_tiny.student()[0].auto_model.named_parameters())
    for name, weight in state.items():
        assert torch.equal(weight, start[name]) == (".mixer." not in name), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_model_has_the_figures_of_its_run(chain, sts_world, stage):
    folder = sts_world.folder / stage
    model = SentenceTransformer(str(folder), device="cpu")
    dev = load_stsb(sts_world.path("stsb"))["validation"]
    assert evaluate_split(model, dev)["pearson"] == pytest.approx(chain[stage]["eval_pearson"], abs=1e-6)
    expected = torch.bfloat16 if stage == "finetune" else torch.float32
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {expected}
    vectors = model.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2 if stage == "finetune" else 1e-5)
    assert model.max_seq_length == 8192


def test_the_saved_models_load_without_lalm(chain, sts_world, tmp_path):
    folders = [sts_world.path(stage) for stage in STAGES]
    out = str(tmp_path / "vectors.npy")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_LALM, json.dumps([TEXTS, out, *folders])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for folder, vectors, tolerance in zip(folders, np.load(out), (1e-6, 1e-6, 1e-2), strict=True):
        np.testing.assert_allclose(SentenceTransformer(folder, device="cpu").encode(TEXTS), vectors, atol=tolerance)


def test_the_card_tells_the_run(chain, sts_world):
    card = (sts_world.folder / "finetune" / "README.md").read_text(encoding="utf-8")
    results = chain["finetune"]
    for expected in (
        "LamModel, stage finetune",
        f"| test | 32 | {results['test_pearson']:.4f} [{results['test_pearson_low']:.4f}, ",
        "test is scored once at the end",
        "The best checkpoint is chosen on validation",
        "sts: 64 scored pairs of 64 from",
        "- nli: 64 rows of 64 from",
        "python run_sts.py",
        "lam_finetune.yaml",
        "mixture: sts 0.35, nli 0.2, qa 0.15, paraphrase 0.2, triplet 0.1",
        "penalties: 0.01 x orthogonal, 0.05 x retention",
        f"start: {sts_world.folder / 'relational'}",
        f"steps: {STEPS}",
        "hardware: ",
        "trust_remote_code=True",
        "saved as bfloat16",
    ):
        assert expected in card, expected
    card = (sts_world.folder / "relational" / "README.md").read_text(encoding="utf-8")
    assert "loss: 0.5 x embedding, 0.5 x layers, 0.5 x similarity, 2.5 x margin" in card
    assert f"teacher: `{sts_world.folder / 'teacher'}`" in card
    assert "| test |" not in card
    card = (sts_world.folder / "distill" / "README.md").read_text(encoding="utf-8")
    assert "made linear" in card
    assert "texts.txt: 160 texts of 160" in card
    assert sts_tiny.sentences(1, 4)[0] not in card, "training texts are not ours to publish"


# of two epochs; the checkpoint lies within the second one
RESUMED = {
    "distill": (),
    "distill, cached vectors": ("--layer_weight", "0", "--max_batch_tokens", "150", "--curriculum", "grow_p2"),
    "relational": ("--margin_weight", "1"),
    "finetune": ("--gradient_accumulation_steps", "2", "--mine_negatives", "1", "--mine_range_min", "0"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_a_straight_one(chain, sts_world, name):
    stage = name.partition(",")[0]
    flags = (*RESUMED[name], "--num_train_epochs", "2", "--max_steps", "-1", "--max_train_samples", "40")
    flags = (*flags, "--eval_steps", "2", "--early_stopping_patience", "9", "--save_total_limit", "99")
    straight = sts_world.run(stage, *flags, output=f"straight {name}")
    folder, target = sts_world.folder / f"straight {name}", sts_world.folder / f"resumed {name}"
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert steps[-1] == straight["steps"]
    interrupted(folder, target, next(step for step in steps if step > straight["steps"] / 2))
    resumed = sts_world.run(stage, *flags, output=target.name)
    assert losses(target) == losses(folder)
    assert scores(target) == scores(folder)
    assert resumed["steps"] == straight["steps"]
    assert resumed["eval_pearson"] == straight["eval_pearson"]
    assert_same_weights(folder, target)


def test_other_texts_are_refused_and_other_arguments_told(chain, sts_world, caplog):
    target, texts = sts_world.folder / "distill, changed", sts_world.folder / "texts.txt"
    interrupted(sts_world.folder / "distill", target, 4)
    before = texts.read_text(encoding="utf-8")
    texts.write_text(before.replace("\n", " again\n", 1), encoding="utf-8")
    try:
        with pytest.raises(UserError, match="training text of another content"):
            sts_world.run("distill", output=target.name)
    finally:
        texts.write_text(before, encoding="utf-8")
    sts_world.run("distill", "--embedding_weight", "2", output=target.name)
    assert "the resumed run began with other arguments: embedding_weight 1.0 -> 2.0\n" in caplog.text


def test_a_finished_stage_without_an_optimizer_is_not_trained_again(sts_world, caplog):
    flags = ("--save_only_model", "--max_steps", "4", "--eval_steps", "2", "--early_stopping_patience", "1")
    first = sts_world.run("distill", *flags, output="only model")
    caplog.clear()
    assert sts_world.run("distill", *flags, output="only model") == first
    assert "nothing is left to train" in caplog.text


def test_a_teacher_of_another_width_is_met_in_its_space(chain, sts_world):
    """Maps to its width are learnt; a resumed run goes on with them."""
    wide = sts_world.folder / "wide"
    sts_tiny.teacher(width=48, layers=3).save(str(wide))
    flags = ("--teacher", str(wide), "--layer_map", "last", "--projection_learning_rate", "1e-2")
    sts_world.run("relational", *flags, output="of wide")
    folder, target = sts_world.folder / "of wide", sts_world.folder / "of wide, resumed"
    interrupted(folder, target, 4)
    sts_world.run("relational", *flags, output=target.name)
    maps = [load_file(path / f"checkpoint-{STEPS}" / "loss.safetensors") for path in (folder, target)]
    assert {weight.shape[0] for weight in maps[0].values()} == {48}
    for name, weight in maps[0].items():
        assert torch.equal(weight, maps[1][name]), name
    before = load_file(folder / "checkpoint-4" / "loss.safetensors")
    assert any(not torch.equal(weight, before[name]) for name, weight in maps[0].items())
    assert losses(folder) == losses(target)
    assert_same_weights(folder, target)
    assert SentenceTransformer(str(folder), device="cpu").get_embedding_dimension() == 32


def test_a_finished_run_is_not_trained_again(chain, sts_world, caplog):
    folder = sts_world.folder / "finetune"
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    times = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")}
    again = sts_world.run("finetune", "--save_dtype", "bfloat16", output="finetune")
    assert "nothing is left to train" in caplog.text
    assert again == chain["finetune"]
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


STILL = ("--learning_rate", "0", "--early_stopping_patience", "2", "--eval_steps", "1", "--save_total_limit", "9")


def test_it_stops_early_and_stays_stopped(chain, sts_world, caplog):
    """Without learning the first evaluation is the best one, and the second after it without a better is the last."""
    results = sts_world.run("finetune", *STILL, output="still")
    assert (results["stopped_early"], results["steps"], results["best_step"]) == (True, 3, 1)
    folder = sts_world.folder / "still"
    # a kill between the last checkpoint and the results
    (folder / "train_results.json").unlink()
    again = sts_world.run("finetune", *STILL, output="still")
    assert "nothing is left to train" in caplog.text
    assert (again["stopped_early"], again["steps"]) == (True, 3)
    # the count of the evaluations without a better one goes on after a kill
    interrupted(folder, sts_world.folder / "still, resumed", 2)
    resumed = sts_world.run("finetune", *STILL, output="still, resumed")
    assert (resumed["stopped_early"], resumed["steps"]) == (True, 3)


def test_starting_over_forgets_the_earlier_run(chain, sts_world):
    sts_world.run("finetune", *STILL, "--do_test", output="over")
    patient = ("--max_steps", "2", "--early_stopping_patience", "0", "--do_test", "false")
    results = sts_world.run("finetune", *patient, "--start_over", output="over")
    folder = sts_world.folder / "over"
    assert results["steps"] == 2
    assert "test_pearson" not in json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    assert not (folder / "checkpoint-3").exists()


class Scripted(BaseEvaluator):
    """A dev score for each step; the fourth step has the best one."""

    def __call__(self, model, output_path=None, epoch=-1, steps=-1) -> dict[str, float]:
        return {"sts-dev_pearson_cosine": {4: 0.9, 6: 0.5}.get(steps, 0.1)}


def test_the_best_checkpoint_is_kept(chain, sts_world, monkeypatch):
    monkeypatch.setattr("lalm.training.sts.run.dev_evaluator", lambda *_: Scripted())
    flags = ("--learning_rate", "1e-3", "--eval_steps", "2", "--save_total_limit", "2")
    results = sts_world.run("finetune", *flags, output="best")
    folder = sts_world.folder / "best"
    assert (results["best_step"], results["best_pearson"]) == (4, 0.9)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert_same_weights(folder, folder / "checkpoint-4")
    # also where the run was moved before it is called again, or is resumed
    moved = folder.rename(folder.with_name("best, moved"))
    (moved / "model.safetensors").unlink()
    assert sts_world.run("finetune", *flags, output=moved.name) == results
    assert_same_weights(moved, moved / "checkpoint-4")
    (moved / "model.safetensors").unlink()
    shutil.rmtree(moved / "checkpoint-8")
    assert sts_world.run("finetune", *flags, output=moved.name)["steps"] == STEPS
    assert_same_weights(moved, moved / "checkpoint-4")
    assert (moved / "checkpoint-8").is_dir()


def test_cached_and_live_vectors_of_a_teacher_teach_the_same(chain, sts_world):
    found = {}
    flags = ("--layer_weight", "0", "--similarity_weight", "1", "--teacher_precision")
    for kind, precision in (("live", "float32"), ("cached", "float32"), ("cached", "float16")):
        output = f"{kind} {precision}"
        sts_world.run("distill", *flags, precision, "--teacher_vectors", kind, output=output)
        found[output] = losses(sts_world.folder / output)
    assert found["live float32"] == pytest.approx(found["cached float32"], rel=1e-4)
    assert found["live float32"] == pytest.approx(found["cached float16"], rel=1e-2)


def test_distillation_brings_the_student_nearer(sts_world):
    flags = ("--max_steps", "40", "--learning_rate", "5e-3", "--eval_steps", "20", "--logging_steps", "10")
    # means of ten steps each: that of the first step alone is far from typical
    sts_world.run("distill", *flags, "--logging_first_step", "false", output="longer")
    found = losses(sts_world.folder / "longer")
    assert found[-1] < 0.85 * found[0]


def test_short_vectors_are_trained_along(chain, sts_world):
    sts_world.run("finetune", "--matryoshka_dims", "32", "16", "8", output="matryoshka")
    assert losses(sts_world.folder / "matryoshka") != losses(sts_world.folder / "finetune")
    short = SentenceTransformer(sts_world.path("matryoshka"), device="cpu", truncate_dim=8)
    assert short.encode(TEXTS).shape == (len(TEXTS), 8)


def test_texts_longer_than_the_teachers_positions(sts_world):
    """Its vectors are those of the beginning; the student reads all."""
    texts = [[" ".join(sts_tiny.WORDS * 3), text] for text in sts_tiny.sentences(16, 3)]
    flags = ("--train_file", sts_world.write("long.tsv", texts), "--max_seq_length", "128", "--layer_weight", "0")
    assert sts_world.run("distill", *flags, "--max_steps", "2", "--eval_steps", "2", output="long")["steps"] == 2


def test_a_static_teacher_and_a_student_that_is_not_ours(chain, sts_world):
    words = sts_tiny.tokenizer()._tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=24)], device="cpu")
    static.save(sts_world.path("static"))
    flags = ("--teacher", sts_world.path("static"), "--max_steps", "2", "--eval_steps", "2")
    results = sts_world.run("relational", *flags, "--layer_weight", "0", output="of static")
    assert results["steps"] == 2
    with pytest.raises(UserError, match="it has no layers; set --layer_weight 0 and --teacher_vectors cached"):
        sts_world.run("relational", *flags, output="of static, layers")
    with pytest.raises(UserError, match="no encoder that a student can be made of; give --model_name_or_path"):
        sts_world.run("distill", *flags, output="made of static")
    with pytest.raises(UserError, match="is no encoder of transformers"):
        sts_world.run("finetune", "--model_name_or_path", sts_world.path("static"), output="on static")
    bert = ("--model_name_or_path", sts_world.path("teacher"), "--max_steps", "2", "--eval_steps", "2")
    assert sts_world.run("finetune", *bert, output="bert")["steps"] == 2


def test_documents_are_found_while_the_vectors_of_texts_stay(chain, sts_world):
    body = ". ".join(sts_tiny.sentences(120, 8, longest=14)).replace(" a ", " the ")
    articles = [json.dumps({"title": title, "text": f"{title} {body}."}) for title in ("man", "dog", "held out")]
    sts_world.write("articles.jsonl", [[line] for line in articles])
    flags = ["--document_file", sts_world.path("articles.jsonl"), "--train_file", sts_world.path("texts.txt")]
    flags += ["--held_out_file", sts_world.write("titles.txt", [["Held out"]]), "--max_seq_length", "64"]
    flags += ["--mixture", "document=1", "text=1", "--per_device_train_batch_size", "2"]
    with pytest.raises(UserError, match="give --embedding_weight"):
        sts_world.run("finetune", *flags, output="documents")
    assert sts_world.run("finetune", *flags, "--embedding_weight", "1", output="documents")["steps"] == STEPS
    history = json.loads((sts_world.folder / "documents/trainer_state.json").read_text("utf-8"))["log_history"]
    # every step is a batch of one kind: the term of the other is 0, or absent before its first batch, and never NaN
    logged = [[entry.get(name, 0) for name in ("document", "embedding")] for entry in history if "loss" in entry]
    assert all((one > 0) != (other > 0) and one + other > 0 for one, other in logged)
    assert {one > 0 for one, _ in logged} == {True, False}
    card = (sts_world.folder / "documents/README.md").read_text("utf-8")
    assert "2 articles" in card
    with pytest.raises(UserError, match="give --document_file"):
        sts_world.run("finetune", "--mixture", "document=1", output="no documents")


def test_negatives_are_mined(chain, sts_world, caplog):
    flags = ("--mixture", "paraphrase=1", "--mine_negatives", "2", "--mine_range_min", "0", "--mine_margin", "0")
    sts_world.run("finetune", *flags, output="mined")
    assert "triplets mined from 96 pairs" in caplog.text
    assert "--nli_file is not used: --mixture has no share for it" in caplog.text


def test_augmented_rows_in_an_order_of_difficulty(chain, sts_world, caplog):
    flags = ("--augmentation", "word_swap", "word_deletion", "--augmentation_rate", "0.2")
    flags += ("--row_order", "easy_to_hard")
    for stage in ("relational", "finetune"):
        results = sts_world.run(stage, *flags, output=f"augmented {stage}")
        assert results["steps"] == STEPS
        assert losses(sts_world.folder / f"augmented {stage}") != losses(sts_world.folder / stage)
    card = (sts_world.folder / "augmented finetune" / "README.md").read_text(encoding="utf-8")
    assert "altered copies by word_swap, word_deletion, 0.2 of the words" in card


def distance(one: Path, other: Path) -> float:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return sum((ours[name].float() - theirs[name].float()).square().sum().item() for name in ours)


def test_retention_holds_the_weights_near_the_start(chain, sts_world):
    far = {}
    for weight in ("0", "1e3"):
        sts_world.run("finetune", "--retention_weight", weight, "--learning_rate", "1e-3", output=f"kept {weight}")
        far[weight] = distance(sts_world.folder / f"kept {weight}", sts_world.folder / "relational")
    assert 0 < far["1e3"] < 0.5 * far["0"]


def test_the_orthogonal_regulariser_acts_on_q_k_v(chain, sts_world):
    flags = ("--orthogonal_weight", "1", "--learning_rate", "1e-2", "--load_best_model_at_end", "false")
    sts_world.run("relational", *flags, output="orthogonal")

    def excess(folder: str) -> float:
        weights = load_file(sts_world.folder / folder / "model.safetensors")
        squares = [w @ w.T - torch.eye(len(w)) for name, w in weights.items() if name.endswith("k_proj.weight")]
        return sum(square.square().sum().item() for square in squares)

    assert excess("orthogonal") < 0.7 * excess("distill")


@pytest.mark.parametrize("flags", [("--bf16",), ("--eval_strategy", "no"), ("--eval_strategy", "epoch")])
def test_other_ways_to_train(chain, sts_world, flags):
    results = sts_world.run("distill", *flags, output="other" + "".join(flags))
    assert results["steps"] == STEPS
    assert np.isfinite(results["eval_pearson"])
