"""A run whose numbers are not finite says so and ends; no good checkpoint is lost to it."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import run_clm
import run_sts
from lalm.errors import UserError
from lalm.training.divergence import check_learned, check_loss, check_norm, check_weights, root_mean_square
from tests.training.conftest import TINY_MODELS
from tests.training.sts import tiny_models as sts_tiny

pytestmark = pytest.mark.slow

TRAIN = ("--do_train", "--do_eval", "--save_steps", "1", "--warmup_steps", "0")


def spoil(folder, value: float) -> None:
    """Put a number that is not finite into the weights of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", TINY_MODELS)
def test_a_learning_rate_far_too_high_is_an_error(tiny_run, tmp_path, model_type):
    with pytest.raises(UserError, match="diverged|not finite"):
        tiny_run(*TRAIN, "--learning_rate", "1e30", "--max_steps", "6", model_type=model_type)
    assert not (tmp_path / "run" / "eval_results.json").exists()
    for path in (tmp_path / "run").rglob("model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path


@pytest.mark.parametrize(
    ("rate", "flags", "message"),
    [
        ("1e30", ("--warmup_steps", "1"), "after step 2 the root mean square of the weights is .*, and they are not"),
        ("1", (), "the loss of the trained model is .*, that of a guess among 300 tokens 5.7"),
    ],
)
def test_a_diverged_run_whose_numbers_stay_finite(tiny_run, tmp_path, rate, flags, message):
    with pytest.raises(UserError, match=message):
        tiny_run(*TRAIN, "--learning_rate", rate, "--max_steps", "2", *flags, model_type="lalm_gla")
    assert not (tmp_path / "run" / "eval_results.json").exists()


@pytest.mark.parametrize(
    ("loss", "losses", "diverged"),
    [
        (5.9, [5.8, 5.7], False),
        (9.0, [5.7, 0.01], False),
        (14.0, [14.2, 13.6], False),
        (5.7, [], False),
        (6.4, [5.8, 6.3], True),
        (14.8, [14.2, 14.9], True),
        (6.3, [], True),
    ],
    ids=["short", "overfitted", "strange text", "nothing logged", "worse", "strange text, worse", "nothing but worse"],
)
def test_which_losses_have_diverged(loss, losses, diverged):
    history = [{"loss": value, "step": 1} for value in losses] + [{"train_loss": 5.7}]
    with pytest.raises(UserError, match="diverged") if diverged else contextlib.nullcontext() as caught:
        check_learned(loss, 300, history)
    assert (caught is not None) == diverged


def test_a_diverged_run_without_a_held_out_split(tiny_run, tmp_path):
    """The last training loss tells; the model of an earlier run stays as it was."""
    flags = ("--do_train", "--save_steps", "9", "--warmup_steps", "0", "--logging_steps", "1", "--max_steps", "3")
    tiny_run(*flags, model_type="lalm_gla")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="the loss of the trained model is .*, that of a guess among 300 tokens 5.7"):
        tiny_run(*flags, "--learning_rate", "1", "--start_over", model_type="lalm_gla")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_frozen_and_empty_weights_have_no_size():
    model = nn.ParameterList([torch.full((3,), 1e30), torch.empty(0)])
    assert root_mean_square(model) == pytest.approx(1e30)
    model[0].requires_grad_(False)
    assert root_mean_square(model) == 0
    check_weights(model, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [("--do_train",), ("--do_eval",)])
