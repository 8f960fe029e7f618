"""causal=False against a dense sum over pairs, written from the definition in ops/rules.py."""

import pytest
import torch

from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import CASES, EPS, call, make_inputs, quadratic, relative_error, tensors

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
LENGTHS = (1, 2, 63, 65, 130)


def dense(case, x, mask=None, segments=None):
    """o_i = sum over j of the document, either side: q_i . exp(decay between i and j) k_j, times v_j. For delta rules
    the sum of two readings by transition matrices, the second of the reversed text."""
    if case.strongest_write:
        ahead, _ = quadratic(case, x, None, mask, segments)
        flipped = {name: None if t is None else t.flip(1) for name, t in x.items()}
        flips = (None if t is None else t.flip(1) for t in (mask, segments))
        return ahead + quadratic(case, flipped, None, *flips)[0].flip(1)
    q, k, v = x["q"], x["k"], x["v"]
    length = q.shape[1]
    real = torch.ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    segments = torch.zeros(q.shape[:2], dtype=torch.long) if segments is None else segments
    g = case.log_decay(x).expand_as(k) * real[..., None, None]
    ending = g.cumsum(1)  # up to and with the token
    starting = ending - g  # up to and without it
    later = torch.ones(length, length, dtype=torch.bool).tril()[None, :, :, None, None]
    decay = torch.where(later, ending[:, :, None] - ending[:, None], starting[:, None] - starting[:, :, None])
    seen = real[:, None, :] & (segments[:, :, None] == segments[:, None, :])
    decay = decay.masked_fill(~seen[..., None, None], -torch.inf)
    weights = torch.einsum("bihk,bjhk,bijhk->bijh", q * q.shape[-1] ** -0.5, k, decay.exp())
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1) if case.normalize else v
    out = torch.einsum("bijh,bjhr->bihr", weights, values)
    return out[..., :-1] / (out[..., -1:] + EPS) if case.normalize else out


def inputs(case, length, **kwargs):
    return make_inputs(case, length, **kwargs) | {"initial_state": None}


def without_state(form, case, x, **kwargs):
    return form(*tensors(case, x), causal=False, **case.options, **kwargs)[0]


@every_case
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.slow
def test_outputs_and_gradients(case, length, form):
    x = {name: None if t is None else t.requires_grad_() for name, t in inputs(case, length).items()}
    leaves = [t for t in x.values() if t is not None]
    expected, actual = dense(case, x), without_state(getattr(case, form), case, x)
    assert relative_error(actual, expected) < 1e-10
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), leaves)
    floor = 1e-3 * max(want.abs().max().item() for want in wanted)  # at T = 1 no gate matters
    for got, want in zip(torch.autograd.grad((actual * cotangent).sum(), leaves), wanted, strict=True):
        assert relative_error(got, want, floor) < 1e-9


@every_case
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_padding_and_documents(case, form):
    x = inputs(case, 70)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) > 0.3
    segments = torch.tensor([0] * 20 + [1] * 3 + [2] * 47)[None].expand(2, -1)
    for layout in (SequenceLayout(mask), SequenceLayout(None, segments), SequenceLayout(mask, segments)):
        expected = dense(case, x, layout.mask, layout.segments)
        actual = without_state(getattr(case, form), case, x, layout=layout)
        real = torch.ones_like(mask) if layout.mask is None else layout.mask
        assert relative_error(actual[real], expected[real]) < 1e-10


@every_case
def test_packed_row(case):
    x = inputs(case, 30, batch=1)
    boundaries = torch.tensor([0, 4, 4, 19, 30])
    segments = torch.tensor([0] * 4 + [2] * 15 + [3] * 11)[None]
    actual = without_state(case.chunk, case, x, cu_seqlens=boundaries)
    assert relative_error(actual, dense(case, x, segments=segments)) < 1e-10


@every_case
def test_float32(case):
    x = inputs(case, 200, dtype=torch.float32)
    expected = dense(case, {name: None if t is None else t.double() for name, t in x.items()})
    assert relative_error(without_state(case.chunk, case, x), expected) < 2e-5


@every_case
def test_states_are_refused(case):
    with pytest.raises(ValueError, match="causal=False"):
        call(case.chunk, case, inputs(case, 5), causal=False)
    with pytest.raises(ValueError, match="initial_state"):
        case.chunk(*tensors(case, make_inputs(case, 5)), initial_state=make_inputs(case, 5)["initial_state"],
                   causal=False, **case.options)  # fmt: skip
