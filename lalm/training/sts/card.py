# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The figures of a run of run_sts.py, and its model card: that of sentence-transformers with a part of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from sentence_transformers.base.model_card import generate_model_card

from lalm.training.run_facts import command_line, hardware
from lalm.training.sts.arguments import StsTrainingArguments
from lalm.training.sts.data import HUB_NAME
from lalm.training.sts.losses import backbone
from lalm.training.sts.stages import Arguments
from lalm.training.sts.tasks import CAVEAT, TASKS

EXAMPLES = ["A child feeds ducks at the pond.", "A girl gives bread to the ducks.", "The train was late again."]
METRIC = "eval_sts-dev_pearson_cosine"
PREFIXES = {"validation": "eval", "test": "test"} | {name: name for name in TASKS}
OURS = """## Figures

{figures}

Cosine of the vectors against {source}; percentile bootstrap over the pairs, which does not cover the training seed. \
{choice}{test}.{caveat}

## Data

{data}

## Training

```bash
{command}
```

{training}

"""


class StsCardData(SentenceTransformerModelCardData):
    """Card data without rows of the training data, many of which may not be passed on; its snippet runs."""

    path: str = ""

    def set_widget_examples(self, dataset: Any) -> None:
        """Show sentences of ours."""
        examples: list[Any] = [{"source_sentence": EXAMPLES[0], "sentences": EXAMPLES[1:]}]
        self.widget = examples
        self.usage_examples = EXAMPLES

    def _render_examples_table(self, dataset_info: dict, asset_counter: int = 0) -> tuple[str, int]:
        dataset_info.pop("examples", None)
        return "", asset_counter

    def generate_usage_snippet(self) -> str:
        """As in the library, with our path and the flag that a model with its own code needs."""
        stock = 'SentenceTransformer("sentence_transformers_model_id")'
        snippet = super().generate_usage_snippet().replace("# Download from the 🤗 Hub\n", "")
        return snippet.replace(stock, f'SentenceTransformer("{self.path}", trust_remote_code=True)')


def describe(model: SentenceTransformer, arguments: Arguments, notes: Mapping[str, str]) -> None:
    """Give a model the card data of this run; nothing is looked up on the Hub."""
    model_arguments, _, training = arguments
    several = training.stage == "finetune"
    names = list(notes) if several else [", ".join(Path(name).name for name in notes)]
    card = StsCardData(
        language=training.language or "en",
        license=training.license,
        model_name=f"{training.folder.name} ({type(backbone(model)).__name__}, stage {training.stage})",
        train_datasets=[{"name": name} for name in names],
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "dense", "lalm"],
        local_files_only=True,
        generate_widget_examples=False,
    )
    card.path = str(training.hub_model_id or training.output_dir)
    start = model_arguments.model_name_or_path or model_arguments.teacher
    if not Path(start).exists():
        card.base_model = start
    model.model_card_data = card
    card.register_model(model)


