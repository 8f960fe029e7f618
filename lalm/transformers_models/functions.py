# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Our ops with the arguments of transformers' torch functions. Besides those they read `seq_idx` and `padding_mask`
`[B, T]`, which layouts.py passes through the layers; what neither knows is ignored, as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.utils import logging

from lalm.modeling.ops.cpp_kernels import why_no_kernel
from lalm.modeling.ops.delta import delta_rule
from lalm.modeling.ops.delta import kda as channels
from lalm.modeling.ops.dense import causal_conv1d
from lalm.modeling.ops.diagonal import ssd
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout

logger = logging.get_logger("transformers.lalm")

_SILU = ("silu", "swish")
# What the in-tree functions must not see: with packed documents they raise, and padding they cannot place.
OWN_ARGUMENTS = ("padding_mask",)


def with_fallback(replacement: Callable) -> Callable[[Callable], Callable]:
    """`original -> replacement`, which leaves to the original what is not on the CPU and, unless there are documents
    or padding, what is compiled or exported and what a machine without a C++ compiler computes."""

    def make(original: Callable) -> Callable:
        @wraps(original)
        def run(first: torch.Tensor, *args, **kwargs):
            has_layout = any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens", "padding_mask"))
            if first.device.type == "cpu" and (has_layout or _has_kernels()):
                return replacement(first, *args, **kwargs)
            return original(first, *args, **{n: x for n, x in kwargs.items() if n not in OWN_ARGUMENTS})

        return run

    return make


def _has_kernels() -> bool:
    if torch.compiler.is_compiling():
        return False
    problem = why_no_kernel("short_conv", WIDTH=4, BEFORE=3, SILU=1)
    if problem is not None:
        logger.warning_once(f"lalm has no C++ kernels here ({problem}): transformers' own functions run.")
    return problem is None


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`hidden_states [B, D, T]` -> the same; documents and padding may be those of its last tokens, behind the inputs
    that a cache holds."""
    missing = hidden_states.shape[2] - max((x.shape[1] for x in (seq_idx, padding_mask) if x is not None), default=0)
    if padding_mask is not None:
        padding_mask = F.pad(padding_mask.bool(), (missing, 0), value=True)
    if seq_idx is not None:
        seq_idx = torch.cat([seq_idx[:, :1].expand(-1, missing), seq_idx], dim=1)
    own = activation if activation in _SILU else None
    y = causal_conv1d.causal_conv1d_fn(
        hidden_states, weight.to(_wider(hidden_states, weight)), bias, seq_idx, activation=own, mask=padding_mask
    )
    return y if activation is None or own is not None else ACT2FN[activation](y)  # type: ignore[return-value]


def causal_conv1d_update(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """New tokens `[B, D, T]` behind `conv_state [B, D, S]`, which is moved on in place."""
    own = activation if activation in _SILU else None
    y = causal_conv1d.causal_conv1d_update(hidden_states, conv_state, weight, bias, own)
    return y if activation is None or own is not None else ACT2FN[activation](y)


def _wider(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return weight.dtype if x.dtype == weight.dtype else torch.promote_types(x.dtype, weight.dtype)


def _delta(rule: Callable) -> Callable:
    """A delta rule of ours, `gated_delta_rule` or `kda`, with the arguments that transformers gives its chunk and its
    recurrent form; o `[B, T, H, V]` has the dtype of `query`. `chunk_size` is ours and changes no result."""

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        seq_idx: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        o, final = rule(
            query,
            key,
            value,
            g,
            beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens if seq_idx is None else None,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            layout=layout_of(seq_idx, padding_mask),
        )
        return o.to(query.dtype), final

    return run


gated_delta_rule, kda = _delta(delta_rule.gated_delta_rule), _delta(channels.kda)


def mamba2_chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 64,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`mamba_chunk_scan_combined`, in float32 as transformers has it; `chunk_size` is ours and changes no result."""
    found = ssd.mamba_chunk_scan_combined(
        hidden_states.to(compute_dtype(hidden_states)),
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
        mask=None if padding_mask is None else padding_mask.bool(),
    )
    # Layers view it in another shape.
    return (found[0].contiguous(), found[1]) if isinstance(found, tuple) else found.contiguous()


def mamba2_selective_state_update(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`selective_state_update`, with the order of arguments that transformers has."""
    return ssd.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


def layout_of(seq_idx: torch.Tensor | None, padding_mask: torch.Tensor | None) -> SequenceLayout | None:
    """The layout of a batch; None if nothing is special about it."""
    if seq_idx is None and padding_mask is None:
        return None
    mask = None if padding_mask is None else padding_mask.bool()
    return SequenceLayout(mask, None if seq_idx is None else seq_idx.long())
