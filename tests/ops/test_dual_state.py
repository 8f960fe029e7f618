# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The dual-state delta rule: its forms agree, it contains the rules it is made of, and its states stay bounded."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lalm.modeling.ops import dispatch
from lalm.modeling.ops.cpp_kernels import load_kernel
from lalm.modeling.ops.delta.delta_rule import recurrent_delta_rule, recurrent_gated_delta_rule
from lalm.modeling.ops.delta.dual_state import chunk_dual_state_delta, dual_state_delta, recurrent_dual_state_delta
from lalm.modeling.ops.dispatch import in_form
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import relative_error

cpp_dual_state_delta = in_form(dual_state_delta, "cpp")

NAMES = ("q", "k", "v", "g", "beta", "read", "coupling")
needs_compiler = pytest.mark.skipif(
    load_kernel("rms_norm") is None,
    reason="this machine has no C++ compiler",
)


def make(length, batch=2, heads=3, key=5, value=7, memories=2, causal=True, dtype=torch.float64, seed=0):
    """Inputs by name; the rows of the coupling are not negative and sum to 1."""
    gen = torch.Generator().manual_seed(seed)
    lead = (batch, length, heads) if causal else (2, batch, length, heads)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    x = {name: F.normalize(rand(batch, length, heads, key), dim=-1) for name in ("q", "k")}
    x["v"] = rand(batch, length, heads, value)
    # Decays from 0.999 to 0.05 a step, so that near and far past both matter.
    x["g"] = -(2 * rand(*lead, memories) - 2).exp().clamp(1e-3, 3.0)
    x["beta"], x["read"] = rand(*lead, memories).sigmoid(), rand(*lead, memories)
    x["coupling"] = rand(*lead, memories, memories).softmax(-1)
    return {name: tensor.to(dtype) for name, tensor in x.items()}


def with_state(x, seed=1):
    batch, _, heads, key = x["q"].shape
    shape = (batch, heads, x["g"].shape[-1], key, x["v"].shape[-1])
    state = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x | {"initial_state": state.to(x["q"].dtype)}


def run(op, x, mask=None, **kwargs):
    """Outputs at real tokens, final state, and the gradient of every input for random cotangents."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    causal = kwargs.get("causal", True)
    o, state = op(**leaves, scale=0.7, output_final_state=causal, **kwargs)
    gen = torch.Generator().manual_seed(9)
    weight = torch.randn(o.shape, generator=gen, dtype=torch.float64).to(o.dtype)
    weight = weight if mask is None else weight * mask[..., None, None]
    loss = (o * weight).sum()
    if state is not None:
        loss = loss + (state * torch.randn(state.shape, generator=gen, dtype=torch.float64).to(state.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o if mask is None else o[mask], "state": state} | dict(zip(leaves, found, strict=True))


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert actual[name] is None
        else:
            assert relative_error(actual[name], tensor) < tolerance, name


def hard_layout(batch, length, seed=0):
    """Padding anywhere, documents that begin anywhere (on padding too)."""
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=gen) > 0.25
    mask[:, length // 2] = True
    segments = (torch.rand(batch, length, generator=gen) > 0.85).long().cumsum(1)
    return SequenceLayout(mask, segments)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 32, 33, 63, 65, 96, 130])
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "plain"])
def test_chunk_is_recurrent(length, delta):
    x = with_state(make(length, seed=length))
    expected = run(recurrent_dual_state_delta, x, use_delta_rule=delta)
    assert_same(run(chunk_dual_state_delta, x, use_delta_rule=delta), expected, 1e-12)


@pytest.mark.parametrize("memories", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 24, 128])
def test_chunk_size_and_number_of_memories(chunk_size, memories):
    x = make(50, memories=memories)
    actual = run(chunk_dual_state_delta, x, chunk_size=chunk_size)
    assert_same(actual, run(recurrent_dual_state_delta, x), 1e-12)


@pytest.mark.parametrize("op", [chunk_dual_state_delta, recurrent_dual_state_delta])
def test_gradcheck(op):
    x = with_state(make(5, batch=1, heads=1, key=2, value=3))
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    assert torch.autograd.gradcheck(lambda *t: op(**dict(zip(x, t, strict=True)), output_final_state=True), leaves)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("length", [13, 70])
def test_slabs_change_nothing(length, causal, monkeypatch):
    """Long texts are worked on a few chunks at a time, with a backward pass of its own."""
    layout = hard_layout(2, length)
    x = make(length, causal=causal)
    expected = run(recurrent_dual_state_delta, x, layout.mask, layout=layout, causal=causal)
    whole = run(chunk_dual_state_delta, x, layout.mask, layout=layout, causal=causal, chunk_size=8)
    assert_same(whole, expected, 1e-12)
    monkeypatch.setattr(dispatch, "PAIRS_AT_ONCE", 5000)
    slabs = run(chunk_dual_state_delta, x, layout.mask, layout=layout, causal=causal, chunk_size=8)
    assert_same(slabs, expected, 1e-12)


def test_one_input_alone_wants_its_gradient(monkeypatch):
    """Frozen tensors beside a trained one, in the slabs' own backward pass."""
    monkeypatch.setattr(dispatch, "PAIRS_AT_ONCE", 3000)
    x = make(60)
    expected = run(chunk_dual_state_delta, x, chunk_size=8)
    for name in NAMES:
        leaf = x[name].clone().requires_grad_()
        o, state = chunk_dual_state_delta(**(x | {name: leaf}), scale=0.7, output_final_state=True, chunk_size=8)
        gen = torch.Generator().manual_seed(9)
        loss = sum((t * torch.randn(t.shape, generator=gen, dtype=t.dtype)).sum() for t in (o, state))
        assert relative_error(torch.autograd.grad(loss, leaf)[0], expected[name]) < 1e-12


