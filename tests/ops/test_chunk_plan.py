"""The chunk form picks its evaluation by the strength of the decay; each choice is held against the recurrence."""

import pytest
import torch

from lalm.modeling.ops.diagonal.gla import chunk_gla, recurrent_gla
from lalm.modeling.ops.dispatch import chunks_of_decays

# Log decay a step -> size of the chunks, and whether they are factored.
PLANS = {
    -0.1: (64, True),
    -0.93: (64, True),
    -0.95: (16, True),
    -3.7: (16, True),
    -3.8: (64, False),
    -50.0: (64, False),
}


def inputs(step, length=150, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 4, generator=gen, dtype=dtype) for _ in range(3))
    g = torch.full((2, length, 2, 4), 1e-3 * step, dtype=dtype)
    g[1, :, 1, 2] = step  # one channel of one head decides for the call
    return [x.requires_grad_() for x in (q, k, v, g)]


@pytest.mark.parametrize("step", PLANS)
def test_the_strongest_channel_decides(step):
    assert chunks_of_decays(inputs(step)[3], 64) == PLANS[step]
    assert chunks_of_decays(inputs(step, dtype=torch.bfloat16)[3].detach(), 64)[1] == PLANS[step][1]


def test_no_gate_is_factored():
    assert chunks_of_decays(None, 64) == (64, True)


@pytest.mark.parametrize("step", PLANS)
def test_every_plan_is_the_recurrence(step):
    x = inputs(step)
    weight = torch.randn(2, 150, 2, 4, dtype=torch.float64)
    results = []
    for op in (recurrent_gla, chunk_gla):
        o, state = op(*x, output_final_state=True)
        results.append([o, state, *torch.autograd.grad((o * weight).sum() + state.square().sum(), x)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
