"""Tiny files and models for whole runs of run_sts.py, which go through `run_sts.main` as the command line does."""

import csv
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

import run_sts
from tests.training.sts import tiny_models as sts_tiny

RECIPES = Path(run_sts.__file__).parent / "recipes"
STEPS = 8


def history(folder: Path, key: str) -> list[float]:
    """What a run has logged under a name, in order."""
    entries = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[key] for entry in entries if key in entry]


def losses(folder: Path) -> list[float]:
    return history(folder, "loss")


def scores(folder: Path) -> list[float]:
    return history(folder, "eval_sts-dev_pearson_cosine")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def reworded(text: str, kept: int, source: random.Random) -> str:
    """`kept` of a text's words, the others replaced, in another order."""
    words = text.split()
    words[kept:] = source.choices(sts_tiny.WORDS, k=len(words) - kept)
    return " ".join(source.sample(words, len(words)))


class StsWorld:
    """A folder with a teacher, STS-B in small, texts, pairs and triplets."""

    def __init__(self, folder: Path):
        self.folder = folder
        source = random.Random(0)
        sts_tiny.teacher().save(str(folder / "teacher"))
        (folder / "stsb").mkdir()
        for seed, (name, count) in enumerate({"train": 64, "dev": 32, "test": 32}.items()):
            with open(folder / "stsb" / f"stsb-en-{name}.csv", "w", encoding="utf-8", newline="") as handle:
                for text in sts_tiny.sentences(count, seed):
                    kept = source.randint(0, len(text.split()))
                    score = round(5 * kept / len(text.split()), 2)
                    csv.writer(handle).writerow([text, reworded(text, kept, source), score])
        self.write("texts.txt", [[text] for text in sts_tiny.sentences(160, 4)])
        pairs = [[text, reworded(text, 9, source)] for text in sts_tiny.sentences(96, 5)]
        self.write("pairs.tsv", pairs)
        others = sts_tiny.sentences(64, 6)
        self.write("triplets.tsv", [[*pair, other] for pair, other in zip(pairs, others, strict=False)])

    def write(self, name: str, rows: list[list[str]]) -> str:
        """Write rows, tabs between their cells."""
        path = self.folder / name
        path.write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")
        return str(path)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def arguments(self, stage: str, *flags: str, output: str) -> list[str]:
        """A recipe of ours with the files of this folder and a small budget; `flags` win."""
        pairs, triplets = self.path("pairs.tsv"), self.path("triplets.tsv")
        files = {
            "distill": ["--train_file", self.path("texts.txt")],
            "relational": ["--train_file", pairs, "--model_name_or_path", self.path("distill")],
            "finetune": [
                *("--model_name_or_path", self.path("relational"), "--nli_file", triplets, "--qa_file", pairs),
                *("--paraphrase_file", pairs, "--triplet_file", triplets),
            ],
        }[stage]
        budget = {"max_steps": STEPS, "eval_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 16}
        budget |= {"max_seq_length": 32, "disable_tqdm": "true"}
        places = {"teacher": "teacher", "data_dir": "stsb", "cache_dir": "cache", "output_dir": output}
        given = {name: str(value) for name, value in budget.items()}
        given |= {name: self.path(value) for name, value in places.items()}
        settings = [item for name, value in given.items() for item in (f"--{name}", value)]
        return [str(RECIPES / f"lam_{stage}.yaml"), *files, *settings, *flags]

    def run(self, stage: str, *flags: str, output: str) -> dict:
        """Run a stage."""
        return run_sts.main(self.arguments(stage, *flags, output=output))
