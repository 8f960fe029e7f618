"""Efficient attention: tokens, line and dense oracle agree, in any layout, in pieces, and where exp would overflow."""

import pytest
import torch

from lalm.modeling.ops.local_global.efficient_attention import chunk_efficient_attention, recurrent_efficient_attention
from lalm.modeling.ops.local_global.efficient_bidirectional import (
    bidirectional_efficient_attention,
    cross_efficient_attention,
)
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.efficient_oracle import LENGTH, efficient, error, gradients, make, make_layout

FORMS = {"recurrent": recurrent_efficient_attention, "chunk": chunk_efficient_attention}
both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
both_semantics = pytest.mark.parametrize("semantics", ["0.19", "v0.2.1"])
# Keys around 0, and keys whose every feature is rescaled again and again.
both_ranges = pytest.mark.parametrize("steep", [1, 60], ids=["mild", "steep"])
LAYOUTS = ("plain", "left", "right", "inner", "scattered", "row", "packed", "packed_scattered", "packed_left")
every_layout = pytest.mark.parametrize("kind", LAYOUTS)
BLINDSPOTS = (1, 2, 3, 8, 50)

GOLDEN = {
    ("0.19", 1): [[0.479426, 0.973848], [0.355579, 0.429223], [0.265747, 0.470120], [0.412782, 0.353876],
                  [-0.082284, 0.110716], [0.092706, 0.244324]],
    ("0.19", 3): [[0.0, 0.0]] * 3 + [[0.266277, 0.512], [0.265589, 0.457574], [0.265638, 0.461453]],
    ("v0.2.1", 1): {5: [0.114670, 0.213317]},
    ("v0.2.1", 3): {0: [0, 0], 1: [0, 0], 2: [0, 0], 5: [0.228422, 0.384496]},
    ("0.19", None): {0: [0.038108, 0.150060], 5: [0.063428, 0.171005]},
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=str)
@both_forms
def test_golden(case, form):
    """Numbers of systems.md 1.9, from linear-attention-transformer itself."""
    index = torch.arange(12, dtype=torch.float64).reshape(1, 6, 1, 2)
    q, k, v = index.sin(), (0.7 * index).cos(), (1.3 * index + 0.5).sin()
    semantics, size = case
    if size is None:
        out = bidirectional_efficient_attention(q, k, v)
    else:
        out, _ = form(q, k, v, blindspot_size=size, semantics=semantics)
    rows = GOLDEN[case] if isinstance(GOLDEN[case], dict) else dict(enumerate(GOLDEN[case]))
    for row, expected in rows.items():
        assert (out[0, row, 0] - torch.tensor(expected, dtype=torch.float64)).abs().max() < 6e-7


def real(layout, out):
    return out if layout.mask is None else out * layout.mask[..., None, None]


def check(fn, oracle, x, layout):
    """Values and gradients at real tokens; nothing flows into padding."""
    weight = real(layout, torch.randn(x["v"].shape, dtype=torch.float64))
    out, grads = gradients(fn, x, weight)
    expected, expected_grads = gradients(oracle, x, weight)
    assert out.isfinite().all()
    assert error(real(layout, out), real(layout, expected)) < 1e-11
    for name, grad in expected_grads.items():
        assert error(grads[name], grad) < 1e-9, name
        assert layout.mask is None or (grads[name][~layout.mask] == 0).all(), f"a padded {name} got a gradient"


@both_forms
@both_semantics
@both_ranges
@pytest.mark.parametrize("size", BLINDSPOTS)
@every_layout
@pytest.mark.slow
def test_causal_is_the_dense_formula(form, semantics, steep, size, kind):
    layout, options = make_layout(kind), {"semantics": semantics, "blindspot_size": size}
    check(
        lambda q, k, v: form(q, k, v, layout=layout, **options)[0],
        lambda **x: efficient(x, layout, semantics, size),
        make(LENGTH, steep=steep),
        layout,
    )


@both_semantics
@both_ranges
@every_layout
def test_bidirectional_is_the_dense_formula(semantics, steep, kind):
    layout = make_layout(kind)
    check(
        lambda q, k, v: bidirectional_efficient_attention(q, k, v, layout=layout, semantics=semantics),
        lambda **x: efficient(x, layout, semantics, causal=False),
        make(LENGTH, steep=steep),
        layout,
    )


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
@both_semantics
def test_lengths_around_chunks(length, size, semantics):
    x, options = make(length, batch=1, heads=1), {"blindspot_size": size, "semantics": semantics}
    check(
        lambda q, k, v: chunk_efficient_attention(q, k, v, **options)[0],
        lambda **x: efficient(x, SequenceLayout(), semantics, size),
        x,
        SequenceLayout(),
    )


