# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The commands of lalm: `python -m lalm clm ...`, or `lalm-clm ...`; `accelerate launch -m lalm clm ...` for several
processes.
"""

import sys
from importlib import import_module

from lalm.errors import exit_on_user_error, exit_with, nearest_hint

COMMANDS = {
    "clm": ("lalm.training.clm.run", "train and evaluate causal language models"),
    "sts": ("lalm.training.sts.run", "train and evaluate sentence encoders"),
    "compare-runs": ("lalm.training.clm.compare_runs", "losses and results of several runs"),
    "convert": ("lalm.convert.command_line", "checkpoints of other libraries, and softmax models to linear ones"),
    "export-onnx": ("lalm.onnx_export", "a model as an ONNX graph, float32 and int8"),
    "serve": ("lalm.serve", "a server with OpenAI's interface"),
    "doctor": ("lalm.doctor", "which kernels run on this machine, and why not"),
}


def usage() -> str:
    """Return a line for each command."""
    lines = [f"  python -m lalm {name:<14}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m lalm COMMAND [recipe] [--flag value ...]", *lines])


def run(command: str) -> None:
    """Run a command with the rest of the command line."""
    exit_on_user_error(lambda: import_module(COMMANDS[command][0]).main(sys.argv[1:]))


def clm() -> None:
    """The command `lalm-clm`."""
    run("clm")


def sts() -> None:
    """The command `lalm-sts`."""
    run("sts")


def main() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage())
        return
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        names = list(COMMANDS)
        exit_with(f"there is no command '{command}'{nearest_hint(command, names)}; there are {', '.join(names)}")
    run(command)


if __name__ == "__main__":
    main()
