"""Every wrong shape is a ValueError that names the argument."""

import pytest
import torch

from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import CASE_IDS, CASES, call, make_inputs

every_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
both_forms = pytest.mark.parametrize("form", ["recurrent", "chunk"])

BAD_INPUTS = {
    "q": lambda x: {"q": x["q"][0]},
    "k": lambda x: {"k": x["k"][..., :-1]},
    "v": lambda x: {"v": x["v"][:, :-1]},
    "initial_state": lambda x: {"initial_state": x["initial_state"][:1]},
}


@every_case
@both_forms
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_shape_is_named(case, form, name):
    x = make_inputs(case, 6)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(getattr(case, form), case, x | BAD_INPUTS[name](x))


@both_forms
@pytest.mark.parametrize("case", [c for c in CASES if c.takes_g], ids=lambda c: c.name)
@pytest.mark.parametrize("cut", ["time", "last", "rank"])
def test_bad_gate_is_named(case, form, cut):
    x = make_inputs(case, 6)
    bad = {"time": x["g"][:, :-1], "last": x["g"][..., :-1], "rank": x["g"][..., None]}[cut]
    with pytest.raises(ValueError, match=r"\bg\b"):
        call(getattr(case, form), case, x | {"g": bad})


@every_case
@both_forms
def test_swapped_time_and_heads_of_a_state(case, form):
    """The state of the transposed layout [B,H,V,K] is refused, not broadcast."""
    x = make_inputs(case, 6)
    with pytest.raises(ValueError, match="initial_state"):
        call(getattr(case, form), case, x | {"initial_state": x["initial_state"].transpose(-1, -2)})


@every_case
@both_forms
@pytest.mark.parametrize(
    "layout", [{"mask": torch.ones(2, 5, dtype=torch.bool)}, {"segments": torch.zeros(1, 6).long()}], ids=str
)
def test_bad_layout_is_named(case, form, layout):
    x = make_inputs(case, 6)
    (name,) = layout
    with pytest.raises(ValueError, match=name):
        call(getattr(case, form), case, x, layout=SequenceLayout(**({"mask": None, "segments": None} | layout)))


@every_case
@both_forms
@pytest.mark.parametrize("cu_seqlens", [[0, 3], [1, 6], [0, 4, 3, 6], [0, 7], [0], [[0, 6]], [0.0, 6.0]], ids=str)
def test_bad_cu_seqlens_is_named(case, form, cu_seqlens):
    x = make_inputs(case, 6, batch=1) | {"initial_state": None}
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(getattr(case, form), case, x, cu_seqlens=torch.tensor(cu_seqlens))


@every_case
@both_forms
def test_cu_seqlens_needs_one_row_and_a_state_per_document(case, form):
    x = make_inputs(case, 6, batch=2)
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(getattr(case, form), case, x, cu_seqlens=torch.tensor([0, 6]))
    x = make_inputs(case, 6, batch=1)
    for count in (1, 3):  # too few and too many for two documents
        states = x | {"initial_state": x["initial_state"].repeat(count, 1, 1, 1)}
        with pytest.raises(ValueError, match="initial_state"):
            call(getattr(case, form), case, states, cu_seqlens=torch.tensor([0, 2, 6]))


@every_case
@both_forms
def test_no_token(case, form):
    x = make_inputs(case, 6)
    empty = {n: t if t is None or n == "initial_state" else t[:, :0] for n, t in x.items()}
    with pytest.raises(ValueError, match="token"):
        call(getattr(case, form), case, empty)


@every_case
@pytest.mark.parametrize("chunk_size", [0, -1])
def test_bad_chunk_size(case, chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        call(case.chunk, case, make_inputs(case, 6), chunk_size=chunk_size)
