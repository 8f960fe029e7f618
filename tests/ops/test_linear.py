# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""A linear map by oneDNN, or by the kernel for a few rows, is the stock one: outputs, gradients of both orders, and
everything that is left to torch."""

import pytest
import torch
from torch.nn import functional as F

from lalm.modeling.layers import make_linear
from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops import dispatch
from lalm.modeling.ops.dense import matrix_product as module
from lalm.modeling.ops.dense.cross_entropy import linear_cross_entropy
from lalm.modeling.ops.dense.matrix_product import linear, weight_gradient
from lalm.modeling.ops.dispatch import mkl_is_slow
from tests.ops.cases import relative_error

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
needs_compiler = pytest.mark.skipif(cpp.load_kernel("few_rows") is None, reason="this machine has no C++ compiler")
AMD = {"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_f": True}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """A processor that is faster with oneDNN, on which any product pays; counts the products that went there."""
    taken = []
    forward = module._OneDnnLinear.forward

    def counted(ctx, *arguments):
        taken.append(arguments)
        return forward(ctx, *arguments)

    monkeypatch.setattr(dispatch, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(dispatch, "EARNS_ONEDNN", 0)
    monkeypatch.setattr(module._OneDnnLinear, "forward", staticmethod(counted))
    return taken


class Quantised(torch.Tensor):
    """A weight whose product is not that of its numbers."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*arguments, **(kwargs or {}))
            return torch.full_like(y, 7) if function is F.linear else y


def factors(rows=33, size=24, outputs=40, dtype=torch.float32):
    torch.manual_seed(rows)
    return tuple(torch.randn(shape, dtype=dtype) for shape in ((rows, size), (outputs, size), (outputs,)))


def exact(function, *inputs):
    """Output and gradients in float64."""
    return differentiated(function, *(x.detach().double() for x in inputs))


def differentiated(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("size", "outputs"), [(24, 40), (40, 24), (7, 100), (64, 64), (17, 1)])
@pytest.mark.parametrize("rows", [16, 33, 130])
def test_outputs_and_gradients(rows, size, outputs, has_bias, calls):
    inputs = factors(rows, size, outputs)[: 2 + has_bias]
    found = differentiated(linear, *inputs)
    assert len(calls) >= 1
    for actual, expected in zip(found, exact(F.linear, *inputs), strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 6), (36,)])
def test_leading_axes_and_any_strides(shape, calls):
    x, weight, bias = factors(36)
    every_other = torch.randn(36, 48)[:, ::2]
    for rows in (x, x.t().contiguous().t(), every_other, every_other[:1].expand(36, -1)):
        for matrix in (weight, weight.t().contiguous().t(), torch.randn(80, 24)[::2]):
            given = rows.unflatten(0, shape)
            actual = linear(given, matrix, bias)
            assert actual.shape == (*shape, 40)
            assert relative_error(actual, F.linear(given.double(), matrix.double(), bias.double())) < 1e-6
    assert len(calls) == 12


def test_gradient_that_is_expanded_or_transposed(calls):
    x, weight, _ = factors()
    for of_output in (torch.ones(()).expand(33, 40), torch.randn(40, 33).t(), torch.randn(33, 80)[:, ::2]):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        found = torch.autograd.grad(linear(*leaves), leaves, of_output)
        for actual, expected in zip(found, (of_output @ weight, of_output.t() @ x), strict=True):
            assert relative_error(actual, expected) < 1e-6
    assert len(calls) > 3


def test_frozen_factors_cost_no_product(calls):
    x, weight, _ = factors()
    for frozen in (0, 1):
        calls.clear()
        leaves = [x.clone(), weight.clone()]
        leaves[1 - frozen].requires_grad_()
        linear(*leaves).sum().backward()
        assert len(calls) == 2
        assert leaves[frozen].grad is None


def test_second_derivatives():
    leaves = [x.requires_grad_() for x in factors()]
    found = []
    for function in (linear, F.linear):
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("outputs", [5, 24, 96, 500])
def test_weight_gradient(outputs):
    dy, x = torch.randn(50, outputs), torch.randn(50, 24)
    assert relative_error(weight_gradient(dy, x), dy.double().t() @ x.double()) < 1e-6


def test_layers_and_the_loss_in_pieces_run_there(calls):
    x, weight, bias = factors()
    layer = make_linear(24, 40)
    layer.weight.data, layer.bias.data = weight, bias
    assert torch.equal(layer(x), linear(x, weight, bias))
    calls.clear()
    targets = torch.arange(33)
    leaves = [x.requires_grad_() for x in (x, weight, bias)]
    found = torch.autograd.grad(linear_cross_entropy(*leaves, targets), leaves)
    assert len(calls) == 3
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), targets), leaves)
    for actual, wanted in zip(found, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5


def test_a_graph_holds_the_stock_product(calls, monkeypatch):
    """In one piece, without a look at the processor, and for any number of rows."""
    layer = make_linear(24, 40)
    monkeypatch.setattr(dispatch, "mkl_is_slow", None)
    x, weight, bias = factors()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="eager")
    monkeypatch.setattr(dispatch, "WORTH_STREAMING", 0)
    for rows in (x, x[:20], x[:7]):
        assert torch.equal(compiled(rows, weight, bias), F.linear(rows, weight, bias))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    assert torch.equal(exported(x[:20]), F.linear(x[:20], layer.weight, layer.bias))
    assert not calls


