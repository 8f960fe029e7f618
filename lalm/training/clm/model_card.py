# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The model card of a run: its data, command, hardware and measured figures, nothing else."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lalm.training.clm.arguments import ClmTrainingArguments, DataArguments, ModelArguments
from lalm.training.clm.comparison import cells
from lalm.training.clm.data import RunData
from lalm.training.clm.model_builder import count_parameters
from lalm.training.run_facts import command_line, hardware

BODY = """
# {name}

{origin}

## Figures

{figures}

{scoring}

## Data

{data}

## Training

```bash
{command}
```

{training}

Hardware: {hardware}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}"{trust})
model = AutoModelForCausalLM.from_pretrained("{path}"{trust})
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(inputs["input_ids"], max_new_tokens=40)[0]))
```

## Versions

{versions}
"""


def origin(model, arguments: ModelArguments, training: ClmTrainingArguments) -> str:
    """Say where the weights come from."""
    total, embeddings = count_parameters(model)
    trained = training.do_train
    size = f"{total:,} parameters ({embeddings:,} of them token embeddings)"
    kind = f"`{model.config.model_type}` causal language model, {size}"
    if training.stage:
        way = {"transfer": "the outputs of its softmax layers", "distill": "its distribution over the next token"}
        return (
            f"A {kind}, made of the weights of the teacher `{training.teacher}` (licence: "
            f"{licence_of(str(training.teacher))}) and trained to give {way[training.stage]}"
            + (f", further from `{arguments.model_name_or_path}`." if arguments.model_name_or_path else ".")
        )
    if arguments.model_name_or_path:
        what = "trained further from" if trained else "evaluated here as it is in"
        return f"A {kind}, {what} `{arguments.model_name_or_path}`."
    return f"A {kind}, {'trained from scratch' if trained else 'not trained'}."


def licence_of(name: str) -> str:
    """The licence that the card of a folder or Hub model states."""
    try:
        card = ModelCard.load(str(Path(name) / "README.md") if Path(name).exists() else name)
        return str(card.data.license or "not stated")
    except Exception:  # no card, or no network; errors of the Hub's client have no common base
        return "not stated"


def figures_table(results: Mapping[str, float]) -> str:
    """Return the perplexities and accuracies as a table."""
    rows = ["| split | token-level perplexity | token accuracy | tokens scored |", "|---|---|---|---|"]
    labels = {"before": "validation, before training", "eval": "validation", "test": "test"}
    labels |= {f"teacher_{prefix}": f"{label}, the teacher" for prefix, label in labels.items()}
    for prefix, label in labels.items():
        if f"{prefix}_perplexity" in results:
            perplexity, accuracy, scored = (
                results[f"{prefix}_{name}"] for name in ("perplexity", "accuracy", "tokens_scored")
            )
            rows.append(f"| {label} | {perplexity:.2f} | {accuracy:.4f} | {int(scored):,} |")
    return "\n".join(rows) if len(rows) > 2 else "This run was not evaluated."


def cost_line(results: Mapping[str, float]) -> str:
    """Return memory and speed in one line, where they were measured."""
    names = ("cache per sequence", "prefill tokens/s", "decoding tokens/s", "peak memory")
    found = cells(results)
    return "; ".join(f"{name}: {found[name]}" for name in names if name in found)


def scoring(data: DataArguments) -> str:
    """Say which tokens the perplexity covers."""
    unscored = f"the first token of {'each block' if data.eval_stride == data.block_size else 'the text'}"
    if data.packing == "documents":
        unscored += " and the first token of each document"
    return (
        f"Perplexity is exp(sum of -log p / number of scored tokens), per token of this model's own tokenizer, with "
        f"windows of {data.block_size} tokens and stride {data.eval_stride}. Not scored: {unscored}."
    )


