"""Sliding windows in blocks against softmax over all pairs, in any layout and length."""

import pytest
import torch

from lalm.modeling.ops.local_global.local_attention import sliding_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.efficient_oracle import LENGTH, error, gradients, make, make_layout, visible
from tests.ops.test_efficient_attention import check, every_layout

both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def pairs(q, k, v, layout, window, causal):
    """Softmax over the pairs that transformers' masks let through: `key > query - w`, or `|query - key| <= w`."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    rule = (lambda i, j: i - window < j <= i) if causal else (lambda i, j: abs(i - j) <= window)
    seen = visible(layout, *q.shape[:2], rule)[..., None]
    scores = torch.einsum("bihk,bjhk->bijh", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(2).nan_to_num(0)
    return torch.einsum("bijh,bjhv->bihv", weights, v)


@every_layout
@pytest.mark.parametrize("window", [1, 5, 8, 18, 40])
@both_directions
def test_is_softmax_over_the_window(kind, window, causal):
    layout = make_layout(kind)
    check(
        lambda **x: sliding_attention(**x, window_size=window, causal=causal, layout=layout),
        lambda **x: pairs(**x, layout=layout, window=window, causal=causal),
        make(LENGTH),
        layout,
    )


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 5 * 8 - 3])
@both_directions
def test_any_length(length, causal):
    check(
        lambda **x: sliding_attention(**x, window_size=8, causal=causal),
        lambda **x: pairs(**x, layout=SequenceLayout(), window=8, causal=causal),
        make(length),
        SequenceLayout(),
    )


@both_directions
@pytest.mark.parametrize("kind", ["plain", "packed_scattered"])
def test_heads_of_keys_are_shared(kind, causal):
    x, layout = make(LENGTH, heads=4), make_layout(kind)
    x |= {"k": x["k"][:, :, :2], "v": x["v"][:, :, :2]}
    weight = torch.randn(*x["q"].shape[:3], x["v"].shape[-1], dtype=torch.float64)
    if layout.mask is not None:
        weight = weight * layout.mask[..., None, None]
    _, grads = gradients(lambda **x: sliding_attention(**x, window_size=5, causal=causal, layout=layout), x, weight)
    _, expected = gradients(lambda **x: pairs(**x, layout=layout, window=5, causal=causal), x, weight)
    for name, grad in expected.items():
        assert error(grads[name], grad) < 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["row", "packed_left"])
def test_a_loss_on_padding_is_finite(kind, dtype):
    """A row of padding only, and a loss that forgot the mask: no softmax over nothing."""
    x, layout = make(LENGTH, dtype=dtype), make_layout(kind)
    out, grads = gradients(
        lambda **x: sliding_attention(**x, window_size=5, layout=layout), x, torch.ones_like(x["v"])
    )
    assert out.dtype == dtype
    assert all(tensor.isfinite().all() for tensor in (out, *grads.values()))


def test_scale_and_dropout_act_on_the_weights():
    x = make(LENGTH, dtype=torch.float32)
    scaled = sliding_attention(3 * x["q"], x["k"], x["v"], 8, scale=0.25)
    assert error(scaled, sliding_attention(x["q"], x["k"], x["v"], 8, scale=0.75)) < 1e-5
    out = sliding_attention(x["q"], x["k"], torch.ones_like(x["v"]), 8, dropout=0.5)
    assert out.std() > 0.1
    assert abs(out.mean() - 1) < 0.2


def test_bad_input_is_named():
    q, k, v = make(6).values()
    with pytest.raises(ValueError, match="window_size must be at least 1"):
        sliding_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="G that divides H"):
        sliding_attention(q, k[:, :, :2], v[:, :, :2], 2)
    with pytest.raises(ValueError, match=r"layout\.mask must be \[B, T\]"):
        sliding_attention(q, k, v, 2, layout=SequenceLayout(torch.ones(2, 5, dtype=torch.bool)))
