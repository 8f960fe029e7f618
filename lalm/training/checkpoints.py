# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: what may be resumed, what must not be touched."""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from lalm.training.errors import UserError

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def check_safetensors(path: Path) -> None:
    """Raise ValueError if a safetensors file is shorter than its header promises."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        header_size = int.from_bytes(handle.read(8), "little")
        if size < 8 or 8 + header_size > size:
            raise ValueError(f"{path.name} is cut off")
        header = json.loads(handle.read(header_size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if size < 8 + header_size + max(ends, default=0):
        raise ValueError(f"{path.name} is cut off")


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError or OSError that says what is missing or cut off in a Trainer checkpoint."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    if "global_step" not in state:
        raise ValueError("trainer_state.json has no global_step")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        adapter = (folder / "adapter_model.safetensors").is_file()
        names = ["adapter_model.safetensors" if adapter else "model.safetensors"]
    sharded_by_backend = any(folder.glob("pytorch_model_fsdp_*")) or any(folder.glob("global_step*"))
    if not sharded_by_backend:
        for name in names:
            check_safetensors(folder / name)
        # torch.save writes a zip file, whose directory comes last
        if not zipfile.is_zipfile(folder / "optimizer.pt"):
            raise ValueError("optimizer.pt is missing or cut off")
    if not zipfile.is_zipfile(folder / "scheduler.pt"):
        raise ValueError("scheduler.pt is missing or cut off")
    states = list(folder.glob("rng_state*.pth"))
    if not states or not all(zipfile.is_zipfile(path) for path in states):
        raise ValueError("rng_state.pth is missing or cut off")


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, latest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and CHECKPOINT.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Return the latest checkpoint that can be resumed, passing over damaged ones with a message."""
    for folder in checkpoints_of(output_dir):
        try:
            check_checkpoint(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is incomplete (%s): not resumed from", folder, error)
            continue
        return folder
    return None


def is_finished(checkpoint: str, training: Any) -> bool:
    """Tell whether a checkpoint stands at the end of the training asked for."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    if training.max_steps > 0:
        return state.global_step >= training.max_steps
    return (state.epoch or 0) >= training.num_train_epochs


def run_record(model: Any, data: Any, training: Any) -> dict:
    """Return the arguments of a run as JSON values, without secrets."""
    record = {"model": dict(vars(model)), "data": dict(vars(data)), "training": training.to_dict()}
    record["model"].pop("token")
    return json.loads(json.dumps(record, default=str))


def differences(old: dict, new: dict, names: Sequence[str]) -> list[str]:
    """Return the `names` of arguments whose values differ between two records."""

    def flat(record: dict) -> dict:
        return {**record.get("training", {}), **record.get("data", {}), **record.get("model", {})}

    before, after = flat(old), flat(new)
    return [name for name in names if before.get(name) != after.get(name)]


def read_record(output_dir: Path) -> dict | None:
    """Return the record of the run in a folder; None if it holds none of ours."""
    try:
        record = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "training" in record else None


def write_record(output_dir: Path, record: dict) -> None:
    """Write the record of a run, all of it or nothing."""
    staging = output_dir / (RUN_FILE + ".tmp")
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


def check_output_dir(record: dict, training: Any) -> str | None:
    """Check the output folder, without touching it, and return the checkpoint to resume from, if any.

    Args:
        training: `RunArguments` with `TrainingArguments`.

    Raises:
        UserError: the folder holds something else, or a run with other arguments.
    """
    folder = training.folder
    if not folder.exists():
        return str(choose_checkpoint(folder, asked)) if (asked := training.resume_from_checkpoint) else None
    if not folder.is_dir():
        raise UserError(f"--output_dir: {folder} is a file")
    old = read_record(folder)
    if old is None and any(folder.iterdir()):
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
    checkpoint = choose_checkpoint(folder, training.resume_from_checkpoint)
    if checkpoint is not None:
        logger.info("resuming from %s (start again with --start_over)", checkpoint)
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
    if training.start_over:
        for stale in checkpoints_of(folder):
            shutil.rmtree(stale)
        for figures in folder.glob("*_results.json"):
            figures.unlink()
    write_record(folder, record)
