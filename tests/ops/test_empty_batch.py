# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""A batch of no texts gives results of no texts, by every form of every op; a text of no tokens is refused."""

import subprocess
import sys

import pytest
import torch

from lalm.modeling.ops.cpp_kernels import load_kernel
from lalm.modeling.ops.delta.delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    delta_rule,
    gated_delta_rule,
    recurrent_delta_rule,
    recurrent_gated_delta_rule,
)
from lalm.modeling.ops.delta.dual_state import chunk_dual_state_delta, dual_state_delta, recurrent_dual_state_delta
from lalm.modeling.ops.diagonal.gla import chunk_gla, gla, recurrent_gla
from lalm.modeling.ops.diagonal.linear_attention import (
    chunk_linear_attention,
    linear_attention,
    recurrent_linear_attention,
)
from lalm.modeling.ops.diagonal.retention import chunk_retention, recurrent_retention, retention
from lalm.modeling.ops.dispatch import in_form
from lalm.modeling.ops.local_global.efficient_attention import chunk_efficient_attention, recurrent_efficient_attention
from lalm.modeling.ops.local_global.efficient_bidirectional import bidirectional_efficient_attention
from lalm.modeling.ops.local_global.local_attention import local_attention, sliding_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout

cpp_delta_rule = in_form(delta_rule, "cpp")
cpp_dual_state_delta = in_form(dual_state_delta, "cpp")
cpp_gated_delta_rule = in_form(gated_delta_rule, "cpp")
cpp_gla = in_form(gla, "cpp")
cpp_linear_attention = in_form(linear_attention, "cpp")
cpp_retention = in_form(retention, "cpp")


def cpp_taylor_attention(*args, **kwargs):
    return linear_attention(*args, taylor=True, implementation="cpp", **kwargs)


HEADS, SIZE, LENGTH = 2, 32, 9


def gates(op, shape):
    """What an op takes after q, k and v; by the last word of its name."""
    per_head, per_key = torch.zeros(*shape[:3]), torch.zeros(shape)
    name = op.__name__
    if "dual_state" in name:
        memories = torch.zeros(*shape[:3], 2)
        return memories, memories, memories, torch.zeros(*shape[:3], 2, 2)
    if "gla" in name:
        return (per_key,)
    if "gated_delta" in name:
        return per_head, per_head
    return (per_head,) if "delta" in name else (8,) if op in (local_attention, sliding_attention) else ()


PLAIN = (
    recurrent_gla,
    chunk_gla,
    recurrent_linear_attention,
    chunk_linear_attention,
    recurrent_retention,
    chunk_retention,
    recurrent_delta_rule,
    chunk_delta_rule,
    recurrent_gated_delta_rule,
    chunk_gated_delta_rule,
    recurrent_dual_state_delta,
    chunk_dual_state_delta,
    recurrent_efficient_attention,
    chunk_efficient_attention,
    bidirectional_efficient_attention,
    local_attention,
    sliding_attention,
)
CPP = (
    cpp_gla,
    cpp_linear_attention,
    cpp_taylor_attention,
    cpp_retention,
    cpp_delta_rule,
    cpp_gated_delta_rule,
    cpp_dual_state_delta,
)


def read(op, shape, **options):
    """Outputs of zeros of `shape [B, T, H, K]`, and the gradients of q, k and v."""
    leaves = [torch.zeros(shape, requires_grad=True) for _ in range(3)]
    found = op(*leaves, *gates(op, shape), **options)
    o = found[0] if isinstance(found, tuple) else found
    return o, torch.autograd.grad(o.sum(), leaves)


def check_no_texts(op):
    empty = torch.zeros(0, LENGTH, dtype=torch.bool)
    for layout in (None, SequenceLayout(mask=empty), SequenceLayout(segments=empty.long())):
        shape = (0, LENGTH, HEADS, SIZE // 2 if op is cpp_taylor_attention else SIZE)
        o, slopes = read(op, shape, layout=layout)
        assert o.shape == shape
        assert all(slope.shape == shape for slope in slopes)


@pytest.mark.parametrize("op", PLAIN, ids=lambda op: op.__name__)
def test_no_texts(op):
    check_no_texts(op)


@pytest.mark.skipif(load_kernel("rms_norm") is None, reason="no C++ compiler here")
def test_no_texts_in_cpp():
    """In a process of its own, which a division by zero in a kernel would end."""
    code = (
        "from lalm.modeling.ops import dispatch; dispatch.EARNS_COMPILING = 0; "
        "from tests.ops import test_empty_batch as test"
    )
    lines = "".join(f"test.check_no_texts(test.{op.__name__}); " for op in CPP)
    subprocess.run([sys.executable, "-c", f"{code}; {lines}"], check=True, timeout=300)


@pytest.mark.parametrize("op", PLAIN + CPP, ids=lambda op: op.__name__)
def test_no_tokens(op):
    with pytest.raises(ValueError, match="hold no token"):
        read(op, (2, 0, HEADS, SIZE))
