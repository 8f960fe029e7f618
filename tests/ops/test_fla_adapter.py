"""What dispatch hands to flash-linear-attention, and what it makes of the answer.

The kernels need a GPU. Stand-ins with their signatures, built on our recurrent forms, take their place: they know
packed documents by cu_seqlens only, as the kernels do, so padding and per-row documents must have been translated.
"""

import sys
import types

import pytest
import torch

from lalm.modeling.ops.delta_rule import (
    fla_delta_rule,
    fla_gated_delta_rule,
    recurrent_delta_rule,
    recurrent_gated_delta_rule,
)
from lalm.modeling.ops.dispatch import fla_diagonal
from lalm.modeling.ops.gla import fla_gla, recurrent_gla
from lalm.modeling.ops.layout import SequenceLayout
from lalm.modeling.ops.linear_attention import fla_linear_attention, recurrent_linear_attention
from lalm.modeling.ops.retention import fla_retention, recurrent_retention
from tests.ops.cases import CASE_IDS, CASES, make_inputs

FORMS = {
    recurrent_gla: fla_gla,
    recurrent_linear_attention: fla_linear_attention,
    recurrent_retention: fla_retention,
    recurrent_delta_rule: fla_delta_rule,
    recurrent_gated_delta_rule: fla_gated_delta_rule,
}


def simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    return recurrent_linear_attention(
        q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, normalize=False
    )


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    kernels = {
        "gla.chunk_gla": recurrent_gla,
        "simple_gla.chunk_simple_gla": simple_gla,
        "delta_rule.chunk_delta_rule": recurrent_delta_rule,
        "gated_delta_rule.chunk_gated_delta_rule": recurrent_gated_delta_rule,
    }
    for name, function in kernels.items():
        package, attribute = name.split(".")
        module = types.ModuleType(f"fla.ops.{package}")
        setattr(module, attribute, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def layouts(length):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:7] = mask[1, -2:] = False
    segments = torch.zeros(2, length, dtype=torch.int64)
    segments[0, 4:], segments[1, 9:], segments[1, 11:] = 1, 7, 2
    return {
        "plain": None,
        "padded": SequenceLayout(mask=mask),
        "packed": SequenceLayout(segments=segments),
        "both": SequenceLayout(mask=mask, segments=segments),
    }


@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "both"])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_same_as_the_recurrence(case, stateful, kind):
    x = make_inputs(case, 17, dtype=torch.float32)
    initial_state = x.pop("initial_state") if stateful else x.pop("initial_state") * 0
    layout = layouts(17)[kind]
    arguments = {**x, "initial_state": initial_state, "output_final_state": True, "layout": layout, **case.options}
    if case.gate == "fixed" or (case.strongest_write and not case.takes_g):
        del arguments["g"]
    expected, expected_state = case.recurrent(**arguments)
    o, state = FORMS[case.recurrent](**arguments)
    real = torch.ones(2, 17, dtype=torch.bool) if layout is None or layout.mask is None else layout.mask
    torch.testing.assert_close(o[real], expected[real], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-6)


def test_kernels_get_one_dtype():
    """The kernels take q, k and v of one type; a feature map gives float32 beside a bfloat16 v."""
    q = torch.rand(1, 5, 2, 4)
    o, _ = fla_diagonal(q, q, torch.rand(1, 5, 2, 3, dtype=torch.bfloat16), None, 1.0, None, None)
    assert o.dtype == torch.bfloat16
