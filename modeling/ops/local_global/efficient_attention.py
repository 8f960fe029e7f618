# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The op of causal efficient attention; efficient_recurrence.py defines it."""

from __future__ import annotations

import torch

from lalm.modeling.ops.dispatch import choose, in_form
from lalm.modeling.ops.dtypes import without_autocast
from lalm.modeling.ops.local_global.efficient_chunks import chunk_efficient
from lalm.modeling.ops.local_global.efficient_recurrence import EfficientState, check_efficient, recurrent_efficient
from lalm.modeling.ops.sequence_layout import SequenceLayout

_FORMS = {"recurrent": recurrent_efficient, "chunk": chunk_efficient}


def efficient_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: EfficientState | None = None,
    output_final_state: bool = False,
    *,
    blindspot_size: int = 1,
    semantics: str = "0.19",
    layout: SequenceLayout | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, EfficientState | None]:
    """Causal efficient attention.

    Args:
        q, k: `[B, T, H, K]`, before any feature map; every finite k is safe.
        v: `[B, T, H, V]`.
        initial_state: what the tokens before left; None for nothing.
        output_final_state: also return the state after the last token.
        blindspot_size: tokens of a bucket. A bucket becomes visible when it is full, so that its own tokens do not see
            it and the first bucket of a document reads exactly 0; 1 makes every token see itself. Buckets count real
            tokens from the start of each document.
        semantics: "0.19" or "v0.2.1", see above.
        layout: padding and document boundaries of a batch.
        implementation: "recurrent" (one token at a time: the definition, and the way to decode), "chunk", or "auto".

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None. States and sums are float32, or float64 if an
        input is.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
    """
    check_efficient(q, k, v, initial_state, blindspot_size, semantics, layout)
    form = _FORMS[choose("efficient_attention", implementation, q, v, _FORMS)]
    with without_autocast(q.device):
        o, state = form(q, k, v, initial_state, blindspot_size, semantics, layout or SequenceLayout())
        return o.to(v.dtype), state if output_final_state else None


recurrent_efficient_attention = in_form(efficient_attention, "recurrent")
chunk_efficient_attention = in_form(efficient_attention, "chunk")
