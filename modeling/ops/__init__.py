# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The ops: one function per rule, such as `gated_delta_rule`, which takes the fastest form for its input, C++ and GPU
kernels included; and the field's pair `recurrent_<rule>` (the definition) and `chunk_<rule>`, each of which is always
that form, in plain PyTorch."""

from lalm.modeling.ops.delta.delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    delta_rule,
    gated_delta_rule,
    recurrent_delta_rule,
    recurrent_gated_delta_rule,
)
from lalm.modeling.ops.delta.dual_state import chunk_dual_state_delta, dual_state_delta, recurrent_dual_state_delta
from lalm.modeling.ops.delta.kda import chunk_kda, kda, recurrent_kda
from lalm.modeling.ops.dense.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from lalm.modeling.ops.diagonal.gla import chunk_gla, gla, recurrent_gla
from lalm.modeling.ops.diagonal.linear_attention import (
    chunk_linear_attention,
    linear_attention,
    recurrent_linear_attention,
)
from lalm.modeling.ops.diagonal.retention import chunk_retention, recurrent_retention, retention
from lalm.modeling.ops.diagonal.ssd import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)
from lalm.modeling.ops.local_global.efficient_attention import (
    chunk_efficient_attention,
    efficient_attention,
    recurrent_efficient_attention,
)
from lalm.modeling.ops.local_global.local_attention import local_attention, sliding_attention
from lalm.modeling.ops.local_global.window_linear import window_linear_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout

__all__ = [
    "SequenceLayout",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_delta_rule",
    "chunk_dual_state_delta",
    "chunk_efficient_attention",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_kda",
    "chunk_linear_attention",
    "chunk_retention",
    "delta_rule",
    "dual_state_delta",
    "efficient_attention",
    "gated_delta_rule",
    "gla",
    "kda",
    "linear_attention",
    "local_attention",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "recurrent_delta_rule",
    "recurrent_dual_state_delta",
    "recurrent_efficient_attention",
    "recurrent_gated_delta_rule",
    "recurrent_gla",
    "recurrent_kda",
    "recurrent_linear_attention",
    "recurrent_retention",
    "retention",
    "selective_state_update",
    "sliding_attention",
    "window_linear_attention",
]
