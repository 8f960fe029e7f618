# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What run_clm.py and `lalm-clm` do: build data, model and Trainer, train, evaluate, report."""

import copy
import gc
import logging
import sys
from pathlib import Path

from transformers import set_seed

import lalm  # noqa: F401  registers our models with AutoConfig and AutoModelForCausalLM
from lalm.errors import UserError, one_line
from lalm.network import go_offline_without_network
from lalm.training.checkpoints import check_output_dir, check_results_dir, check_text, claim_output_dir, run_record
from lalm.training.clm.arguments import parse_arguments
from lalm.training.clm.comparison import bits_per_byte, cost_figures, write_comparison
from lalm.training.clm.data import RunData, prepare_data
from lalm.training.clm.decoding import COST_KEYS
from lalm.training.clm.linearise import Stage, build_stage, check_stage, report_stage, score_teacher
from lalm.training.clm.model_builder import build_model
from lalm.training.clm.model_card import model_card
from lalm.training.clm.model_checks import check_model
from lalm.training.clm.packing import PackingCollator
from lalm.training.clm.trainer import ClmTrainer
from lalm.training.divergence import check_last_loss, check_learned
from lalm.training.hub_push import check_hub
from lalm.training.logs import set_up_logging
from lalm.training.loss_curve import write_loss_curve
from lalm.training.results import EVALUATION_KEYS, read_json, save_results, summary_lines, training_figures
from lalm.training.tracking import check_trackers

logger = logging.getLogger("lalm.training")


def build_trainer(arguments, data, argv: list[str], results: dict, stage: Stage | None = None) -> ClmTrainer:
    """Build the model, or take that of the stage, and its Trainer."""
    model_arguments, data_arguments, training = arguments
    set_seed(training.seed)
    model = stage.student if stage else build_model(model_arguments, data.tokenizer, data_arguments.block_size)
    pad = data.tokenizer.pad_token_id if data.tokenizer.pad_token_id is not None else data.tokenizer.eos_token_id

    def write_card(trainer: ClmTrainer) -> None:
        card = model_card(trainer.accelerator.unwrap_model(trainer.model), data, arguments, results, argv)
        (training.folder / "README.md").write_text(card, encoding="utf-8")

    try:
        return ClmTrainer(
            model=model,
            args=training,
            train_dataset=data.splits.get("train"),
            eval_dataset=data.splits.get("validation"),
            data_collator=PackingCollator(data_arguments.block_size, pad or 0),
            processing_class=data.tokenizer,
            data=data_arguments,
            write_card=write_card,
        )
    except (ValueError, ImportError, OSError) as error:
        # options that only the Trainer holds against each other, and packages that it misses
        raise UserError(one_line(error)) from error


def train(trainer: ClmTrainer, checkpoint: str | None, results: dict, stage: Stage | None = None) -> None:
    """Train (or resume), save the model, and gather the figures."""
    if checkpoint and trainer.is_over(checkpoint):
        logger.info("%s is the end of the training: nothing is left to train", checkpoint)
        trainer.restore(checkpoint)
    else:
        trainer.args.eval_on_start &= checkpoint is None  # a resumed run has that evaluation in its history
        trainer.train(resume_from_checkpoint=checkpoint)
    if not (trainer.args.do_eval or trainer.args.stage):  # of a stage the loss is no cross-entropy
        check_last_loss(trainer.vocab_size, trainer.state.log_history)
    if stage:
        stage.finish()
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    figures = training_figures(trainer)
    if not figures["train_seconds"]:
        # the run was complete already: keep the speed that was measured then
        earlier = read_json(trainer.args.folder / "train_results.json")
        figures |= {key: earlier[key] for key in ("tokens_per_second", "train_seconds") if key in earlier}
    results |= figures
    if trainer.is_world_process_zero():
        save_results(trainer.args.folder, "train", figures)


