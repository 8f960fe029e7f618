# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a model card says of a run: its hardware and its command."""

import os
import platform
import shlex
import sys
from pathlib import Path

import torch


def hardware() -> str:
    """Return what the run computed on, e.g. ``2 x NVIDIA H200`` or ``CPU (Xeon ...), 1 thread``."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    threads, processes = torch.get_num_threads(), int(os.environ.get("WORLD_SIZE", "1"))
    return f"CPU ({name}), {processes} process(es) of {threads} thread(s)"


def command_line(argv: list[str], script: str) -> str:
    """Return the command as typed; the value of a token is left out."""
    words, hide = [], False
    for word in argv:
        name = word.partition("=")[0]
        secret = name in ("--token", "--hub_token", "--hub-token")
        words.append("..." if hide else f"{name}=..." if secret and "=" in word else word)
        hide = secret and "=" not in word
    if (program := Path(sys.argv[0]).name) in ("lalm-clm", "lalm-sts"):
        return f"{program} {shlex.join(words)}".rstrip()
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    return f"{launcher} {script} {shlex.join(words)}".rstrip()
