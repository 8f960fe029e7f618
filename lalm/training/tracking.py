# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Experiment trackers: a clear word when the package is missing."""

import importlib.util

from lalm.errors import UserError, nearest_hint

PACKAGES = {
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
}


def check_trackers(names: list[str]) -> None:
    """Refuse trackers whose package is not installed, before any time is spent on data.

    Raises:
        UserError: with the command that installs the package, or the nearest tracker's name.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to: there is no tracker '{name}'{nearest_hint(name, list(INTEGRATION_TO_CALLBACK))}; "
                f"use none, {', '.join(PACKAGES)}"
            )
        packages = PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(f"--report_to {name} needs a package that is not installed: pip install {packages[0]}")
