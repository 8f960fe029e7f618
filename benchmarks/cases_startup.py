# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""How long one waits for the first result: importing, and the first forward of a tiny model.

python -m benchmarks.cases_startup     # in a process of its own: seconds of the first forwards, as JSON
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

from benchmarks.forks import in_a_fork
from benchmarks.models import LLAMA, VARIANTS, build, decodes_exactly, tokens
from benchmarks.registry import Contest, Contestant, Ratio, register

ROOT = Path(__file__).resolve().parents[1]
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"vocab_size": 1000, "max_position_embeddings": 512}
IMPORTS = {"transformers": "from transformers import LlamaConfig, LlamaForCausalLM", "lalm": "import lalm"}
# These compile C++ kernels when nobody on the machine has done so yet.
COLD = ("gla", "gated_delta_net", "lam")
_COLD = " uncompiled"


def fresh_interpreter(*arguments: str) -> Any:
    """What a new Python process prints last, from JSON."""
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def import_time(statement: str) -> float:
    """Seconds that a fresh interpreter takes for a statement."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return fresh_interpreter("-c", code)


def importing() -> Contest:
    contestants = {name: Contestant(partial(import_time, code)) for name, code in IMPORTS.items()}
    ratio = Ratio("lalm", "transformers", "import", 1.1, at_most=True)
    return Contest(contestants, [ratio])


def tiny(name: str) -> Any:
    fields = TINY | ({"intermediate_size": 512} if name == LLAMA else {})
    return build(name, **fields)


def first_forward(name: str) -> float:
    """Seconds of the first forward of this process's life."""
    model, ids = tiny(name.removesuffix(_COLD)), tokens(32, vocabulary=TINY["vocab_size"])
    with torch.no_grad():
        start = time.perf_counter()
        model(input_ids=ids)
        return time.perf_counter() - start


def forwards() -> dict[str, float]:
    """The first forward of every model, each in a process that has imported all and run nothing."""
    found = {name: in_a_fork(partial(first_forward, name)) for name in (LLAMA, *VARIANTS)}
    for name in COLD:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LALM_CACHE"] = folder
            found[name + _COLD] = in_a_fork(partial(first_forward, name + _COLD))
    return found


def first_forwards() -> Contest:
    """Each round is one fresh interpreter, from which every contestant takes its own figure."""
    round_: dict[str, float] = {}

    def take(name: str) -> float:
        if name not in round_:
            round_.update(fresh_interpreter("-m", "benchmarks.cases_startup"))
        return round_.pop(name)

    names = (*VARIANTS, *(name + _COLD for name in COLD))
    contestants = {LLAMA: Contestant(partial(take, LLAMA))}
    for name in names:
        gate = partial(decodes_exactly, tiny(name.removesuffix(_COLD)))
        contestants[name] = Contestant(partial(take, name), gate)
    shape = "[1, 32], 2 layers of 128"
    return Contest(contestants, [Ratio(name, LLAMA, shape, 1.1, at_most=True) for name in names])


register("import", "import lalm against importing transformers' Llama", importing, budget=15, warm_up=False)
if hasattr(os, "fork"):
    register(
        "first_forward",
        "first forward of a tiny model against Llama's, kernels compiled before and not",
        first_forwards,
        budget=12,
        warm_up=False,
    )

if __name__ == "__main__":
    print(json.dumps(forwards()))
