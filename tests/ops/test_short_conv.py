# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The C++ short convolution is the one in plain torch, outputs and gradients, with padding and documents anywhere."""

import pytest
import torch

from lalm.modeling.layers import ShortConvolution
from lalm.modeling.model_inputs import build_layout
from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops import sequence_layout as layout
from tests.ops.cases import relative_error

pytestmark = pytest.mark.skipif(
    cpp.load_kernel("short_conv", WIDTH=4, BEFORE=3, SILU=1) is None, reason="this machine has no C++ compiler"
)
LENGTH = 17


def layouts():
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, 11:], mask[1, :4], mask[2, [0, 5, 6, 9, 16]] = False, False, False
    documents = torch.tensor([[0] * 6 + [1] * 11, [0] * 9 + [1] * 2 + [2] * 6, [0] * 5 + [3] * 12])
    return {
        "plain": layout.SequenceLayout(),
        "padding": build_layout(mask, None, None, None, (3, LENGTH), True),
        "documents": build_layout(None, None, documents, None, (3, LENGTH), True),
        "both": build_layout(mask, None, documents, None, (3, LENGTH), True),
    }


def run(conv, parts, where, keeps_state):
    leaves = [part.clone().requires_grad_() for part in parts]
    outputs, state = conv(leaves, None, where, keeps_state)
    assert (state is None) == (not keeps_state)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if where.mask is None else where.mask
    y = torch.cat(list(outputs), dim=-1)[real]
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, *torch.autograd.grad((y * weight).sum(), [*leaves, conv.weight])


@pytest.mark.parametrize("kind", ["plain", "padding", "documents", "both"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "centred"])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("activation", [True, False], ids=["silu", "linear"])
def test_cpp_is_torch(kind, causal, width, activation):
    torch.manual_seed(0)
    conv = ShortConvolution(5 + 70, width, causal, activation)
    torch.nn.init.normal_(conv.weight)
    parts, where = [torch.randn(3, LENGTH, 5), torch.randn(3, LENGTH, 70)], layouts()[kind]
    found = run(conv, parts, where, keeps_state=False)
    exact = run(conv.double(), [part.double() for part in parts], where, keeps_state=True)
    for actual, expected in zip(found, exact, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("kind", ["plain", "padding", "documents", "both"])
@pytest.mark.parametrize("width", [1, 4, LENGTH + 3])
def test_state_for_a_cache(kind, width, monkeypatch):
    """The kernel leaves the state that plain torch does; values and gradients."""
    torch.manual_seed(0)
    conv, parts, where = (
        ShortConvolution(21, width),
        [torch.randn(3, LENGTH, 5), torch.randn(3, LENGTH, 16)],
        layouts(),
    )
    torch.nn.init.normal_(conv.weight)

    def state_of():
        leaves = [part.clone().requires_grad_() for part in parts]
        outputs, state = conv(leaves, None, where[kind], True)
        loss = (state * torch.linspace(-1, 1, state.numel()).view_as(state)).sum()
        return state, *torch.autograd.grad(loss + 0 * sum(y.sum() for y in outputs), leaves)

    found = state_of()
    assert found[0].shape == (3, width - 1, 21)
    monkeypatch.setattr("lalm.modeling.layers.cpp_short_conv", lambda *arguments: None)
    for actual, expected in zip(found, state_of(), strict=True):
        assert torch.equal(actual, expected)


def test_threads_give_the_same():
    conv, parts, where = ShortConvolution(130, 4), [torch.randn(3, LENGTH, 130)], layouts()["both"]
    torch.nn.init.normal_(conv.weight)
    expected = run(conv, parts, where, keeps_state=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        actual = run(conv, parts, where, keeps_state=False)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_more_channels_than_a_task_takes():
    """One goes through 512 of them; the weights of all the others have gradients, too."""
    torch.manual_seed(0)
    conv, parts, where = (
        ShortConvolution(1300, 3),
        [torch.randn(3, LENGTH, 1200), torch.randn(3, LENGTH, 100)],
        layouts(),
    )
    torch.nn.init.normal_(conv.weight)
    found = run(conv, parts, where["both"], keeps_state=False)
    exact = run(conv.double(), [part.double() for part in parts], where["both"], keeps_state=True)
    for actual, expected in zip(found, exact, strict=True):
        assert relative_error(actual, expected) < 1e-6
    for first in range(0, 1300, 100):
        assert relative_error(found[-1][first : first + 100], exact[-1][first : first + 100]) < 1e-5
