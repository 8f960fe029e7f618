# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Which implementation of an op runs. The one place that decides, that says so, and that knows optional kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from transformers.utils import logging

from lalm.modeling.ops.autograd import has_open_length

# Under transformers' own logger, so that its verbosity settings hold.
logger = logging.get_logger("transformers.lalm")

# Below this many tokens stepping through them beats preparing one chunk.
_SHORT = 8


def choose(
    rule: str,
    implementation: str,
    v: torch.Tensor,
    *,
    recurrent: Callable,
    chunk: Callable,
    fla: Callable | None = None,
    cpp: Callable | None = None,
    triton: Callable | None = None,
) -> Callable:
    """Pick the form of op `rule` for values `v [B, T, H, V]`.

    Args:
        rule: the op's name, for the log.
        implementation: "auto" takes `cpp` where it is given, else `recurrent` for a few tokens (decoding), else `fla`
            for 16-bit values on a GPU if flash-linear-attention is installed (`lalm[gpu]`) and nothing is being
            compiled, else `chunk`; "chunk", "recurrent", "fla", "cpp" and "triton" take that form whatever the input.
        fla: the GPU kernel of flash-linear-attention, None where it has none.
        cpp: the C++ kernel, None where it does not run.
        triton: our own GPU kernel, None where there is none.

    Raises:
        ValueError: "fla" or "triton" for tensors that are not on a GPU, or a form that is not to be had.
        ImportError: "fla" without flash-linear-attention installed, "triton" without Triton.
    """
    name = implementation
    if name == "auto":
        is_short = not has_open_length() and v.shape[1] < _SHORT
        name = "cpp" if cpp else "recurrent" if is_short else "chunk"
        if name == "chunk" and fla not in (None, chunk) and _is_for_fla(v):
            name = "fla"
    if name in ("fla", "triton") and v.device.type == "cpu":
        raise ValueError(
            f"linear_attn_implementation={name!r} runs Triton kernels on a GPU, and the input is on the CPU: move the "
            "model to the GPU or set linear_attn_implementation='auto'."
        )
    if not torch.compiler.is_compiling():
        _announce(rule, name, implementation, v.device.type)
    form = {"recurrent": recurrent, "chunk": chunk, "fla": fla, "cpp": cpp, "triton": triton}[name]
    if form is None:
        reason = "no C++ kernel for this model, device or machine" if name == "cpp" else f"no {name} kernel for a GPU"
        raise ValueError(
            f"linear_attn_implementation={name!r}: {rule} has {reason}; set linear_attn_implementation='auto'."
        )
    return form


@cache
def has_fla() -> bool:
    """Whether flash-linear-attention and Triton are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def _is_for_fla(v: torch.Tensor) -> bool:
    """Whether flash-linear-attention's kernels are at home with `v`. They would round float32 to TF32, which torch
    does only when asked to, and a compiled graph breaks at them."""
    is_half = v.dtype in (torch.bfloat16, torch.float16)
    return v.device.type == "cuda" and is_half and not torch.compiler.is_compiling() and has_fla()


@cache
def _announce(rule: str, name: str, implementation: str, device: str) -> None:
    logger.info(f"{rule}: the {name} form runs on {device} (linear_attn_implementation={implementation!r}).")
