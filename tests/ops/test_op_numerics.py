"""Where naive code breaks: strong gates, very long inputs, bfloat16, and the memory of the backward pass."""

import numpy
import pytest
import torch

from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import CASE_IDS, CASES, EPS, call, gradients, make_inputs, quadratic, relative_error

every_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
gated_cases = pytest.mark.parametrize("case", [c for c in CASES if c.takes_g], ids=lambda c: c.name)
both_forms = pytest.mark.parametrize("form", ["recurrent", "chunk"])
GATES = ("zero", "strong", "very_strong", "one_strong_step", "mixed")


def set_gates(x, kind):
    gen = torch.Generator().manual_seed(11)
    fill = {"zero": 0.0, "strong": -50.0, "very_strong": -1e4, "one_strong_step": -1e-3, "mixed": -50.0}[kind]
    gate = torch.full_like(x["g"], fill)
    if kind == "one_strong_step":
        gate[:, [7, 30]] = -50.0
    elif kind == "mixed":
        # Neighbouring channels and steps of nothing and of everything: no common factor can be pulled out.
        gate = gate * (torch.rand(gate.shape, generator=gen) < 0.3)
    return x | {"g": gate}


@gated_cases
@both_forms
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.slow
def test_gates_from_nothing_to_everything(case, form, kind):
    x = set_gates(make_inputs(case, 81), kind)
    weights = torch.randn(x["v"].shape).double(), torch.randn(x["initial_state"].shape).double()
    out, final, grads = gradients(lambda x: quadratic(case, x), x, *weights)
    actual = gradients(lambda x: call(getattr(case, form), case, x), x, *weights)
    # The oracle subtracts cumulative sums of up to 1e6, exact to 1e-10: that bounds the agreement here.
    assert relative_error(actual[0], out) < 1e-9
    assert relative_error(actual[1], final) < 1e-9
    for name in grads:
        # Behind a gate of -50 a gradient of 1e-22 is the difference of terms of size 1: hence the floor.
        assert relative_error(actual[2][name], grads[name], floor=1.0) < 1e-9, name


@gated_cases
@both_forms
@pytest.mark.parametrize("kind", GATES)
def test_strong_gates_in_float32(case, form, kind):
    x = set_gates(make_inputs(case, 81, dtype=torch.float32), kind)
    weights = torch.randn(x["v"].shape).double(), torch.randn(x["initial_state"].shape).double()
    exact = {n: None if t is None else t.double() for n, t in x.items()}
    out, final, grads = gradients(lambda x: call(case.recurrent, case, x), exact, *weights)
    actual = gradients(lambda x: call(getattr(case, form), case, x), x, *weights)
    assert relative_error(actual[0], out) < 2e-5
    assert relative_error(actual[1], final) < 2e-5
    for name in grads:
        assert relative_error(actual[2][name], grads[name], floor=1.0) < 2e-5, name


@gated_cases
@pytest.mark.parametrize("place", [0, 15, 40, 79, 80])
def test_gates_beside_a_large_token(case, place):
    """A gate's gradient has the precision of its own size: a hundredfold token leaves no rounding in the others."""
    x = make_inputs(case, 81, dtype=torch.float32, key=16, value=16)
    x["g"] = 0.05 * x["g"]
    for name in ("q", "k", "v") if case.strongest_write is None else ("q", "v"):
        x[name][:, place] *= 100
    weights = torch.randn(x["v"].shape).double(), torch.zeros(x["initial_state"].shape).double()
    exact = {n: None if t is None else t.double() for n, t in x.items()}
    _, _, right = gradients(lambda x: call(case.recurrent, case, x), exact, *weights)
    for form in ("recurrent", "chunk"):
        _, _, found = gradients(lambda x, form=form: call(getattr(case, form), case, x), x, *weights)
        for t in range(81):
            assert relative_error(found["g"][:, t], right["g"][:, t], floor=1e-3) < 5e-5, (form, t)


def numpy_recurrence(case, x):
    """float64, one head, one step at a time: nothing shared with the ops but the definition."""
    q, k, v = (x[n][0, :, 0].double().numpy() for n in ("q", "k", "v"))
    decay = case.log_decay(x).expand_as(x["k"])[0, :, 0].double().exp().numpy()
    beta = x["beta"][0, :, 0].double().numpy() if case.strongest_write else None
    values = numpy.concatenate([v, numpy.ones_like(v[:, :1])], 1) if case.normalize else v
    state, out = numpy.zeros((k.shape[1], values.shape[1])), numpy.empty((len(k), values.shape[1]))
    for t in range(len(k)):
        state = decay[t][:, None] * state
        written = values[t] if beta is None else beta[t] * (values[t] - k[t] @ state)
        state = state + k[t][:, None] * written
        out[t] = q[t] @ state
    out = out * k.shape[1] ** -0.5
    return torch.from_numpy(out[:, :-1] / (out[:, -1:] + EPS) if case.normalize else out), torch.from_numpy(state)


