# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What is being done to a computation from outside: forms and kernels step aside for it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work. Both look into every operation, so
    that neither a kernel nor a backward pass written by hand serves them: the plain forms run."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_looked_into() -> bool:
    """Whether a transform or a tracer is at work, to which a kernel is closed."""
    return is_transformed() or torch.jit.is_tracing()


def has_open_length() -> bool:
    """Whether a program is being exported that is to serve every number of tokens: no decision may depend on it."""
    return torch.compiler.is_exporting()


def hides_values() -> bool:
    """Whether no decision may depend on the numbers in a tensor, because one computation stands for many."""
    return torch.compiler.is_compiling() or is_transformed()
