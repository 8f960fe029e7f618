"""What dispatch hands to flash-linear-attention, and what it makes of the answer.

The kernels need a GPU, and run these tests where there is one. Elsewhere stand-ins with their signatures, built on our
recurrent forms, take their place: they know packed documents by cu_seqlens only, as the kernels do, so padding and
per-row documents must have been translated.
"""

import sys
import types

import pytest
import torch

from lalm.modeling.ops import dispatch
from lalm.modeling.ops.delta.delta_rule import (
    delta_rule,
    gated_delta_rule,
    recurrent_delta_rule,
    recurrent_gated_delta_rule,
)
from lalm.modeling.ops.diagonal.gla import gla, recurrent_gla
from lalm.modeling.ops.diagonal.linear_attention import linear_attention, recurrent_linear_attention
from lalm.modeling.ops.diagonal.retention import recurrent_retention, retention
from lalm.modeling.ops.dispatch import has_fla, in_form
from lalm.modeling.ops.fla_kernels import fla_diagonal
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import CASES, make_inputs, relative_error

fla_delta_rule = in_form(delta_rule, "fla")
fla_gated_delta_rule = in_form(gated_delta_rule, "fla")
fla_gla = in_form(gla, "fla")
fla_linear_attention = in_form(linear_attention, "fla")
fla_retention = in_form(retention, "fla")

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


ON_A_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_fla(), reason="there is no GPU with flash-linear-attention"
)


@pytest.fixture(params=["stand-ins", pytest.param("kernels", marks=ON_A_GPU)])
def device(request, monkeypatch):
    """Where the tensors have to be."""
    if request.param == "kernels":
        return "cuda"
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
    monkeypatch.setattr(dispatch, "_reaches_gpu", lambda name, v: True)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return "cpu"


def layouts(length, device):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:7] = mask[1, -2:] = False
    segments = torch.zeros(2, length, dtype=torch.int64)
    segments[0, 4:], segments[1, 9:], segments[1, 11:] = 1, 7, 2
    mask, segments = mask.to(device), segments.to(device)
    return {
        "plain": None,
        "padded": SequenceLayout(mask=mask),
        "packed": SequenceLayout(segments=segments),
        "both": SequenceLayout(mask=mask, segments=segments),
    }


@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "both"])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name != "kda"])
def test_same_as_the_recurrence(case, stateful, kind, device):
    """Outputs, last states and all gradients."""
    # The kernels multiply float32 in TF32, and take heads of whole tiles.
    length, sizes, tolerance = (17, (5, 7), 1e-5) if device == "cpu" else (150, (32, 64), 1e-2)
    x = {
        name: tensor.to(device)
        for name, tensor in make_inputs(case, length, 2, 3, *sizes, dtype=torch.float32).items()
        if tensor is not None
    }
    if not stateful:
        x["initial_state"] *= 0
    if case.gate == "fixed" or (case.strongest_write and not case.takes_g):
        x.pop("g", None)
    layout = layouts(length, device)[kind]
    real = torch.ones(2, length, dtype=torch.bool) if layout is None or layout.mask is None else layout.mask
    found, expected = (
        outputs_and_gradients(function, x, real, layout=layout, **case.options)
        for function in (FORMS[case.recurrent], case.recurrent)
    )
    for name, value in expected.items():
        assert relative_error(found[name], value) < tolerance, name


def outputs_and_gradients(function, x, real, **options):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    o, state = function(**leaves, output_final_state=True, **options)
    found = {"o": o[real], "state": state}
    loss = sum((value * torch.linspace(-1, 2, value.numel(), device=value.device).view_as(value)).sum()
               for value in found.values())  # fmt: skip
    return found | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_kernels_get_one_dtype(device):
    """The kernels take q, k and v of one type; a feature map gives float32 beside a bfloat16 v."""
    q, v = torch.rand(1, 5, 2, 32), torch.rand(1, 5, 2, 64, dtype=torch.bfloat16)
    o, _ = fla_diagonal(q.to(device), q.to(device), v.to(device), None, 1.0, None, None)
    assert o.dtype == torch.bfloat16
