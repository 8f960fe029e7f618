# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The dtypes of the arithmetic: float32, or float64 for float64 inputs, also under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: the type of all arithmetic, states and accumulated gradients."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products have the dtypes of their factors; it costs nothing where autocast is off."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()
