# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""LAM on documents: train the encoder on whole articles, and average its weights with those it started from.

    python -m experiments.lam_documents --output_dir runs/lam_documents [further flags of run_sts.py]

Training moves the encoder away from STS-B. The equal average with the start (Wortsman et al. 2022, arXiv:2109.01903)
keeps what both know; `recipes/lam_documents.yaml` trains, a run that is there is not repeated.
"""

import argparse
from pathlib import Path

import run_sts
from experiments.lam_minilm_l6_soup import average
from lalm.errors import exit_on_user_error

RECIPE = Path(run_sts.__file__).with_name("recipes") / "lam_documents.yaml"


def main() -> None:
    """Train if need be, average, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lam_documents"))
    parser.add_argument("--start", type=Path, default=Path("checkpoints/lam-minilm-l6"))
    parser.add_argument("--data_dir", default="data/stsb")
    arguments, flags = parser.parse_known_args()
    trained, data = arguments.output_dir / "trained", ["--data_dir", arguments.data_dir]
    if not (trained / "eval_results.json").exists():
        start = ["--model_name_or_path", str(arguments.start)]
        run_sts.main([str(RECIPE), "--output_dir", str(trained), *start, *data, *flags])
    average([arguments.start, trained], arguments.output_dir / "averaged")
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
