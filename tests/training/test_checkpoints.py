"""Output folders: what is resumed, what is refused, and that no save damages what was there."""

import errno
import json
import os
import shutil

import pytest
import safetensors.torch

from lalm.errors import UserError, is_disk_full
from lalm.modeling.saving import UNFINISHED
from lalm.training.checkpoint_files import CHECKSUMS, check_checkpoint, write_checksums
from lalm.training.clm.trainer import ClmTrainer
from lalm.training.tracking import check_trackers

pytestmark = pytest.mark.slow

TRAIN = ("--do_train", "--save_steps", "2")


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def pierce(path):
    """A hole, as a crash leaves it where the file was not yet on the disk."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 32] = bytes(32)
    path.write_bytes(bytes(content))


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


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "config.json", "tokenizer.json", "rng_state.pth"]
)
def test_a_hole_in_any_file_means_the_checkpoint_before(tiny_run, checkpoint, caplog, name):
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    pierce(checkpoint / name)
    caplog.clear()
    tiny_run(*TRAIN)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [name in line and str(checkpoint) in line for line in warnings] == [True]
    assert f"resuming from {checkpoint.with_name('checkpoint-2')}" in caplog.text
    assert (checkpoint / "model.safetensors").read_bytes() == whole["model.safetensors"]


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "config.json", "tokenizer.json"])
def test_holes_are_seen_in_checkpoints_without_checksums_too(checkpoint, name):
    """Those of an older version, or copied without: as far as the format tells."""
    (checkpoint / CHECKSUMS).unlink()
    check_checkpoint(checkpoint)
    pierce(checkpoint / name)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        check_checkpoint(checkpoint)


def test_a_file_that_has_gone_is_named(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        check_checkpoint(checkpoint)


FSDP = {
    "whole": ["pytorch_model_fsdp.bin", "optimizer.bin"],
    "sharded": [
        *("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/0.distcp"),
        *("optimizer_0/.metadata", "optimizer_0/0.distcp"),
    ],
}


@pytest.mark.parametrize("names", FSDP.values(), ids=FSDP)
def test_checkpoints_of_fsdp_are_complete(checkpoint, names):
    """The names that accelerate gives to whole and to sharded state dicts; each of the files is needed."""
    (checkpoint / CHECKSUMS).unlink()
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    for name in names:
        with pytest.raises((ValueError, OSError)):
            check_checkpoint(checkpoint)
        (checkpoint / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint / "scheduler.pt", checkpoint / name)
    check_checkpoint(checkpoint)
    write_checksums(checkpoint)
    check_checkpoint(checkpoint)
    os.truncate(checkpoint / names[-1], 10)
    with pytest.raises(ValueError, match=r"cut off|damaged"):
        check_checkpoint(checkpoint)


def test_another_training_text_is_refused(tiny_run, checkpoint, texts):
    """Also one that comes of what is held out for validation."""
    text = texts["train"].read_text(encoding="utf-8")
    texts["train"].write_text(text.replace("attention", "convolution", 1), encoding="utf-8")
    with pytest.raises(UserError, match="training text of another content.*--start_over"):
        tiny_run(*TRAIN, "--max_steps", "6")
    texts["train"].write_text(text, encoding="utf-8")
    assert tiny_run(*TRAIN, "--max_steps", "6")["steps"] == 6


def test_another_text_at_the_other_end_of_a_stream_is_refused(tiny_run, texts):
    tiny_run(*TRAIN, "--streaming")
    text = texts["train"].read_text(encoding="utf-8")
    texts["train"].write_text(text[:-3] + "x.\n", encoding="utf-8")
    with pytest.raises(UserError, match="training text of another content"):
        tiny_run(*TRAIN, "--streaming", "--max_steps", "6")


def test_other_arguments_are_told_and_what_becomes_of_them(tiny_run, checkpoint, tmp_path, caplog):
    caplog.clear()
    flags = ("--learning_rate", "5", "--per_device_train_batch_size", "2", "--lr_scheduler_type", "constant")
    tiny_run(*TRAIN, *flags, "--max_steps", "6")
    changes = [
        "learning_rate 0.001 -> 5.0 (the optimizer keeps the first)",
        "lr_scheduler_type warmup_stable_decay -> constant",
        "max_steps 4 -> 6",
        "per_device_train_batch_size 4 -> 2",
    ]
    assert f"the resumed run began with other arguments: {', '.join(changes)}\n" in caplog.text
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["learning_rate"] for entry in history if entry["step"] == 6 and "loss" in entry] == [1e-3]


def test_the_same_arguments_are_not_told(tiny_run, checkpoint, caplog):
    shutil.rmtree(checkpoint)
    caplog.clear()
    tiny_run(*TRAIN)
    assert "other arguments" not in caplog.text


WITHOUT_OPTIMIZER = [("--save_only_model", "--save_steps", "2"), ("--save_strategy", "no")]


@pytest.mark.parametrize("flags", WITHOUT_OPTIMIZER, ids=["only_model", "no_checkpoint"])
def test_a_finished_run_without_an_optimizer_is_not_trained_again(tiny_run, tmp_path, flags, caplog):
    first = tiny_run("--do_train", *flags)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    caplog.clear()
    second = tiny_run("--do_train", *flags)
    assert "nothing is left to train" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert (second["steps"], second["train_seconds"]) == (4, first["train_seconds"])
    assert second["final_loss"] == first["final_loss"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="no optimizer to resume its training with .*--start_over"):
        tiny_run("--do_train", *flags, "--max_steps", "6")
    assert tiny_run("--do_train", *flags, "--max_steps", "6", "--start_over")["steps"] == 6


def test_an_interrupted_run_without_an_optimizer_is_refused(tiny_run, tmp_path):
    """Its trained weights would be lost otherwise; what --start_over interrupted is no finished run."""
    flags = ("--do_train", "--save_only_model", "--save_steps", "2")
    tiny_run(*flags)
    (tmp_path / "run" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4 holds a model, but no optimizer"):
        tiny_run(*flags)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        tiny_run(*flags, "--resume_from_checkpoint", "true")
    with pytest.raises(UserError, match="is no complete checkpoint: it was saved with --save_only_model"):
        tiny_run(*flags, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4"))


def test_start_over_forgets_that_a_training_was_finished(tiny_run, tmp_path, monkeypatch):
    tiny_run("--do_train", "--save_strategy", "no")
    monkeypatch.setattr(ClmTrainer, "train", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_run("--do_train", "--save_strategy", "no", "--start_over")
    monkeypatch.undo()
    trained, train = [], ClmTrainer.train
    monkeypatch.setattr(ClmTrainer, "train", lambda *args, **kwargs: trained.append(True) or train(*args, **kwargs))
    tiny_run("--do_train", "--save_strategy", "no")
    assert trained == [True]


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
    assert not (tmp_path / "run" / UNFINISHED).exists()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing file data/0"),
            True,
        ),
        (RuntimeError("[enforce fail at inline_container.cc:863] . unexpected pos 704 vs 598"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
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