@pytest.mark.parametrize("op", [recurrent_dual_state_delta, chunk_dual_state_delta])
def test_padding_is_inert(op):
    """Rows with padding anywhere give what their real tokens give alone, whatever stands on the padding."""
    x = with_state(make(40))
    mask = hard_layout(2, 40).mask
    for name in NAMES:
        x[name][~mask] = 1e3 if name == "v" else x[name][~mask]
    o, state = op(**x, output_final_state=True, layout=SequenceLayout(mask))
    for row in range(2):
        alone = {name: tensor[row : row + 1] for name, tensor in x.items()}
        alone |= {name: alone[name][:, mask[row]] for name in NAMES}
        expected, final = op(**alone, output_final_state=True)
        assert relative_error(o[row : row + 1, mask[row]], expected) < 1e-12
        assert relative_error(state[row : row + 1], final) < 1e-12


@pytest.mark.parametrize("op", [recurrent_dual_state_delta, chunk_dual_state_delta])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_packed_documents_are_apart(op, causal):
    x = make(45, batch=1, causal=causal)
    boundaries = [0, 3, 4, 4, 30, 45]
    cu_seqlens = torch.tensor(boundaries)
    o, state = op(**x, cu_seqlens=cu_seqlens, output_final_state=causal, causal=causal)
    gates = ("g", "beta", "read", "coupling")
    for index, (start, end) in enumerate(itertools.pairwise(boundaries)):
        if start == end:
            continue
        axis = {name: 2 if name in gates and not causal else 1 for name in NAMES}
        alone = {name: tensor.narrow(axis[name], start, end - start) for name, tensor in x.items()}
        expected, final = op(**alone, output_final_state=causal, causal=causal)
        assert relative_error(o[:, start:end], expected) < 1e-12
        if causal:
            assert relative_error(state[index : index + 1], final) < 1e-12


@pytest.mark.parametrize("op", [recurrent_dual_state_delta, chunk_dual_state_delta])
def test_pieces_give_the_whole(op):
    x = make(50)
    expected, final = op(**x, output_final_state=True)
    state, outputs = None, []
    for start, end in ((0, 1), (1, 20), (20, 50)):
        piece = {name: tensor[:, start:end] for name, tensor in x.items()}
        o, state = op(**piece, initial_state=state, output_final_state=True)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), expected) < 1e-12
    assert relative_error(state, final) < 1e-12


