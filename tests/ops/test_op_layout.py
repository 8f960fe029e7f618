"""Padding masks, packed segments, cu_seqlens, and states that travel from call to call."""

import itertools

import pytest
import torch
from accelerate.utils import send_to_device

from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import CASE_IDS, CASES, call, gradients, make_inputs, quadratic, relative_error

every_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
both_forms = pytest.mark.parametrize("form", ["recurrent", "chunk"])
LENGTH = 83


def mask_of(kind, length=LENGTH):
    """Two rows padded differently. Padding crosses sub-chunk and chunk boundaries."""
    mask = torch.ones(2, length, dtype=torch.bool)
    if kind == "left":
        mask[0, :19] = mask[1, :70] = False
    elif kind == "right":
        mask[0, 13:] = mask[1, 66:] = False
    elif kind == "interior":
        mask[0, 5:40] = mask[1, 60:68] = False
    elif kind == "scattered":
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.5
    elif kind == "row_of_padding":
        mask[1] = False
    return mask


def layout(mask=None, segments=None):
    return SequenceLayout(mask=mask, segments=segments)


def rows(x, batch, time):
    """Row `batch` of every input at the times `time` (a slice, an index or a boolean mask), with batch size 1."""
    out = {n: None if t is None else t[batch : batch + 1][:, time] for n, t in x.items() if n != "initial_state"}
    return out | {"initial_state": x["initial_state"][batch : batch + 1]}


@every_case
@both_forms
@pytest.mark.parametrize("kind", ["left", "right", "interior", "scattered", "row_of_padding"])
def test_padding_is_as_if_it_were_not_there(case, form, kind):
    """Each row equals its real tokens alone: outputs, final state, gradients; nothing flows into padded inputs."""
    fn, x, mask = getattr(case, form), make_inputs(case, LENGTH), mask_of(kind)
    out_weight = torch.randn(x["v"].shape, dtype=torch.float64) * mask[..., None, None]
    state_weight = torch.randn(x["initial_state"].shape, dtype=torch.float64)
    out, final, grads = gradients(lambda x: call(fn, case, x, layout=layout(mask)), x, out_weight, state_weight)
    assert out.isfinite().all(), "padded outputs are unspecified but must stay finite"
    for b in range(2):
        keep = mask[b]
        if not keep.any():
            assert torch.equal(final[b], x["initial_state"][b])
            continue
        alone = rows(x, b, keep)
        weights = (out_weight[b : b + 1, keep], state_weight[b : b + 1])
        o, s, g = gradients(lambda x: call(fn, case, x), alone, *weights)
        assert relative_error(out[b : b + 1, keep], o) < 1e-11
        assert relative_error(final[b : b + 1], s) < 1e-11
        for name in ("q", "k", "v", "g"):
            if name in g:
                assert relative_error(grads[name][b : b + 1, keep], g[name]) < 1e-10, name
                assert (grads[name][b, ~keep] == 0).all(), f"a padded {name} got a gradient"
        assert relative_error(grads["initial_state"][b], g["initial_state"][0]) < 1e-10


@every_case
@both_forms
def test_padded_values_do_not_matter(case, form):
    """Whatever stands in a padded step, however large, leaves real outputs and the state bit for bit alone."""
    fn, x, mask = getattr(case, form), make_inputs(case, LENGTH), mask_of("scattered")
    junk = dict(x)
    for name in ("q", "k", "v"):
        junk[name] = torch.where(mask[..., None, None], x[name], 1e4)
    if x["g"] is not None:
        real = mask.reshape(mask.shape + (1,) * (x["g"].ndim - 2))
        junk["g"] = torch.where(real, x["g"], -50.0)
    out, final = call(fn, case, x, layout=layout(mask))
    junk_out, junk_final = call(fn, case, junk, layout=layout(mask))
    assert torch.equal(out[mask], junk_out[mask])
    assert torch.equal(final, junk_final)