@every_case
@pytest.mark.slow
def test_hundred_thousand_tokens(case):
    x = make_inputs(case, 100_000, batch=1, heads=1, key=4, value=4, dtype=torch.float32) | {"initial_state": None}
    if x["g"] is not None:
        x["g"] = x["g"] * 1e-3  # memories of thousands of tokens
    out, final = call(case.chunk, case, x)
    expected, state = numpy_recurrence(case, x)
    # 1 563 chunk sums in float32, errors of random sign: about 40 eps; ten times that is allowed.
    assert relative_error(out[0, :, 0], expected) < 5e-5
    assert relative_error(final[0, 0], state) < 5e-5
    tail = (out[0, -1000:, 0].double() - expected[-1000:]).abs().max() / expected[-1000:].abs().max()
    assert tail < 5e-5, "the error grows along the sequence"


@every_case
def test_gradients_of_ten_thousand_tokens_are_finite(case):
    x = make_inputs(case, 10_000, batch=1, heads=1, key=4, value=4, dtype=torch.float32)
    weights = torch.ones(x["v"].shape), torch.ones(x["initial_state"].shape)
    _, _, grads = gradients(lambda x: call(case.chunk, case, x), x, *weights)
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


@every_case
@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_and_state_dtypes(case, form, dtype):
    x = make_inputs(case, 18, dtype=dtype)
    out, final = call(getattr(case, form), case, x)
    assert out.dtype == dtype
    assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    leaf = x["k"].requires_grad_()
    (grad,) = torch.autograd.grad(call(getattr(case, form), case, x)[0].float().sum(), leaf)
    assert grad.dtype == dtype


@every_case
@both_forms
def test_bfloat16_is_accumulated_in_float32(case, form):
    """Against float64 on the same rounded inputs only the last rounding of o may remain."""
    x = make_inputs(case, 300, dtype=torch.bfloat16)
    if x["g"] is not None:
        x["g"] = x["g"].float() * 0.01
    exact = {n: None if t is None else t.double() for n, t in x.items()}
    out, final = call(getattr(case, form), case, x)
    expected, state = call(case.recurrent, case, exact)
    assert relative_error(final, state) < 1e-5
    # float32 and float64 round to different neighbours only next to a tie, about once in 2^16 / 2^8 numbers.
    assert (out == expected.bfloat16()).double().mean() > 0.99


@both_forms
@pytest.mark.parametrize("case", [c for c in CASES if c.normalize], ids=lambda c: c.name)
def test_elu_sums_do_not_stall_in_bfloat16(case, form):
    """bfloat16 cannot count beyond 256 by ones; the normaliser of 3000 equal tokens must still be 3000."""
    ones = torch.ones(1, 3000, 1, 4, dtype=torch.bfloat16)
    value = torch.arange(3000).remainder(7)[None, :, None, None].expand(1, 3000, 1, 2).bfloat16()
    gate = None if case.gate == "none" else torch.zeros(1, 3000, 1)
    x = {"q": ones, "k": ones, "v": value, "g": gate}
    out, final = call(getattr(case, form), case, x)
    assert torch.allclose(final[..., -1], torch.tensor(3000.0))
    assert abs(out[0, -1, 0, 0].item() - value.double().mean()) < 2**-7 * 3


@every_case
@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.slow
def test_backward_keeps_few_bytes(case, length):
    """What autograd keeps of the chunk form is linear in T: about the inputs, not a state a token."""
    x = make_inputs(case, length, batch=1, heads=2, key=32, value=32, dtype=torch.float32)
    leaves = {n: None if t is None else t.requires_grad_() for n, t in x.items()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, final = call(case.chunk, case, leaves)
    inputs = sum(t.numel() * t.element_size() for t in leaves.values() if t is not None)
    # A state for every chunk of 64 costs K V / 64 = 16 numbers a token and head here: a sixth of q, k, v.
    assert sum(kept.values()) < 3 * inputs, f"{sum(kept.values()) / inputs:.1f} times the inputs are kept"
    (out.sum() + final.sum()).backward()
    assert all(t is None or t.grad.isfinite().all() for t in leaves.values())


@every_case
@both_forms
def test_autocast_leaves_the_op_alone(case, form):
    """Under bfloat16 autocast the sums must stay in float32, as the inputs are."""
    x = make_inputs(case, 40, dtype=torch.float32)
    out, final = call(getattr(case, form), case, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast_out, cast_final = call(getattr(case, form), case, x)
    assert torch.equal(out, cast_out)
    assert torch.equal(final, cast_final)


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=lambda c: c.name)  # the slowest test here: two suffice
@both_forms
@pytest.mark.slow
def test_compiles_without_graph_breaks(case, form):
    """Traced forward and backward equal the eager ones, with padding and packing in the graph."""
    x = make_inputs(case, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    segments = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    weights = (
        torch.randn(x["v"].shape).double() * mask[..., None, None],
        torch.randn(x["initial_state"].shape).double(),
    )
    eager = lambda x: call(getattr(case, form), case, x, layout=SequenceLayout(mask, segments))  # noqa: E731
    torch.compiler.reset()
    out, final, grads = gradients(torch.compile(eager, fullgraph=True, backend="aot_eager"), x, *weights)
    expected = gradients(eager, x, *weights)
    assert relative_error(out[mask], expected[0][mask]) < 1e-12
    assert relative_error(final, expected[1]) < 1e-12
    for name in grads:
        assert relative_error(grads[name], expected[2][name]) < 1e-11, name