@pytest.mark.parametrize("op", [recurrent_dual_state_delta, chunk_dual_state_delta])
def test_without_leak_it_is_two_gated_delta_rules(op):
    x = make(41)
    expected = 0
    for a in range(2):
        o, state = recurrent_gated_delta_rule(
            x["q"], x["k"], x["v"], x["g"][..., a], x["beta"][..., a], output_final_state=True
        )
        expected = expected + x["read"][..., a, None] * o
    actual, states = op(**(x | {"coupling": None}), output_final_state=True)
    assert relative_error(actual, expected) < 1e-12
    assert relative_error(states[:, :, 1], state) < 1e-12


@pytest.mark.parametrize("op", [recurrent_dual_state_delta, chunk_dual_state_delta])
def test_one_memory_that_keeps_all_is_deltanet(op):
    x = make(41, memories=1)
    x |= {"g": torch.zeros_like(x["g"]), "read": torch.ones_like(x["read"]), "coupling": None}
    expected, _ = recurrent_delta_rule(x["q"], x["k"], x["v"], x["beta"][..., 0])
    assert relative_error(op(**x)[0], expected) < 1e-12


def test_both_ways_is_a_pass_each():
    x = make(30, causal=False)
    o, _ = chunk_dual_state_delta(**x, causal=False)
    gates = ("g", "beta", "read", "coupling")
    ahead = {name: tensor[0] if name in gates else tensor for name, tensor in x.items()}
    back = {name: (tensor[1] if name in gates else tensor).flip(1) for name, tensor in x.items()}
    expected = recurrent_dual_state_delta(**ahead)[0] + recurrent_dual_state_delta(**back)[0].flip(1)
    assert relative_error(o, expected) < 1e-12


@pytest.mark.parametrize("decay", [0.0, -1e-3])
def test_states_stay_bounded_over_100k_tokens(decay):
    """max_a |Z_a| <= max |v| min(T, 1 / (1 - exp g)) with any leak whose rows sum to 1, for keys that turn slowly: the
    worst case of a delta rule, whose memory then runs away from the values it holds."""
    length = 100_000
    angle = torch.arange(length, dtype=torch.float64) * 1e-2
    k = torch.stack([angle.cos(), angle.sin()], dim=-1)[None, :, None]
    v = torch.ones(1, length, 1, 1, dtype=torch.float64)
    gates = torch.ones(1, length, 1, 2, dtype=torch.float64)
    coupling = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).expand(1, length, 1, 2, 2)
    state, largest = None, 0.0
    for part in range(0, length, 5000):
        now = slice(part, part + 5000)
        arguments = (k[:, now], k[:, now], v[:, now], gates[:, now] * decay, gates[:, now], gates[:, now])
        _, state = chunk_dual_state_delta(*arguments, coupling[:, now], initial_state=state, output_final_state=True)
        largest = max(largest, float(state.norm(dim=(-2, -1)).max()))
    bound = length if decay == 0 else 1 / (1 - torch.tensor(decay).exp())
    assert 1 < largest <= bound
    # an additive leak, as the seed writes it, grows without bound
    additive = torch.tensor([[1.0, 0.1], [0.1, 1.0]], dtype=torch.float64).expand(1, length, 1, 2, 2)
    now = slice(0, 2000)
    arguments = (k[:, now], k[:, now], v[:, now], gates[:, now] * decay, gates[:, now], gates[:, now])
    _, state = chunk_dual_state_delta(*arguments, additive[:, now], output_final_state=True)
    assert state.norm() > 1e20


@needs_compiler
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "plain"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 70])
def test_cpp_is_recurrent(length, delta, causal):
    layout = hard_layout(2, length)
    x = make(length, key=16, value=16, causal=causal, dtype=torch.float32)
    x = with_state(x) if causal else x
    exact = {name: tensor.double() for name, tensor in x.items()}
    options = {"layout": layout, "causal": causal, "use_delta_rule": delta}
    expected = run(recurrent_dual_state_delta, exact, layout.mask, **options)
    assert_same(run(cpp_dual_state_delta, x, layout.mask, **options), expected, 5e-6)
    assert_same(run(chunk_dual_state_delta, x, layout.mask, **options), expected, 5e-6)


def compare_sizes(key, value, memories):
    x = make(40, key=key, value=value, memories=memories, dtype=torch.float32)
    exact = {name: tensor.double() for name, tensor in x.items()}
    assert_same(run(cpp_dual_state_delta, x), run(recurrent_dual_state_delta, exact), 5e-6)


