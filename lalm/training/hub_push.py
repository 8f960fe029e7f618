# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""--push_to_hub: whether it can work is asked before the run, and a failed push costs no figures."""

import logging
import os
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from lalm.errors import UserError, one_line
from lalm.modeling.saving import UNFINISHED, commit_folder

logger = logging.getLogger(__name__)

# what a training goes on with, and no reader of a model needs
STATE = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "checksums.json", "global_step*",
    "pytorch_model_fsdp*",
)  # fmt: skip


def repository(training: Any) -> str:
    """Return the name of the repository to push to, as the Trainer chooses it."""
    return training.hub_model_id or training.folder.absolute().name


def check_hub(training: Any) -> None:
    """Make the repository now: no network, no login and no right to write show before any work.

    Raises:
        UserError: with the Hub's reason.
    """
    if not training.push_to_hub or training.process_index != 0:
        return
    try:
        HfApi().create_repo(
            repository(training), token=training.hub_token, private=training.hub_private_repo, exist_ok=True
        )
    except Exception as error:
        # errors of the Hub's client, of its HTTP library (whose name depends on the version) and of the system
        raise UserError(
            f"--push_to_hub: the Hub gives no repository '{repository(training)}': {one_line(error)}; see to "
            f"network, `hf auth login` or --hub_token, or drop --push_to_hub"
        ) from error


def push_failed(training: Any, error: Exception) -> UserError:
    """Return what to say when a push fails after the training."""
    return UserError(
        f"--push_to_hub: {one_line(error)}; everything is saved: push it later with "
        f"`hf upload {repository(training)} {training.folder} --exclude 'checkpoint-*'`"
    )


def push_checkpoint(training: Any, repo_id: str, checkpoint: Path, step: int) -> Future:
    """Push a checkpoint, as `hub_strategy` says, in the background; an error is logged and costs nothing else.

    Hard links keep the files where they are read from while later checkpoints replace this one.
    """
    links = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}-", dir=training.folder))
    shutil.copytree(checkpoint, links, copy_function=_link, dirs_exist_ok=True)
    everything = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
    folder = everything.get(training.hub_strategy)

    def push() -> None:
        options = {"token": training.hub_token, "revision": training.hub_revision}
        message = f"Training in progress, step {step}"
        try:
            commit_folder(links, repo_id, message=message, ignore=[*STATE, TRAINING_ARGS_NAME], **options)
            if folder:
                message += ", checkpoint"
                commit_folder(
                    links, repo_id, message=message, path_in_repo=folder, ignore=[TRAINING_ARGS_NAME], **options
                )
        except Exception as error:
            logger.warning("--push_to_hub: %s was not pushed: %s", checkpoint, one_line(error))
        finally:
            shutil.rmtree(links, ignore_errors=True)

    return HfApi().run_as_future(push)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)
