"""What retention adds to the common table: its decays, its quadratic form, and the paper's equations."""

import math

import pytest
import torch

from lalm.modeling.ops.diagonal.retention import chunk_retention, recurrent_retention, retention, retention_log_decay
from lalm.modeling.ops.dispatch import in_form
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import CASES, relative_error, tensors
from tests.ops.cases import make_inputs as make_case_inputs

parallel_retention = in_form(retention, "parallel")

(CASE,) = [case for case in CASES if case.name == "retention"]
FORMS = {"recurrent": recurrent_retention, "chunk": chunk_retention, "parallel": parallel_retention}
every_form = pytest.mark.parametrize("form", FORMS)
LENGTH = 150


def make_inputs(length=LENGTH, **kwargs):
    return make_case_inputs(CASE, length, **kwargs)


def mask_and_segments():
    """Two rows, padded left and in between, with documents that begin inside chunks and at their boundary."""
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :9] = mask[0, 70:90] = mask[1, 3::4] = False
    segments = torch.tensor([[0] * 40 + [1] * 3 + [2] * 107, [5] * 128 + [1] * 22])
    return mask, segments


LAYOUTS = {
    "plain": lambda mask, segments: None,
    "padded": lambda mask, segments: SequenceLayout(mask=mask),
    "packed": lambda mask, segments: SequenceLayout(segments=segments),
    "both": SequenceLayout,
}


def test_decays_are_the_papers():
    decay = retention_log_decay(3, torch.float64).exp()
    assert torch.allclose(decay, torch.tensor([31 / 32, 63 / 64, 127 / 128]).double(), rtol=1e-15, atol=0)
    assert retention_log_decay(2).dtype == torch.float32
    # Beyond 2^-24 a float32 difference would be 1 and its logarithm 0.
    assert math.isclose(retention_log_decay(30)[29].item(), -(2.0**-34), rel_tol=1e-6)


@every_form
def test_equations_of_the_paper(form):
    """Eq. 5 and 6 on numbers that fit in the head: one head, K = V = 1, k = v = 1, q = 1, gamma = 31/32."""
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    out, final = FORMS[form](ones, ones, ones, output_final_state=True)
    gamma = 31 / 32
    expected = torch.tensor([1, 1 + gamma, 1 + gamma + gamma**2], dtype=torch.float64)
    assert relative_error(out[0, :, 0, 0], expected) < 1e-15
    assert relative_error(final[0, 0, 0, 0], expected[-1]) < 1e-15


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("stateful", [False, True], ids=["fresh", "state"])
def test_forms_agree(kind, stateful):
    """Outputs and final states in float64, with padding, documents and an entering state."""
    x, (mask, segments) = make_inputs(), mask_and_segments()
    layout = LAYOUTS[kind](mask, segments)
    real = mask if kind in ("padded", "both") else torch.ones_like(mask)
    given = {"initial_state": x["initial_state"] if stateful else None, "output_final_state": True, "layout": layout}
    results = [form(*tensors(CASE, x), **given) for form in FORMS.values()]
    for out, final in results[1:]:
        assert relative_error(out[real], results[0][0][real]) < 1e-12
        assert relative_error(final, results[0][1]) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 64, 65])
def test_gradients_agree(length):
    x = make_inputs(length)
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "initial_state")]
    weights, grads = (torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])), []
    for form in FORMS.values():
        out, final = form(*leaves[:3], initial_state=leaves[3], output_final_state=True)
        grads.append(torch.autograd.grad((out * weights[0]).sum() + (final * weights[1]).sum(), leaves))
    for other in grads[1:]:
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(other, grads[0], strict=True))


def test_forms_agree_on_packed_rows():
    """cu_seqlens, a state in and out for each document, an empty one among them."""
    x, boundaries = make_inputs(90, batch=1), torch.tensor([0, 4, 4, 70, 90])
    states = torch.randn(4, *x["initial_state"].shape[1:], dtype=torch.float64)
    results = [
        form(*tensors(CASE, x), initial_state=states, output_final_state=True, cu_seqlens=boundaries)
        for form in FORMS.values()
    ]
    assert torch.equal(results[0][1][1], states[1])
    for out, final in results[1:]:
        assert relative_error(out, results[0][0]) < 1e-12
        assert relative_error(final, results[0][1]) < 1e-12


@pytest.mark.parametrize("kind", LAYOUTS)
def test_both_directions_weigh_by_distance(kind):
    """causal=False: gamma^|n - m|, own token once."""
    x, (mask, segments) = make_inputs(), mask_and_segments()
    layout = LAYOUTS[kind](mask, segments)
    layout_or_empty = layout or SequenceLayout()
    real = mask if layout_or_empty.mask is not None else torch.ones_like(mask)
    n = real.cumsum(1)
    seen = real[:, None, :].expand(-1, LENGTH, -1)
    if layout_or_empty.segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])
    log_decay = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(3)], dtype=torch.float64)
    decay = ((n[:, :, None] - n[:, None]).abs()[..., None] * log_decay).exp() * seen[..., None]
    expected = torch.einsum("bihk,bjhk,bijh,bjhv->bihv", x["q"] * 5**-0.5, x["k"], decay, x["v"])
    for form in FORMS.values():
        out, final = form(*tensors(CASE, x), layout=layout, causal=False)
        assert final is None
        assert relative_error(out[real], expected[real]) < 1e-12


@every_form
def test_float32_stays_float32(form):
    """The decays are constants: they must not lift a float32 model to float64."""
    x = make_inputs(70, dtype=torch.float32)
    out, final = FORMS[form](*tensors(CASE, x), output_final_state=True)
    exact, _ = recurrent_retention(*(t.double() for t in tensors(CASE, x)))
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, exact) < 2e-6


def test_parallel_form_counts_exactly_far_apart():
    """Distances are whole numbers times one logarithm, so float32 keeps them at 4 000 tokens."""
    x = make_inputs(4000, batch=1, heads=1, key=2, value=2, dtype=torch.float32)
    out, _ = parallel_retention(*tensors(CASE, x))
    exact, _ = chunk_retention(*(t.double() for t in tensors(CASE, x)))
    assert relative_error(out, exact) < 2e-6
