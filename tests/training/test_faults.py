"""Runs that are killed, told to end, run out of disk, or meet NaN: what is said, and that resuming equals no fault."""

import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerState, modeling_utils

from lalm.errors import UserError, exit_on_user_error
from lalm.modeling import saving
from lalm.training import checkpoint_files, checkpoints, trainer
from lalm.training.callbacks import ThroughputCallback
from lalm.training.clm.trainer import ClmTrainer

pytestmark = pytest.mark.slow

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


def at_call(number: int):
    """Wrap a function so that its call of this number kills the process."""

    def wrap(function):
        count = iter(range(1, 1000))

        def wrapped(*args, **kwargs):
            if next(count) == number:
                kill_self()
            return function(*args, **kwargs)

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


def half_a_move(function):
    """A kill while the final model replaces what is in the output folder."""

    def wrapped(source, target):
        os.replace(source / "config.json", target / "config.json")
        kill_self()

    return wrapped


MOMENTS = {
    "in a step": (ClmTrainer, "training_step", at_call(4)),
    "in the weights of a checkpoint": (modeling_utils, "safe_save_file", half_a_file),
    "before the optimizer of a checkpoint": (torch, "save", at_call(4)),
    "before the state of a checkpoint": (TrainerState, "save_to_json", at_call(2)),
    "before the checksums of a checkpoint": (checkpoint_files, "write_checksums", at_call(2)),
    "in the files of the final model": (trainer, "move_files", half_a_move),
}


