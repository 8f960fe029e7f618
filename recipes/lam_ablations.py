# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Train LAM with one part less at a time, each with three seeds, and print what each part is worth on STS-B.

    python recipes/lam_ablations.py --output_dir runs/lam_ablations [--teacher ...]

Further flags go to run_sts.py. A run that is there is not repeated. Seeds share data and order: differences to the
full model are taken seed by seed, and the intervals (Student's t) cover the seeds, not the choice of pairs.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from scipy.stats import t as student_t

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_sts  # noqa: E402  the script beside this folder
from lalm.errors import exit_on_user_error  # noqa: E402
from lalm.training.results import read_json  # noqa: E402
from lalm.training.sts.arguments import parse_sts_arguments  # noqa: E402
from lalm.training.sts.stages import build_student  # noqa: E402
from lalm.training.sts.teacher import load_teacher  # noqa: E402

RECIPE = str(Path(__file__).with_suffix(".yaml"))
SEEDS = (1, 2, 3)
FULL = "full"
NO_MIXER = "no mixer: its output weights zero throughout"
VARIATIONS: dict[str, list[str]] = {
    FULL: [],
    "no resonance flux": ["use_flux=false"],
    "one memory (decay .999)": ["num_memories=1", "decay_init=[0.999]", "use_flux=false", "use_leak=false"],
    "no delta rule": ["use_delta_rule=false"],
    "no leak": ["use_leak=false"],
    "causal": ["is_causal=true"],
    NO_MIXER: [],
}


def without_mixer(folder: Path, flags: list[str]) -> list[str]:
    """Flags that train a student whose mixers give nothing but a bias."""
    model, _, training = parse_sts_arguments([RECIPE, *flags])
    if not folder.exists():
        model.ridge_texts = 0
        teacher = load_teacher(model.teacher, device="cpu")
        student = build_student(model, teacher, [], training.max_seq_length)
        with torch.no_grad():
            for name, weight in student.named_parameters():
                if "mixer.o_proj" in name:
                    weight.zero_()
        student.save(str(folder))
    return ["--model_name_or_path", str(folder), "--freeze", *(model.freeze or []), "o_proj.weight"]


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of a few numbers."""
    mean = statistics.mean(values)
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} ± {half:.4f}"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lam_ablations"))
    arguments, flags = parser.parse_known_args()
    figures: dict[str, list[dict]] = {name: [] for name in VARIATIONS}
    for seed in SEEDS:
        for index, (name, overrides) in enumerate(VARIATIONS.items()):
            folder = arguments.output_dir / f"{index}-seed{seed}"
            if not (folder / "test_results.json").exists():
                print(f"{name}, seed {seed}", flush=True)
                change = ["--config_overrides", *overrides] if overrides else []
                if name == NO_MIXER:
                    change = without_mixer(arguments.output_dir / "no-mixer-start", flags)
                run_sts.main([RECIPE, "--output_dir", str(folder), "--seed", str(seed), *change, *flags])
            figures[name].append(read_json(folder / "all_results.json"))
    print("\n| | dev Pearson | test Pearson | difference on test, seed by seed |\n|---|---|---|---|")
    full = [run["test_pearson"] for run in figures[FULL]]
    for name, runs in figures.items():
        dev, test = ([run[f"{split}_pearson"] for run in runs] for split in ("eval", "test"))
        less = "" if name == FULL else interval([ours - whole for ours, whole in zip(test, full, strict=True)])
        print(f"| {name} | {statistics.mean(dev):.4f} | {statistics.mean(test):.4f} | {less} |")


if __name__ == "__main__":
    exit_on_user_error(main)
