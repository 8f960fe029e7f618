"""Local attention against softmax over all pairs, in any layout, length and cut."""

import pytest
import torch

from lalm.modeling.ops.local_global.local_attention import local_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.efficient_oracle import LENGTH, error, gradients, make, make_layout, visible
from tests.ops.test_efficient_attention import check, every_layout, real

WINDOWS = (1, 2, 5, 8, 40)
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def pairs(x, layout, window, causal):
    """Softmax over the visible pairs, systems.md 1.5."""
    q, k, v = x["q"], x["k"], x["v"]

    def rule(i, j):
        steps = i // window - j // window
        return (steps in (0, 1) and j <= i) if causal else steps in (-1, 0, 1)

    seen = visible(layout, *q.shape[:2], rule)[..., None]
    scores = torch.einsum("bihk,bjhk->bijh", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(2).nan_to_num(0)
    return torch.einsum("bijh,bjhv->bihv", weights, v)


@every_layout
@pytest.mark.parametrize("window", WINDOWS)
@both_directions
def test_is_softmax_over_visible_pairs(kind, window, causal):
    layout = make_layout(kind)
    check(
        lambda q, k, v: local_attention(q, k, v, window, layout=layout, causal=causal)[0],
        lambda **x: pairs({n: t.masked_fill(~real_tokens(layout), 0) for n, t in x.items()}, layout, window, causal),
        make(LENGTH),
        layout,
    )


def real_tokens(layout):
    return torch.ones(2, LENGTH, 1, 1, dtype=torch.bool) if layout.mask is None else layout.mask[..., None, None]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 31])
@both_directions
def test_any_length(length, causal):
    x, layout = make(length), SequenceLayout()
    expected = pairs(x, layout, 8, causal)
    assert error(local_attention(*x.values(), 8, causal=causal)[0], expected) < 1e-12
    masked = SequenceLayout(torch.ones(2, length, dtype=torch.bool))
    assert error(local_attention(*x.values(), 8, causal=causal, layout=masked)[0], expected) < 1e-12


def in_pieces(x, cuts, layout, window):
    """Output and state of pieces ending at `cuts`, the state handed on."""
    outs, state, start = [], None, 0
    for stop in [*cuts, x["q"].shape[1]]:
        mask, segments = (None if t is None else t[:, start:stop] for t in (layout.mask, layout.segments))
        part = SequenceLayout(mask, segments, None if mask is None else mask.int().argsort(dim=1, stable=True))
        o, state = local_attention(*(x[n][:, start:stop] for n in "qkv"), window, state, True, layout=part)
        outs.append(o)
        start = stop
    return torch.cat(outs, 1), state


CUTS = {"one_by_one": range(1, LENGTH), "pieces": [1, 2, 10, 11, 30], "halves": [17], "end": [36]}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", ["plain", "left", "inner", "scattered", "row"])
@pytest.mark.parametrize("window", WINDOWS)
def test_pieces_are_the_whole(cuts, kind, window):
    x, layout = make(LENGTH), make_layout(kind)
    out, state = in_pieces(x, cuts, layout, window)
    whole, final = local_attention(*x.values(), window, None, True, layout=layout)
    assert error(real(layout, out), real(layout, pairs(x, layout, window, True))) < 1e-12
    assert error(real(layout, whole), real(layout, out)) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(state, final, strict=True))
    assert state.keys.shape == (2, 3, 2 * window, state.keys.shape[3])


@pytest.mark.parametrize("cuts", [[16], [13, 24]], ids=str)
@pytest.mark.parametrize("window", [2, 5, 8])
def test_pieces_with_documents(cuts, window):
    x, layout = make(LENGTH), make_layout("packed_scattered")
    out, state = in_pieces(x, cuts, layout, window)
    _, final = local_attention(*x.values(), window, None, True, layout=layout)
    assert error(real(layout, out), real(layout, pairs(x, layout, window, True))) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(state, final, strict=True))


def test_state_of_a_padded_row_is_that_of_its_tokens():
    x, layout = make(LENGTH), make_layout("inner")
    _, state = local_attention(*x.values(), 5, None, True, layout=layout)
    for b in range(2):
        alone = (t[b : b + 1][:, layout.mask[b]] for t in x.values())
        expected = local_attention(*alone, 5, None, True)[1]
        assert all(torch.equal(a[b : b + 1], e) for a, e in zip(state, expected, strict=True))


