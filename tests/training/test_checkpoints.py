"""Output folders: what is resumed, what is refused, and that no save damages what was there."""

import errno
import shutil

import pytest
import safetensors.torch

from lalm.training.checkpoint_files import check_checkpoint
from lalm.training.errors import UserError, is_disk_full
from lalm.training.run_trainer import STAGING
from lalm.training.tracking import check_trackers

TRAIN = ("--do_train", "--save_steps", "2")


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def checkpoint(tiny_run, tmp_path):
    tiny_run(*TRAIN)
    return tmp_path / "run" / "checkpoint-4"


def test_damage_to_any_file_of_a_checkpoint_is_seen(checkpoint, tmp_path):
    check_checkpoint(checkpoint)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt", "rng_state.pth"):
        for harm in ("missing", "cut"):
            damaged = shutil.copytree(checkpoint, tmp_path / f"{name}-{harm}")
            if harm == "missing":
                (damaged / name).unlink()
            else:
                cut(damaged / name)
            with pytest.raises((ValueError, OSError)):
                check_checkpoint(damaged)


def test_a_damaged_checkpoint_is_passed_over(tiny_run, checkpoint, caplog):
    cut(checkpoint / "optimizer.pt")
    caplog.clear()
    results = tiny_run(*TRAIN)
    assert f"{checkpoint} is incomplete (optimizer.pt is missing or cut off)" in caplog.text
    assert f"resuming from {checkpoint.with_name('checkpoint-2')}" in caplog.text
    assert results["steps"] == 4
    check_checkpoint(checkpoint)  # written again


def test_a_finished_run_is_not_trained_again(tiny_run, tmp_path):
    first = tiny_run(*TRAIN)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    second = tiny_run(*TRAIN)
    assert second["steps"] == 4
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert second["train_seconds"] == first["train_seconds"]
    assert second["final_loss"] == first["final_loss"]


def test_another_run_in_the_folder_is_refused_and_start_over_replaces_it(tiny_run, tmp_path):
    tiny_run(*TRAIN)
    with pytest.raises(UserError, match="holds a run with another block_size, seed; .*--start_over"):
        tiny_run(*TRAIN, "--block_size", "16", "--seed", "8")
    before = (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="there is no file"):
        tiny_run(*TRAIN, "--start_over", "--train_file", "missing.txt")
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes() == before
    results = tiny_run("--do_train", "--start_over", "--seed", "8", "--max_steps", "2")
    assert results["steps"] == 2
    assert not (tmp_path / "run" / "checkpoint-4").exists()


@pytest.mark.parametrize("flags", [(), ("--start_over",)])
def test_a_foreign_folder_is_never_touched(tiny_run, tmp_path, flags):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty and holds no run of run_clm.py"):
        tiny_run(*TRAIN, *flags)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_resume_that_is_asked_for_must_be_possible(tiny_run, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        tiny_run(*TRAIN, "--resume_from_checkpoint", "true")
    with pytest.raises(UserError, match="is no complete checkpoint"):
        tiny_run(*TRAIN, "--resume_from_checkpoint", str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_earlier_model_whole(tiny_run, tmp_path, monkeypatch):
    """The disk fills up while the second run writes its final weights; the first run's must survive."""
    tiny_run("--do_train", "--save_strategy", "no")
    model = tmp_path / "run" / "model.safetensors"
    before = model.read_bytes()

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(safetensors.SafetensorError) as caught:
        tiny_run("--do_train", "--save_strategy", "no", "--start_over", "--seed", "9")
    assert is_disk_full(caught.value)
    assert model.read_bytes() == before
    assert not (tmp_path / "run" / STAGING).exists()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing file data/0"),
            True,
        ),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("hidden_size"), False),
    ],
)
def test_full_disk_is_told_from_other_errors(error, full):
    assert is_disk_full(error) == full
    wrapper = KeyError("wrapper")
    wrapper.__cause__ = error
    assert is_disk_full(wrapper) == full


def test_resuming_uses_the_tokenizer_of_the_checkpoint(tiny_run, checkpoint, caplog):
    shutil.rmtree(checkpoint)
    caplog.clear()
    tiny_run(*TRAIN)
    assert "resuming" in caplog.text
    assert "trained a byte-level BPE tokenizer" not in caplog.text


def test_missing_tracker(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to wandb needs a package .*: pip install wandb"):
        check_trackers(["wandb"])
    with pytest.raises(UserError, match=r"no tracker 'trackioo' \(did you mean 'trackio'\?\)"):
        check_trackers(["trackioo"])
