# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""--push_to_hub: whether it can work is asked before the run, and a failed push costs no figures."""

from typing import Any

from huggingface_hub import HfApi

from lalm.errors import UserError, one_line


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
