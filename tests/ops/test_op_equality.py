"""recurrent == chunk == the attention matrix: outputs, final states and every gradient."""

import pytest
import torch

from tests.ops.cases import CASE_IDS, CASES, call, gradients, make_inputs, quadratic, relative_error, tensors

# Around the chunk (64) and sub-chunk (16) boundaries, and the shortest sequences.
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 130, 193)
every_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)


def loss_weights(x, case, dtype=torch.float64):
    """Random cotangents for o and for the final state, so that every gradient path is exercised at once."""
    batch, _, heads, value = x["v"].shape
    out_weight = torch.randn(x["v"].shape, dtype=dtype)
    return out_weight, torch.randn(batch, heads, x["k"].shape[-1], value + case.normalize, dtype=dtype)


def assert_same(actual, expected, tolerance):
    """actual and expected are (o, final_state, gradients) triples."""
    assert relative_error(actual[0], expected[0]) < tolerance, "output"
    assert relative_error(actual[1], expected[1]) < tolerance, "final state"
    assert actual[2].keys() == expected[2].keys()
    for name in expected[2]:
        assert relative_error(actual[2][name], expected[2][name]) < tolerance, f"gradient of {name}"


@every_case
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize("length", [1, 2, 17, 65])
def test_form_is_the_attention_matrix(case, form, length):
    x = make_inputs(case, length)
    weights = loss_weights(x, case)
    expected = gradients(lambda x: quadratic(case, x), x, *weights)
    assert_same(gradients(lambda x: call(getattr(case, form), case, x), x, *weights), expected, 1e-10)


@every_case
@pytest.mark.parametrize("length", LENGTHS)
def test_chunk_is_recurrent_float64(case, length):
    x = make_inputs(case, length, seed=length)
    weights = loss_weights(x, case)
    expected = gradients(lambda x: call(case.recurrent, case, x), x, *weights)
    assert_same(gradients(lambda x: call(case.chunk, case, x), x, *weights), expected, 1e-10)


@every_case
@pytest.mark.parametrize("length", [1, 17, 64, 130])
def test_chunk_float32_is_recurrent_float64(case, length):
    # eps(float32) is 1.2e-7; sums of ~100 signed products lose two digits of it, and gradients chain three of them.
    x = make_inputs(case, length, dtype=torch.float32)
    weights = loss_weights(x, case)
    exact = {name: None if t is None else t.double() for name, t in x.items()}
    expected = gradients(lambda x: call(case.recurrent, case, x), exact, *weights)
    assert_same(gradients(lambda x: call(case.chunk, case, x), x, *weights), expected, 2e-5)
    assert_same(gradients(lambda x: call(case.recurrent, case, x), x, *weights), expected, 2e-5)


@every_case
@pytest.mark.parametrize("chunk_size", [1, 16, 32, 128])
def test_chunk_size_changes_nothing(case, chunk_size):
    x = make_inputs(case, 70)
    weights = loss_weights(x, case)
    expected = gradients(lambda x: call(case.recurrent, case, x), x, *weights)
    actual = gradients(lambda x: call(case.chunk, case, x, chunk_size=chunk_size), x, *weights)
    assert_same(actual, expected, 1e-10)


@every_case
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_explicit_scale_and_no_initial_state(case, form):
    x = make_inputs(case, 19) | {"initial_state": None}
    expected, final = quadratic(case, x, scale=0.3)
    actual, actual_final = call(getattr(case, form), case, x, scale=0.3)
    assert relative_error(actual, expected) < 1e-12
    assert relative_error(actual_final, final) < 1e-12
    without, none = getattr(case, form)(*tensors(case, x), scale=0.3, **case.options)
    assert none is None, "final_state must be None unless output_final_state=True"
    assert torch.equal(without, actual)


@every_case
@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (8, 3), (3, 20)])
@pytest.mark.parametrize("heads", [1, 4])
def test_key_and_value_widths_are_free(case, sizes, heads):
    x = make_inputs(case, 37, batch=1, heads=heads, key=sizes[0], value=sizes[1])
    expected, final = quadratic(case, x)
    for fn in (case.recurrent, case.chunk):
        actual, actual_final = call(fn, case, x)
        assert relative_error(actual, expected) < 1e-11
        assert relative_error(actual_final, final) < 1e-11


@every_case
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_gradcheck(case, form):
    """Finite differences: an error shared by both forms' hand-written backward would show here."""
    x = make_inputs(case, 5, batch=1, heads=2, key=2, value=3)
    names = [name for name, t in x.items() if t is not None]
    leaves = [x[name].requires_grad_() for name in names]
    options = {"chunk_size": 2} if form == "chunk" else {}

    def fn(*tensors):
        return call(getattr(case, form), case, dict.fromkeys(x) | dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize(
    ("case", "needs_grad"),
    [(c, n) for c in CASES for n in make_inputs(c, 1) if n != "g" or c.takes_g],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradient_for_one_input_alone(case, needs_grad):
    """A frozen tensor beside a trained one (LoRA, frozen gates) must neither crash nor change the others."""
    x = make_inputs(case, 33)
    weights = loss_weights(x, case)
    _, _, expected = gradients(lambda x: call(case.chunk, case, x), x, *weights)
    leaf = x[needs_grad].clone().requires_grad_()
    out, final = call(case.chunk, case, x | {needs_grad: leaf})
    (actual,) = torch.autograd.grad((out * weights[0]).sum() + (final * weights[1]).sum(), leaf)
    assert relative_error(actual, expected[needs_grad]) < 1e-12


@every_case
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_non_contiguous_inputs(case, form):
    """Projections reach the ops as views: heads before time, or slices of a fused projection."""
    x = make_inputs(case, 21)
    strided = {n: None if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()}
    expected, final = call(getattr(case, form), case, x)
    actual, actual_final = call(getattr(case, form), case, strided)
    assert relative_error(actual, expected) < 1e-13
    assert relative_error(actual_final, final) < 1e-13


@every_case
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_inputs_are_left_alone(case, form):
    x = make_inputs(case, 21)
    before = {name: None if t is None else t.clone() for name, t in x.items()}
    call(getattr(case, form), case, x)
    for name, t in x.items():
        assert t is None or torch.equal(t, before[name]), f"the op wrote into {name}"