def killed_run(run, target, name, wrap) -> int | None:
    """The exit code of a copy of this process in which `target.name` is wrapped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, wrap(getattr(target, name)))
        process = multiprocessing.get_context("fork").Process(target=run, args=TRAIN, kwargs={"model_type": MODEL})
        process.start()
    process.join(100)
    return process.exitcode


def test_a_run_that_is_killed_at_any_moment_equals_the_unbroken_one(tiny_run, tmp_path, unbroken):
    for moment, (target, name, wrap) in MOMENTS.items():
        assert killed_run(tiny_run, target, name, wrap) == -signal.SIGKILL, moment
        tiny_run(*TRAIN, model_type=MODEL)
        assert_equal_runs(tmp_path / "run", unbroken)
        (tmp_path / "run").rename(tmp_path / moment)


WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}


def photographed_run(run, folder: Path, pictures: Path) -> None:
    """A run in a copy of this process. Before everything that it does to a file of its output folder, it copies the
    folder: what a SIGKILL at that moment would leave."""

    def watch():
        taking, count = False, itertools.count()

        def hook(event, arguments):
            nonlocal taking
            if taking or event not in WRITES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            taking = True
            if folder.is_dir():
                shutil.copytree(folder, pictures / f"{next(count):03d}")
            taking = False

        sys.addaudithook(hook)
        run(*TRAIN, "--save_total_limit", "1", model_type=MODEL)

    process = multiprocessing.get_context("fork").Process(target=watch)
    process.start()
    process.join(100)
    assert process.exitcode == 0


def test_a_run_can_be_resumed_from_every_moment_of_its_saves(tiny_run, tmp_path, unbroken):
    """The step to resume from never falls, what is finished is whole, and the resumed run equals the unbroken one."""
    photographed_run(tiny_run, tmp_path / "run", tmp_path / "pictures")
    moments: dict[tuple, list[Path]] = {}
    steps = []
    for picture in sorted((tmp_path / "pictures").iterdir()):
        last = checkpoints.last_complete_checkpoint(picture)
        steps.append(0 if last is None else int(last.name.rpartition("-")[2]))
        for model in picture.glob("model.safetensors"):
            assert model.read_bytes() == (unbroken / "model.safetensors").read_bytes()
        found = len(checkpoints.checkpoints_of(picture)), len(list(picture.glob(f"{saving.UNFINISHED}*")))
        moments.setdefault((steps[-1], *found), []).append(picture)
    assert steps == sorted(steps)
    assert {0, 2, 4, 6} == set(steps)
    assert len(steps) > 100
    for pictures in moments.values():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        pictures[len(pictures) // 2].rename(tmp_path / "run")
        tiny_run(*TRAIN, "--save_total_limit", "1", model_type=MODEL)
        assert_equal_runs(tmp_path / "run", unbroken)


@pytest.mark.parametrize("save", [(), ("--save_strategy", "no")])
def test_sigterm_saves_and_ends_in_one_line(tiny_run, tmp_path, monkeypatch, capsys, unbroken, save):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
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


def test_sigterm_ends_a_worker_of_a_run_silently(capfd):
    """As datasets ends those that prepare the text."""

    def run():
        context = multiprocessing.get_context("fork")
        runs = context.Event()
        worker = context.Process(target=lambda: (runs.set(), time.sleep(30)))
        worker.start()
        assert runs.wait(20)  # a signal between the fork and the first line of the worker is lost
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == -signal.SIGTERM

    exit_on_user_error(run)
    assert capfd.readouterr().err == ""


def test_sigterm_before_the_training_is_one_line(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lalm.training.clm.run.prepare_data", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: tiny_run(*TRAIN))
    assert caught.value.code == 143
    assert "error: terminated; saved checkpoints stay" in capsys.readouterr().err


def test_a_full_disk_in_a_checkpoint(tiny_run, tmp_path, capsys):
    """Its weights still fit, its optimizer does not: the checkpoint before is resumed."""
    tiny_run(*TRAIN, output="unbroken")
    tiny_run(*TRAIN, "--max_steps", "2")
    largest = (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, limits[1]))
    try:
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(lambda: tiny_run(*TRAIN))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == 2
    assert "error: the disk is full (" in capsys.readouterr().err
    tiny_run(*TRAIN)
    assert_equal_runs(tmp_path / "run", tmp_path / "unbroken")


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
    changed = [old != new for old, new in itertools.pairwise(weights)]
    assert changed == [False, False, True, False, True]


def test_three_steps_with_nan_in_a_row_end_the_run(tiny_run, tmp_path, monkeypatch):
    broken_batches(monkeypatch, 3, 4, 5)
    with pytest.raises(
        UserError, match="diverged: step 5: the norm of the gradients is nan, as in the 2 steps before"
    ):
        tiny_run(*TRAIN, model_type=MODEL)
    checkpoint_files.check_checkpoint(tmp_path / "run" / "checkpoint-2")


def forked(body, errors: Path, **environment: str) -> multiprocessing.process.BaseProcess:
    """A running copy of this process, which has imported all, that does `body`, its stderr in a file."""

    def run():
        os.environ.update(environment)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        AcceleratorState._reset_state(reset_partial_state=True)
        exit_on_user_error(body)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def two_processes(run, folder: Path, step: int, number: int) -> list[tuple[int | None, str]]:
    """Exit codes and errors of two processes with gloo, of which the second gets a signal in a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    begin = ThroughputCallback.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        begin(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThroughputCallback, "on_step_begin", on_step_begin)
        files = [folder / "first", folder / "second"]
        running = [
            forked(run, file, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank, file in enumerate(files)
        ]
    for process in running:
        process.join(100)
        process.kill()
    return [(process.exitcode, file.read_text()) for process, file in zip(running, files, strict=True)]


def test_two_processes_end_together(tiny_run, tmp_path):
    """SIGTERM to one: both save the same step. Then one is killed: the other ends with a message and does not hang."""

    def run():
        tiny_run("--do_train", "--max_steps", "8", "--save_steps", "9", "--ddp_backend", "gloo", model_type=MODEL)

    ended = two_processes(run, tmp_path, 2, signal.SIGTERM)
    assert [code for code, _ in ended] == [143, 143], ended
    assert "error: terminated; checkpoint-3 is saved" in ended[0][1]
    (code, errors), (killed, _) = two_processes(run, tmp_path, 5, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    assert code == 1, errors
    assert "resuming from" in errors
    assert re.search(r"^error: another process of this run has ended \(.*same command resumes", errors, re.MULTILINE)
    assert "Traceback" not in errors