@every_case
@both_forms
def test_all_true_mask_is_no_mask(case, form):
    fn, x = getattr(case, form), make_inputs(case, 20)
    out, final = call(fn, case, x)
    masked_out, masked_final = call(fn, case, x, layout=layout(torch.ones(2, 20, dtype=torch.bool)))
    assert torch.equal(out, masked_out)
    assert torch.equal(final, masked_final)


SEGMENTS = torch.tensor([[0] * 3 + [1] * 1 + [2] * 60 + [3] * 19, [7] * 64 + [2] * 17 + [7] * 1 + [0] * 1])


@every_case
@both_forms
def test_segments_are_documents_alone(case, form):
    """Two rows packed differently; ids need not be ordered or unique, only a change counts."""
    fn, x = getattr(case, form), make_inputs(case, LENGTH)
    out_weight = torch.randn(x["v"].shape, dtype=torch.float64)
    state_weight = torch.randn(x["initial_state"].shape, dtype=torch.float64)
    out, final, grads = gradients(
        lambda x: call(fn, case, x, layout=layout(segments=SEGMENTS)), x, out_weight, state_weight
    )
    for b in range(2):
        boundaries = [0, *(SEGMENTS[b].diff().nonzero()[:, 0] + 1).tolist(), LENGTH]
        for start, stop in itertools.pairwise(boundaries):
            alone = rows(x, b, slice(start, stop))
            if start > 0:
                alone["initial_state"] = torch.zeros_like(alone["initial_state"])
            is_last = float(stop == LENGTH)
            weights = (out_weight[b : b + 1, start:stop], state_weight[b : b + 1] * is_last)
            o, s, g = gradients(lambda x: call(fn, case, x), alone, *weights)
            assert relative_error(out[b : b + 1, start:stop], o) < 1e-11
            for name in ("q", "k", "v", "g"):
                if name in g:
                    # Floor: the normalised output of a document of one token hardly depends on its q and k.
                    assert relative_error(grads[name][b : b + 1, start:stop], g[name], floor=0.01) < 1e-10, name
            if start == 0:
                assert relative_error(grads["initial_state"][b], g["initial_state"][0]) < 1e-10
        assert relative_error(final[b], s[0]) < 1e-11


@every_case
@both_forms
def test_segments_and_mask_together(case, form):
    fn, x, mask = getattr(case, form), make_inputs(case, LENGTH), mask_of("interior")
    expected, final = quadratic(case, x, mask=mask, segments=SEGMENTS)
    out, actual_final = call(fn, case, x, layout=layout(mask, SEGMENTS))
    assert relative_error(out[mask], expected[mask]) < 1e-11
    assert relative_error(actual_final, final) < 1e-11


BOUNDARIES = ([0, 1, 4, 20, 84, 90], [0, 0, 30, 30, 90, 90], [0, 90], [0, 16, 32, 48, 64, 80, 90])


@every_case
@both_forms
@pytest.mark.parametrize("boundaries", BOUNDARIES, ids=["short", "with_empty", "one", "aligned"])
def test_cu_seqlens(case, form, boundaries):
    """A state in and a state out for each document; an empty one hands its state through."""
    fn, x = getattr(case, form), make_inputs(case, 90, batch=1)
    documents = len(boundaries) - 1
    gen = torch.Generator().manual_seed(5)
    x["initial_state"] = torch.rand(documents, *x["initial_state"].shape[1:], generator=gen, dtype=torch.float64)
    cu_seqlens = torch.tensor(boundaries)
    out_weight = torch.randn(x["v"].shape, dtype=torch.float64)
    state_weight = torch.randn(x["initial_state"].shape, dtype=torch.float64)
    out, final, grads = gradients(lambda x: call(fn, case, x, cu_seqlens=cu_seqlens), x, out_weight, state_weight)
    assert final.shape == x["initial_state"].shape
    for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        state = x["initial_state"][n : n + 1]
        if start == stop:
            assert torch.equal(final[n : n + 1], state)
            assert torch.equal(grads["initial_state"][n], state_weight[n])
            continue
        alone = rows(x, 0, slice(start, stop)) | {"initial_state": state}
        o, s, g = gradients(lambda x: call(fn, case, x), alone, out_weight[:, start:stop], state_weight[n : n + 1])
        assert relative_error(out[:, start:stop], o) < 1e-11
        assert relative_error(final[n], s[0]) < 1e-11
        for name in ("q", "k", "v", "g"):
            if name in g:
                assert relative_error(grads[name][:, start:stop], g[name], floor=0.01) < 1e-10, name
        assert relative_error(grads["initial_state"][n], g["initial_state"][0]) < 1e-10


