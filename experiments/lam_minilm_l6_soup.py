# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Supervised STS-B without choosing anything: three runs, their weights averaged, the test split scored once.

    python -m experiments.lam_minilm_l6_soup --output_dir runs/lam_minilm_l6_soup [--data_dir ...]

Every run is lam_minilm_l6_supervised.yaml with its own rate and seed, kept as it is after its last step: no early
stop, no best checkpoint, no test score. Their equal average ("uniform soup", Wortsman et al. 2022, arXiv:2203.05482,
section 2) is scored on validation and test at the very end. Further flags go to run_sts.py; what is there is not
trained again.
"""

import argparse
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

import run_sts
from lalm.errors import exit_on_user_error

RECIPE = str(Path(run_sts.__file__).with_name("recipes") / "lam_minilm_l6_supervised.yaml")
RATES = {1: 4e-5, 2: 6e-5, 3: 8e-5}  # by seed: the range of every rate tried before
UNCHOSEN = ["--max_steps", "540", "--load_best_model_at_end", "false", "--do_test", "false", "--save_dtype", "float32"]


def average(folders: list[Path], target: Path, shares: list[float] | None = None) -> None:
    """Save the average of sentence encoders of one shape, in bfloat16, as ``target``; without shares, an equal one."""
    shares = shares or [1 / len(folders)] * len(folders)
    models = [SentenceTransformer(str(folder), device="cpu") for folder in folders]
    with torch.no_grad():
        for weights in zip(*(model.parameters() for model in models), strict=True):
            weights[0].copy_(sum(share * weight.double() for share, weight in zip(shares, weights, strict=True)))
    models[0].to(torch.bfloat16).save(str(target))


def main() -> None:
    """Train what is missing, average, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lam_minilm_l6_soup"))
    parser.add_argument("--data_dir", default="data/stsb")
    arguments, flags = parser.parse_known_args()
    data = ["--data_dir", arguments.data_dir]
    folders = [arguments.output_dir / f"seed{seed}" for seed in RATES]
    for folder, (seed, rate) in zip(folders, RATES.items(), strict=True):
        if not (folder / "eval_results.json").exists():
            own = ["--output_dir", str(folder), "--seed", str(seed), "--learning_rate", str(rate)]
            run_sts.main([RECIPE, *own, *UNCHOSEN, *data, *flags])
    soup = arguments.output_dir / "soup"
    average(folders, soup)
    results = arguments.output_dir / "results"
    run_sts.main(["--model_name_or_path", str(soup), *data, "--output_dir", str(results), "--eval_only"])


if __name__ == "__main__":
    exit_on_user_error(main)
