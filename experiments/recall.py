# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Recall against memory and speed: train small models on multi-query associative recall, then ask what each can hold.

    python -m experiments.recall recipes/recall.yaml --output_dir runs/recall

Every model of the plan is trained once a learning rate with the stock Trainer; the rate with the best validation
accuracy is trained with the other seeds too, and only these runs are scored on test. Then the bytes that a cache holds
of a text, and the tokens a second of decoding after it, are measured in one process. The same command again repeats no
run that is finished. results.json, recall.png and a table come out.

Task: Zoology (Arora et al., arXiv 2312.04927, section 4). Recall against state size: Based (Arora et al., arXiv
2402.18668, figure 2).
"""

import argparse
import dataclasses
import math
import os
import re
import statistics
import typing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, logging, set_seed

import lalm  # noqa: F401  registers our models
from benchmarks.machine import describe
from benchmarks.timing import Calls, alternate, spread
from lalm.errors import UserError, exit_on_user_error, nearest_hint, one_line
from lalm.recall.task import evaluate_recall, multi_query_associative_recall
from lalm.training.clm.decoding import decoding_error, decoding_seconds, read_texts, state_bytes
from lalm.training.clm.model_builder import config_class_of, config_field_names
from lalm.training.recipe import read_recipe
from lalm.training.results import read_json, write_json

WEIGHT_DECAY = 0.1  # of both papers
TOLERANCE = 1e-4  # float32, of the logits of decoding against those of one forward
# No two splits share a seed, whatever the seed of the run.
TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 1_000_000, 1, 2


@dataclasses.dataclass
class Plan:
    """What is trained and asked; the fields are those of the recipe.

    Args:
        vocab_size: tokens of the task and of the models.
        train_length: tokens of a text in training and validation; numbers of pairs below.
        train_pairs: key-value pairs of a text; every number has as many texts.
        train_texts: training texts of each of these.
        test: (length, pairs) of the test slices.
        evaluation_texts: validation and test texts a slice.
        batch_size: texts a step.
        max_steps: steps of a run, the first tenth of them warm-up, the rate falling by a cosine to 0.
        learning_rates: tried with the first seed.
        seeds: of weights, order and training texts.
        decode_after: tokens that have been read when decoding is timed.
        decode_batch: texts decoded side by side.
        decode_steps: tokens of each in one sample.
        decode_seconds: time for all samples together; three rounds at least.
        sizes: fields of every configuration.
        models: fields of each one's own, `model_type` among them; a name begins with its family, "based f=8".
    """

    vocab_size: int
    train_length: int
    train_pairs: list[int]
    train_texts: int
    test: list[list[int]]
    evaluation_texts: int
    batch_size: int
    max_steps: int
    learning_rates: list[float]
    seeds: list[int]
    sizes: dict[str, Any]
    models: dict[str, dict[str, Any]]
    decode_after: int = 256
    decode_batch: int = 64
    decode_steps: int = 16
    decode_seconds: float = 60.0

    @classmethod
    def read(cls, path: str) -> "Plan":
        """The plan in a YAML or JSON file.

        Raises:
            UserError: the file is broken, or a field is unknown, missing or does not fit.
        """
        fields = dataclasses.fields(cls)
        recipe = read_recipe(path, [field.name for field in fields])
        missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in recipe]
        if missing:
            raise UserError(f"the recipe {path} lacks {', '.join(missing)}")
        plan = cls(**recipe)
        plan.check_values()
        for name in plan.models:
            plan.config(name)
        return plan

    def check_values(self) -> None:
        """Refuse what cannot be trained or asked, before anything is."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected: Any = typing.get_origin(field.type) or field.type
            if not isinstance(value, (int, float) if expected is float else expected) or not value:
                raise UserError(f"{field.name} must be of type {expected.__name__} and not empty or 0, got {value!r}")
            if expected in (int, float) and value < 0:
                raise UserError(f"{field.name} must be positive, got {value}")
        if not all(isinstance(rate, float) and rate > 0 for rate in self.learning_rates):
            raise UserError(f"learning_rates must be positive numbers such as 1.0e-3, got {self.learning_rates}")
        if not all(isinstance(seed, int) and seed > 0 for seed in self.seeds):
            raise UserError(f"seeds must be 1 or more, since validation and test draw from below, got {self.seeds}")
        try:
            for length, pairs in [*self.training_slices(), *self.test]:
                self.texts(length, pairs, 1, 0)
        except (TypeError, ValueError) as error:
            raise UserError(f"train_length, train_pairs and test do not fit: {one_line(error)}") from None

    def config(self, name: str) -> Any:
        """The configuration of one model of the plan."""
        fields = self.sizes | self.models[name]
        if "model_type" not in fields:
            raise UserError(f"models: {name} has no model_type")
        config_class = config_class_of(fields.pop("model_type"))
        unknown = [field for field in fields if field not in (names := config_field_names(config_class))]
        if unknown:
            raise UserError(f"models: {name} has no field '{unknown[0]}'{nearest_hint(unknown[0], names)}")
        try:
            return config_class(vocab_size=self.vocab_size, **fields)
        except Exception as error:
            raise UserError(f"models: {name}: {one_line(error)}") from None

    def texts(self, length: int, pairs: int, count: int, seed: int) -> Dataset:
        """One slice of the task."""
        return multi_query_associative_recall(self.vocab_size, count, length, pairs, seed=seed)

    def training_slices(self) -> list[list[int]]:
        return [[self.train_length, pairs] for pairs in self.train_pairs]

    def scores(self, model: Any, slices: list[list[int]], seed: int) -> dict[str, float]:
        """Accuracy by slice, "64/4" for 64 tokens and 4 pairs."""
        return {
            f"{length}/{pairs}": round(
                evaluate_recall(model, self.texts(length, pairs, self.evaluation_texts, seed), self.batch_size), 5
            )
            for length, pairs in slices
        }


