# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Runs benchmark cases and prints the ratio of ours to each baseline.

    python -m benchmarks.run                             # all but --full cases: 20 minutes on two idle cores
    python -m benchmarks.run --case 'ops_*' --only gla   # some cases, one variant
    python -m benchmarks.run --list

Every case runs in its own process, whose allocator keeps freed memory, for ours and for the baselines alike.
The exit code is 1 if a gate failed or a case crashed, else 0: a missed target is a result, not an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.forks import in_a_fork
from benchmarks.gates import PASSED
from benchmarks.machine import describe, matrix_product_rates
from benchmarks.memory import keep_freed_memory
from benchmarks.registry import CASES, Case, Comparison, GateError, Ratio, select
from benchmarks.timing import Spread, alternate, spread

for _module in ("ops", "models", "encoder", "startup", "gpu"):  # importing registers, in the order of the table
    import_module(f"benchmarks.cases_{_module}")

Line = dict[str, Any]
_HEAD = ("case", "ours", "against", "shape", "ours", "against", "ratio [quartiles]", "target", "")
_WIDTHS = (18, 26, 20, 33, 9, 9, 22, 8, 0)
_BAD = ("gate failed", "broke")


def check(comparison: Comparison) -> dict[str, str]:
    """Run all gates; return the reasons of those that failed, by run."""
    reasons = {name: failure(run.gate) for name, run in comparison.runs.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def failure(gate: Callable[[], None] | None) -> str:
    """Why a gate fails; empty if it passes."""
    try:
        if gate:
            gate()
    except GateError as error:
        return str(error)
    return ""


def figure(ratio: Ratio, comparison: Comparison, samples: dict[str, list[float]]) -> Line:
    """The measured part of a line: each round gives one ratio, and the median of the ratios counts."""
    factor = 1000 if comparison.unit == "ms" else 1
    ours, baseline = samples[ratio.ours], samples[ratio.baseline]
    ratios = spread(ratio.value(a, b) for a, b in zip(ours, baseline, strict=True))
    return {
        "status": "measured",
        "ours_value": spread(factor * x for x in ours)._asdict(),
        "baseline_value": spread(factor * x for x in baseline)._asdict(),
        "ratio": ratios._asdict(),
        "met": ratio.is_met(ratios.median),
    }


def measure(case: Case, only: str = "*", quick: bool = False, rounds: int = 1) -> tuple[list[Line], dict[str, Any]]:
    """The table lines and samples of a case: at least `rounds` rounds; `quick` takes a tenth of the budget."""
    comparison = case.build().only(only)
    failed = check(comparison)
    runs = {name: run.call for name, run in comparison.runs.items() if name not in failed}
    least = max(rounds, 1 if quick else case.least_rounds)
    samples = alternate(runs, case.budget / (10 if quick else 1), least, case.warm_up) if len(runs) > 1 else {}
    lines = []
    for ratio in comparison.ratios:
        reasons = [f"{name}: {failed[name]}" for name in (ratio.ours, ratio.baseline) if name in failed]
        result = {"status": "gate failed", "reason": "; ".join(reasons)} if reasons else {}
        goal = {"target": ratio.target, "at_most": ratio.at_most, "goal": ratio.goal}
        named = {"ours": ratio.ours, "baseline": ratio.baseline, "shape": ratio.shape}
        kind = {"dtype": comparison.dtype, "unit": comparison.unit}
        lines.append({"case": case.name} | named | kind | goal | (result or figure(ratio, comparison, samples)))
    details = {
        name: {"facts": run.facts, "samples": samples.get(name, []), "gate": failed.get(name, "passed")}
        for name, run in comparison.runs.items()
    }
    return lines, details


def attempt(case: Case, only: str, quick: bool, rounds: int) -> tuple[list[Line], dict[str, Any]]:
    """Run `measure`, or return one line that says why it cannot run."""
    torch.manual_seed(0)
    keep_freed_memory()
    missing = {"case": case.name, "ours": case.what}
    if case.needs == "cuda" and not torch.cuda.is_available():
        return [missing | {"status": "no GPU"}], {}
    try:
        return measure(case, only, quick, rounds)
    except ImportError as error:
        return [missing | {"status": "not installed", "reason": str(error)}], {}
    except Exception as error:
        traceback.print_exc()
        return [missing | {"status": "broke", "reason": f"{type(error).__name__}: {error}"}], {}


def row(line: Line) -> str:
    """Format one line of the table."""
    if line["status"] != "measured":
        named = "  ".join(line[key] for key in ("ours", "baseline", "shape") if key in line)
        return f"{line['case']:{_WIDTHS[0]}}  {named}: {line['status']} {line.get('reason', '')}".rstrip()
    values = [f"{_digits(line[key]['median'])} {line['unit']}" for key in ("ours_value", "baseline_value")]
    ratio = Spread(**line["ratio"])
    quartiles = f"[{ratio.q1:.2f}, {ratio.q3:.2f}]" if ratio.n > 1 else "one round"
    shown = f"{ratio.median:.2f}x {quartiles}"
    verdict = "met" if line["met"] else "missed"
    return _columns(line["case"], line["ours"], line["baseline"], line["shape"], *values, shown, line["goal"], verdict)


def _columns(*cells: str) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def summary(lines: list[Line]) -> str:
    """Count the outcomes, e.g. "3 met, 1 missed"."""
    words = ["met" if line.get("met") else "missed" if "met" in line else line["status"] for line in lines]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def write(path: Path, report: dict[str, Any]) -> None:
    """Write atomically, so that an interrupted run leaves the cases that it finished."""
    staged = path.with_name(path.name + ".part")
    staged.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="run only these; shell patterns")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only lines whose `ours` matches")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no long cases: a smoke test")
    parser.add_argument("--full", action="store_true", help="include the cases that do not fit into 20 minutes")
    parser.add_argument("--rounds", type=int, default=1, help="minimum rounds per case, regardless of its budget")
    parser.add_argument("--threads", type=int, default=1, help="threads of the timed work (1)")
    parser.add_argument("--list", action="store_true", help="list the cases")
    arguments = parser.parse_args(argv)
    try:
        arguments.cases = select(arguments.case, arguments.full, arguments.quick)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _apart(*arguments: Any) -> tuple[list[Line], dict[str, Any], list[str]]:
    """Run `attempt`; also return the gates that have passed, so that later cases skip them."""
    return *attempt(*arguments), sorted(PASSED)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = parse(argv)
    if arguments.list:
        print("\n".join(f"{name:{_WIDTHS[0]}}  {case.what}{' (--full)' * case.extra}" for name, case in CASES.items()))
        return 0
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    machine = in_a_fork(describe)
    command = "python -m benchmarks.run " + shlex.join(sys.argv[1:] if argv is None else argv)
    report: dict[str, Any] = {"command": command.strip(), "machine": machine, "lines": [], "cases": {}}
    print(f"{machine['hardware']['cpu']}, {machine['threads']} thread(s), torch {machine['versions']['torch']}, "
          f"transformers {machine['versions']['transformers']}, {machine['date']}, load {machine['load']:.1f}, "
          f"large products {machine['matrix_product_gflops']} GFLOP/s\n\n{_columns(*_HEAD)}")  # fmt: skip
    start = time.monotonic()
    for case in arguments.cases:
        began = time.monotonic()
        # In a fork, because what a case leaves in the allocator would change the figures of the next.
        lines, details, passed = in_a_fork(partial(_apart, case, arguments.only, arguments.quick, arguments.rounds))
        PASSED.update(passed)
        print("\n".join(map(row, lines)), flush=True)
        report["lines"] += lines
        report["cases"][case.name] = {"seconds": round(time.monotonic() - began, 1), "runs": details}
        if arguments.json:
            write(arguments.json, report)
    again = in_a_fork(matrix_product_rates)
    machine["matrix_product_gflops"] = {
        dtype: max(rate, again[dtype]) for dtype, rate in machine["matrix_product_gflops"].items()
    }
    if arguments.json:
        write(arguments.json, report)
    print(f"\n{summary(report['lines'])}; {time.monotonic() - start:.0f} s")
    return int(any(line["status"] in _BAD for line in report["lines"]))


if __name__ == "__main__":
    sys.exit(main())