def training_facts(training: ClmTrainingArguments, results: Mapping[str, float]) -> str:
    """List the settings and totals of the training."""
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    precision = "bfloat16 autocast" if training.bf16 else "float16 autocast" if training.fp16 else "float32"
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    facts = {
        "steps": f"{int(results['steps']):,}" if "steps" in results else None,
        "tokens seen": f"{int(results['tokens_seen']):,}" if "tokens_seen" in results else None,
        "blocks a step": str(per_step),
        "learning rate": f"{training.learning_rate:g}, {schedule}, warm-up {training.warmup_steps:g}",
        "optimiser": f"{getattr(training.optim, 'value', training.optim)}, weight decay {training.weight_decay:g}, "
        f"betas ({training.adam_beta1:g}, {training.adam_beta2:g})",
        "precision": precision,
        "seed": str(training.seed),
        "final training loss": f"{results['final_loss']:.4f}" if "final_loss" in results else None,
        "speed": f"{results['tokens_per_second']:,.0f} tokens/s" if results.get("tokens_per_second") else None,
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def data_facts(run: RunData) -> str:
    """List the splits: where each comes from and what it became."""
    lines = [f"- {split}: {run.sources[split]}: {note}" for split, note in run.notes.items()]
    return "\n".join([*lines, f"- tokenizer: {len(run.tokenizer):,} tokens"])


def _measured(data: DataArguments, run: RunData, results: Mapping[str, float]) -> list[EvalResult]:
    """The entries of `model-index`: quality of each split that was scored, and what the model costs."""

    def entry(split: str, metric: str, name: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type=data.dataset_name or "text",
            dataset_name=data.dataset_name or Path(run.sources[split]).name,
            dataset_config=data.dataset_config_name,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )

    scored = [
        (prefix, split)
        for prefix, split in (("eval", "validation"), ("test", "test"))
        if f"{prefix}_perplexity" in results
    ]
    found = [
        entry(split, metric, f"token-level {metric}", results[f"{prefix}_{metric}"])
        for prefix, split in scored
        for metric in ("perplexity", "accuracy")
        if f"{prefix}_{metric}" in results
    ]
    if not (scored and results.get("context")):
        return found
    tokens = f"{results['context']:,} tokens"
    names = {
        "cache_bytes": f"bytes of cache per sequence after {tokens}",
        "prefill_tokens_per_second": f"prefill of {tokens}, tokens/s",
        "decode_tokens_per_second": f"decoding after {tokens}, tokens/s",
        "peak_memory_bytes": f"peak memory of a prefill of {tokens}, bytes",
    }
    measured = {key: name for key, name in names.items() if results.get(key) is not None}
    split = scored[-1][1]
    return found + [entry(split, key, f"{name} ({hardware()})", results[key]) for key, name in measured.items()]


def front_matter(network, run: RunData, arguments, results: Mapping[str, float]) -> str:
    """Return the card's YAML head for the Hub, with the figures as its `model-index`."""
    model, data, training = arguments
    name = Path(str(training.hub_model_id or training.output_dir)).name
    model_type = network.config.model_type
    # a local folder is no model the Hub could link to
    is_remote = model.model_name_or_path and not Path(model.model_name_or_path).exists()
    head = ModelCardData(
        license=training.license,
        language=training.language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in ("lalm" if model_type.startswith("lalm_") else None, model_type) if tag],
        datasets=[data.dataset_name] if data.dataset_name else None,
        base_model=model.model_name_or_path if is_remote else None,
        model_name=name,
        eval_results=_measured(data, run, results),
    )
    return f"---\n{head.to_yaml()}\n---\n"


def model_card(
    network,
    run: RunData,
    arguments: tuple[ModelArguments, DataArguments, ClmTrainingArguments],
    results: Mapping[str, float],
    argv: list[str],
) -> str:
    """Return the text of README.md.

    Args:
        network: the trained model.
        results: ``<before|eval|test>_<perplexity|accuracy|tokens_scored>``, steps, tokens_seen, tokens_per_second ...
        argv: the command line after the script's name.
    """
    model, data, training = arguments
    path = training.hub_model_id or training.output_dir
    versions = {"Python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return front_matter(network, run, arguments, results) + BODY.format(
        name=Path(str(path)).name,
        origin=origin(network, model, training),
        figures="\n\n".join(filter(None, [figures_table(results), cost_line(results)])),
        scoring=scoring(data),
        data=data_facts(run),
        command=command_line(argv, training.script),
        training=training_facts(training, results) if training.do_train else "Nothing was trained.",
        hardware=hardware(),
        path=path,
        # with lalm installed and imported the flag is not needed; the reader of a card may have neither
        trust=", trust_remote_code=True" if type(network).__module__.split(".")[0] not in ("transformers",) else "",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )
