"""The C++ kernels as registered ops of torch: their schemas, fake implementations and gradients."""

import importlib.util
import itertools

import pytest
import torch
from torch.library import opcheck

from lalm.modeling.ops import dispatch, gla
from lalm.modeling.ops.cpp_kernels import load_kernel
from lalm.modeling.ops.delta import delta_channels_cpp as channels
from lalm.modeling.ops.delta import delta_rule_cpp as delta
from lalm.modeling.ops.delta import lam_gates
from lalm.modeling.ops.diagonal import diagonal_cpp as diagonal
from lalm.modeling.ops.kernels import kernel_op

pytestmark = pytest.mark.skipif(load_kernel("rms_norm") is None, reason="no C++ compiler on this machine")
BATCH, LENGTH, HEADS, SIZE = 2, 5, 2, 16


def make(*shape):
    return torch.rand(*shape).requires_grad_()


def cases():
    """An op, its tensors and its options: with padding and documents, with a state, grouped heads, both directions."""
    torch.manual_seed(0)
    row, state = (BATCH, LENGTH, HEADS, SIZE), (BATCH, HEADS, SIZE, SIZE)
    skip, starts = (torch.zeros(BATCH, LENGTH, dtype=torch.bool) for _ in range(2))
    skip[0, :2] = starts[1, 3] = True
    grouped = (make(BATCH, LENGTH, 1, SIZE), make(BATCH, LENGTH, 1, SIZE), make(*row))
    gates = [make(2, *row[:3], 2) for _ in range(3)]
    yield (
        diagonal._diagonal,
        diagonal.DiagonalTensors(make(*row), make(*row), make(*row), -torch.rand(*row), make(*state), skip, starts),
        diagonal.DiagonalOptions(0.5, None, False),
    )
    yield (
        diagonal._diagonal,
        diagonal.DiagonalTensors(make(*row), make(*row), make(*row), None, make(*state[:3], SIZE + 1), None, None),
        diagonal.DiagonalOptions(0.5, 1e-3, False),
    )
    yield (
        delta._delta_rule,
        delta.DualTensors(*grouped, *gates, make(*gates[0].shape, 2), None, skip, starts.expand(2, -1, -1)),
        delta.DualOptions(0.5, 1e-6, True, False),
    )
    yield (
        delta._delta_rule,
        delta.DualTensors(
            *grouped, None, make(1, *row[:3], 1), None, None, make(*state[:2], 1, SIZE, SIZE), None, None
        ),
        delta.DualOptions(0.5, None, True, True),
    )
    yield (
        channels._delta_channels,
        channels.ChannelTensors(*grouped, -torch.rand(*row), make(*row[:3]), make(*state), skip, starts),
        channels.ChannelOptions(0.5, 1e-6, True),
    )
    fluxes = make(HEADS, SIZE, SIZE), make(2, HEADS, 2), make(2, HEADS)
    yield (
        lam_gates._lam_gates,
        lam_gates.LamGateTensors(make(BATCH, LENGTH, 2 * HEADS * 7), make(*row), make(*row), *fluxes),
        lam_gates.LamGateOptions(0.1),
    )


CASES = pytest.mark.parametrize(
    ("op", "x", "options"), list(cases()), ids=["gates", "normalised", "both_ways", "delta", "channels", "lam_gates"]
)


@CASES
@pytest.mark.slow
def test_opcheck(op, x, options):
    found = opcheck(op.registered, (*x, *options, True))
    assert len(found) == 4
    assert set(found.values()) == {"SUCCESS"}


@CASES
def test_opcheck_of_the_backward_pass(op, x, options):
    with torch.no_grad():
        made = op.registered(*x, *options, True)
        gradients = [torch.rand_like(y) for y in made[: op.outputs]]
        arguments = (*gradients, *op.saved(made, options), *x, *options)
        found = opcheck(op.registered_backward, arguments, test_utils=("test_schema", "test_faketensor"))
    assert found == {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}


