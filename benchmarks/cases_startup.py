# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Start-up time: importing, and the first forward of a tiny model.

python -m benchmarks.cases_startup     # reads model names from stdin, prints the seconds of a first forward for each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.forks import in_a_fork, make_own, touched_pages
from benchmarks.models import LLAMA, VARIANTS, build, decodes_exactly, tokens
from benchmarks.registry import Comparison, Ratio, Run, register

ROOT = Path(__file__).resolve().parents[1]
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"vocab_size": 1000, "max_position_embeddings": 512}
IMPORTS = {"transformers": "from transformers import LlamaConfig, LlamaForCausalLM", "lalm": "import lalm"}
# Also timed with an empty kernel cache, where the first forward compiles C++ kernels.
COLD = ("gla", "gated_delta_net", "lam")
_COLD = " uncompiled"


def fresh_interpreter(*arguments: str) -> Any:
    """Parse the last line that a new Python process prints as JSON."""
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def import_time(statement: str) -> float:
    """Seconds that a statement takes in a fresh interpreter."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return fresh_interpreter("-c", code)


def importing() -> Comparison:
    runs = {name: Run(partial(import_time, code)) for name, code in IMPORTS.items()}
    ratio = Ratio("lalm", "transformers", "import", 1.1, at_most=True)
    return Comparison(runs, [ratio])


def tiny(name: str) -> Any:
    fields = TINY | ({"intermediate_size": 512} if name == LLAMA else {})
    return build(name, **fields)


@torch.no_grad()
def compile_kernels(name: str) -> None:
    """Run a batch that is long enough to trigger compilation of the kernels of `name` into the cache."""
    tiny(name)(input_ids=tokens(TINY["max_position_embeddings"], vocabulary=TINY["vocab_size"]).expand(32, -1))


def first_forward(name: str) -> float:
    """Seconds of the first forward in this process."""
    model, ids = tiny(name.removesuffix(_COLD)), tokens(32, vocabulary=TINY["vocab_size"])
    with torch.no_grad():
        start = time.perf_counter()
        model(input_ids=ids)
        return time.perf_counter() - start


def answer_forwards() -> None:
    """For each name on stdin, time the first forward in a fork that has done all imports and run nothing, with the
    imports' pages pre-faulted."""
    pages = touched_pages()

    def sample(name: str) -> float:
        make_own(pages)
        return first_forward(name)

    for line in sys.stdin:
        name = line.strip()
        with tempfile.TemporaryDirectory() as empty:
            os.environ.pop("LALM_CACHE", None)
            if name.endswith(_COLD):
                os.environ["LALM_CACHE"] = empty
            print(in_a_fork(partial(sample, name)), flush=True)


def first_forwards() -> Comparison:
    """First forwards of all variants against Llama; a fresh interpreter forks a child for each sample."""
    command = [sys.executable, "-m", "benchmarks.cases_startup"]
    asked = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take(name: str) -> float:
        assert asked.stdin is not None
        assert asked.stdout is not None
        print(name, file=asked.stdin, flush=True)
        return float(asked.stdout.readline())

    for name in VARIANTS:
        compile_kernels(name)
    names = (*VARIANTS, *(name + _COLD for name in COLD))
    runs = {LLAMA: Run(partial(take, LLAMA))}
    for name in names:
        gate = partial(decodes_exactly, tiny(name.removesuffix(_COLD)))
        runs[name] = Run(partial(take, name), gate)
    shape = "[1, 32], 2 layers of 128"
    return Comparison(runs, [Ratio(name, LLAMA, shape, 1.1, at_most=True) for name in names])


register(
    "import", "import lalm against importing transformers' Llama", importing, budget=15, least_rounds=2, warm_up=False
)
if hasattr(os, "fork"):
    register(
        "first_forward",
        "first forward of a tiny model against Llama's, kernels compiled before and not",
        first_forwards,
        budget=35,
        warm_up=False,
    )

if __name__ == "__main__":
    answer_forwards()
