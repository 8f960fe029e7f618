# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Everything that only a GPU can show, in at most six minutes: parity of the GPU kernels, speed, a short training.

    make gpu-check                    # in an environment of its own
    python -m experiments.gpu_check   # in this one

Needs torch with CUDA; `pip install "lalm[gpu,dev]"` installs the rest. Every step runs in its own process with a time
limit, and a step that fails does not stop the others. The output folder gets `results.json`, the figures of the
benchmarks and a log per step. The exit code is 1 if a step failed, 2 without a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from lalm.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parents[1]


def steps(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """By name: seconds that the step may take, and the words that follow `python`."""
    train = ["run_clm.py", "recipes/demo_gla.yaml", "--output_dir", str(folder / "training"), "--bf16", "true"]
    return {
        "kernels": (140, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_dual_state_triton.py",
                          "tests/ops/test_fla_adapter.py"]),
        "speed": (150, ["-m", "benchmarks.run", "--case", "gpu_*", "--json", str(folder / "benchmarks.json")]),
        "training": (60, [*train, "--start_over", "--max_steps", "200"]),
    }  # fmt: skip


def run(name: str, seconds: int, words: list[str], folder: Path) -> dict:
    """Run one step; its output goes to `<name>.log`."""
    begun = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                [sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    last, elapsed = lines[-1] if lines else "", round(time.monotonic() - begun, 1)
    print(f"{name}: {'out of time' if code is None else f'exit code {code}'}: {last}", flush=True)
    return {"exit_code": code, "seconds": elapsed, "last_line": last}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu-check", help="folder of results and logs")
    parser.add_argument("--only", nargs="+", choices=list(steps(Path())), help="steps to run; default: all")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError(f"there is no GPU for torch {torch.__version__}: nothing here can run without one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name, (seconds, words) in steps(arguments.output.resolve()).items():
        if not arguments.only or name in arguments.only:
            results[name] = run(name, seconds, words, arguments.output)
            (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if any(step["exit_code"] != 0 for step in results.values() if isinstance(step, dict)):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
