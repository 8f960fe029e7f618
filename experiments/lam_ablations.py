# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Train LAM with one part less at a time, each with three seeds, and print what each part is worth.

    python -m experiments.lam_ablations --output_dir runs/lam_ablations [--teacher ...]
    python -m experiments.lam_ablations --long --output_dir runs/lam_ablations

The first is recipes/lam_ablations.yaml, scored on STS-B. With --long, every model of the first is trained further on
articles (recipes/lam_documents.yaml, all weights, 100 steps) and scored on the test split of
experiments.long_text_retrieval at 4,096 tokens. Further flags go to run_sts.py. A run that is there is not repeated.
Seeds share data and order: differences to the full model are taken seed by seed, and the intervals (Student's t)
cover the seeds, not the choice of pairs or articles.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from scipy.stats import t as student_t
from sentence_transformers import SentenceTransformer

import run_sts
from experiments.long_text_retrieval import read_articles, score
from lalm.errors import exit_on_user_error
from lalm.training.results import read_json, write_json
from lalm.training.sts.arguments import parse_sts_arguments
from lalm.training.sts.stages import build_student
from lalm.training.sts.teacher import load_teacher

RECIPES = Path(run_sts.__file__).with_name("recipes")
SHORT, LONG = str(RECIPES / "lam_ablations.yaml"), str(RECIPES / "lam_documents.yaml")
LONG_FLAGS = [
    *("--freeze", "embed_tokens"),
    *("--max_steps", "100", "--learning_rate", "3e-4", "--eval_strategy", "no", "--save_strategy", "no"),
]
ARTICLES, TOKENS = "data/wikipedia-en/articles.jsonl.gz", 4096
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
    "fixed decay": ["use_adaptive_decay=false"],
}


def without_mixer(folder: Path, flags: list[str]) -> list[str]:
    """Flags that train a student whose mixers give nothing but a bias."""
    model, _, training = parse_sts_arguments([SHORT, *flags])
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


def table(figures: Mapping[str, list[dict]], columns: Mapping[str, str]) -> str:
    """Return the means of some figures of all variations as a table, and the differences in the last of them."""
    last = list(columns)[-1]
    heads = [*columns.values(), f"difference in {columns[last]}, seed by seed"]
    rows = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    whole = [run[last] for run in figures[FULL]]
    for name, runs in figures.items():
        means = [f"{statistics.mean([run[column] for run in runs]):.4f}" for column in columns]
        less = "" if name == FULL else interval([run[last] - all_ for run, all_ in zip(runs, whole, strict=True)])
        rows.append(f"| {name} | {' | '.join([*means, less])} |")
    return "\n".join(rows)


def train_short(folder: Path, name: str, seed: int, flags: list[str]) -> dict:
    """Train one variation on sentences, unless it is there, and return its figures."""
    if not (folder / "test_results.json").exists():
        print(f"{name}, seed {seed}", flush=True)
        change = ["--config_overrides", *VARIATIONS[name]] if VARIATIONS[name] else []
        if name == NO_MIXER:
            change = without_mixer(folder.parent / "no-mixer-start", flags)
        run_sts.main([SHORT, "--output_dir", str(folder), "--seed", str(seed), *change, *flags])
    return read_json(folder / "all_results.json")


def train_long(start: Path, name: str, seed: int, articles: list[dict[str, str]], flags: list[str]) -> dict:
    """Train a variation further on articles, unless it is there, and return its recall in the test split."""
    folder = start.with_name(f"{start.name}-long")
    if not (folder / "recall.json").exists():
        print(f"{name}, seed {seed}, articles", flush=True)
        own = ["--model_name_or_path", str(start), "--output_dir", str(folder), "--seed", str(seed)]
        kept = ["o_proj.weight"] if name == NO_MIXER else []
        run_sts.main([LONG, *own, *LONG_FLAGS[:2], *kept, *LONG_FLAGS[2:], *flags])
        model = SentenceTransformer(str(folder), device="cpu")
        found = {kind: first for _, kind, first, _ in score(model, articles, [TOKENS], folder.name)}
        write_json(folder / "recall.json", found)
    return read_json(folder / "recall.json")


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lam_ablations"))
    parser.add_argument("--long", action="store_true", help="train on articles too, and score their retrieval")
    arguments, flags = parser.parse_known_args()
    articles = read_articles(Path(ARTICLES), "test") if arguments.long else []
    figures: dict[str, list[dict]] = {name: [] for name in VARIATIONS}
    recall: dict[str, list[dict]] = {name: [] for name in VARIATIONS}
    for seed in SEEDS:
        for index, name in enumerate(VARIATIONS):
            folder = arguments.output_dir / f"{index}-seed{seed}"
            figures[name].append(train_short(folder, name, seed, flags))
            if arguments.long:
                recall[name].append(train_long(folder, name, seed, articles, flags))
    print("\n" + table(figures, {"eval_pearson": "dev Pearson", "test_pearson": "test Pearson"}))
    if arguments.long:
        print("\n" + table(recall, {"title": "recall@1 by title", "sentence": "recall@1 by a late sentence"}))


if __name__ == "__main__":
    exit_on_user_error(main)
