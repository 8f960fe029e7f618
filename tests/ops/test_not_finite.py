# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""NaN and infinity reach what a token may see, and nothing else: not from padding, not from another document."""

import pytest
import torch

from lalm.modeling.layers import ShortConvolution
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
from lalm.modeling.ops.local_global.efficient_bidirectional import (
    bidirectional_efficient_attention,
    cross_efficient_attention,
)
from lalm.modeling.ops.local_global.local_attention import local_attention, sliding_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout

cpp_delta_rule = in_form(delta_rule, "cpp")
cpp_dual_state_delta = in_form(dual_state_delta, "cpp")
cpp_gated_delta_rule = in_form(gated_delta_rule, "cpp")
cpp_gla = in_form(gla, "cpp")
cpp_linear_attention = in_form(linear_attention, "cpp")
cpp_retention = in_form(retention, "cpp")
parallel_retention = in_form(retention, "parallel")

SIZE, HEADS, LENGTH = 32, 2, 37  # large enough for the kernels
HAS_KERNELS = load_kernel("rms_norm") is not None


def short_conv(q, k, v, layout, causal=True):
    """The one in plain torch, which float64 gets."""
    conv = ShortConvolution(HEADS * SIZE, 3, causal).double()
    torch.nn.init.constant_(conv.weight, 0.3)
    (o,), _ = conv([(q + k + v).flatten(-2).double()], None, layout)
    return o.unflatten(-1, (HEADS, SIZE))


GATES = {"dual": "memory memory memory coupling", "gla": "key", "gated_delta": "head head", "delta": "head"}
FORMS = (
    *(recurrent_gla, chunk_gla, cpp_gla),
    *(recurrent_linear_attention, chunk_linear_attention, cpp_linear_attention),
    *(recurrent_retention, chunk_retention, cpp_retention, parallel_retention),
    *(recurrent_delta_rule, chunk_delta_rule, cpp_delta_rule),
    *(recurrent_gated_delta_rule, chunk_gated_delta_rule, cpp_gated_delta_rule),
    *(recurrent_dual_state_delta, chunk_dual_state_delta, cpp_dual_state_delta),
    *(recurrent_efficient_attention, chunk_efficient_attention, bidirectional_efficient_attention),
    *(local_attention, sliding_attention, short_conv),
)
BOTH_SIDES = [op for op in FORMS if "efficient" not in op.__name__ and op is not parallel_retention]
CASES = [pytest.param(op, {}, id=op.__name__) for op in FORMS]
CASES += [pytest.param(op, {"causal": False}, id=f"{op.__name__}-both_sides") for op in BOTH_SIDES]
for semantics in ("0.19", "v0.2.1"):
    for op in (recurrent_efficient_attention, chunk_efficient_attention):
        CASES.append(pytest.param(op, {"blindspot_size": 4, "semantics": semantics}, id=f"{op.__name__}-{semantics}"))
every_op = pytest.mark.parametrize(("op", "options"), CASES)
CORNERS = {
    "padding left": [0, 1, 2, 3, 4],
    "padding right": [LENGTH - 3, LENGTH - 2, LENGTH - 1],
    "padding inside": [0, 7, 8, 9, 22, LENGTH - 1],
}


def inputs(op, options):
    """q, k, v and the gates of an op, all of which may be differentiated."""
    gen = torch.Generator().manual_seed(0)
    sides = () if options.get("causal", True) else (2,)
    shapes = {"head": (HEADS,), "key": (HEADS, SIZE), "memory": (HEADS, 2), "coupling": (HEADS, 2, 2)}
    kinds = next((text for name, text in GATES.items() if name in op.__name__), "").split()
    found = [torch.rand(2, LENGTH, HEADS, SIZE, generator=gen) / SIZE**0.5 for _ in range(3)]
    for place, kind in enumerate(kinds):
        leading = sides if "dual" in op.__name__ else ()
        x = 0.5 * torch.rand(*leading, 2, LENGTH, *shapes[kind], generator=gen)
        found.append(-x if place == 0 and op.__name__.split("_", 1)[1] != "delta_rule" else x)
    return found


def time_axis(x):
    """1, or 2 of gates of both directions."""
    return tuple(x.shape).index(LENGTH)


def read(op, options, tensors, bad, weight, layout):
    """Outputs and gradients of all inputs, with something that is no number at the tokens `bad [B, T]`."""
    leaves = [torch.where(bad.reshape(2, LENGTH, *[1] * (x.ndim - time_axis(x) - 1)), torch.nan, x).requires_grad_()
              for x in tensors]  # fmt: skip
    window = (8,) if op in (local_attention, sliding_attention) else ()
    found = op(*leaves, *window, layout=layout, **options)
    o = found[0] if isinstance(found, tuple) else found
    # What follows an op need not give finite gradients where its inputs were none.
    return o, torch.autograd.grad(o, leaves, torch.where(bad[..., None, None], torch.nan, weight).to(o))


def check(op, options, bad, layout):
    if op.__name__.startswith("cpp") and not HAS_KERNELS:
        pytest.skip("no C++ compiler on this machine")
    tensors = inputs(op, options)
    weight = torch.randn(2, LENGTH, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    weight = weight.masked_fill(bad[..., None, None], 0)
    o, slopes = read(op, options, tensors, bad, weight, layout)
    expected, exact = read(op, options, tensors, torch.zeros_like(bad), weight, layout)
    torch.testing.assert_close(o[~bad], expected[~bad])
    for actual, right in zip(slopes, exact, strict=True):
        place = (slice(None),) * (time_axis(actual) - 1) + (~bad,)
        torch.testing.assert_close(actual[place], right[place], atol=1e-5, rtol=1e-5)
    return o, slopes


@every_op
@pytest.mark.parametrize("kind", CORNERS)
def test_padding(op, options, kind):
    bad = torch.zeros(2, LENGTH, dtype=torch.bool)
    bad[0, CORNERS[kind]] = True
    order = (~bad).int().argsort(dim=1, stable=True)
    o, slopes = check(op, options, bad, SequenceLayout(mask=~bad, order=order))
    assert o.isfinite().all()
    assert all(slope.isfinite().all() for slope in slopes)


@every_op
@pytest.mark.parametrize("documents", [[0, 6, 13, 33], [0, 16, 32]], ids=str)
def test_documents(op, options, documents):
    """Every second one is spoiled."""
    segments = torch.zeros(2, LENGTH, dtype=torch.long)
    segments[0, documents[1:]] = 1
    segments[1, [5, 20]] = 1
    segments = segments.cumsum(1)
    check(op, options, segments % 2 == 1, SequenceLayout(segments=segments))


def test_padding_of_a_context():
    q, k, v = (torch.rand(2, LENGTH, HEADS, SIZE, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 5:9] = False
    bad = ~mask[..., None, None]
    o = cross_efficient_attention(q, k.masked_fill(bad, torch.nan), v.masked_fill(bad, torch.inf), mask)
    torch.testing.assert_close(o, cross_efficient_attention(q, k, v, mask))
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(o.sum(), (q, k, v)))
