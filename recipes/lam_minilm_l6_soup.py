# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Supervised STS-B without choosing anything: three runs, their weights averaged, the test split scored once.

    python recipes/lam_minilm_l6_soup.py --output_dir runs/lam_minilm_l6_soup [--data_dir ...]

Every run is lam_minilm_l6_supervised.yaml with its own rate and seed, kept as it is after its last step: no early
stop, no best checkpoint, no test score. Their equal average ("uniform soup", Wortsman et al. 2022, arXiv:2203.05482,
section 2) is scored on validation and test at the very end. Further flags go to run_sts.py; what is there is not
trained again.
"""

import argparse
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_sts  # noqa: E402  the script beside this folder
from lalm.errors import exit_on_user_error  # noqa: E402

RECIPE = str(ROOT / "recipes" / "lam_minilm_l6_supervised.yaml")
RATES = {1: 4e-5, 2: 6e-5, 3: 8e-5}  # by seed: the range of every rate tried before
UNCHOSEN = ["--max_steps", "540", "--load_best_model_at_end", "false", "--do_test", "false", "--save_dtype", "float32"]


def average(folders: list[Path], target: Path) -> None:
    """Save the equal average of sentence encoders of one shape, in bfloat16, as ``target``."""
    models = [SentenceTransformer(str(folder), device="cpu") for folder in folders]
    with torch.no_grad():
        for weights in zip(*(model.parameters() for model in models), strict=True):
            weights[0].copy_(torch.stack([weight.double() for weight in weights]).mean(0))
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