def flat_figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of `evaluate_model` with the splits as prefixes: eval_pearson, test_spearman_low ..."""
    return {
        f"{PREFIXES.get(split, split)}_{name}": value
        for split, figures in results.items()
        for name, value in figures.items()
    }


def sts_training_figures(trainer: Any) -> dict[str, Any]:
    """Return steps, speed, losses and the best and first Pearson on dev of a training."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    speeds = [entry["rows_per_second"] for entry in history if "rows_per_second" in entry]
    figures: dict[str, Any] = {
        "stage": trainer.args.stage,
        "steps": trainer.state.global_step,
        "train_seconds": round(trainer.throughput.seconds, 1),
        "rows_per_second": speeds[-1] if speeds else 0,
        "stopped_early": trainer.state.global_step < trainer.state.max_steps,
    }
    if losses:
        figures |= {"first_loss": losses[0], "final_loss": losses[-1]}
    before = next((entry for entry in history if entry["step"] == 0 and METRIC in entry), None)
    if before:
        figures["before_pearson"] = before[METRIC]
    if trainer.state.best_metric is not None:
        chosen_by = str(trainer.args.metric_for_best_model).removeprefix("eval_sts-dev_").removesuffix("_cosine")
        figures |= {f"best_{chosen_by}": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
    return figures


def figures_table(results: Mapping[str, Any]) -> str:
    """Return the correlations of the splits as a table."""
    rows = ["| split | pairs | Pearson [95 % interval] | Spearman [95 % interval] |", "|---|---|---|---|"]
    for split, prefix in PREFIXES.items():
        if f"{prefix}_pearson" not in results:
            continue
        cells = [
            f"{results[f'{prefix}_{name}']:.4f} [{results[f'{prefix}_{name}_low']:.4f}, "
            f"{results[f'{prefix}_{name}_high']:.4f}]"
            for name in ("pearson", "spearman")
        ]
        rows.append(f"| {split} | {results[f'{prefix}_n']:,} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows) if len(rows) > 2 else "This run was not evaluated."


def training_facts(arguments: Arguments, notes: Mapping[str, str], results: Mapping[str, Any]) -> str:
    """List the settings of the training."""
    model, data, training = arguments
    terms = {term: weight for term, weight in training.loss_weights.items() if weight}
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    saved = "float32" if model.save_dtype == "auto" else model.save_dtype
    mixture = ", ".join(f"{kind} {share:g}" for kind, share in data.shares.items() if kind in notes)
    penalties = {"orthogonal": training.orthogonal_weight, "retention": training.retention_weight or 0}
    facts = {
        "stage": training.stage,
        "start": model.model_name_or_path or f"`{model.teacher}`, made linear",
        "teacher": f"`{model.teacher}`" if terms else None,
        "loss": ", ".join(f"{weight:g} x {term}" for term, weight in terms.items()) or None,
        "mixture": mixture if training.stage == "finetune" else None,
        "penalties": ", ".join(f"{weight:g} x {name}" for name, weight in penalties.items() if weight) or None,
        "not trained": ", ".join(f"`{part}`" for part in model.freeze or []) or None,
        "steps": f"{results['steps']:,}" if "steps" in results else None,
        "rows a step": str(per_step),
        "learning rate": f"{training.learning_rate:g}, {schedule}, warm-up {training.warmup_steps:g}",
        "longest training text": f"{training.max_seq_length} tokens",
        "precision": f"{'bfloat16 autocast' if training.bf16 else 'float32'}, saved as {saved}",
        "seed": str(training.seed),
        "hardware": hardware(),
        "Pearson on validation before training": _number(results, "before_pearson"),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def _number(results: Mapping[str, Any], name: str) -> str | None:
    return f"{results[name]:.4f}" if name in results else None


def sts_card(
    model: SentenceTransformer,
    arguments: Arguments,
    notes: Mapping[str, str],
    source: str,
    results: Mapping[str, Any],
    argv: list[str],
) -> str:
    """Return the text of README.md.

    Args:
        notes: what is said of every part of the training data.
        source: where the scored pairs come from.
        results: `flat_figures` and `sts_training_figures`.
        argv: the command line after the script's name.
    """
    training: StsTrainingArguments = arguments[2]
    best = training.load_best_model_at_end
    ours = OURS.format(
        figures=figures_table(results),
        source=source,
        choice="The best checkpoint is chosen on validation" if best else "The last step's weights are kept",
        test=", test is scored once at the end" if training.do_test else "",
        caveat=f"\n\n{CAVEAT}." if arguments[1].tasks else "",
        data="\n".join(f"- {name}: {note}" for name, note in notes.items()),
        command=command_line(argv, training.script),
        training=training_facts(arguments, notes, results),
    )
    text = generate_model_card(model)
    head, mark, rest = text.partition("## Model Details")
    card = ModelCard(head + ours + mark + rest)
    data: Any = card.data
    data.model_name = training.folder.name
    data.eval_results = [
        EvalResult(
            task_type="semantic-similarity",
            task_name="Semantic Similarity",
            dataset_type=TASKS.get(split) or (HUB_NAME if HUB_NAME in source else "sts"),
            dataset_name=split if split in TASKS else source,
            dataset_split="test" if split in TASKS else split,
            metric_type=f"{metric}_cosine",
            metric_value=results[f"{prefix}_{metric}"],
        )
        for split, prefix in PREFIXES.items()
        for metric in ("pearson", "spearman")
        if f"{prefix}_{metric}" in results
    ]
    return str(card)
