# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Both directions at once: a recurrence read forward and backward over each document.

The weight of token j for token i is then q_i . diag(exp(sum of the g between them)) k_j on either side: gates after j
for an earlier one (G_i - G_j), gates before j for a later one. A token's own weight counts once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout


def both_ways(x: torch.Tensor | None) -> torch.Tensor | None:
    """`[B, T, ...] -> [2 B, T, ...]`: the rows as they are, then reversed in time."""
    return None if x is None else torch.cat([x, x.flip(1)])


def layout_both_ways(layout: SequenceLayout | None) -> SequenceLayout:
    """The layout of rows doubled by `both_ways`. Reversed documents lie together as before."""
    layout = layout or SequenceLayout()
    return SequenceLayout(both_ways(layout.mask), both_ways(layout.segments))


def bidirectional_diagonal(core: Callable) -> Callable:
    """A core of `diagonal_recurrence` (same arguments, no state) -> the core that reads both ways."""

    def read(q, k, v, g, scale, state, layout):
        layout = layout or SequenceLayout()
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


def refuse_states(initial_state: torch.Tensor | None, output_final_state: bool) -> None:
    """Raise ValueError if a state is given or asked for, which has no meaning when both sides are read."""
    if initial_state is not None or output_final_state:
        raise ValueError("causal=False reads both sides and has no state: drop initial_state and output_final_state.")
