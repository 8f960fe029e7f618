# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The kernel of LAM's gates gives what plain torch gives in float64, values and all gradients."""

import copy

import pytest
import torch

from lalm import LamConfig
from lalm.modeling import modeling_lam
from lalm.modeling.modeling_lam import LamGates
from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops.delta.lam_gates import cpp_lam_gates, plain_lam_gates
from tests.ops.cases import relative_error

pytestmark = pytest.mark.skipif(cpp.load_kernel("lam_gates") is None, reason="this machine has no C++ compiler")


def gates(heads, size, **fields):
    torch.manual_seed(heads)
    config = LamConfig(hidden_size=heads * size, num_attention_heads=heads, num_hidden_layers=1, **fields)
    module = LamGates(config)
    module.reset_parameters()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    inputs = torch.randn(2, 7, heads * size), torch.randn(2, 7, heads, size) * 0.3, torch.randn(2, 7, heads, size)
    return module, inputs


def run(module, inputs, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    found = module(*leaves)
    torch.manual_seed(1)
    loss = sum((x * torch.randn(x.shape).to(dtype)).sum() for x in found.values() if x is not None)
    gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()], materialize_grads=True, allow_unused=True)
    return [*found.values(), *gradients]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "size"), [(1, 8), (3, 20), (4, 32), (12, 17)])
def test_values_and_gradients(heads, size, causal, monkeypatch):
    module, inputs = gates(heads, size, is_causal=causal)
    exact = run(copy.deepcopy(module).double(), inputs, torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_lam, "plain_lam_gates", None)
        found = run(module, inputs, torch.float32)
    for actual, expected in zip(found, exact, strict=True):
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < 4e-6  # of the flux bias, a sum in which much cancels
    monkeypatch.setattr(module, "is_complete", False)
    for actual, expected in zip(run(module, inputs, torch.float32), exact, strict=True):
        assert relative_error(actual, expected) < 4e-6


def test_extreme_logits_stay_finite():
    module, (_, k, v) = gates(4, 32, is_causal=True)
    torch.manual_seed(0)
    x = (torch.randn(2, 7, 4 * 7) * torch.logspace(-3, 6, 28)).requires_grad_()
    tensors = (x, k, v, module.flux_weight, module.decay_bias, module.flux_bias)
    found = cpp_lam_gates(*tensors, modeling_lam._LEAK_MAX)
    exact = plain_lam_gates(*(tensor.double() for tensor in tensors), modeling_lam._LEAK_MAX)
    for gate, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(gate, expected.float(), rtol=5e-6, atol=1e-7)  # as sigmoids are in float32
    (gradient,) = torch.autograd.grad(sum(gate.sum() for gate in found), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_types_and_threads(threads):
    module, inputs = gates(4, 32, is_causal=False)
    expected, before = module(*inputs), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = copy.deepcopy(module).bfloat16()(*(x.bfloat16() for x in inputs))
        many = module(*(x.repeat(1, 500, *[1] * (x.dim() - 2)) for x in inputs))
    finally:
        torch.set_num_threads(before)
    for name, gate in expected.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], gate) < 0.1
        torch.testing.assert_close(many[name][:, :, -7:], gate)


def test_other_gates_are_plain():
    for fields in ({"use_flux": False}, {"use_leak": False}, {"use_adaptive_decay": False}):
        module, inputs = gates(2, 16, **fields)
        assert not module.is_complete
        exact = run(copy.deepcopy(module).double(), inputs, torch.float64)
        for actual, expected in zip(run(module, inputs, torch.float32), exact, strict=True):
            assert actual is None or relative_error(actual, expected) < 4e-6
