# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The type in which matrix products of 16-bit numbers run fastest.

An x86 processor without arithmetic for bfloat16 or float16 unpacks each number for every product it enters: there a
product is 4 (bfloat16) to 10 times (float16) slower than one of both factors cast to float32, which also rounds less.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
# Fewer rows than this wait for the weights to come from memory, which casting only delays.
_LEAST_ROWS = 16


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: the type of all arithmetic, states and accumulated gradients."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, products have the types of their factors. Costs nothing where they have them anyway."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


@cache
def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of `dtype`; True where nothing is known of it."""
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if found.get("architecture") != "x86_64" or dtype not in _INSTRUCTIONS:
        return True
    return any(found.get(name) for name in _INSTRUCTIONS[dtype])


def product_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type in which to multiply `x [..., D]` with a matrix, where `dtype` is what the product is asked in."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < _LEAST_ROWS * x.shape[-1]:
        return dtype
    return dtype if has_arithmetic(dtype) else torch.float32
