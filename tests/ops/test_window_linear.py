"""Window and linear attention under one normaliser, against the sums written out token by token."""

import pytest
import torch

from lalm.modeling.ops.local_global.window_linear import window_linear_attention
from lalm.modeling.ops.sequence_layout import SequenceLayout

W, SINKS = 4, 2


def by_hand(q, k, v, log_q, features, documents, real, relative, window=W, sinks=SINKS):
    """o of every real token: one row, head and pair of tokens at a time."""
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    groups = q.shape[2] // k.shape[2]
    phi = features(k)
    for b in range(len(q)):
        for i in range(q.shape[1]):
            if not real[b, i]:
                continue
            before = [j for j in range(i + 1) if real[b, j] and documents[b, j] == documents[b, i]]
            near = [j for place, j in enumerate(before) if place < sinks or len(before) - place <= window]
            far = [j for j in before if j not in near]
            for h in range(q.shape[2]):
                g = h // groups
                scores = torch.stack([q[b, i, h] @ k[b, j, g] for j in near]) * q.shape[-1] ** -0.5
                weights = (scores - scores.max() if relative else scores).exp()
                total = sum(w * v[b, j, g] for w, j in zip(weights, near, strict=True))
                norm = weights.sum()
                for j in far:
                    weight = log_q[b, i, h].exp() @ phi[b, j, g]
                    total, norm = total + weight * v[b, j, g], norm + weight
                o[b, i, h] = total / norm
    return o


def inputs(length, batch=2, heads=4, groups=2, size=3, value=5, features=6, seed=0):
    torch.manual_seed(seed)
    shapes = [(heads, size), (groups, size), (groups, value), (heads, features)]
    tensors = [torch.randn(batch, length, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(groups, features, size, dtype=torch.float64, requires_grad=True)

    def key_features(k):
        return torch.einsum("bthk,hfk->bthf", k, weight.to(k.dtype)).softmax(-1)

    return tensors, weight, key_features


LAYOUTS = {
    "plain": lambda b, t: (torch.zeros(b, t), torch.ones(b, t)),
    "padded": lambda b, t: (torch.zeros(b, t), (torch.arange(t) >= torch.tensor([[t // 3], [0]])).double()),
    "holes": lambda b, t: (torch.zeros(b, t), (torch.arange(t) % 5 != 1).expand(b, t).double()),
    "packed": lambda b, t: (torch.arange(t).expand(b, t) // 7, torch.ones(b, t)),
    "packed_holes": lambda b, t: (torch.arange(t).expand(b, t) // 6, (torch.arange(t) % 4 != 3).expand(b, t).double()),
}


def layout_of(name, batch, length):
    documents, real = LAYOUTS[name](batch, length)
    real = real.bool()
    mask = None if bool(real.all()) else real
    order = None if mask is None else mask.int().argsort(dim=1, stable=True)
    segments = documents.long() if bool(documents.any()) else None
    return SequenceLayout(mask, segments, order), documents, real


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("length", [1, 3, 4, 9, 21])
def test_outputs_and_gradients_are_the_sums_by_hand(name, length, relative):
    tensors, weight, key_features = inputs(length)
    layout, documents, real = layout_of(name, 2, length)
    q, k, v, log_q = tensors
    o, state = window_linear_attention(q, k, v, log_q, key_features, W, SINKS, relative=relative, layout=layout)
    assert state is None
    expected = by_hand(q, k, v, log_q, key_features, documents, real, relative)
    cotangent = torch.randn_like(expected) * real[..., None, None]
    torch.testing.assert_close(o * real[..., None, None], expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad((o * cotangent).sum(), [*tensors, weight])
    wanted = torch.autograd.grad((expected * cotangent).sum(), [*tensors, weight], allow_unused=True)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["plain", "padded", "holes"])
@pytest.mark.parametrize("sizes", [(1,) * 21, (2, 1, 11, 3, 4), (13, 8)])
def test_pieces_are_the_whole(name, sizes):
    tensors, _, key_features = inputs(sum(sizes))
    layout, _, real = layout_of(name, 2, sum(sizes))
    tensors = [x.detach() for x in tensors]
    whole, final = window_linear_attention(*tensors, key_features, W, SINKS, output_final_state=True, layout=layout)
    state, outputs, start = None, [], 0
    for size in sizes:
        part = slice(start, start + size)
        mask = None if layout.mask is None else layout.mask[:, part]
        own = SequenceLayout(mask, None, None if mask is None else mask.int().argsort(dim=1, stable=True))
        o, state = window_linear_attention(
            *(x[:, part] for x in tensors), key_features, W, SINKS, state, True, layout=own
        )
        outputs.append(o)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1)[real], whole[real], rtol=1e-10, atol=1e-10)
    for x, y in zip(state, final, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_float32_and_large_scores():
    """Scores of +-200 neither overflow nor divide by 0, and float32 is as near to float64 as its digits allow."""
    tensors, _, key_features = inputs(40, seed=1)
    q, k, v, log_q = (x.detach() for x in tensors)
    exact, _ = window_linear_attention(q, k, v, log_q, key_features, W, SINKS)
    single, _ = window_linear_attention(*(x.float() for x in (q, k, v, log_q)), key_features, W, SINKS)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)
    large, _ = window_linear_attention(*(x.float() for x in (q * 50, k * 10, v, log_q * 100)), key_features, W, SINKS)
    assert large.isfinite().all()


def test_errors_name_the_argument():
    (q, k, v, log_q), _, key_features = inputs(5)
    with pytest.raises(ValueError, match="window_size"):
        window_linear_attention(q, k, v, log_q, key_features, 0)
    with pytest.raises(ValueError, match="num_sinks"):
        window_linear_attention(q, k, v, log_q, key_features, 3, -1)
    with pytest.raises(ValueError, match="divides H"):
        window_linear_attention(q[:, :, :3], k, v, log_q, key_features, 3)