@needs_compiler
@pytest.mark.parametrize("sizes", [(33, 16, 1), (32, 48, 2), (16, 64, 3), (20, 7, 4)])
def test_cpp_sizes(sizes):
    compare_sizes(*sizes)


@needs_compiler
@pytest.mark.parametrize("processor", ["x86-64-v2", "x86-64-v3"])
def test_cpp_in_narrower_registers(processor, compile_for):
    """Vectors of 4 and of 8 numbers, as processors without AVX and without AVX-512 have them."""
    compile_for(processor)
    compare_sizes(20, 47, 2)


@needs_compiler
@pytest.mark.parametrize("state", [True, False], ids=["state", "empty"])
@pytest.mark.parametrize("length", [255, 256, 257, 600])
def test_cpp_across_segments(length, state):
    """The backward pass begins at kept states. One document begins on padding, one inside a segment."""
    x = make(length, heads=2, key=16, value=16, dtype=torch.float32)
    x = with_state(x) if state else x
    mask, segments = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.long)
    mask[0, 3:20], mask[1, -5:] = False, False
    segments[0, 18:], segments[1, 251:] = 1, 1
    layout = SequenceLayout(mask, segments)
    exact = {name: tensor.double() for name, tensor in x.items()}
    expected = run(recurrent_dual_state_delta, exact, mask, layout=layout)
    assert_same(run(cpp_dual_state_delta, x, mask, layout=layout), expected, 5e-6)


@needs_compiler
def test_cpp_pieces_and_gradients_of_one_result_alone():
    """A text read in pieces, its states handed on; the gradient of a state without outputs and without a state."""
    x = make(50, key=16, value=16, dtype=torch.float32)
    exact = {name: tensor.double() for name, tensor in x.items()}
    expected, final = recurrent_dual_state_delta(**exact, output_final_state=True)
    state, outputs = None, []
    for start, end in ((0, 1), (1, 20), (20, 50)):
        piece = {name: tensor[:, start:end] for name, tensor in x.items()}
        o, state = cpp_dual_state_delta(**piece, initial_state=state, output_final_state=True)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), expected) < 5e-6
    assert relative_error(state, final) < 5e-6
    for index in range(2):
        found = []
        for op, tensors in ((cpp_dual_state_delta, with_state(x)), (recurrent_dual_state_delta, with_state(exact))):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
            op(**leaves, output_final_state=index == 1)[index].sum().backward()
            found.append({name: leaf.grad for name, leaf in leaves.items()})
        for name, expected in found[1].items():
            if expected is None:  # a state owes nothing to queries and reads
                assert not found[0][name].any(), name
            else:
                assert relative_error(found[0][name], expected) < 5e-6, name


@needs_compiler
def test_cpp_threads_give_the_same():
    x = make(40, key=16, value=16, dtype=torch.float32)
    expected = run(cpp_dual_state_delta, x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        actual = run(cpp_dual_state_delta, x)
    finally:
        torch.set_num_threads(before)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_cpp_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="float32 or less"):
        cpp_dual_state_delta(**make(4, key=16, value=16))
    with pytest.raises(ValueError, match="at least 512 numbers"):
        cpp_dual_state_delta(**make(4, value=7, dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("beta", (2, 9, 3, 1), r"beta must be \[B, T, H, M\]"),
        ("read", (2, 9, 3), r"read must be"),
        ("coupling", (2, 9, 3, 2), r"coupling must be \[B, T, H, M, M\]"),
        ("initial_state", (2, 3, 5, 7), "initial_state must be"),
        ("k", (2, 9, 3, 4), "k must have the shape of q"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    x = make(9) | {name: torch.zeros(shape, dtype=torch.float64)}
    for op in (recurrent_dual_state_delta, chunk_dual_state_delta):
        with pytest.raises(ValueError, match=message):
            op(**x)


def test_both_ways_has_no_state():
    with pytest.raises(ValueError, match="causal=False reads both sides"):
        chunk_dual_state_delta(**make(9, causal=False), causal=False, output_final_state=True)
    with pytest.raises(ValueError, match="2, B, T, H, M"):
        chunk_dual_state_delta(**make(9), causal=False)