@pytest.mark.parametrize("kind", ["plain", "left"])  # rows that have seen as many tokens, and that have not
@pytest.mark.parametrize("window", [1, 5])
def test_a_state_that_is_overwritten(window, kind):
    x, layout = make(LENGTH), make_layout(kind)
    states, parts = [None, None], [[], []]
    for i, overwrites in enumerate([False, True]):
        for start, end in [(0, LENGTH // 2), *((t, t + 1) for t in range(LENGTH // 2, LENGTH))]:
            piece, before = [t[:, start:end] for t in x.values()], states[i]
            own = layout.first(end) if start == 0 else None
            o, states[i] = local_attention(*piece, window, before, True, layout=own, overwrite_state=overwrites)
            parts[i].append(o)
            is_same = before is not None and states[i].keys.data_ptr() == before.keys.data_ptr()
            assert is_same == (overwrites and before is not None)
    assert error(torch.cat(parts[1], 1), torch.cat(parts[0], 1)) < 1e-14
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_gradients_are_not_lost_by_overwriting():
    x = {name: t.requires_grad_() for name, t in make(7).items()}
    state = local_attention(*(t[:, :6] for t in x.values()), 5, None, True)[1]
    kept = state.keys.clone()
    local_attention(*(t[:, 6:] for t in x.values()), 5, state, True, overwrite_state=True)[0].sum().backward()
    assert torch.equal(state.keys, kept)
    assert x["k"].grad[:, 5].abs().max() > 0


def test_gradients_flow_through_states():
    x = make(LENGTH)
    weight = torch.randn(x["v"].shape, dtype=torch.float64)
    pieces = lambda q, k, v: in_pieces({"q": q, "k": k, "v": v}, [5, 6, 20], SequenceLayout(), 5)[0]  # noqa: E731
    _, grads = gradients(pieces, x, weight)
    _, expected = gradients(lambda **x: pairs(x, SequenceLayout(), 5, True), x, weight)
    for name in expected:
        assert error(grads[name], expected[name]) < 1e-11, name


@both_directions
def test_one_key_head_is_shared(causal):
    x, layout = make(LENGTH), make_layout("packed_left")
    k, v = x["k"][:, :, :1], x["v"][:, :, :1]
    out, state = local_attention(x["q"], k, v, 5, None, causal, layout=layout, causal=causal)
    same, _ = local_attention(x["q"], k.expand_as(x["k"]), v.expand_as(x["v"]), 5, layout=layout, causal=causal)
    assert torch.equal(out, same)
    assert not causal or state.keys.shape[1] == 1


def test_cost_is_linear_in_length():
    """Bytes that autograd keeps grow as T, where all pairs would grow as T squared."""

    def kept(length):
        found, x = {}, {n: t.requires_grad_() for n, t in make(length, 1, 2, 8, 8, dtype=torch.float32).items()}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        segments = torch.arange(length)[None] // 100
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, _ = local_attention(*x.values(), 16, layout=SequenceLayout(segments=segments))
        out.sum().backward()
        return sum(found.values()) / length

    assert kept(2048) < 1.1 * kept(512)


def test_dropout_acts_on_the_weights():
    x = make(LENGTH, dtype=torch.float32)
    ones = torch.ones_like(x["v"])
    out, _ = local_attention(x["q"], x["k"], ones, 8, dropout=0.5)
    assert out.std() > 0.1
    assert abs(out.mean() - 1) < 0.2


@pytest.mark.parametrize("kind", ["plain", "packed_scattered"])
@pytest.mark.slow
def test_compiles(kind):
    x, layout = make(LENGTH), make_layout(kind)
    state = local_attention(*make(7).values(), 5, None, True)[1]
    run = lambda q, k, v: local_attention(q, k, v, 5, state, True, layout=layout)  # noqa: E731
    torch.compiler.reset()
    compiled, after = torch.compile(run, fullgraph=True, backend="aot_eager")(*x.values())
    out, expected = run(*x.values())
    assert error(compiled, out) < 1e-12
    assert torch.equal(after.seen, expected.seen)


def test_bad_input_is_named():
    q, k, v = make(6).values()
    _, state = local_attention(q, k, v, 2, None, True)
    with pytest.raises(ValueError, match="window_size must be at least 1"):
        local_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="causal=False reads both sides"):
        local_attention(q, k, v, 2, state, causal=False)
    with pytest.raises(ValueError, match="initial_state must hold keys, values and a count"):
        local_attention(q, k, v, 3, state)
    with pytest.raises(ValueError, match="G that divides H"):
        local_attention(q, k[:, :, :2], v[:, :, :2], 2)