@CASES
def test_the_registered_op_is_the_one_that_runs(op, x, options):
    """Values and gradients bit for bit; without what the kernel keeps, gradients come from the plain form."""
    tensors = [y for y in x if y is not None and y.requires_grad]
    found = []
    for made in (op(x, options), op.registered(*x, *options, True), op.registered(*x, *options, False)):
        outputs = [y for y in made[: op.outputs] if y is not None and y.requires_grad]
        loss = sum(y.square().sum() for y in outputs)
        found.append((outputs, torch.autograd.grad(loss, tensors, create_graph=False)))
    for index, (outputs, gradients) in enumerate(found[1:]):
        for y, expected in zip((*outputs, *gradients), itertools.chain(*found[0]), strict=True):
            assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5) if index else torch.equal(y, expected)


def test_second_derivatives_come_from_the_plain_form():
    op, x, options = next(cases())
    found = []
    for made in (op(x, options), op.registered(*x, *options, True)):
        (dq,) = torch.autograd.grad(made[0].square().sum(), x.q, create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), x.k)[0])
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


@pytest.fixture
def gla_inputs(monkeypatch):
    """Inputs that are worth a kernel."""
    monkeypatch.setattr(dispatch, "EARNS_COMPILING", 1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 20, 2, 32) for _ in range(3))
    return q, k, v, -torch.rand(2, 20, 2, 32)


def read(q, k, v, g):
    return gla(q, k, v, g)[0]


def compiled(function, **options):
    """`function` compiled to one graph, and the list in which our ops in its graphs will be."""
    graphs, found = [], []

    def run(graph, _):
        graphs.append(graph)
        found.extend(str(node.target) for node in graph.graph.nodes if "lalm" in str(node.target))
        return graph

    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=run, **options), found


@pytest.mark.slow
def test_graphs_serve_open_lengths(gla_inputs):
    run, found = compiled(read, dynamic=True)
    for length in (20, 19, 15, 12):
        piece = [y[:, :length].contiguous() for y in gla_inputs]
        assert torch.equal(run(*piece), read(*piece))
    assert 1 <= len(found) <= 2  # torch compiles once more after the first length, and then no more


@pytest.mark.slow
def test_transforms_inside_a_graph_see_plain_torch(gla_inputs):
    q, *others = gla_inputs
    slope = torch.func.grad(lambda q: read(q, *others).sum())
    for function in (lambda q: torch.vmap(lambda q: read(q, *others))(q[None])[0], slope):
        run, found = compiled(function)
        torch.testing.assert_close(run(q), function(q), rtol=1e-4, atol=1e-4)
        assert not found


def test_an_exported_program_runs_where_there_is_no_kernel(gla_inputs):
    class Model(torch.nn.Module):
        def forward(self, *x):
            return read(*x)

    program = torch.export.export(Model(), gla_inputs)
    assert not [node for node in program.graph.nodes if "lalm" in str(node.target)]


def test_a_second_copy_of_the_code_has_a_namespace_of_its_own():
    spec = importlib.util.spec_from_file_location("copied_kernel_op", kernel_op.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy._library.ns != kernel_op._library.ns


def test_a_structure_is_that_of_the_source():
    gradients = kernel_op.structure("delta_rule", "Gradients")
    assert [name for name, _ in gradients._fields_] == ["q", "k", "v", "decay", "beta", "read", "coupling", "state"]
    inputs = kernel_op.structure("delta_rule", "Inputs")
    assert inputs.row.size == inputs.token.size == 3 * 8
    places = {"x": 1, "factor": 2, "count": 3}
    with pytest.raises(TypeError, match="threads"):
        kernel_op.pack("activation", "Inputs", **places)
    with pytest.raises(AttributeError, match="thread"):
        kernel_op.pack("activation", "Inputs", **places, thread=1)