def in_pieces(x, cuts, layout, forms=(chunk_efficient_attention,), **options):
    """Output and state of pieces ending at `cuts`, the state handed on."""
    outs, state, start = [], None, 0
    for number, stop in enumerate([*cuts, x["q"].shape[1]]):
        part = SequenceLayout(*(None if t is None else t[:, start:stop] for t in (layout.mask, layout.segments)))
        form = forms[number % len(forms)]
        # What a piece continues is its row's first document: the boundary itself must lie inside a piece.
        o, state = form(*(x[n][:, start:stop] for n in "qkv"), state, True, layout=part, **options)
        outs.append(o)
        start = stop
    return torch.cat(outs, 1), state


CUTS = {"one_by_one": range(1, LENGTH), "pieces": [1, 2, 10, 11, 30], "halves": [17]}


@pytest.mark.parametrize("forms", [[*FORMS.values()], [chunk_efficient_attention]], ids=["mixed", "chunk"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", ["plain", "left", "scattered", "row"])
@pytest.mark.parametrize("size", [1, 3, 8, 16])
@pytest.mark.parametrize(("semantics", "steep"), [("0.19", 1), ("0.19", 60), ("v0.2.1", 1)])
def test_pieces_are_the_whole(forms, cuts, kind, size, semantics, steep):
    x, layout = make(LENGTH, steep=steep), make_layout(kind)
    options = {"blindspot_size": size, "semantics": semantics}
    whole, final = recurrent_efficient_attention(*x.values(), output_final_state=True, layout=layout, **options)
    out, state = in_pieces(x, cuts, layout, forms, **options)
    assert error(real(layout, out), real(layout, whole)) < 1e-11
    for actual, expected in zip(state, final, strict=True):
        assert expected is None or error(actual, expected) < 1e-11


@both_forms
@pytest.mark.parametrize("cuts", [[16], [13, 24]], ids=str)
@pytest.mark.parametrize("size", [1, 3, 8, 16])
@both_semantics
@both_ranges
def test_pieces_with_documents(form, cuts, size, semantics, steep):
    """Boundaries inside the pieces: the state enters the first document of a piece and leaves the last."""
    x, layout = make(LENGTH, steep=steep), make_layout("packed_scattered")
    options = {"blindspot_size": size, "semantics": semantics}
    whole, final = recurrent_efficient_attention(*x.values(), output_final_state=True, layout=layout, **options)
    out, state = in_pieces(x, cuts, layout, (form,), **options)
    assert error(real(layout, out), real(layout, whole)) < 1e-11
    for actual, expected in zip(state, final, strict=True):
        assert expected is None or error(actual, expected) < 1e-11


@pytest.mark.parametrize("size", [1, 3, 8, 16])
@both_semantics
@both_ranges
def test_gradients_flow_through_states(size, semantics, steep):
    x, options = make(LENGTH, steep=steep), {"blindspot_size": size, "semantics": semantics}
    weight = torch.randn(x["v"].shape, dtype=torch.float64)
    pieces = lambda q, k, v: in_pieces({"q": q, "k": k, "v": v}, [5, 6, 20], SequenceLayout(), **options)[0]  # noqa: E731
    _, grads = gradients(pieces, x, weight)
    _, expected = gradients(lambda **x: efficient(x, SequenceLayout(), semantics, size), x, weight)
    for name in expected:
        assert error(grads[name], expected[name]) < 1e-10, name


def test_first_bucket_is_exactly_zero():
    for form in FORMS.values():
        out, _ = form(*make(LENGTH).values(), blindspot_size=8)
        assert (out[:, :8] == 0).all()
        assert (out[:, 8:] != 0).all()


def log_space(x, size):
    """The oracle in log space, float64: what exp(200) times exp(-200) should give."""
    q, k, v = (t.double() for t in x.values())
    index = torch.arange(q.shape[1])
    seen = index < (index[:, None] + 1 if size == 1 else index[:, None] // size * size)
    log_q = q.log_softmax(-1) - 0.5 * torch.tensor(q.shape[-1]).double().log()
    scores = (log_q[:, :, None] + k[:, None]).logsumexp(-1).masked_fill(~seen[..., None], -torch.inf)
    bottom = scores.logsumexp(2).clamp_min(torch.tensor(1e-3).double().log())
    return torch.einsum("bijh,bjhv->bihv", (scores - bottom[:, :, None]).exp(), v)


@both_forms
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", ["wild", "rising", "falling", "low", "steps"])
def test_keys_of_200_in_float32(form, size, kind):
    """exp(88) is infinite in float32; every case here is exact in log space."""
    x = make(90, dtype=torch.float32)
    ramp = torch.linspace(-200, 200, 90)[None, :, None, None]
    shift = {
        "wild": 200 * torch.rand(x["k"].shape) - 100,
        "rising": ramp,
        "falling": -ramp,
        "low": torch.tensor(-200.0),
        "steps": 200 * (torch.rand(x["k"].shape) < 0.1),
    }
    x["k"] = (x["k"] + shift[kind]).clamp(-200, 200)
    x["q"] = 10 * x["q"]
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    out, state = form(*leaves.values(), output_final_state=True, blindspot_size=size)
    expected = log_space(x, size)
    # Exponents reach 200, where float32 is spaced by 1.5e-5: that is the relative error of a weight.
    assert error(out.detach(), expected) < 1e-4
    out.square().sum().backward()
    assert all(t is None or t.isfinite().all() for t in state)
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


@both_forms
def test_a_high_key_does_not_reach_the_next_document(form):
    x = make(20, dtype=torch.float32)
    x["k"][:, :10] = 200.0
    layout = SequenceLayout(segments=(torch.arange(20) >= 10).long().expand(2, -1))
    alone, _ = form(*(t[:, 10:] for t in x.values()))
    assert error(form(*x.values(), layout=layout)[0][:, 10:], alone) < 1e-5


@both_forms
@both_semantics
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("size", [1, 3])
def test_inputs_are_left_alone(form, semantics, length, size):
    x = make(length)
    _, state = form(*make(2).values(), output_final_state=True, blindspot_size=size, semantics=semantics)
    before = [t.clone() for t in (*x.values(), *state) if t is not None]
    form(*x.values(), state, True, blindspot_size=size, semantics=semantics)
    after = [t for t in (*x.values(), *state) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@both_forms
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(form, size, dtype):
    x = make(20, dtype=dtype)
    out, state = form(*x.values(), output_final_state=True, blindspot_size=size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == dtype
    assert {t.dtype for t in state if t is not None} == {wide}
    assert {t.dtype for t in form(*x.values(), state, True, blindspot_size=size)[1] if t is not None} == {wide}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("semantics", ["0.19", "v0.2.1"])
def test_backward_keeps_memory_linear_in_length(size, semantics):
    def kept(length):
        found, x = {}, {n: t.requires_grad_() for n, t in make(length, 1, 2, 32, 32, dtype=torch.float32).items()}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, _ = chunk_efficient_attention(*x.values(), blindspot_size=size, semantics=semantics)
        out.sum().backward()
        return sum(found.values()) / (length * 2 * 32 * 4)

    # In units of one [T, H, 32] tensor. A state for each token would be 32 of them.
    assert kept(512) < 25
    assert kept(1024) < 1.1 * kept(512)


@both_forms
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.slow
def test_compiles(form, size):
    layout, x = make_layout("packed_scattered"), make(LENGTH)
    state = form(*make(5).values(), output_final_state=True, blindspot_size=size)[1]
    run = lambda q, k, v: form(q, k, v, state, True, layout=layout, blindspot_size=size)  # noqa: E731
    if form is recurrent_efficient_attention:
        x, layout = {n: t[:, :3] for n, t in x.items()}, SequenceLayout()
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*x.values())
    assert error(compiled[0], run(*x.values())[0]) < 1e-12


def test_cross_reads_the_real_context():
    """q from one text, k and v from another, equal to both joined and masked; 0 where the context is empty."""
    x, context = make(5), make(9, seed=4)
    mask = torch.tensor([[True] * 6 + [False] * 3, [False] * 9])
    out = cross_efficient_attention(x["q"], context["k"], context["v"], mask)
    weights = context["k"][0, :6].softmax(0)
    expected = torch.einsum("ihk,jhk,jhv->ihv", x["q"][0].softmax(-1) / 2, weights, context["v"][0, :6])
    assert error(out[0], expected) < 1e-12
    assert (out[1] == 0).all()
    whole = cross_efficient_attention(x["q"], context["k"], context["v"], semantics="v0.2.1")
    assert (
        error(whole[:, :, :, :1], 2 * cross_efficient_attention(x["q"], context["k"], context["v"])[..., :1]) < 1e-12
    )


@both_forms
def test_bad_input_is_named(form):
    q, k, v = make(6).values()
    with pytest.raises(ValueError, match="blindspot_size must be at least 1"):
        form(q, k, v, blindspot_size=0)
    with pytest.raises(ValueError, match="semantics must be one of"):
        form(q, k, v, semantics="0.20")
    _, state = form(q, k, v, output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state.pending must be \(2, 3, 4, 7\)"):
        form(q, k, v, state, blindspot_size=2)
    with pytest.raises(ValueError, match="initial_state.published must be"):
        form(q[:1], k[:1], v[:1], state)
