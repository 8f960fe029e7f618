# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The training losses of several runs in one picture, and a table of what they ended at.

python -m lalm.training.clm.compare_runs runs/gla runs/retnet --output loss_curves.png
"""

import argparse
from pathlib import Path

from lalm.errors import UserError, exit_on_user_error
from lalm.training.loss_curve import loss_points, write_loss_curves
from lalm.training.results import read_json


def read_run(folder: Path) -> dict:
    """The log, the figures and the model type of one output folder of run_clm.py.

    Raises:
        UserError: the folder holds no finished run.
    """
    state, config = read_json(folder / "trainer_state.json"), read_json(folder / "config.json")
    if not state or not config:
        raise UserError(f"{folder} holds no finished run: it has no trainer_state.json and config.json")
    return {
        "name": folder.resolve().name,
        "model_type": config["model_type"],
        "log": state["log_history"],
        **read_json(folder / "all_results.json"),
    }


def table(runs: list[dict]) -> str:
    """Markdown: folder, model type, first and last loss (nats per token), test perplexity, tokens per second."""
    lines = ["| run | model | first loss | last loss | test perplexity | tokens/s |", "|---|---|---|---|---|---|"]
    for run in runs:
        losses = [loss for _, loss in loss_points(run["log"])[0]]
        test, speed = run.get("test_perplexity"), run.get("tokens_per_second")
        cells = [run["name"], f"`{run['model_type']}`", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"]
        cells += ["" if value is None else f"{value:,.{digits}f}" for value, digits in ((test, 1), (speed, 0))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Read the folders, draw, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of run_clm.py")
    parser.add_argument("--output", type=Path, default=Path("loss_curves.png"), help="the picture")
    parser.add_argument("--title", default="training loss")
    arguments = parser.parse_args(argv)
    runs = [read_run(folder) for folder in arguments.runs]
    curves = {run["name"]: loss_points(run["log"])[0] for run in runs}
    if not any(curves.values()):
        raise UserError("nothing can be compared: the runs logged no training loss")
    print(table(runs))
    if write_loss_curves(curves, arguments.output, arguments.title):
        print(f"the picture is in {arguments.output}")


if __name__ == "__main__":
    exit_on_user_error(main)
