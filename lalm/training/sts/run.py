# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What run_sts.py and `lalm-sts` do: train a stage, or score a model."""

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, set_seed

import lalm  # noqa: F401  registers our models with AutoConfig and AutoModel
from lalm.errors import extra_needed
from lalm.network import go_offline_without_network
from lalm.training.checkpoints import check_output_dir, check_results_dir, check_text, claim_output_dir, run_record
from lalm.training.hub_push import check_hub
from lalm.training.logs import set_up_logging
from lalm.training.loss_curve import write_loss_curve
from lalm.training.results import read_json, save_results
from lalm.training.tracking import check_trackers

with extra_needed("run_sts.py", "sts"):
    from lalm.training.sts.arguments import StsDataArguments, parse_sts_arguments
    from lalm.training.sts.card import describe, flat_figures, sts_card, sts_training_figures
    from lalm.training.sts.data import StsSplits, load_stsb
    from lalm.training.sts.evaluation import STATISTICS, check_defined, check_scores, evaluate_model
    from lalm.training.sts.sources import TrainingData, collect
    from lalm.training.sts.stages import Arguments, Stage, build_stage, load_model
    from lalm.training.sts.tasks import CAVEAT, TASKS, load_tasks
    from lalm.training.sts.teacher import load_teacher
    from lalm.training.sts.trainer import StsTrainer, dev_evaluator

logger = logging.getLogger("lalm.training")

# of a clone; an installed lalm has none
DEFAULT_MODEL = Path(__file__).resolve().parents[3] / "checkpoints" / "lam-minilm-l6"


def build_trainer(stage: Stage, found: TrainingData, splits: StsSplits, arguments: Arguments, argv, results):
    """Return the Trainer of a stage."""
    _, data, training = arguments
    describe(stage.model, arguments, found.notes)

    def write_card(trainer: StsTrainer) -> None:
        card = sts_card(stage.model, arguments, found.notes, splits.source, results, argv)
        (training.folder / "README.md").write_text(card, encoding="utf-8")

    patience = training.early_stopping_patience
    return StsTrainer(
        model=stage.model,
        args=training,
        train_dataset=stage.train_dataset,
        loss=stage.loss,
        shares=stage.shares,
        row_order=data.row_order,
        evaluator=dev_evaluator(splits["validation"], training),
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
        write_card=write_card,
    )


def train(trainer: StsTrainer, checkpoint: str | None, dtype: str, results: dict) -> None:
    """Train (or resume), save the model, and gather the figures."""
    earlier = {}
    if checkpoint and trainer.is_over(checkpoint):
        logger.info("%s is the end of the training: nothing is left to train", checkpoint)
        trainer.restore(checkpoint)
        earlier = read_json(trainer.args.folder / "train_results.json")
    else:
        trainer.args.eval_on_start &= checkpoint is None  # a resumed run has that evaluation in its history
        trainer.train(resume_from_checkpoint=checkpoint)
    if dtype != "auto":
        trainer.accelerator.unwrap_model(trainer.model).to(getattr(torch, dtype))
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    shutil.rmtree(trainer.args.folder / "eval", ignore_errors=True)  # made for a file that we do not want
    results |= sts_training_figures(trainer) | earlier
    if trainer.is_world_process_zero():
        save_results(trainer.args.folder, "train", results)


def sets_to_score(splits: StsSplits, names: Sequence[str], data: StsDataArguments) -> dict[str, Dataset]:
    """Return the splits `names` of STS-B, and the test sets of --tasks."""
    check_scores(splits, names, splits.source)
    tasks = load_tasks(data.tasks or (), data.tasks_dir)
    check_scores(tasks, list(tasks), "--tasks")
    return {name: splits[name] for name in names} | tasks


def evaluate(model, title: str, scored: dict[str, Dataset], arguments: Arguments, results: dict) -> None:
    """Score sets of pairs, print the table, draw the plots and keep the figures."""
    model_arguments, _, training = arguments
    baseline = model_arguments.baseline
    second = load_model(baseline, model_arguments, str(model.device), "--baseline") if baseline else None
    shown = training.folder, title, baseline or ""
    found = evaluate_model(
        model.eval(), scored, second, *shown, training.per_device_eval_batch_size, seed=training.seed
    )
    check_defined(found, was_trained=bool(training.stage))
    results |= flat_figures(found)
    if tasks := [figures for name, figures in found.items() if name in TASKS]:
        means = {statistic: sum(figures[statistic] for figures in tasks) / len(tasks) for statistic in STATISTICS}
        print(f"mean of {len(tasks)} tasks: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
        results |= {f"tasks_{name}": mean for name, mean in means.items()}
        logger.warning("%s.", CAVEAT)
    for name, figures in found.items():
        save_results(training.folder, {"validation": "eval"}.get(name, name), flat_figures({name: figures}))


def run_stage(arguments: Arguments, argv: list[str], results: dict) -> None:
    """Train one stage, evaluate its model and write the card."""
    model_arguments, data, training = arguments
    checkpoint = check_output_dir(record := run_record(*arguments), training)
    check_hub(training)
    set_seed(training.seed)
    splits, hub = load_stsb(data.data_dir), {"cache_dir": model_arguments.cache_dir, "token": model_arguments.token}
    scored = sets_to_score(splits, ["validation", "test"][: 1 + training.do_test], data)
    found = collect(str(training.stage), data, splits, training.seed, hub)
    for name, note in found.notes.items():
        logger.info("%s: %s", name, note)
    check_text(record, found.digest, checkpoint, training)
    stage = build_stage(arguments, found)
    trainer = build_trainer(stage, found, splits, arguments, argv, results)
    if trainer.is_world_process_zero():
        claim_output_dir(record, training)
    trainer.accelerator.wait_for_everyone()
    train(trainer, checkpoint, model_arguments.save_dtype, results)
    if trainer.is_world_process_zero():
        evaluate(stage.model, training.folder.name, scored, arguments, results)
        write_loss_curve(trainer.state.log_history, training.folder / "loss_curve.png", training.folder.name, "")
        trainer.create_model_card()
        print(f"results are in {training.folder}", flush=True)
    if training.push_to_hub:
        trainer.push_to_hub()


def main(argv: list[str] | None = None) -> dict:
    """Run what the command line asks for and return the figures."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = model_arguments, data, training = parse_sts_arguments(argv)
    set_up_logging(training)
    check_trackers(training.trackers)
    go_offline_without_network()
    results: dict = {}
    if training.stage:
        run_stage(arguments, argv, results)
    else:
        check_results_dir(training.folder, model_arguments.model_name_or_path)
        splits = load_stsb(data.data_dir, ("validation", "test"))
        scored = sets_to_score(splits, ["validation", "test"], data)
        name = model_arguments.model_name_or_path or (str(DEFAULT_MODEL) if DEFAULT_MODEL.exists() else None)
        device = "cpu" if training.use_cpu else None
        if name:
            model = load_model(name, model_arguments, device, "--model_name_or_path")
        else:
            model = load_teacher(model_arguments.teacher, device=device, cache_dir=model_arguments.cache_dir)
        logger.info("%s on %s", name or model_arguments.teacher, splits.source)
        evaluate(model, Path(name or model_arguments.teacher).name, scored, arguments, results)
        print(f"results are in {training.folder}")
    return results
