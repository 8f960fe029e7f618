# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Linear multiplies in float32 where 16-bit types have no arithmetic; an MLP works in pieces without gradients."""

import pytest
import torch
from torch.nn import functional as F

from lalm import GLAConfig, LamConfig
from lalm.modeling.layers import MLP, make_linear
from lalm.modeling.modeling_lam import LamMLP
from lalm.modeling.ops import dispatch
from tests.modeling.exact import tokens
from tests.variants import every_row

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def emulated(monkeypatch):
    """A processor without arithmetic for 16-bit types."""
    monkeypatch.setattr(dispatch, "has_instructions", lambda dtype: dtype.itemsize > 2)


def layer_and_input(dtype, rows=16, bias=True):
    torch.manual_seed(0)
    return make_linear(24, 40, bias=bias).to(dtype), torch.randn(2, rows // 2, 24).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_product_is_the_exact_one_rounded_once(dtype, bias, emulated):
    layer, x = layer_and_input(dtype, bias=bias)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_have_the_types_of_their_tensors(dtype, emulated):
    layer, x = layer_and_input(dtype)
    x.requires_grad_()
    layer(x).sum().backward()
    wide, exact = make_linear(24, 40).double(), x.detach().double().requires_grad_()
    wide.load_state_dict(layer.state_dict())
    wide(exact).sum().backward()
    for found, expected in ((x.grad, exact.grad), (layer.weight.grad, wide.weight.grad)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_gets_the_type_it_asks_for(dtype, emulated):
    layer, x = layer_and_input(torch.float32)
    with torch.autocast("cpu", dtype):
        found = layer(x)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, F.linear(x, layer.weight, layer.bias).to(dtype))


def test_float64_and_mixed_types_are_left_to_torch(emulated):
    """Autocast does not touch float64, and without it factors of two types are an error at any number of rows."""
    layer, x = layer_and_input(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="dtype"):
        layer.float()(x.bfloat16())


@pytest.mark.parametrize(
    ("dtype", "rows", "native"),
    [(torch.bfloat16, 14, False), (torch.bfloat16, 16, True), (torch.float32, 16, False), (torch.float64, 16, False)],
)
def test_stock_product_elsewhere(dtype, rows, native, monkeypatch):
    """Few rows, processors with the arithmetic, and wide types."""
    monkeypatch.setattr(dispatch, "has_instructions", lambda asked: native or asked.itemsize > 2)
    layer, x = layer_and_input(dtype, rows)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("found", "known"), [({}, True), ({"architecture": "aarch64"}, True)])
def test_unknown_processors_are_left_alone(found, known, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert dispatch.has_instructions.__wrapped__(torch.bfloat16) is known


@pytest.mark.parametrize(("name", "dtype"), [("avx512_bf16", torch.bfloat16), ("amx_fp16", torch.float16)])
def test_instructions_of_x86_decide(name, dtype, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda has=has: {"architecture": "x86_64", name: has}, raising=False
        )
        assert dispatch.has_instructions.__wrapped__(dtype) is has
    assert dispatch.has_instructions.__wrapped__(torch.float32)


@pytest.mark.parametrize(("mlp_class", "config_class"), [(MLP, GLAConfig), (LamMLP, LamConfig)])
@pytest.mark.parametrize("rows", [1, 5, 14, 15])
def test_mlp_in_pieces_is_the_mlp(mlp_class, config_class, rows, monkeypatch):
    torch.manual_seed(0)
    mlp = mlp_class(config_class(hidden_size=32, num_attention_heads=2))
    x, weights = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 7, 32)
    inputs, sizes = [x, *mlp.parameters()], []
    whole = mlp(x)
    gradients = torch.autograd.grad(whole, inputs, weights)
    monkeypatch.setattr(dispatch, "WIDE_AT_ONCE", rows * mlp.width)
    mlp.up_proj.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    in_pieces = mlp(x)
    assert sum(sizes) == (2 if rows >= 4 else 14)  # with a batch axis of 2, or in pieces without it
    assert max(sizes) <= 4 * rows
    torch.testing.assert_close(in_pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(in_pieces, inputs, weights), gradients)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), whole)
        with torch.autocast("cpu", torch.bfloat16):
            assert mlp(x).dtype == torch.bfloat16


@every_row
def test_model_in_pieces_is_the_model(row, monkeypatch):
    model, ids = row.build(), tokens(2, 33)
    with torch.no_grad():
        whole = model(ids).logits
        monkeypatch.setattr(dispatch, "WIDE_AT_ONCE", 7 * model.config.intermediate_size)
        torch.testing.assert_close(model(ids).logits, whole)
