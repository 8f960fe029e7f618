# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy of a linear head, in pieces: logits `[N, V]` of a long batch never exist at once.

    loss = sum_n (logsumexp_v(W h_n + b) - (W h_n + b)[target_n])      dL/dlogits = softmax - onehot

The pieces' gradients are taken as the pieces are made, so the head costs the three products that it costs anyway.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import differentiable_by, is_transformed
from lalm.modeling.ops.dense.matrix_product import linear, weight_gradient
from lalm.modeling.ops.dispatch import product_dtype, rows_of_logits
from lalm.modeling.ops.dtypes import compute_dtype


def _plain(ctx, hidden, weight, bias, targets, *_) -> torch.Tensor:
    dtype = ctx.dtype
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return F.cross_entropy(logits.to(compute_dtype(logits)), targets, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, hidden, weight, bias, targets):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        needs = ctx.needs_input_grad[1:]
        matrix = weight.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        d_bias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=bias.device)
        size = rows_of_logits(weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows, target = hidden[start : start + size].to(dtype), targets[start : start + size, None]
            logits = linear(rows, matrix, None if bias is None else bias.to(dtype)).to(wide)
            top = logits.logsumexp(-1, keepdim=True)
            loss += (top - logits.gather(-1, target)).sum()
            if not any(needs):
                continue
            d_logits = logits.sub_(top).exp_().scatter_add_(-1, target, -torch.ones_like(top))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                d_hidden[start : start + size] = linear(d_logits, matrix.t())
            if d_weight is not None:
                d_weight += weight_gradient(d_logits, rows)
        ctx.save_for_backward(hidden, weight, bias, targets, d_hidden, d_weight, d_bias)
        ctx.dtype, ctx.dtypes = dtype, (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @differentiable_by(_plain, constants=1)
    def backward(ctx, d_loss):
        d_hidden, d_weight, d_bias = ctx.saved_tensors[4:]
        return (
            None,
            None if d_hidden is None else (d_hidden * d_loss).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_loss).to(ctx.dtypes[0]),
            None if d_bias is None else (d_bias * d_loss).to(ctx.dtypes[1]),
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T + bias`.

    Args:
        hidden: `[N, D]`.
        weight, bias: of the head, `[V, D]` and `[V]` or None.
        targets: int64 `[N]`; `ignore_index` does not count.
        num_items_in_batch: divide by this instead of the number of targets that count.

    Returns:
        a scalar in float32, in float64 for float64 inputs. Products run in the type of autocast, if that is on, else
        in that of `hidden`.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if is_transformed():  # where the number of targets that count must not be known
        logits = F.linear(hidden, weight, bias)
        loss = F.cross_entropy(logits.to(compute_dtype(logits)), targets, ignore_index=ignore_index, reduction="sum")
        items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / items
    counted = targets != ignore_index
    hidden, targets = hidden[counted], targets[counted]
    dtype = product_dtype(hidden, dtype)
    with torch.autocast(kind, enabled=False):
        loss = _LinearCrossEntropy.apply(dtype, hidden, weight, bias, targets)
    items = targets.numel() if num_items_in_batch is None else num_items_in_batch
    return loss / (items.to(loss.device) if isinstance(items, torch.Tensor) else items)


def causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """`ForCausalLMLoss` of transformers with `hidden_states [B, T, D]` and the head in place of the logits."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    return linear_cross_entropy(hidden_states.flatten(0, -2), weight, bias, targets, num_items_in_batch, ignore_index)