def test_a_checkpoint_with_broken_weights_is_refused(tiny_run, tmp_path, texts, flags, value):
    tiny_run("--do_train")
    spoil(tmp_path / "run", value)
    argv = ["--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "next"), "--max_steps", "1"]
    argv += ["--train_file", str(texts["train"]), "--validation_file", str(texts["validation"]), "--block_size", "24"]
    with pytest.raises(UserError, match="--model_name_or_path: .* holds NaN or infinity, in .*; take an earlier"):
        run_clm.main([*argv, *flags])
    assert not (tmp_path / "next").exists()


def test_a_loss_that_breaks_in_the_middle_keeps_the_checkpoints(tiny_run, tmp_path, monkeypatch):
    from transformers import Trainer

    step = Trainer.training_step
    monkeypatch.setattr(
        Trainer,
        "training_step",
        lambda self, *args: step(self, *args) * (torch.nan if self.state.global_step == 2 else 1),
    )
    with pytest.raises(UserError, match=r"diverged: the loss of step 3 is nan \(learning rate .*--learning_rate"):
        tiny_run(*TRAIN)
    saved = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert all(entry["loss"] > 1 for entry in saved["log_history"] if "loss" in entry)
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_weights_that_break_are_not_saved_over_good_ones(tiny_run, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    from lalm.training.callbacks import ThroughputCallback

    tiny_run("--do_train", "--save_steps", "2")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        TrainerCallback.on_step_end(self, args, state, control)
        next(model.parameters()).data.view(-1)[0] = torch.nan

    monkeypatch.setattr(ThroughputCallback, "on_step_end", on_step_end)
    with pytest.raises(UserError, match="after step 5 .* hold NaN or infinity, and are not saved"):
        tiny_run("--do_train", "--save_steps", "2", "--max_steps", "5")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_what_is_finite_passes():
    model = nn.Linear(2, 2)
    check_weights(model, 1)
    check_loss(torch.tensor(3.0), 1, 1e-3)
    check_norm(1e30, 1)
    for norm in (float("inf"), float("nan")):
        with pytest.raises(UserError, match="the gradient's norm at step 4 is"):
            check_norm(norm, 4)


@pytest.mark.parametrize("flags", [("--learning_rate", "1e30"), ("--learning_rate", "1e10", "--max_steps", "1")])
def test_a_stage_of_run_sts_that_diverges(sts_world, flags):
    with pytest.raises(UserError, match="the training has diverged"):
        sts_world.run("distill", "--warmup_steps", "0", "--start_over", *flags, output="diverged")
    assert not (sts_world.folder / "diverged" / "train_results.json").exists()
    for path in (sts_world.folder / "diverged").rglob("*.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path


def test_a_student_with_broken_weights_is_refused(sts_world):
    student = sts_tiny.student()
    next(student.parameters()).data.view(-1)[3] = torch.nan
    student.save(sts_world.path("broken student"))
    flags = ("--model_name_or_path", sts_world.path("broken student"))
    with pytest.raises(UserError, match="--model_name_or_path: .*broken student holds NaN or infinity, first in"):
        sts_world.run("relational", *flags, output="of the broken")
    assert not (sts_world.folder / "of the broken").exists()


@pytest.fixture
def collapses(monkeypatch):
    """What ends a training saves a student that gives every text one vector."""
    from lalm.training.sts.trainer import StsTrainer

    save = StsTrainer.save_model

    def save_collapsed(self, *args, **kwargs):
        if kwargs.get("_internal_call"):
            with torch.no_grad():
                for weight in self.model[0].auto_model.parameters():
                    weight.fill_(weight.ndim < 2)
        save(self, *args, **kwargs)

    monkeypatch.setattr(StsTrainer, "save_model", save_collapsed)


def test_a_student_that_has_collapsed(sts_world, collapses, capsys):
    """No correlation is defined of it: the run ends with one line, its checkpoints are as they were."""
    flags = ("--warmup_steps", "0", "--start_over", "--max_steps", "4", "--eval_steps", "2")
    with pytest.raises(UserError) as caught:
        sts_world.run("distill", *flags, output="collapsed")
    assert str(caught.value) == (
        "the training has collapsed: the trained model gives all 32 pairs of the validation (dev) split the same "
        "cosine, so that no correlation is defined; lower --learning_rate or lengthen --warmup_steps, and train again "
        "with --start_over"
    )
    folder = sts_world.folder / "collapsed"
    assert not (folder / "eval_results.json").exists()
    assert all(load_file(path / "model.safetensors") for path in folder.glob("checkpoint-*"))
    assert "undefined" in capsys.readouterr().out
    argv = ["--model_name_or_path", str(folder), "--data_dir", sts_world.path("stsb"), "--use_cpu", "true"]
    with pytest.raises(UserError, match="--model_name_or_path: the model gives all 32 pairs .*; take an earlier"):
        run_sts.main([*argv, "--output_dir", sts_world.path("score")])
