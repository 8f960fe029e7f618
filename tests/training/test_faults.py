"""Runs that are killed, told to end, run out of disk, or meet NaN: what is said, and that resuming equals no fault."""

import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerState
from transformers.trainer_callback import TrainerCallback

import run_clm
from lalm.errors import UserError, exit_on_user_error
from lalm.modeling import saving
from lalm.training import checkpoint_files
from lalm.training.callbacks import ThroughputCallback
from lalm.training.clm.trainer import ClmTrainer
from tests.training.conftest import TINY_MODELS

TRAIN = ("--do_train", "--save_steps", "2", "--max_steps", "6", "--lr_scheduler_type", "constant")
MODEL = "lalm_gla"


def losses(folder: Path) -> list[tuple]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def assert_equal_runs(folder: Path, unbroken: Path) -> None:
    """Every loss of the curve, and the weights, bit for bit; nothing unfinished is left."""
    assert losses(folder) == losses(unbroken)
    assert (folder / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert not list(folder.rglob(f"{saving.UNFINISHED}*"))


@pytest.fixture
def unbroken(tiny_run, tmp_path):
    tiny_run(*TRAIN, model_type=MODEL, output="unbroken")
    return tmp_path / "unbroken"


def at_call(number: int, action, after: bool = False):
    """Wrap a function so that its call of this number acts before, or after, it does its work."""

    def wrap(function):
        count = iter(range(1, 1000))

        def wrapped(*args, **kwargs):
            is_due = next(count) == number
            if is_due and not after:
                action()
            result = function(*args, **kwargs)
            if is_due and after:
                action()
            return result

        return wrapped

    return wrap


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(function):
    """A kill in the middle of the weights of the second checkpoint."""
    count = iter(range(1, 1000))

    def wrapped(tensors, path, **kwargs):
        function(tensors, path, **kwargs)
        if next(count) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            kill_self()

    return wrapped


MOMENTS = {
    "in a step": (ClmTrainer, "training_step", at_call(4, kill_self)),
    "in the weights of a checkpoint": ("transformers.modeling_utils", "safe_save_file", half_a_file),
    "before the optimizer of a checkpoint": (torch, "save", at_call(4, kill_self)),
    "before the state of a checkpoint": (TrainerState, "save_to_json", at_call(2, kill_self)),
    "before the checksums of a checkpoint": (checkpoint_files, "write_checksums", at_call(2, kill_self)),
    "in the files of the final model": (saving.os, "replace", at_call(36, kill_self)),
}


def killed_run(run, target, name, wrap) -> int | None:
    """The exit code of a forked process in which `target.name` is wrapped."""

    def body():
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(target, str):
                patch.setattr(f"{target}.{name}", wrap(getattr(sys.modules[target], name)))
            else:
                patch.setattr(target, name, wrap(getattr(target, name)))
            run(*TRAIN, model_type=MODEL)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(100)
    return process.exitcode


def test_a_run_that_is_killed_at_any_moment_equals_the_unbroken_one(tiny_run, tmp_path, unbroken, subtests):
    for moment, (target, name, wrap) in MOMENTS.items():
        with subtests.test(moment):
            assert killed_run(tiny_run, target, name, wrap) == -signal.SIGKILL
            tiny_run(*TRAIN, model_type=MODEL)
            assert_equal_runs(tmp_path / "run", unbroken)
            (tmp_path / "run").rename(tmp_path / moment)


class AtStep(TrainerCallback):
    """Sends a signal to this process in a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("save", [(), ("--save_strategy", "no")])
def test_sigterm_saves_and_ends_in_one_line(tiny_run, tmp_path, monkeypatch, capsys, unbroken, save):
    def on_step_begin(self, args, state, control, **kwargs):
        AtStep(2, signal.SIGTERM).on_step_begin(args, state, control)
        begin(self, args, state, control, **kwargs)

    begin = ThroughputCallback.on_step_begin
    monkeypatch.setattr(ThroughputCallback, "on_step_begin", on_step_begin)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: tiny_run(*TRAIN, *save, model_type=MODEL))
    assert caught.value.code == 128 + signal.SIGTERM
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert lines == ["error: terminated; checkpoint-3 is saved, and the same command resumes from it"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.undo()
    tiny_run(*TRAIN, *save, model_type=MODEL)
    assert_equal_runs(tmp_path / "run", unbroken)


def test_sigterm_before_the_training_is_one_line(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_clm, "prepare_data", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: tiny_run(*TRAIN))
    assert caught.value.code == 143
    assert "error: terminated; saved checkpoints stay" in capsys.readouterr().err


def test_a_full_disk_in_a_checkpoint(tiny_run, tmp_path, capsys, unbroken):
    """Its weights still fit, its optimizer does not: the checkpoint before is resumed."""
    tiny_run(*TRAIN, "--max_steps", "2", model_type=MODEL)
    largest = (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, limits[1]))
    try:
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(lambda: tiny_run(*TRAIN, model_type=MODEL))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == 2
    assert "error: the disk is full (" in capsys.readouterr().err
    tiny_run(*TRAIN, model_type=MODEL)
    assert_equal_runs(tmp_path / "run", unbroken)


def broken_batches(monkeypatch, *steps: int) -> None:
    loss = ClmTrainer.compute_loss

    def compute(self, *args, **kwargs):
        return loss(self, *args, **kwargs) * (torch.nan if self.state.global_step + 1 in steps else 1)

    monkeypatch.setattr(ClmTrainer, "compute_loss", compute)


def test_a_batch_with_nan_is_left_out_and_told(tiny_run, tmp_path, monkeypatch, caplog):
    broken_batches(monkeypatch, 2, 3, 5)
    tiny_run(*TRAIN, "--save_steps", "1", "--save_total_limit", "9", "--weight_decay", "0.5", model_type=MODEL)
    warned = [record.message for record in caplog.records if "left out" in record.message]
    assert [re.findall(r"step (\d+)", line) for line in warned] == [["2"], ["3"], ["5"]]
    assert "the norm of the gradients is nan" in warned[0]
    weights = [(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").read_bytes() for step in range(1, 7)]
    changed = [old != new for old, new in zip(weights, weights[1:], strict=False)]
    assert changed == [False, False, True, False, True]


def test_three_steps_with_nan_in_a_row_end_the_run(tiny_run, tmp_path, monkeypatch):
    broken_batches(monkeypatch, 3, 4, 5)
    with pytest.raises(
        UserError, match="diverged: step 5: the norm of the gradients is nan, as in the 2 steps before"
    ):
        tiny_run(*TRAIN, model_type=MODEL)
    checkpoint_files.check_checkpoint(tmp_path / "run" / "checkpoint-2")


SCRIPT = """
import os, sys
import run_clm
from lalm.errors import exit_on_user_error
from tests.training.test_faults import AtStep
from lalm.training.clm.trainer import ClmTrainer
rank, step, number = os.environ["RANK"], int(sys.argv[1]), int(sys.argv[2])
init = ClmTrainer.__init__
def with_signal(self, **kwargs):
    init(self, callbacks=[AtStep(step, number)] if rank == "1" else [], **kwargs)
ClmTrainer.__init__ = with_signal
exit_on_user_error(lambda: run_clm.main(sys.argv[3:]))
"""


def two_processes(arguments, step, number):
    """Exit code and errors of two processes with gloo, of which the second gets a signal in a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LALM_DEBUG": "0"}
    command = [sys.executable, "-c", SCRIPT, str(step), str(int(number)), *arguments]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    running = []
    for rank in ("0", "1"):
        environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
        running.append(subprocess.Popen(command, cwd=Path(run_clm.__file__).parent, env=environment, **streams))
    try:
        return [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


def test_two_processes_end_together(texts, tmp_path):
    """SIGTERM to one: both save the same step. Then one is killed: the other ends with a message and does not hang."""
    arguments = ["--model_type", MODEL, "--config_overrides", TINY_MODELS[MODEL], "--do_train", "--max_steps", "8"]
    arguments += ["--train_file", str(texts["train"]), "--validation_file", str(texts["validation"])]
    arguments += ["--tokenizer_vocab_size", "300", "--block_size", "24", "--ddp_backend", "gloo", "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    arguments += ["--per_device_train_batch_size", "4", "--save_steps", "100"]
    ended = two_processes(arguments, 2, signal.SIGTERM)
    assert [code for _, code in ended] == [143, 143], ended
    assert "error: terminated; checkpoint-3 is saved" in ended[0][0]
    (first, code), (_, killed) = two_processes(arguments, 5, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    assert code == 1, first
    assert "resuming from" in first
    assert re.search(r"^error: another process of this run has ended \(.*same command resumes", first, re.MULTILINE)
    assert "Traceback" not in first
