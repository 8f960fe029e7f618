# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: what may be resumed, what must not be touched."""

import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from lalm.errors import UserError
from lalm.modeling.saving import UNFINISHED
from lalm.training.checkpoint_files import NotResumableError, check_checkpoint

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
STAGED_RECORD = RUN_FILE + ".tmp"  # what a kill may leave of it
CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# they come back with the state of the optimizer and of the schedule, whatever the arguments say
OPTIMIZER_KEEPS = (
    "learning_rate", "projection_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"
)  # fmt: skip


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, latest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and CHECKPOINT.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Return the latest checkpoint that can be resumed, passing over damaged ones with a message."""
    return next((folder for folder in checkpoints_of(output_dir) if is_complete(folder)), None)


def is_complete(folder: Path) -> bool:
    """Tell whether a checkpoint can be resumed; why not is logged."""
    try:
        check_checkpoint(folder)
    except NotResumableError as error:
        logger.info("%s: %s", folder, error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is incomplete (%s): not resumed from", folder, error)
    else:
        return True
    return False


def worse_evaluations(state: TrainerState) -> int:
    """Return how many evaluations in a row were without a better score when a checkpoint was saved."""
    callbacks: Any = state.stateful_callbacks or {}
    stored = callbacks.get("EarlyStoppingCallback", {})
    stored = stored[0] if isinstance(stored, list) else stored
    return int(stored.get("attributes", {}).get("early_stopping_patience_counter", 0))


def is_finished(checkpoint: str | Path, training: Any) -> bool:
    """Tell whether a checkpoint is the end of the training asked for: its last step, or its early stop."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    if 0 < getattr(training, "early_stopping_patience", 0) <= worse_evaluations(state):
        return True
    if training.max_steps > 0:
        return state.global_step >= training.max_steps
    return (state.epoch or 0) >= training.num_train_epochs


def run_record(model: Any, data: Any, training: Any) -> dict:
    """Return the arguments of a run as JSON values, without secrets."""
    record = {"model": dict(vars(model)), "data": dict(vars(data)), "training": training.to_dict()}
    record["model"].pop("token")
    record["training"]["world_size"] = training.world_size
    return json.loads(json.dumps(record, default=str))


def flat(record: dict) -> dict:
    """Return the arguments of a record without their groups."""
    return {**record.get("training", {}), **record.get("data", {}), **record.get("model", {})}


def differences(old: dict, new: dict, names: Sequence[str]) -> list[str]:
    """Return the `names` of arguments whose values differ between two records."""
    before, after = flat(old), flat(new)
    return [name for name in names if before.get(name) != after.get(name)]


def tell_changes(old: dict, new: dict, training: Any) -> None:
    """Warn, in one line, of arguments with which a resumed run goes on in another way than it began."""
    before, after = flat(old), flat(new)
    changed = [name for name in differences(old, new, training.changes_training) if name in before]
    said = [
        f"{name} {before[name]} -> {after.get(name)}" + " (the optimizer keeps the first)" * (name in OPTIMIZER_KEEPS)
        for name in changed
    ]
    if said:
        logger.warning("the resumed run began with other arguments: %s", ", ".join(said))


def check_text(record: dict, text: str | None, checkpoint: str | None, training: Any) -> None:
    """Enter the digest of the training text into the record; refuse to resume on another text.

    Args:
        text: None where the text cannot be known before it is read.
        checkpoint: what is resumed; None begins anew.

    Raises:
        UserError: the run in the output folder began on a text of another content.
    """
    record["text"] = text
    old = (read_record(training.folder) or {}).get("text")
    if checkpoint and text is not None and old not in (None, text):
        raise UserError(
            f"--output_dir: {training.folder} holds a run on a training text of another content: a file, a data set "
            f"or the share held out for validation has changed; name another folder, or delete that run with "
            f"--start_over"
        )


def read_record(output_dir: Path) -> dict | None:
    """Return the record of the run in a folder; None if it holds none of ours."""
    try:
        record = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "training" in record else None


def write_record(output_dir: Path, record: dict) -> None:
    """Write the record of a run, all of it or nothing."""
    staging = output_dir / STAGED_RECORD
    staging.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, output_dir / RUN_FILE)