def test_what_is_left_to_torch(calls, monkeypatch):
    x, weight, bias = factors()
    wide = factors(dtype=torch.float64)
    assert torch.equal(linear(*wide), F.linear(*wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    assert torch.equal(linear(x[0], weight, bias), F.linear(x[0], weight, bias))  # one row, hardly any work
    assert linear(x[:0], weight, bias).shape == (0, 40)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.bfloat16(), weight)
    assert torch.equal(linear(x, weight.as_subclass(Quantised)), torch.full((33, 40), 7.0))
    torch.func.vmap(linear, (0, None))(x.expand(2, 33, 24), weight)
    torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    monkeypatch.setattr(dispatch, "EARNS_ONEDNN", 33 * 24 * 40 + 1)
    monkeypatch.setattr(dispatch, "SHORT_SEQUENCE", 33)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


@pytest.fixture
def streamed(monkeypatch):
    """Any product of few rows is worth a call of the kernel; the number of rows of each that it did."""
    taken = []
    kernel = cpp.load_kernel("few_rows")

    class Counted:
        @staticmethod
        def forward(inputs, y):
            taken.append(inputs._obj.rows)
            kernel.forward(inputs, y)

    monkeypatch.setattr(dispatch, "WORTH_STREAMING", 0)
    monkeypatch.setattr(dispatch, "load_kernel", lambda name: cpp.load_kernel(name) and Counted)
    return taken


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("size", "outputs"), [(1, 1), (15, 3), (16, 7), (64, 33), (100, 1), (131, 20), (512, 300)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 13, 15])
def test_few_rows(rows, size, outputs, threads, streamed, monkeypatch):
    monkeypatch.setattr(module, "threads", lambda numbers: threads)
    x, weight, bias = factors(rows, size, outputs)
    with torch.no_grad():
        for given in ((x, weight), (x, weight, bias), (x[:, None], weight, bias), (x.t().contiguous().t(), weight)):
            expected = F.linear(*(y.double() for y in given))
            actual = linear(*given)
            assert actual.shape == expected.shape
            assert actual.dtype == torch.float32
            assert rows == 0 or relative_error(actual, expected) < 1e-6
    assert streamed == [rows] * 4


@needs_compiler
def test_a_vector_and_parameters_are_streamed(streamed):
    layer = make_linear(24, 40)
    with torch.no_grad():
        assert layer(torch.randn(24)).shape == (40,)
    layer.requires_grad_(False)
    layer(torch.randn(2, 3, 24))
    assert streamed == [1, 6]


@needs_compiler
def test_few_rows_that_are_left_to_torch(streamed, monkeypatch):
    x, weight, bias = factors(3)
    wide = factors(3, dtype=torch.float64)
    recorded = linear(x, weight.clone().requires_grad_(), bias)
    assert torch.equal(recorded, F.linear(x, weight, bias))
    assert recorded.requires_grad
    assert torch.equal(linear(*wide), F.linear(*wide))
    assert torch.equal(linear(x, weight.t().contiguous().t()), F.linear(x, weight.t().contiguous().t()))
    assert torch.equal(linear(x, weight.as_subclass(Quantised)), torch.full((3, 40), 7.0))
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes"):
        linear(x, weight[:, :20].contiguous())
    torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    monkeypatch.setattr(dispatch, "WORTH_STREAMING", weight.numel() + 1)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not streamed


@needs_compiler
@torch.no_grad()
def test_a_short_text_is_streamed_where_mkl_is_slow(streamed, calls, monkeypatch):
    x, weight, bias = factors(65)
    monkeypatch.setattr(dispatch, "EARNS_ONEDNN", 64 * weight.numel())
    for slow, rows in ((True, [15, 16, 63]), (False, [15])):
        monkeypatch.setattr(dispatch, "mkl_is_slow", lambda slow=slow: slow)
        streamed.clear()
        for size in (15, 16, 63, 64, 65):
            actual = linear(x[:size], weight, bias)
            assert relative_error(actual, F.linear(x[:size].double(), weight.double(), bias.double())) < 1e-6
        assert streamed == rows
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "slow"),
    [({}, True), ({"avx512_f": False}, False), ({"cpu_name": "Intel(R) Xeon(R)"}, False), (None, False)],
)
def test_processors_that_mkl_serves_well_stay_with_it(changes, slow, monkeypatch):
    found = {} if changes is None else AMD | changes
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert mkl_is_slow.__wrapped__() is slow
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not mkl_is_slow.__wrapped__()
