# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The GPU kernels of flash-linear-attention, as cores like `recurrent_diagonal` and `recurrent_delta`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lalm.modeling.ops.sequence_layout import SequenceLayout

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
    q, k, v, g, beta = layout.freeze(q, k, v, g, beta)
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
        # The kernels know documents as pieces of one long row: lay the rows end to end and cut at every boundary.
        cuts = torch.ones(batch, length, dtype=torch.bool, device=documents.device)
        cuts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        boundaries = cuts.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([boundaries, boundaries.new_tensor([batch * length])]).to(torch.int32)
        first = torch.searchsorted(boundaries, torch.arange(batch, device=boundaries.device) * length)
        last = torch.cat([first[1:], first.new_tensor([len(boundaries)])]) - 1
        qkv = tuple(x.flatten(0, 1)[None] for x in qkv)
        gates = {name: x.flatten(0, 1)[None] for name, x in gates.items()}
        if state is not None:
            state = state.new_zeros(len(boundaries), *state.shape[1:]).index_copy(0, first, state)
    common = {"scale": scale, "initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    o, final = kernel(*qkv, **gates, **common)
    if last is not None:
        o, final = o.view(batch, length, *o.shape[2:]), final[last]
    return layout.zero_padding(o), final
