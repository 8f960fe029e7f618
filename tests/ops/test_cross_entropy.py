"""The loss in pieces is the stock loss: value, all gradients, ignored targets, counts given by the Trainer."""

import pytest
import torch
from torch.nn import functional as F

from lalm.modeling.ops import dispatch
from lalm.modeling.ops.dense.cross_entropy import linear_cross_entropy
from tests.variants import ROWS

ROW = next(row for row in ROWS if row.name == "gla_plain")


@pytest.fixture(params=[None, 7 * 61, 1], ids=["one_piece", "pieces_of_7", "single_rows"])
def pieces(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(dispatch, "LOGITS_AT_ONCE", request.param)


def example(dtype, bias=True):
    torch.manual_seed(0)
    hidden, weight, offset = torch.randn(30, 8), torch.randn(61, 8), torch.randn(61)
    targets = torch.randint(61, (30,))
    targets[[0, 4, 29]] = -100
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, *([offset] if bias else []))]
    return leaves, targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_value_and_gradients(pieces, dtype, tolerance, items, bias):
    leaves, targets = example(dtype, bias)
    total = F.cross_entropy(F.linear(*leaves), targets, reduction="sum" if items is not None else "mean")
    expected = total if items is None else total / 40
    found = linear_cross_entropy(*leaves[:2], leaves[2] if bias else None, targets, items)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    ours, exact = (torch.autograd.grad(3 * loss, leaves) for loss in (found, expected))
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


def test_bfloat16_accumulates_in_float32(pieces):
    leaves, targets = example(torch.bfloat16)
    exact = F.cross_entropy(F.linear(*(x.double() for x in leaves)), targets)
    found = linear_cross_entropy(*leaves, targets)
    assert found.dtype == torch.float32
    assert abs(found - exact) < 2e-2
    found.backward()
    assert {x.grad.dtype for x in leaves} == {torch.bfloat16}


@pytest.mark.parametrize("native", [True, False])
def test_autocast_decides_the_type_of_the_products(native, monkeypatch):
    """Unless the processor has no arithmetic for it: then they are exact."""
    monkeypatch.setattr(dispatch, "has_instructions", lambda dtype: native)
    leaves, targets = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(*leaves, targets)
        stock = F.cross_entropy(F.linear(*leaves).float(), targets)
    if not native:
        stock = F.cross_entropy(F.linear(*leaves), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, stock, atol=1e-6, rtol=1e-6)
    found.backward()
    assert {x.grad.dtype for x in leaves} == {torch.float32}


def test_frozen_head_and_frozen_inputs():
    leaves, targets = example(torch.float64)
    for index in range(3):
        for i, x in enumerate(leaves):
            x.requires_grad_(i == index)
        (found,) = torch.autograd.grad(linear_cross_entropy(*leaves, targets), leaves[index])
        (exact,) = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), targets), leaves[index])
        torch.testing.assert_close(found, exact)
    with torch.no_grad():
        assert not linear_cross_entropy(*leaves, targets).requires_grad


def test_nothing_to_predict_is_nan_as_in_torch():
    (hidden, weight, bias), targets = example(torch.float32)
    assert torch.isnan(linear_cross_entropy(hidden, weight, bias, torch.full_like(targets, -100)))


@pytest.mark.parametrize(
    "extra", [{}, {"num_items_in_batch": torch.tensor(17)}, {"shift": True}], ids=["mean", "items", "shift_labels"]
)
@pytest.mark.parametrize("keep", [1, torch.tensor([3, 5])], ids=["last", "positions"])
def test_a_models_loss_over_all_positions_where_few_logits_are_kept(pieces, keep, extra):
    model = ROW.build()
    ids = torch.randint(3, 61, (2, 12))
    labels = ids.masked_fill(torch.rand(2, 12) < 0.2, -100)
    if extra.get("shift"):
        extra = {"shift_labels": F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()}
    results = []
    for kept in (0, keep):
        out = model(ids, labels=labels, logits_to_keep=kept, **extra)
        model.zero_grad()
        out.loss.backward()
        results.append((out, {name: x.grad.clone() for name, x in model.named_parameters()}))
    (whole, exact), (few, found) = results
    # the stock loss turns float64 logits into float32
    torch.testing.assert_close(few.loss, whole.loss, check_dtype=False, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(few.logits, whole.logits[:, -1:] if isinstance(keep, int) else whole.logits[:, keep])
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_all_logits_never_exist_at_once(monkeypatch):
    """The largest tensor that the loss makes is a piece of the logits."""
    monkeypatch.setattr(dispatch, "LOGITS_AT_ONCE", 61 * 4)
    hidden, weight = torch.randn(4000, 8, requires_grad=True), torch.randn(61, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, None, torch.randint(61, (4000,))).backward()
    assert largest <= 4000 * 8


def test_a_loss_of_ones_own_gets_all_logits():
    model = ROW.build()
    seen = []
    model.loss_function = lambda logits, labels, **_: seen.append(logits.shape) or logits.sum()
    ids = torch.randint(3, 61, (2, 12))
    assert model(ids, labels=ids, logits_to_keep=1).logits.shape[1] == 1
    assert seen == [(2, 12, 61)]
