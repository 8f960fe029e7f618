# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Train, kill, resume and generate, again and again: every run must end as an unbroken one, and memory stay flat.

    python -m experiments.soak --minutes 20

Runs of run_clm.py are killed at random moments, by SIGKILL or SIGTERM, until they are over; then the model is loaded
and generates in this process, whose memory and open files are watched. The types of models take turns.
"""

import argparse
import gc
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lalm
import run_clm
from lalm.errors import exit_on_user_error
from lalm.training.results import read_json

TYPES = [row.config.model_type for row in lalm.VARIANTS]
SIZES = "hidden_size=64,num_hidden_layers=2,num_attention_heads=2"
# The server has imported everything, and no thread of this process runs in its copies.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["run_clm", "lalm.training.clm.trainer"])
WARM = 0.3  # of the rounds, after which memory may not grow
MOST_GROWTH = 1.05
MOST_KILLS = 20  # in one run


def words(model_type: str, steps: int, output: Path) -> list[str]:
    """The command line of a run of a few seconds."""
    return [
        *("--model_type", model_type, "--config_overrides", SIZES, "--do_train", "--max_steps", str(steps)),
        *("--save_steps", "5", "--block_size", "64", "--use_cpu", "--tokenizer_vocab_size", "512"),
        *("--output_dir", str(output), "--cache_dir", str(output.parent / "cache"), "--logging_steps", "1"),
        *("--lr_scheduler_type", "constant", "--disable_tqdm", "true"),
    ]


def train(argv: list[str], errors: Path) -> None:
    """A run, in a process of its own whose messages go to a file."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    exit_on_user_error(lambda: run_clm.main(argv))


def losses(output: Path) -> list[tuple[int, float]]:
    """The loss curve of a run that is over."""
    history = read_json(output / "trainer_state.json")["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def run_until_over(argv: list[str], source: random.Random, seconds: float, counts: Counter, errors: Path) -> None:
    """Start a run again and again; each start but the last is killed, after a random time below `seconds`."""
    for start in range(MOST_KILLS + 1):
        process = PROCESSES.Process(target=train, args=(argv, errors))
        process.start()
        if start < MOST_KILLS:
            process.join(source.uniform(0.1, 1.0) * seconds)
            if process.exitcode is None:
                number = source.choice((signal.SIGKILL, signal.SIGTERM))
                os.kill(cast(int, process.pid), number)
                counts[number.name] += 1
        process.join()
        told = errors.read_text(encoding="utf-8") if errors.exists() else ""
        counts["resumed"] += "resuming from" in told
        counts["damaged checkpoints passed over"] += told.count("is incomplete")
        if process.exitcode == 0:
            return
        if process.exitcode not in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
            raise SystemExit(f"soak: a run ended with code {process.exitcode}:\n{told[-3000:]}")
    raise SystemExit("soak: a run was not over after its last start")


@torch.no_grad()
def generate(output: Path) -> None:
    """Load a model and let it write."""
    model: Any
    tokenizer: Any
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(["The value of", "import"], return_tensors="pt", padding=tokenizer.pad_token is not None)
    text = model.generate(**inputs, max_new_tokens=64, do_sample=True)
    assert text.shape[1] > inputs["input_ids"].shape[1]


def memory() -> float:
    """Resident memory of this process in MiB (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, kill, resume and generate, again and again.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source, counts = random.Random(given.seed), Counter[str]()
    rounds: list[tuple[float, int]] = []
    unbroken: dict[str, tuple[float, list]] = {}
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="lalm-soak-") as name:
        folder, errors = Path(name), Path(name) / "errors"
        while time.monotonic() < end:
            model_type = TYPES[len(rounds) % len(TYPES)]
            if model_type not in unbroken:
                begin, output = time.monotonic(), folder / f"{model_type}-unbroken"
                process = PROCESSES.Process(target=train, args=(words(model_type, given.steps, output), errors))
                process.start()
                process.join()
                unbroken[model_type] = time.monotonic() - begin, losses(output)
            seconds, curve = unbroken[model_type]
            output = folder / f"run-{len(rounds)}"
            run_until_over(words(model_type, given.steps, output), source, seconds, counts, errors)
            if losses(output) != curve:
                raise SystemExit(f"soak: the loss curve of a killed {model_type} is not that of the unbroken run")
            generate(output)
            shutil.rmtree(output)
            rounds.append((memory(), len(os.listdir("/proc/self/fd"))))
            print(f"{len(rounds)}: {model_type}, {rounds[-1][0]:.0f} MiB, {rounds[-1][1]} files", flush=True)
    report(rounds, counts)


def report(rounds: list[tuple[float, int]], counts: Counter) -> None:
    """Print what was done, and fail if memory or open files grew after the first rounds."""
    told = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
    warm = rounds[int(WARM * len(rounds)) :]
    (first, files), (last, files_then) = warm[0], warm[-1]
    print(f"soak: {len(rounds)} runs equal to unbroken ones, {told}")
    print(f"soak: memory {first:.0f} -> {last:.0f} MiB, open files {files} -> {files_then}")
    if last > MOST_GROWTH * first or files_then > files:
        raise SystemExit("soak: memory or open files grew")


if __name__ == "__main__":
    main()