def choose_checkpoint(output_dir: Path, asked: str | None) -> Path | None:
    """Return the checkpoint to resume: the one asked for by path, else the last complete one, else None.

    Raises:
        UserError: a checkpoint is asked for (a path, or ``true``) and there is no complete one.
    """
    if not asked or str(asked).lower() in ("true", "1"):
        checkpoint = last_complete_checkpoint(output_dir)
        if asked and checkpoint is None:
            raise UserError(f"--resume_from_checkpoint: {output_dir} holds no complete checkpoint")
        return checkpoint
    folder = Path(asked).expanduser()
    try:
        check_checkpoint(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume_from_checkpoint: {folder} is no complete checkpoint: {error}") from None
    return folder


def finished_model(folder: Path, training: Any) -> Path | None:
    """Return the output folder itself if it holds the model of a finished training, for want of a checkpoint.

    Raises:
        UserError: a model, or checkpoints, from which nothing can be resumed: --start_over must be said, for it costs
            a training.
    """
    left = [path for path in (folder, *checkpoints_of(folder)) if holds_only_model(path)]
    if left and left[0] == folder and is_finished(folder, training):
        return folder
    if left:
        raise UserError(
            f"--output_dir: {left[0]} holds a model, but no optimizer to resume its training with (--save_only_model "
            f"or --save_strategy no); train on from it with --model_name_or_path and another folder, or delete it "
            f"with --start_over"
        )
    return None


def holds_only_model(folder: Path) -> bool:
    """Tell whether a folder holds whole weights and the Trainer's state, and nothing else to resume from."""
    try:
        check_checkpoint(folder)
    except NotResumableError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def check_output_dir(record: dict, training: Any) -> str | None:
    """Check the output folder, without touching it, and return the checkpoint to resume from, if any.

    A finished run without checkpoints is its own last one.

    Args:
        training: `RunArguments` with `TrainingArguments`.

    Raises:
        UserError: the folder holds something else, a run with other arguments, or one that cannot be resumed.
    """
    folder = training.folder
    if not folder.exists():
        return str(choose_checkpoint(folder, asked)) if (asked := training.resume_from_checkpoint) else None
    if not folder.is_dir():
        raise UserError(f"--output_dir: {folder} is a file")
    old = read_record(folder)
    if old is None and any(path.name != STAGED_RECORD for path in folder.iterdir()):
        raise UserError(
            f"--output_dir: {folder} is not empty and holds no run of {training.script}; name another folder"
        )
    if training.start_over:
        return None
    if old is not None and (changed := differences(old, record, training.must_match)):
        raise UserError(
            f"--output_dir: {folder} holds a run with another {', '.join(changed)}; name another folder, or "
            f"delete that run with --start_over"
        )
    checkpoint = choose_checkpoint(folder, training.resume_from_checkpoint) or finished_model(folder, training)
    if checkpoint not in (None, folder):
        logger.info("resuming from %s (start again with --start_over)", checkpoint)
        tell_changes(old or {}, record, training)
    return str(checkpoint) if checkpoint else None


def check_results_dir(folder: Path, model: str | None) -> None:
    """Check a folder that an evaluation alone would write its figures into.

    Raises:
        UserError: it is a file, or holds a run whose figures are not those of the folder `model`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir: {folder} is a file")
    is_its_own = model is not None and Path(model).expanduser().resolve() == folder.resolve()
    if read_record(folder) is not None and not is_its_own:
        raise UserError(
            f"--output_dir: {folder} holds a run, whose figures would be overwritten by those of another model; name "
            f"another folder"
        )


def claim_output_dir(record: dict, training: Any) -> None:
    """Make the output folder this run's; with --start_over the earlier checkpoints and results go now, not before.

    By now text and model are known to be good, so no mistake in the arguments costs an earlier run.
    """
    folder = training.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: cannot make {folder}: {error.strerror}") from None
    for unfinished in [*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"checkpoint-*/{UNFINISHED}*")]:
        shutil.rmtree(unfinished)  # saves that were killed
    if training.start_over:
        for stale in checkpoints_of(folder):
            shutil.rmtree(stale)
        for figures in folder.glob("*_results.json"):
            figures.unlink()
        (folder / "trainer_state.json").unlink(missing_ok=True)  # tells of a finished training
    write_record(folder, record)
