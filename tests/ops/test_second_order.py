# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Gradients of gradients, of every function whose backward pass is written by hand, are those of the plain form.

They are taken by `torch.autograd.grad` of some inputs: that walks silently past a step that is not differentiable,
where `backward()` would meet an error.
"""

import pytest
import torch
from torch.nn import functional as F

from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops import dispatch
from lalm.modeling.ops.delta.delta_rule import delta_rule, gated_delta_rule
from lalm.modeling.ops.delta.dual_state import chunk_dual_state_delta, dual_state_delta, recurrent_dual_state_delta
from lalm.modeling.ops.delta.lam_gates import cpp_lam_gates, plain_lam_gates
from lalm.modeling.ops.dense.cross_entropy import linear_cross_entropy
from lalm.modeling.ops.dense.elementwise import activate, rms_norm
from lalm.modeling.ops.dense.short_conv import cpp_short_conv, plain_short_conv
from lalm.modeling.ops.diagonal.gla import chunk_gla, gla, recurrent_gla
from lalm.modeling.ops.diagonal.linear_attention import linear_attention, recurrent_linear_attention
from lalm.modeling.ops.diagonal.retention import retention
from lalm.modeling.ops.diagonal.taylor import taylor_features
from lalm.modeling.ops.dispatch import in_form
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import CASE_IDS, CASES, call, make_inputs, relative_error
from tests.ops.test_dual_state import make, with_state

cpp_delta_rule = in_form(delta_rule, "cpp")
cpp_dual_state_delta = in_form(dual_state_delta, "cpp")
cpp_gated_delta_rule = in_form(gated_delta_rule, "cpp")
cpp_gla = in_form(gla, "cpp")
cpp_linear_attention = in_form(linear_attention, "cpp")
cpp_retention = in_form(retention, "cpp")


def cpp_taylor_attention(*args, **kwargs):
    return linear_attention(*args, taylor=True, implementation="cpp", **kwargs)


LENGTH = 7
KINDS = ("plain", "padding", "documents", "both")
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_compiler = pytest.mark.skipif(cpp.load_kernel("rms_norm") is None, reason="this machine has no C++ compiler")


def layout_of(kind):
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :3], mask[1, [3, 6]] = False, False
    segments = torch.tensor([[0] * 4 + [1] * 3, [0] * 2 + [1] * 3 + [0] * 2])
    return SequenceLayout(
        mask if kind in ("padding", "both") else None, segments if kind in ("documents", "both") else None
    )


def rand_like(x, seed):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x)


def third_order(function, x, layout=None):
    """A product of the Hessian and of what follows it with fixed vectors, of a curved loss of all that `function(**x)`
    returns at real tokens: for every input by name."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in x.items() if value is not None}
    outputs = function(**(x | leaves))
    loss = sum(value.pow(3).sum() for value in leaves.values())  # gradients that bypass the function
    for number, y in enumerate(outputs if isinstance(outputs, (tuple, list)) else (outputs,)):
        if layout is not None and layout.mask is not None and y.shape[:2] == layout.mask.shape:
            y = y * layout.mask[..., None, None]
        loss = loss + (y.sin() * rand_like(y, number)).sum()
    found = {}
    for order in range(3):
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=order < 2)
        found |= {f"{name}, order {order + 1}": g for name, g in zip(leaves, gradients, strict=True)}
        loss = sum((g * rand_like(g, 10 + number)).sum() for number, g in enumerate(gradients))
    return found


def assert_same(actual, expected, tolerance):
    for name, value in expected.items():
        assert relative_error(actual[name], value, floor=1e-3) < tolerance, name