def evaluate(trainer: ClmTrainer, data: RunData, data_arguments, results: dict) -> None:
    """Score the splits asked for and gather their figures, with the window they hold for; measure memory and speed."""
    wanted = (("eval", "validation", trainer.args.do_eval), ("test", "test", trainer.args.do_test))
    for prefix, split in ((prefix, split) for prefix, split, asked in wanted if asked and split in data.splits):
        dataset = data.splits[split]
        metrics = trainer.evaluate(dataset, metric_key_prefix=prefix)
        if trainer.args.do_train:
            check_learned(metrics[f"{prefix}_loss"], trainer.vocab_size, trainer.state.log_history)
        results |= {f"{prefix}_{key}": metrics[f"{prefix}_{key}"] for key in EVALUATION_KEYS}
        results |= {f"{prefix}_block_size": data_arguments.block_size, f"{prefix}_stride": data_arguments.eval_stride}
        results[f"{prefix}_bits_per_byte"] = bits_per_byte(results[f"{prefix}_loss"], dataset, data.tokenizer)
        if data_arguments.measure_tokens and "parameters" not in results:
            results |= cost_figures(trainer, dataset, data_arguments.measure_tokens)


def save_scores(folder: Path, results: dict) -> None:
    """Write what `evaluate` gathered: a file for each split, and one for memory and speed."""
    for prefix in ("eval", "test"):
        if figures := {key: value for key, value in results.items() if key.startswith(f"{prefix}_")}:
            save_results(folder, prefix, figures)
    if figures := {key: results[key] for key in COST_KEYS if key in results}:
        save_results(folder, "cost", figures)


def report(trainer: ClmTrainer, results: dict) -> None:
    """Draw the loss curve, write the card, print the closing lines, and push if asked."""
    folder, trains = trainer.args.folder, trainer.args.do_train
    if trainer.is_world_process_zero():
        save_scores(folder, results)
        if trains:
            write_loss_curve(trainer.state.log_history, folder / "loss_curve.png", folder.name)
        if trains or not (folder / "README.md").exists():
            trainer.create_model_card()
        print("\n".join([*summary_lines(results), f"results are in {folder}"]), flush=True)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def evaluate_models(arguments, argv: list[str]) -> dict:
    """Score the model and those it is compared with, each with its tokenizer; return the figures of the first."""
    model_arguments, data_arguments, training = arguments
    check_results_dir(training.folder, model_arguments.model_name_or_path)
    choices = [model_arguments]
    for name in model_arguments.compare_with or []:
        choices.append(copy.copy(model_arguments))
        choices[-1].model_name_or_path, choices[-1].model_type = name, None
    for choice in choices:
        check_model(choice, data_arguments.block_size)
    check_hub(training)
    rows: list[dict] = []
    for choice in choices:
        figures: dict = {}
        data = prepare_data(choice, data_arguments, training)
        trainer = build_trainer((choice, data_arguments, training), data, argv, figures)
        evaluate(trainer, data, data_arguments, figures)
        model_type = trainer.accelerator.unwrap_model(trainer.model).config.model_type
        rows.append({"model": choice.model_name_or_path or "untrained", "model_type": model_type, **figures})
        if choice is model_arguments:
            report(trainer, figures)
        del trainer, data
        gc.collect()  # two models at once would count as the memory of one
    if training.process_index == 0:
        write_comparison(training.folder, rows)
    return {key: value for key, value in rows[0].items() if key not in ("model", "model_type")}


def main(argv: list[str] | None = None) -> dict:
    """Run what the command line asks for and return the figures."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = model_arguments, data_arguments, training = parse_arguments(argv)
    set_up_logging(training)
    check_trackers(training.trackers)
    go_offline_without_network()
    if not training.do_train:
        if training.stage:
            raise UserError(f"--stage {training.stage} trains: add --do_train, or drop --stage to evaluate")
        return evaluate_models(arguments, argv)
    record = run_record(*arguments)
    checkpoint = check_output_dir(record, training)
    if training.stage:
        check_stage(model_arguments, training, data_arguments.block_size)
    else:
        check_model(model_arguments, data_arguments.block_size)
    check_hub(training)
    data = prepare_data(model_arguments, data_arguments, training, checkpoint)
    check_text(record, data.digest, checkpoint, training)
    results: dict = {}
    set_seed(training.seed)
    stage = build_stage(model_arguments, training, data, data_arguments.block_size) if training.stage else None
    trainer = build_trainer(arguments, data, argv, results, stage)
    if trainer.is_world_process_zero():
        claim_output_dir(record, training)
    trainer.accelerator.wait_for_everyone()
    train(trainer, checkpoint, results, stage)
    evaluate(trainer, data, data_arguments, results)
    if stage:
        score_teacher(trainer, stage, data.splits, results)
        report_stage(trainer, stage)
    report(trainer, results)
    return results
