"""The causal convolution under the names of the `causal_conv1d` package: values, gradients, documents and states."""

import itertools

import pytest
import torch
from transformers.models.mamba2 import modeling_mamba2 as mamba

from lalm.modeling.ops.dense.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tests.ops.cases import relative_error

B, D, T, W = 2, 75, 41, 4


@pytest.fixture(autouse=True)
def small_calls_run(monkeypatch):
    monkeypatch.setattr("lalm.modeling.ops.dispatch.WORTH_A_CONV_KERNEL", 0)


def make(dtype=torch.float32):
    torch.manual_seed(0)
    wide, weight, bias = torch.randn(B, T, D + 9), torch.randn(D, W), torch.randn(D)
    return [x.to(dtype) for x in (wide, weight, bias)]


def gradients(function, tensors, **options):
    """Of x, a slice of wider tokens seen as [B, D, T], of the weight and of the bias."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    y = function(leaves[0][..., 4:-5].transpose(1, 2), *leaves[1:], **options)
    slope = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return y, *torch.autograd.grad((y * slope).sum(), leaves)


@pytest.mark.parametrize("activation", ["silu", None])
def test_is_the_function_of_transformers(activation):
    found = gradients(causal_conv1d_fn, make(), activation=activation)
    exact = gradients(causal_conv1d_fn, make(torch.float64), activation=activation)
    stock = gradients(mamba.causal_conv1d_fn, make(torch.float64), activation=activation)
    assert found[0].transpose(1, 2).is_contiguous()
    for y, x, theirs in zip(found, exact, stock, strict=True):
        assert relative_error(x, theirs) < 1e-12
        assert relative_error(y, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_are_separate(dtype):
    tensors, cuts = make(dtype), [0, 2, 3, 20, T]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(cuts).diff())[None].expand(B, -1).int()

    def separately(x, weight, bias):
        parts = [x[..., a:b] for a, b in itertools.pairwise(cuts)]
        return torch.cat([causal_conv1d_fn(part, weight, bias, activation="silu") for part in parts], -1)

    found = gradients(causal_conv1d_fn, tensors, seq_idx=seq_idx, activation="silu")
    for y, exact in zip(found, gradients(separately, tensors), strict=True):
        assert relative_error(y, exact) < (1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_the_whole(dtype):
    wide, weight, bias = make(dtype)
    x = wide[..., :D].transpose(1, 2)
    whole, last = causal_conv1d_fn(x, weight, bias, activation="silu", return_final_states=True)
    first, state = causal_conv1d_fn(x[..., :17], weight, bias, activation="silu", return_final_states=True)
    out = torch.empty_like(state)
    second, final = causal_conv1d_fn(
        x[..., 17:-3], weight, bias, initial_states=state, return_final_states=True, final_states_out=out,
        activation="silu",
    )  # fmt: skip
    assert final is out
    state = torch.cat([torch.full_like(final[..., :1], 9.0), final], -1)  # a slot more than the window needs
    steps = [causal_conv1d_update(x[..., -3], state, weight, bias, "silu")[..., None]]
    steps.append(causal_conv1d_update(x[..., -2:], state, weight, bias, "silu"))
    assert relative_error(torch.cat([first, second, *steps], -1), whole) < (1e-6 if dtype == torch.float32 else 0.02)
    assert torch.equal(state[..., 1:], last)


def test_windows_pass_over_padding():
    wide, weight, bias = make()
    x, mask = wide[..., :D].transpose(1, 2), torch.ones(B, T, dtype=torch.bool)
    mask[0, [3, 4, 20]], mask[1, :6] = False, False
    state = torch.randn(B, D, W - 1)
    y, final = causal_conv1d_fn(x, weight, bias, initial_states=state, return_final_states=True, mask=mask)
    for row in range(B):
        real = mask[row]
        alone = causal_conv1d_fn(x[row : row + 1, :, real], weight, bias, initial_states=state[row : row + 1],
                                 return_final_states=True)  # fmt: skip
        assert relative_error(y[row : row + 1, :, real], alone[0]) < 1e-6
        assert torch.equal(final[row : row + 1], alone[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 4)}, r"weight must be \[D, W\] with D = 75"),
        ({"bias": torch.ones(3)}, r"bias must be \[D\] = \(75,\)"),
        ({"seq_idx": torch.ones(1, T)}, r"seq_idx must be \[B, T\] = \(2, 41\)"),
        ({"initial_states": torch.ones(B, D, W)}, r"initial_states must be \[B, D, W - 1\] = \(2, 75, 3\)"),
        ({"activation": "gelu"}, "activation must be None, 'silu' or 'swish'"),
    ],
)
def test_what_does_not_fit(change, message):
    arguments = {"x": torch.ones(B, D, T), "weight": torch.ones(D, W)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d_fn(**arguments)