@every_case
@both_forms
def test_cu_seqlens_without_initial_state(case, form):
    fn, x = getattr(case, form), make_inputs(case, 40, batch=1) | {"initial_state": None}
    out, final = call(fn, case, x, cu_seqlens=torch.tensor([0, 11, 11, 40], dtype=torch.int32))
    segments = torch.tensor([[0] * 11 + [1] * 29])
    expected, last = quadratic(case, x, segments=segments)
    assert relative_error(out, expected) < 1e-11
    assert relative_error(final[2:], last) < 1e-11
    assert (final[1] == 0).all()


@every_case
@pytest.mark.parametrize("forms", [("chunk",), ("recurrent",), ("chunk", "recurrent")])
@pytest.mark.parametrize("cuts", [[1], [64], [3, 4, 70], [15, 16, 17, 33]])
def test_pieces_are_the_whole(case, forms, cuts):
    """A sequence run in pieces, the state handed on, in either form or mixed; gradients flow through the states."""
    x = make_inputs(case, LENGTH)
    weights = torch.randn(x["v"].shape, dtype=torch.float64), torch.randn(x["initial_state"].shape).double()

    def in_pieces(x):
        outs, state = [], x["initial_state"]
        for i, (start, stop) in enumerate(zip([0, *cuts], [*cuts, LENGTH], strict=True)):
            fn = getattr(case, forms[i % len(forms)])
            piece = {n: t if t is None or n == "initial_state" else t[:, start:stop] for n, t in x.items()}
            out, state = call(fn, case, piece | {"initial_state": state})
            outs.append(out)
        return torch.cat(outs, 1), state

    out, final, grads = gradients(in_pieces, x, *weights)
    whole_out, whole_final, whole_grads = gradients(lambda x: call(case.recurrent, case, x), x, *weights)
    assert relative_error(out, whole_out) < 1e-11
    assert relative_error(final, whole_final) < 1e-11
    for name in whole_grads:
        assert relative_error(grads[name], whole_grads[name]) < 1e-10, name


@every_case
@both_forms
def test_causal_and_independent_of_batch_mates(case, form):
    fn, x = getattr(case, form), make_inputs(case, 70)
    out, _ = call(fn, case, x)
    for t in (0, 1, 40, 69):
        changed = {n: None if v is None else v.clone() for n, v in x.items()}
        for name in ("q", "k", "v"):
            changed[name][0, t] = 3.0
        if x["g"] is not None:
            changed["g"][0, t] = -9.0
        other, _ = call(fn, case, changed)
        # A later gate may change the rounding of a chunk (its common factor), never more.
        assert t == 0 or relative_error(other[0, :t], out[0, :t]) < 1e-13, "a later token reached back"
        assert relative_error(other[0, t], out[0, t]) > 1e-3, "the change must show"
        assert relative_error(other[1], out[1]) < 1e-13, "a row depends on its batch mate"
    alone, _ = call(fn, case, rows(x, 1, slice(None)))
    assert relative_error(alone[0], out[1]) < 1e-13


def test_layout_moves_with_the_layers_of_a_model():
    """accelerate moves the arguments of a layer by their `to`; a layout left behind would meet another device."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    moved = send_to_device({"layout": SequenceLayout(mask, mask.long(), mask.long())}, "meta")["layout"]
    assert [tensor.device.type for tensor in (moved.mask, moved.segments, moved.order)] == ["meta"] * 3
    assert send_to_device(SequenceLayout(), "meta").mask is None
