"""The gated delta rule in transformers' conventions: grouped heads, q and k normed in the op, slices as inputs."""

import inspect

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops.delta.delta_rule import gated_delta_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import relative_error

B, T, G, H, K, V = 2, 37, 2, 6, 12, 20
SIZES = [G * K, G * K, H * V]
FORMS = ["recurrent", "chunk", "cpp"]


@pytest.fixture(autouse=True)
def small_heads_run(monkeypatch):
    monkeypatch.setattr("lalm.modeling.ops.dispatch.SMALLEST_STATE", 1)


def make(dtype, size=(K, V), length=T):
    torch.manual_seed(0)
    key, value = size
    return {
        "mixed": torch.randn(B, length + 3, 2 * G * key + H * value, dtype=dtype),
        "g": -torch.rand(B, length, H, dtype=dtype) * 3,
        "beta": torch.rand(B, length, H, dtype=dtype),
        "initial_state": torch.randn(B, H, key, value, dtype=dtype),
    }


def run(rule, x, size=(K, V), **options):
    """Outputs, final state and gradients of all inputs, q, k and v being slices of one tensor."""
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    mixed, g, beta, state = leaves.values()
    key, value = size
    parts = mixed[:, 3:].split([G * key, G * key, H * value], -1)
    q, k, v = (part.unflatten(-1, (-1, width)) for part, width in zip(parts, (key, key, value), strict=True))
    o, final = rule(q, k, v, g, beta, initial_state=state, output_final_state=True, **options)
    torch.manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum() for y in (o, final))
    return o, final, *torch.autograd.grad(loss, list(leaves.values()))


# transformers repeats grouped heads before its function in older versions, in it since.
takes_no_groups = "repeat_interleave" not in inspect.getsource(qwen.torch_chunk_gated_delta_rule)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_normed", [True, False], ids=["normed", "plain"])
def test_is_the_function_of_transformers(form, is_normed):
    if form == "cpp" and cpp.load_kernel("rms_norm") is None:
        pytest.skip("this machine has no C++ compiler")
    x = make(torch.float32)
    if not is_normed:
        x["mixed"][..., : 2 * G * K] /= K**0.5
    expected = run(gated_delta_rule, {n: t.double() for n, t in x.items()},
                   implementation="recurrent", use_qk_l2norm_in_kernel=is_normed)  # fmt: skip
    found = run(gated_delta_rule, x, implementation=form, use_qk_l2norm_in_kernel=is_normed)
    rule = qwen.torch_chunk_gated_delta_rule

    def stock(q, k, v, g, beta, **options):
        if takes_no_groups:
            q, k = (t.repeat_interleave(H // G, dim=2) for t in (q, k))
        return rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=is_normed, **options)

    for y, exact, theirs in zip(found, expected, run(stock, x), strict=True):
        assert y.dtype == torch.float32
        assert relative_error(y, exact) < 2e-6
        assert relative_error(theirs, exact) < 5e-6


@pytest.mark.parametrize("kind", ["padding", "documents"])
def test_layouts_in_cpp(kind):
    if cpp.load_kernel("rms_norm") is None:
        pytest.skip("this machine has no C++ compiler")
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :5], mask[1, 20:25], mask[1, -2:] = False, False, False
    documents = torch.tensor([[0] * 9 + [1] * 20 + [2] * 8, [0] * 30 + [1] * 7])
    layout = SequenceLayout(mask=mask) if kind == "padding" else SequenceLayout(segments=documents)
    x = make(torch.float32)

    def real(q, k, v, g, beta, **options):
        o, final = gated_delta_rule(q, k, v, g, beta, layout=layout, use_qk_l2norm_in_kernel=True, **options)
        return layout.zero_padding(o), final

    expected = run(real, {n: t.double() for n, t in x.items()}, implementation="recurrent")
    for y, exact in zip(run(real, x, implementation="cpp"), expected, strict=True):
        assert relative_error(y, exact) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = make(dtype)
    found = run(gated_delta_rule, x | {"initial_state": x["initial_state"].float()}, use_qk_l2norm_in_kernel=True)
    expected = run(gated_delta_rule, {n: t.double() for n, t in x.items()},
                   implementation="recurrent", use_qk_l2norm_in_kernel=True)  # fmt: skip
    assert [y.dtype for y in found] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32]
    for y, exact in zip(found, expected, strict=True):
        assert relative_error(y, exact) < (0.01 if dtype == torch.bfloat16 else 0.002)


def test_second_derivatives():
    x = make(torch.float32, length=9)

    def slopes(implementation, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in x.values()]
        given = dict(zip(x, leaves, strict=True))
        mixed = given["mixed"][:, 3:].split(SIZES, -1)
        q, k, v = (part.unflatten(-1, (-1, width)) for part, width in zip(mixed, (K, K, V), strict=True))
        o, _ = gated_delta_rule(q, k, v, given["g"], given["beta"], initial_state=given["initial_state"],
                                use_qk_l2norm_in_kernel=True, implementation=implementation)  # fmt: skip
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in first), leaves)

    form = "cpp" if cpp.load_kernel("rms_norm") is not None else "chunk"
    for y, exact in zip(slopes(form, torch.float32), slopes("recurrent", torch.float64), strict=True):
        assert relative_error(y, exact) < 5e-5


def test_group_counts_that_do_not_fit():
    q, v, gate = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6)
    with pytest.raises(ValueError, match="v must have a multiple of the 4 heads of q"):
        gated_delta_rule(q, q, v, gate, gate)
