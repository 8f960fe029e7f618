# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The one-pass kernels around the matrix products are what they replace, forward and backward."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from lalm.modeling.ops import autograd, dispatch
from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops.dense import elementwise
from lalm.modeling.ops.dense.elementwise import activate, rms_norm
from lalm.modeling.ops.dispatch import rms_norm_kernel
from tests.ops.cases import relative_error

pytestmark = pytest.mark.skipif(cpp.load_kernel("rms_norm") is None, reason="this machine has no C++ compiler")
SIZES = [2, 15, 16, 17, 32, 47, 48, 64, 100, 512]


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(dispatch, "WORTH_A_KERNEL", 0)


def both(op, reference, *leaves):
    """Outputs and gradients by the kernel and in float64."""
    found = []
    for dtype, function in ((torch.float32, op), (torch.float64, reference)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        y = function(*inputs)
        assert y.dtype == dtype
        found.append([y, *torch.autograd.grad(y, inputs, torch.linspace(-1, 2, y.numel()).view_as(y).to(dtype))])
    return zip(*found, strict=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(size, scale):
    torch.manual_seed(size)
    x, weight = torch.randn(3, 7, size) * scale, torch.randn(size)
    reference = lambda x, weight: weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()  # noqa: E731
    for actual, exact in both(lambda x, weight: rms_norm(x, weight, 1e-5), reference, x, weight):
        assert relative_error(actual, exact) < 2e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "act"), [("silu", F.silu), ("sigmoid", torch.sigmoid), ("gelu", F.gelu)])
def test_activations(name, act, size):
    torch.manual_seed(size)
    x, factor = torch.randn(5, size) * 4, torch.randn(5, size)
    for actual, exact in both(lambda x: activate(name, x), act, x):
        assert relative_error(actual, exact) < 1e-6
    for actual, exact in both(lambda x, y: activate(name, x, y), lambda x, y: act(x) * y, x, factor):
        assert relative_error(actual, exact) < 1e-6


def test_silu_of_every_size():
    x = torch.cat([torch.linspace(-100, 100, 20001), torch.tensor([-1e30, -3e38, 1e30, 0.0, -0.0, 1e-30])])
    y = activate("silu", x, torch.ones_like(x))
    torch.testing.assert_close(y, F.silu(x.double()).float(), rtol=1e-6, atol=1e-35)


def test_gelu_of_every_size():
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-1e30, -100, -13.3, 1e30, 0.0, -0.0, 1e-30])])
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, share = activate("gelu", leaf, torch.ones_like(x)), torch.special.erfc(-exact / 2**0.5) / 2
    # Also where torch's own 1 + erf has lost all digits; the last term is what x^2 / 2 loses in float32.
    torch.testing.assert_close(y, (exact * share).float(), rtol=5e-6, atol=1e-35)
    assert (y - exact * share).abs().div((exact * share).abs() + 1e-35)[x.abs() < 3].max() < 1e-6
    (found,), (expected,) = (torch.autograd.grad(z.sum(), z0) for z, z0 in ((y, leaf), (exact * share, exact)))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=3e-7)


def test_not_a_number_stays_one():
    x = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    assert activate("silu", x, torch.ones(4)).isnan().tolist() == [False, True, False, False]
    assert activate("gelu", x, torch.ones(4)).isnan().tolist() == [False, True, False, False]
    assert rms_norm(x[:3], torch.ones(3), 1e-5).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    x, weight = torch.randn(4, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
    exact = F.rms_norm(x.double(), (64,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, **tolerance)
    exact = F.silu(x.double()) * weight.double()
    found = activate("silu", x, weight.expand_as(x).contiguous())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_strided_inputs_frozen_weight_and_threads():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 40, 33).transpose(0, 1).requires_grad_(), torch.randn(33)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (33,), weight, 1e-5).square().sum(), x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            (found,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x)
            torch.testing.assert_close(found, expected)
            assert torch.allclose(activate("silu", x, x), F.silu(x) * x, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_small_inputs_compile_nothing(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("LALM_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "EARNS_COMPILING", 1 << 21)
    cpp._plan.cache_clear()
    try:
        x, weight = torch.randn(1, 64), torch.randn(64)
        with torch.no_grad():
            torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5))
            torch.testing.assert_close(activate("silu", x, x), F.silu(x) * x)
        assert not list(tmp_path.iterdir())
    finally:
        cpp._plan.cache_clear()


def test_small_inputs_take_a_kernel_without_gradients(monkeypatch):
    x, weight, recorded = torch.randn(8, 64), torch.randn(64), []
    monkeypatch.setattr(elementwise, "apply_function", lambda *x: recorded.append(x) or autograd.apply_function(*x))
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5))
        assert len(recorded) == 1
        monkeypatch.setattr(dispatch, "WORTH_A_KERNEL", x.numel() + 1)
        torch.testing.assert_close(activate("gelu", x), F.gelu(x))
        assert len(recorded) == 2


@pytest.mark.parametrize("dual", [False, True], ids=["torch.func", "forward mode"])
def test_transforms_see_plain_torch(dual):
    x, weight = torch.randn(8, 64), torch.randn(64)
    for op, plain in (
        (lambda x: rms_norm(x, weight, 1e-5), lambda x: F.rms_norm(x, (64,), weight, 1e-5)),
        (lambda x: activate("silu", x, weight.expand_as(x)), lambda x: F.silu(x) * weight),
        (lambda x: activate("gelu", x), F.gelu),
    ):
        tangent = torch.func.jvp(plain, (x,), (x,))[1]
        if dual:
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(op(forward_ad.make_dual(x, x))).tangent
            torch.testing.assert_close(found, tangent)
            continue
        torch.testing.assert_close(torch.func.jvp(op, (x,), (x,))[1], tangent)
        torch.testing.assert_close(torch.vmap(op)(x), plain(x))
        torch.testing.assert_close(torch.jit.trace(op, x)(2 * x), plain(2 * x))
        expected = torch.func.grad(lambda x, plain=plain: plain(x).sum())(x)
        torch.testing.assert_close(torch.func.grad(lambda x, op=op: op(x).sum())(x), expected)


@pytest.mark.parametrize("shape", [(1, 1, 128), (1, 1, 8, 32)], ids=["token", "heads"])
def test_a_single_token_is_normed_by_the_kernel(shape, monkeypatch):
    """A step of decoding takes a few dozen norms of one token: torch's own is five operations each."""
    monkeypatch.undo()
    x, weight = torch.randn(shape), torch.ones(shape[-1])
    with torch.no_grad():
        assert rms_norm_kernel(x, weight) is not None
    assert rms_norm_kernel(x, weight) is None
