# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a student of a softmax decoder can be given without gradients: output projections, and the choice of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lalm.convert.centroids import watch_attention
from lalm.modeling.modeling_heads import LalmForCausalLM
from lalm.modeling.softmax_attention import SoftmaxAttention


def linear_layers(student: LalmForCausalLM) -> dict[int, nn.Module]:
    """The mixers of a student that are not softmax attention, by layer."""
    mixers = {index: layer.mixer for index, layer in enumerate(student.model.layers)}
    return {index: mixer for index, mixer in mixers.items() if not isinstance(mixer, SoftmaxAttention)}


@torch.no_grad()
def fit_output_projections(
    student: LalmForCausalLM, teacher: LalmForCausalLM, batches: Iterable[dict[str, torch.Tensor]], ridge: float = 1e-3
) -> dict[int, float]:
    """Set the output projection of each linear layer by ridge regression on what the teacher's layer gives:
    min |F W - A|^2 + ridge * mean(diag(F^T F)) |W|^2, F what enters the projection for the teacher's inputs.

    Args:
        teacher: the student with all layers softmax, of the same weights.
        batches: `input_ids [B, T]` and what else the model takes.

    Returns:
        |F W - A|^2 / |A|^2 of each layer, on the same text.
    """
    layers, sums, squares = linear_layers(student), dict[int, Any](), dict[int, Any]()
    entering: dict[int, torch.Tensor] = {}
    hooks = [
        cast(nn.Module, mixer.o_proj).register_forward_pre_hook(
            lambda _, args, index=index: entering.__setitem__(index, args[0])
        )
        for index, mixer in layers.items()
    ]
    try:
        with watch_attention(teacher, layers) as seen:
            for batch in batches:
                _read(teacher, batch)
                for index, mixer in layers.items():
                    mixer(seen[index].inputs, **seen[index].options)
                    f, a = (x.flatten(0, 1).double() for x in (entering[index], seen[index].outputs))
                    f = f if cast(nn.Linear, mixer.o_proj).bias is None else nn.functional.pad(f, (0, 1), value=1.0)
                    both = f.T @ torch.cat([f, a], dim=1)
                    sums[index] = both + sums.get(index, 0)
                    squares[index] = a.square().sum() + squares.get(index, 0)
    finally:
        for hook in hooks:
            hook.remove()
    errors = {}
    for index, mixer in layers.items():
        projection, size = cast(nn.Linear, mixer.o_proj), len(sums[index])
        left, right = sums[index][:, :size], sums[index][:, size:]
        penalty = ridge * left.diagonal().mean() * torch.eye(size, dtype=left.dtype, device=left.device)
        weight = torch.linalg.solve(left + penalty, right)
        projection.weight.copy_(weight[: projection.in_features].T)
        if projection.bias is not None:
            projection.bias.copy_(weight[-1])
        missed = squares[index] - 2 * (weight * right).sum() + (weight * (left @ weight)).sum()
        errors[index] = float(missed / squares[index])
    return errors


@torch.no_grad()
def layer_sensitivity(
    student: LalmForCausalLM, teacher: LalmForCausalLM, batches: Sequence[dict[str, torch.Tensor]]
) -> dict[int, float]:
    """How much the loss of `teacher` on the text rises where one of its layers is the student's linear one.

    Args:
        teacher: the student with all layers softmax, of the same weights.
        batches: `input_ids [B, T]` and what else the model takes; read once for every linear layer.
    """
    rises = {}
    before = _loss(teacher, batches)
    for index, mixer in linear_layers(student).items():
        with _replaced(teacher.model.layers[index].mixer, mixer):
            rises[index] = _loss(teacher, batches) - before
    return rises


def _read(model: LalmForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: x.to(model.device) for name, x in batch.items() if name != "labels"}
    return model.model(**inputs, use_cache=False).last_hidden_state


def _loss(model: LalmForCausalLM, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    losses = []
    for batch in batches:
        hidden, targets = _read(model, batch)[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
        for piece, wanted in zip(hidden.split(256), targets.to(model.device).split(256), strict=True):
            losses.append(nn.functional.cross_entropy(model.lm_head(piece).float(), wanted, reduction="none"))
    return torch.cat(losses).mean().item()


@contextmanager
def _replaced(mixer: nn.Module, by: nn.Module):
    """Inside, `mixer` gives what `by` gives."""
    hook = mixer.register_forward_hook(lambda _, args, kwargs, output: by(*args, **kwargs), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


__all__ = ["fit_output_projections", "layer_sensitivity", "linear_layers"]