class Runs:
    """The runs of a plan in a folder: `<output_dir>/<model>/lr<rate>-seed<seed>/`, each with its run.json."""

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder = plan, folder

    def place(self, name: str, rate: float, seed: int) -> Path:
        return self.folder / re.sub(r"[^\w.]+", "_", name) / f"lr{rate:g}-seed{seed}"

    def settings(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """All that a run follows from."""
        plan = self.plan
        names = ("vocab_size", "train_length", "train_pairs", "train_texts", "evaluation_texts", "batch_size")
        common = {field: getattr(plan, field) for field in (*names, "max_steps")}
        return common | {"learning_rate": rate, "seed": seed, "model": plan.sizes | plan.models[name]}

    def finished(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """What a run noted, nothing if it has not come to its end.

        Raises:
            UserError: it followed from other settings.
        """
        place, settings = self.place(name, rate, seed), self.settings(name, rate, seed)
        run = read_json(place / "run.json")
        other = [field for field, value in settings.items() if run and run["settings"].get(field) != value]
        if other:
            raise UserError(f"{place} was trained with another {', '.join(other)}; choose a new --output_dir")
        return run

    def run(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """A finished run, trained now if it is not there. Its run.json is written last."""
        run = self.finished(name, rate, seed)
        if not run:
            place = self.place(name, rate, seed)
            model, figures = train(self.plan, name, rate, seed, place)
            figures["validation"] = self.plan.scores(model, self.plan.training_slices(), VALIDATION_SEED)
            model.save_pretrained(place)
            run = {"settings": self.settings(name, rate, seed), **figures}
            write_json(place / "run.json", run)
            print(f"{place}: validation {mean(run['validation']):.3f}, {run['seconds']:.0f} s", flush=True)
        return run

    def load(self, name: str, rate: float, seed: int) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.place(name, rate, seed)).eval()

    def tested(self, name: str, rate: float, seed: int) -> dict[str, float]:
        """Test accuracy by slice, measured once."""
        path, slices = self.place(name, rate, seed) / "test.json", self.plan.test
        scores = read_json(path)
        if scores.keys() != {f"{length}/{pairs}" for length, pairs in slices}:
            scores = self.plan.scores(self.load(name, rate, seed), slices, TEST_SEED)
            write_json(path, scores)
        return scores


def mean(scores: dict[str, float]) -> float:
    return statistics.mean(scores.values())


def train(plan: Plan, name: str, rate: float, seed: int, place: Path) -> tuple[Any, dict[str, Any]]:
    """A trained model, and parameters, seconds and losses of its run."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(plan.config(name))
    slices = enumerate(plan.training_slices())
    texts = concatenate_datasets(
        [plan.texts(length, pairs, plan.train_texts, TRAIN_SEED * seed + i) for i, (length, pairs) in slices]
    )
    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=plan.max_steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.max_steps // 10,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        logging_steps=max(1, plan.max_steps // 20),
        save_strategy="no",
        report_to=[],
        disable_tqdm=False,  # the bar of a run tells how long the rest of it takes
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=texts)
    trainer.remove_callback(PrinterCallback)
    done = trainer.train()
    losses = {str(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model, {"parameters": parameters, "seconds": done.metrics["train_runtime"], "losses": losses}


def cost(runs: Runs, chosen: dict[str, float]) -> dict[str, dict[str, Any]]:
    """By model: bytes of a text's cache after the lengths of the test, and samples of tokens decoded a second.

    The models take turns, so that what disturbs the machine disturbs all alike. Each is first held against its own
    forward pass over the whole text.

    Raises:
        UserError: a model decodes something else than it computes at once.
    """
    plan, costs = runs.plan, {}
    timed: Calls = {}
    lengths = sorted({length for length, _ in plan.test} | {plan.decode_after})
    for name, rate in chosen.items():
        model = runs.load(name, rate, plan.seeds[0])
        ids = torch.randint(plan.vocab_size, (plan.decode_batch, max(lengths)), generator=torch.manual_seed(0))
        error = decoding_error(model, ids[:2, : plan.decode_after], min(8, plan.decode_after - 1))
        if not error <= TOLERANCE:
            raise UserError(f"{name}: logits while decoding are off by {error:.1e}, over {TOLERANCE:.0e}")
        held = {str(length): state_bytes(read_texts(model, ids[:2, :length])) for length in lengths}
        costs[name] = {"state_bytes": held, "decoding_error": error}
        cache, last = read_texts(model, ids[:, : plan.decode_after]), ids[:, -1:]
        timed[name] = partial(decoding_seconds, model, cache, last, plan.decode_steps)
    for name, seconds in alternate(timed, plan.decode_seconds).items():
        rates = spread(plan.decode_batch * plan.decode_steps / sample for sample in seconds)
        costs[name]["decode_tokens_per_second"] = {k: round(v, 1) for k, v in rates._asdict().items()}
    return costs


def evaluate(plan: Plan, folder: Path) -> dict[str, Any]:
    """Train what is missing, choose the rates on validation, score on test, measure the cost."""
    runs, chosen, models = Runs(plan, folder), {}, {}
    for name in plan.models:
        tried = {rate: mean(runs.run(name, rate, plan.seeds[0])["validation"]) for rate in plan.learning_rates}
        chosen[name] = max(tried, key=tried.__getitem__)
        done = [runs.run(name, chosen[name], seed) for seed in plan.seeds]
        models[name] = {
            "parameters": done[0]["parameters"],
            "learning_rate": chosen[name],
            "validation_by_rate": {str(rate): round(score, 5) for rate, score in tried.items()},
            "train_seconds": [run["seconds"] for run in done],
            "test": [runs.tested(name, chosen[name], seed) for seed in plan.seeds],
        }
    for name, found in cost(runs, chosen).items():
        models[name] |= found
    return {"plan": dataclasses.asdict(plan), "machine": describe(), "models": models}


def table(results: dict[str, Any]) -> str:
    """Markdown, a row a model: test accuracy (mean of the seeds, least and greatest), bytes, tokens/s (quartiles)."""
    models, plan = results["models"], results["plan"]
    slices = [f"{length}/{pairs}" for length, pairs in plan["test"]]
    longest = str(max(length for length, _ in plan["test"]))
    head = ["model", "parameters", "rate", *slices, f"bytes after {longest}"]
    head.append(f"tokens/s after {plan['decode_after']}")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, model in models.items():
        cells = [name, f"{model['parameters']:,}", f"{model['learning_rate']:g}"]
        cells += [span([seed[one] for seed in model["test"]]) for one in slices]
        speed = model["decode_tokens_per_second"]
        cells += [
            f"{model['state_bytes'][longest]:,}",
            f"{speed['median']:,.0f} ({speed['q1']:,.0f}-{speed['q3']:,.0f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(scores: list[float]) -> str:
    """Mean, and least and greatest where there are several."""
    middle = f"{statistics.mean(scores):.3f}"
    return middle if len(scores) == 1 else f"{middle} ({min(scores):.3f}-{max(scores):.3f})"


def panels(results: dict[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By title, and by family in it: (KiB after as many tokens, value) of each model."""
    plan, drawn = results["plan"], {}
    hardest = [plan["train_length"], max(plan["train_pairs"])]
    for length, pairs in [one for one in (hardest, plan["test"][-1]) if one in plan["test"]]:
        key = f"{length}/{pairs}"
        drawn[f"recall, {length} tokens, {pairs} pairs"] = points(
            results, length, lambda model, key=key: statistics.mean(seed[key] for seed in model["test"])
        )
    after = plan["decode_after"]
    drawn[f"tokens/s of {plan['decode_batch']} texts, after {after}"] = points(
        results, after, lambda model: model["decode_tokens_per_second"]["median"]
    )
    return drawn


def points(results: dict[str, Any], length: int, value: Any) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for name, model in results["models"].items():
        found.setdefault(name.split()[0], []).append((model["state_bytes"][str(length)] / 1024, value(model)))
    return {family: sorted(pairs) for family, pairs in found.items()}


def draw(results: dict[str, Any], path: Path) -> None:
    """Recall and speed of decoding over the bytes of a text's cache; the old picture stays until the new is whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = panels(results)
    figure = Figure(figsize=(4.6 * len(drawn), 4), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, families) in zip(places, drawn.items(), strict=True):
        for family, pairs in families.items():
            style = {"color": "black"} if family == "llama" else {}
            axes.plot(*zip(*pairs, strict=True), "o-", markersize=4, label=family, **style)
        axes.set(title=title, xscale="log", xlabel="KiB of cache a text", ylim=(0, None))
        low, high = (bound(x for pairs in families.values() for x, _ in pairs) for bound in (min, max))
        ticks = [2**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    places[-1].legend(fontsize="small", loc="lower left")
    machine = results["machine"]
    figure.suptitle(f"{machine['hardware']['cpu']}, {machine['threads']} thread(s), {machine['date'][:10]}")
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    os.replace(part, path)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then write the figures and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help="YAML or JSON file with the fields of Plan, as recipes/recall.yaml")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recall"))
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    plan = Plan.read(arguments.plan)
    runs = len(plan.models) * (len(plan.learning_rates) + len(plan.seeds) - 1)
    print(f"{runs} runs of {plan.max_steps:,} steps, one after the other; those that are finished are not repeated")
    results = evaluate(plan, arguments.output_dir)
    write_json(arguments.output_dir / "results.json", results)
    draw(results, arguments.output_dir / "recall.png")
    print(f"\n{table(results)}\n\n{arguments.output_dir}: results.json, recall.png")


if __name__ == "__main__":
    exit_on_user_error(main)
