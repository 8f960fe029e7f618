# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""LAM on documents: train the encoder on whole articles, and average its weights with those it started from.

    python -m experiments.lam_documents --output_dir runs/lam_documents [further flags of run_sts.py]

Training moves the encoder away from STS-B. An average with the start (Wortsman et al. 2022, arXiv:2109.01903)
keeps what both know. `recipes/lam_documents.yaml` trains in two runs, each of which draws lengths and sentences of the
articles anew; a run that is there is not repeated.
"""

import argparse
from pathlib import Path

import run_sts
from experiments.lam_minilm_l6_soup import average
from lalm.errors import exit_on_user_error

# What the second run has in the place of the recipe's.
SECOND = ["--seed", "2", "--max_steps", "800", "--learning_rate", "2e-4"]
RECIPE = Path(run_sts.__file__).with_name("recipes") / "lam_documents.yaml"


def main() -> None:
    """Train if need be, average, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lam_documents"))
    parser.add_argument("--start", type=Path, default=Path("checkpoints/lam-minilm-l6"))
    parser.add_argument("--share", type=float, default=0.75, help="share of the trained weights in the average")
    parser.add_argument("--data_dir", default="data/stsb")
    arguments, flags = parser.parse_known_args()
    trained, data = arguments.start, ["--data_dir", arguments.data_dir]
    for name, own in (("first", []), ("second", SECOND)):
        start, trained = trained, arguments.output_dir / name
        if not (trained / "eval_results.json").exists():
            places = ["--output_dir", str(trained), "--model_name_or_path", str(start)]
            run_sts.main([str(RECIPE), *places, *data, *own, *flags])
    shares = [1 - arguments.share, arguments.share]
    average([arguments.start, trained], arguments.output_dir / "averaged", shares)
    results = arguments.output_dir / "results"
    run_sts.main(
        [
            "--model_name_or_path",
            str(arguments.output_dir / "averaged"),
            *data,
            "--output_dir",
            str(results),
            "--eval_only",
        ]
    )


if __name__ == "__main__":
    exit_on_user_error(main)
