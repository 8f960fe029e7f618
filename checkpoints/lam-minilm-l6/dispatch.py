# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Which implementation of an op runs. The one place that decides, that says so, and that knows optional kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from transformers.utils import logging

from .layout import SequenceLayout
from .transforms import has_open_length

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


_NEEDS_FLA = "linear_attn_implementation='fla' needs flash-linear-attention with Triton: pip install 'lalm[gpu]'."


def fla_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` by the kernels of flash-linear-attention; same arguments."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError(_NEEDS_FLA) from error
    layout = layout or SequenceLayout()
    q, k, v, g = layout.freeze(q, k, v, g)
    if g is None:
        return _run_fla(chunk_simple_gla, (q, k, v), {}, scale, state, layout)
    if g.shape[-1] == 1:
        return _run_fla(chunk_simple_gla, (q, k, v), {"g": g.squeeze(-1).float()}, scale, state, layout)
    return _run_fla(chunk_gla, (q, k, v), {"g": g.float()}, scale, state, layout)


def fla_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_delta` by the kernels of flash-linear-attention; same arguments."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise ImportError(_NEEDS_FLA) from error
    gates = {"beta": beta.to(v.dtype)}
    if g is None:
        return _run_fla(chunk_delta_rule, (q, k, v), gates, scale, state, layout)
    return _run_fla(chunk_gated_delta_rule, (q, k, v), gates | {"g": g.float()}, scale, state, layout)


def _run_fla(
    kernel: Callable,
    qkv: tuple[torch.Tensor, ...],
    gates: dict[str, torch.Tensor],
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel on a batch `[B, T, ...]` whose rows may hold several documents."""
    batch, length = qkv[0].shape[:2]
    qkv = tuple(x.to(qkv[2].dtype) for x in qkv)
    documents = layout.document_ids()
    cu_seqlens = last = None
    if documents is not None:
        # The kernels know documents as pieces of one long row: lay the rows end to end and cut at every border.
        cuts = torch.ones(batch, length, dtype=torch.bool, device=documents.device)
        cuts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        borders = cuts.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([borders, borders.new_tensor([batch * length])]).to(torch.int32)
        first = torch.searchsorted(borders, torch.arange(batch, device=borders.device) * length)
        last = torch.cat([first[1:], first.new_tensor([len(borders)])]) - 1
        qkv = tuple(x.flatten(0, 1)[None] for x in qkv)
        gates = {name: x.flatten(0, 1)[None] for name, x in gates.items()}
        if state is not None:
            state = state.new_zeros(len(borders), *state.shape[1:]).index_copy(0, first, state)
    common = {"scale": scale, "initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    o, final = kernel(*qkv, **gates, **common)
    if last is not None:
        o, final = o.view(batch, length, *o.shape[2:]), final[last]
    return layout.zero_padding(o), final
