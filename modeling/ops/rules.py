# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What every rule does around its recurrence: checks, packed documents, precision, both directions of reading.

A core is the recurrence of a rule in one form: `core(q, k, v, *gates, scale, state, layout) -> (o, state)`. It
computes in float32 (float64 for float64 inputs), ignores what stands on padding, and returns 0 there.

Read forward and backward over each document, the weight of token j for token i is q_i . diag(exp(sum of the g between
them)) k_j on either side: gates after j for an earlier one (G_i - G_j), gates before j for a later one. A token's own
weight counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_layout, check_state, per_document


class Call(NamedTuple):
    """The arguments that every op takes after its tensors; `gla` documents them."""

    scale: float | None
    initial_state: torch.Tensor | None
    output_final_state: bool
    cu_seqlens: torch.Tensor | None
    layout: SequenceLayout | None
    causal: bool


def run_rule(
    core: Callable,
    tensors: tuple,
    call: Call,
    state_shape: tuple[int, ...],
    both_directions: Callable,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op of a rule.

    Args:
        core: see above.
        tensors: q, k `[B, T, H, K]`, v `[B, T, H, V]` and the gates, whose shapes the op has checked.
        state_shape: of the state of one batch element.
        both_directions: what makes of the core one that reads both ways, for `causal=False`.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    q, v = tensors[0], tensors[2]
    check_layout(call.layout, q)
    if call.cu_seqlens is not None:
        if call.layout is not None:
            raise ValueError("Pass cu_seqlens or layout, not both: a layout's segments already hold the boundaries.")

        def one_batch(*tensors, initial_state=None, output_final_state=False, layout=None):
            own = Call(call.scale, initial_state, output_final_state, None, layout, call.causal)
            return run_rule(core, tensors, own, state_shape, both_directions)

        return per_document(one_batch, tensors, call.cu_seqlens, call.initial_state, call.output_final_state)
    if not call.causal:
        refuse_states(call.initial_state, call.output_final_state)
        core = both_directions(core)
    check_state(call.initial_state, (q.shape[0], *state_shape))
    with without_autocast(q.device):
        o, state = core(*tensors, call.scale, call.initial_state, call.layout or SequenceLayout())
        return o.to(v.dtype), state if call.output_final_state else None


def check_gate(name: str, x: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless the gate has its shape, that of q or less."""
    if x.shape != shape:
        axes = ", ".join("BTHK"[: len(shape)])
        raise ValueError(f"{name} must be {meaning}, [{axes}] = {tuple(shape)}, got {tuple(x.shape)}.")


def both_ways(x: torch.Tensor | None) -> torch.Tensor | None:
    """`[B, T, ...] -> [2 B, T, ...]`: the rows as they are, then reversed in time."""
    return None if x is None else torch.cat([x, x.flip(1)])


def layout_both_ways(layout: SequenceLayout | None) -> SequenceLayout:
    """The layout of rows doubled by `both_ways`. Reversed documents lie together as before."""
    layout = layout or SequenceLayout()
    return SequenceLayout(both_ways(layout.mask), both_ways(layout.segments))


def bidirectional_diagonal(core: Callable) -> Callable:
    """The core of a diagonal rule -> the core that reads both ways, without a state to begin from."""

    def read(q, k, v, g, scale, state, layout):
        dtype = compute_dtype(q, k, v, g)
        q, k, v, g = layout.freeze(q, k, v, g)
        if g is None and layout.segments is None:  # every token reads the same sum
            state = torch.einsum("bthk,bthv->bhkv", k.to(dtype), v.to(dtype))
            return layout.zero_padding(torch.einsum("bthk,bhkv->bthv", q.to(dtype) * scale, state)), state
        batch = q.shape[0]
        doubled = [both_ways(x) for x in (q, k, v, g)]
        o, state = core(*doubled, scale, None, layout_both_ways(layout))
        own = (q.to(dtype) * k.to(dtype)).sum(-1, keepdim=True) * scale
        return layout.zero_padding(o[:batch] + o[batch:].flip(1) - own * v.to(dtype)), state

    return read


def bidirectional_delta(core: Callable) -> Callable:
    """The core of a delta rule -> the sum of what a token reads from its left and from its right; each side has its
    own write included."""

    def read(q, k, v, g, beta, scale, state, layout):
        batch = q.shape[0]
        doubled = [both_ways(x) for x in (q, k, v, g, beta)]
        o, state = core(*doubled, scale, None, layout_both_ways(layout))
        return o[:batch] + o[batch:].flip(1), state

    return read


def refuse_states(initial_state: torch.Tensor | None, output_final_state: bool) -> None:
    """Raise ValueError if a state is given or asked for, which has no meaning when both sides are read."""
    if initial_state is not None or output_final_state:
        raise ValueError("causal=False reads both sides and has no state: drop initial_state and output_final_state.")