@every_kind
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_chunk_forms(case, kind):
    layout, x = layout_of(kind), make_inputs(case, LENGTH, heads=2, key=3, value=2)
    options = {"layout": layout, "chunk_size": 2}
    expected = third_order(lambda **x: call(case.recurrent, case, x, layout=layout), x, layout)
    assert_same(third_order(lambda **x: call(case.chunk, case, x, **options), x, layout), expected, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_chunk_forms_against_differences(case):
    """torch's own check of second derivatives by finite differences."""
    x = make_inputs(case, 3, batch=1, heads=1, key=2, value=1)
    names = [name for name, value in x.items() if value is not None]

    def function(*values):
        return call(case.chunk, case, x | dict(zip(names, values, strict=True)), chunk_size=2)

    assert torch.autograd.gradgradcheck(function, [x[name].requires_grad_() for name in names])


@every_kind
@pytest.mark.parametrize("delta", [True, False])
def test_dual_state_in_slabs(kind, delta, monkeypatch):
    monkeypatch.setattr(dispatch, "PAIRS_AT_ONCE", 1)
    layout, x = layout_of(kind), with_state(make(LENGTH, heads=2, key=3, value=2))
    options = {"layout": layout, "use_delta_rule": delta, "output_final_state": True}
    expected = third_order(lambda **x: recurrent_dual_state_delta(**x, **options), x, layout)
    found = third_order(lambda **x: chunk_dual_state_delta(**x, **options, chunk_size=2), x, layout)
    assert_same(found, expected, 1e-10)


def test_one_tensor_for_all():
    """Inputs that are one tensor or follow from each other: each use counts once."""
    x = torch.randn(1, 5, 1, 2, dtype=torch.float64, requires_grad=True)
    g = -F.softplus(x)
    found = []
    for op in (recurrent_gla, chunk_gla):
        (d,) = torch.autograd.grad((op(x, x, x * x, g)[0].square() + x.square()).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(d.square().sum(), x, retain_graph=True)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", ["q", "v", "g"])
def test_one_input_needs_a_gradient(wanted):
    """A gradient penalty on a part of the inputs; the others are constants."""
    case = next(case for case in CASES if case.name == "gla")
    found = []
    for op in (recurrent_gla, chunk_gla):
        x = make_inputs(case, 5, key=3, value=2)
        x[wanted].requires_grad_()
        (d,) = torch.autograd.grad(op(x["q"], x["k"], x["v"], x["g"])[0].sin().sum(), x[wanted], create_graph=True)
        d.square().sum().backward()
        found.append(x[wanted].grad)
    torch.testing.assert_close(*found)


def test_many_cotangents_at_once():
    """The backward pass alone inside vmap."""
    x = torch.randn(1, 9, 1, 2, dtype=torch.float64, requires_grad=True)
    y = chunk_gla(x, x, x, -x.square())[0]
    rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    found = torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(rows)
    expected = torch.autograd.functional.jacobian(lambda x: recurrent_gla(x, x, x, -x.square())[0], x)
    torch.testing.assert_close(found.view_as(expected), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_keeps_its_type(normalize):
    """Under autocast, whose types are none of the plain form's business."""
    op = recurrent_linear_attention if normalize else recurrent_gla
    x = torch.rand(1, 9, 1, 2, dtype=torch.float64, requires_grad=True)
    extra = {} if normalize else {"g": -x}
    with torch.autocast("cpu", torch.bfloat16):
        (d,) = torch.autograd.grad(op(x, x, x, **extra)[0].sum(), x, create_graph=True)
    assert d.dtype == torch.float64


@needs_compiler
@every_kind
@pytest.mark.parametrize(
    "name", ["linear_normalized", "linear_normalized_gated", "gla", "retention", "delta", "delta_gated"]
)
def test_cpp_forms(name, kind):
    """The kernels of float32 against the definition in float64; values of 20 leave registers in part empty."""
    case = next(case for case in CASES if case.name == name)
    op = {"gla": cpp_gla, "retention": cpp_retention, "delta": cpp_delta_rule, "delta_gated": cpp_gated_delta_rule}
    op = op.get(name, cpp_linear_attention)
    layout, x = layout_of(kind), make_inputs(case, LENGTH, heads=2, key=32, value=20, dtype=torch.float32)
    expected = third_order(lambda **x: call(case.recurrent, case, x, layout=layout), double(x), layout)
    assert_same(third_order(lambda **x: call(op, case, x, layout=layout), x, layout), expected, 2e-4)


def double(x):
    return {name: None if value is None else value.double() for name, value in x.items()}


@needs_compiler
@every_kind
def test_cpp_taylor(kind):
    layout = layout_of(kind)
    x = {name: 0.5 * torch.randn(2, LENGTH, 1, size) for name, size in (("q", 8), ("k", 8), ("v", 16))}

    def plain(q, k, v):
        return recurrent_linear_attention(taylor_features(q), taylor_features(k), v, layout=layout, scale=1.0)[0]

    found = third_order(lambda **x: cpp_taylor_attention(**x, layout=layout, scale=1.0)[0], x, layout)
    assert_same(found, third_order(plain, double(x), layout), 2e-4)


@needs_compiler
@every_kind
@pytest.mark.parametrize("causal", [True, False])
def test_cpp_dual_state(kind, causal):
    layout, x = layout_of(kind), make(LENGTH, heads=2, key=16, value=20, causal=causal, dtype=torch.float32)
    x = with_state(x) if causal else x
    options = {"layout": layout, "causal": causal, "output_final_state": causal}

    def of(op):
        return lambda **x: [y for y in op(**x, **options) if y is not None]

    expected = third_order(of(recurrent_dual_state_delta), double(x), layout)
    assert_same(third_order(of(cpp_dual_state_delta), x, layout), expected, 2e-4)


@needs_compiler
def test_elementwise(monkeypatch):
    monkeypatch.setattr("lalm.modeling.ops.dispatch.WORTH_A_KERNEL", 1)
    x = {"x": torch.randn(3, 40), "weight": torch.randn(40)}
    found = third_order(lambda x, weight: rms_norm(x, weight, 1e-5), x)
    assert_same(found, third_order(lambda x, weight: rms_norm(x, weight, 1e-5), double(x)), 1e-4)
    x = {"x": torch.randn(3, 40), "factor": torch.randn(3, 40)}
    for name in ("sigmoid", "silu", "gelu"):
        expected = third_order(lambda name=name, **x: activate(name, **x), double(x))
        assert_same(third_order(lambda name=name, **x: activate(name, **x), x), expected, 1e-4)


@needs_compiler
def test_lam_gates():
    shapes = {"x": (2, 5, 14), "k": (2, 5, 2, 4), "v": (2, 5, 2, 3), "flux_weight": (2, 4, 3)}
    shapes |= {"decay_bias": (1, 2, 2), "flux_bias": (1, 2)}
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    found = third_order(lambda **x: cpp_lam_gates(**x, leak_max=0.5), x)
    assert_same(found, third_order(lambda **x: plain_lam_gates(**x, leak_max=0.5), double(x)), 1e-4)


@needs_compiler
@every_kind
@pytest.mark.parametrize("before", [3, 2])
def test_short_conv(kind, before):
    layout = layout_of(kind)
    if layout.mask is not None:
        layout.order = layout.mask.int().argsort(dim=1, stable=True)
    x = {"first": torch.randn(2, LENGTH, 3), "second": torch.randn(2, LENGTH, 5), "weight": torch.randn(8, 4)}
    mask = torch.ones(2, LENGTH, 1) if layout.mask is None else layout.mask[..., None]

    def kernel(first, second, weight):
        return torch.cat(cpp_short_conv([first, second], weight, before, True, layout), -1) * mask

    def plain(first, second, weight):
        return plain_short_conv(torch.cat([first, second], -1), weight, before, True, layout)[0] * mask

    assert_same(third_order(kernel, x), third_order(plain, double(x)), 1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy(bias):
    targets = torch.tensor([1, 4, -100, 0, 2])
    x = {"hidden": torch.randn(5, 3), "weight": torch.randn(6, 3), "bias": torch.randn(6) if bias else None}
    x = double(x)
    found = third_order(lambda **x: linear_cross_entropy(**x, targets=targets), x)
    expected = third_order(lambda hidden, weight, bias: F.cross_entropy(F.linear(hidden, weight, bias), targets), x)
    assert_same(found, expected, 1e-10)
