"""Efficient attention written out in the formulas of systems.md 1.3, 1.4, 1.8: dense over pairs, sharing nothing with
the ops. Positions and visibility are counted token by token in Python."""

import torch

from lalm.modeling.ops.sequence_layout import SequenceLayout

LENGTH = 37


def make(length, batch=2, heads=3, key=4, value=5, seed=0, dtype=torch.float64, steep=1):
    gen = torch.Generator().manual_seed(seed)
    sizes = {"q": key, "k": key, "v": value}
    draw = {
        n: torch.randn(batch, length, heads, size, generator=gen, dtype=torch.float64) for n, size in sizes.items()
    }
    return {name: (x * {"q": 1.5, "k": 1.5 * steep, "v": 1.5}[name]).to(dtype) for name, x in draw.items()}


def make_layout(kind, length=LENGTH):
    """Two rows that are padded and packed differently; `order` as the model's layout has it."""
    mask = segments = None
    if "left" in kind or "inner" in kind or "right" in kind or "scattered" in kind or "row" in kind:
        mask = torch.ones(2, length, dtype=torch.bool)
    if "left" in kind:
        mask[0, :9] = mask[1, :30] = False
    if "right" in kind:
        mask[0, 13:] = mask[1, -1:] = False
    if "inner" in kind:
        mask[0, 5:17] = mask[1, 20:22] = False
    if "scattered" in kind:
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.5
    if "row" in kind:
        mask[1] = False
    if "packed" in kind:
        cuts = torch.zeros(2, length, dtype=torch.long)
        for row, at in ((0, 3), (0, 4), (0, 20), (1, 11), (1, 33)):
            cuts[row, at:] = 1 - cuts[row, at - 1]  # ids come back: only a change counts
        segments = cuts
    order = None if mask is None else mask.int().argsort(dim=1, stable=True)
    return SequenceLayout(mask, segments, order)


def places(layout, batch, length):
    """Per row: document and position of every token, None for padding."""
    rows = []
    for b in range(batch):
        row, document, count = [], 0, 0
        for t in range(length):
            if layout.segments is not None and t and layout.segments[b, t] != layout.segments[b, t - 1]:
                document, count = document + 1, 0
            real = layout.mask is None or bool(layout.mask[b, t])
            row.append((document, count) if real else None)
            count += real
        rows.append(row)
    return rows


def visible(layout, batch, length, rule):
    """bool `[B, T, T]`: both real, one document, and rule(position of query, position of key)."""
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    for b, row in enumerate(places(layout, batch, length)):
        for i, query in enumerate(row):
            for j, key in enumerate(row):
                if query is not None and key is not None and query[0] == key[0]:
                    seen[b, i, j] = rule(query[1], key[1])
    return seen


def efficient(x, layout, semantics="0.19", blindspot=1, causal=True):
    q, k, v = x["q"], x["k"], x["v"]
    if causal:
        seen = visible(
            layout, *q.shape[:2], lambda i, j: j < (i + 1 if blindspot == 1 else i // blindspot * blindspot)
        )
    else:
        seen = visible(layout, *q.shape[:2], lambda i, j: True)
    seen = seen[..., None, None].double()
    scale = q.shape[-1] ** -0.5 if semantics == "0.19" else 1.0
    features = q.softmax(-1) * scale
    if not causal:
        weights = seen * k.exp()[:, None]
        weights = weights / weights.sum(2, keepdim=True).clamp_min(1e-300)
        return torch.einsum("bihk,bijhk,bjhv->bihv", features, weights, v)
    if semantics == "0.19":
        scores = torch.einsum("bihk,bijhk->bijh", features, seen * k.exp()[:, None])
        return torch.einsum("bijh,bjhv->bihv", scores, v) / scores.sum(2).clamp_min(1e-3)[..., None]
    weights = seen * (torch.nn.functional.elu(k) + 1)[:, None]
    weights = weights / (weights.sum(2, keepdim=True) + 1e-6)
    return torch.einsum("bihk,bijhk,bjhv->bihv", features, weights, v)


def gradients(fn, x, weight):
    """fn(**leaves) and the gradients of <fn, weight>."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    out = fn(**leaves)
    (out * weight).sum().backward()
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
