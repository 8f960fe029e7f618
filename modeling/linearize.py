# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""A linear student of a softmax encoder: its weights where they fit, output projections fitted in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lalm.configuration.configuration_lam import LamConfig
from lalm.modeling.model_inputs import build_layout

# What both configurations have under one name and must agree on.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
)
# Positions whose mean stands for all of them where the student has none: the usual length of a sentence.
_TYPICAL_LENGTH = 32


def student_config(teacher: PreTrainedModel, **changes) -> LamConfig:
    """LAM's configuration in the shape of a BERT-like `teacher`; `changes` are further fields.

    Raises:
        ValueError: the teacher is not of BERT's shape.
    """
    _bert_parts(teacher)
    theirs = teacher.config
    fields = {name: getattr(theirs, name) for name in (*_SHARED, "pad_token_id")}
    fields["norm_eps"] = theirs.layer_norm_eps
    if changes.get("position_embedding_type") == "learned":
        fields["max_position_embeddings"] = theirs.max_position_embeddings
    return LamConfig(**(fields | changes))


@torch.no_grad()
def copy_weights(student: Any, teacher: PreTrainedModel) -> None:
    """Give a LamModel the weights of `teacher`: embeddings, norms and MLPs are its own, q, k, v and o its attention's.

    Without learned positions the mean of the teacher's first ones goes into the word embeddings. The short convolution
    starts as the identity, the output gate even. `fit_output_projections` should follow: what the teacher's o expects
    are averages, which a delta rule does not give.

    Raises:
        ValueError: the teacher is not of BERT's shape, or the student does not fit it; the message names the field.
    """
    embeddings, layers = _bert_parts(teacher)
    config = student.config
    for name in _SHARED:
        ours, theirs = getattr(config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"{name} = {ours!r} of the student must be the teacher's, {theirs!r}.")
    needed = {"expand_k": 1, "expand_v": 1, "norm_type": "layernorm", "mlp_type": "mlp"}
    needed |= {"full_attention_layers": [], "sliding_attention_layers": []}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"A student of a softmax encoder needs {name}={value!r}, got {getattr(config, name)!r}.")
    if config.position_embedding_type == "sinusoidal":
        raise ValueError("position_embedding_type of a student must be 'none', 'rope' or 'learned', not 'sinusoidal'.")
    words = embeddings.word_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    positions = embeddings.position_embeddings.weight
    if student.embed_positions is None:
        words = words + positions[:_TYPICAL_LENGTH].mean(0)
    else:
        table = student.embed_positions.table.weight
        if table.shape[0] > positions.shape[0]:
            raise ValueError(
                f"max_position_embeddings = {table.shape[0]} is more than the teacher's {positions.shape[0]}."
            )
        table.copy_(positions[: table.shape[0]])
    student.embed_tokens.weight.copy_(words)
    _copy(student.embed_norm, embeddings.LayerNorm)
    for ours, theirs in zip(student.layers, layers, strict=True):
        attention, mixer = theirs.attention, ours.mixer
        for name in ("query", "key", "value"):
            _copy(getattr(mixer, f"{name[0]}_proj"), getattr(attention.self, name))
        _copy(mixer.o_proj, attention.output.dense)
        _copy(ours.mixer_norm, attention.output.LayerNorm)
        _copy(ours.mlp.up_proj, theirs.intermediate.dense)
        _copy(ours.mlp.down_proj, theirs.output.dense)
        _copy(ours.mlp_norm, theirs.output.LayerNorm)
        if mixer.conv is not None:
            mixer.conv.weight.zero_()
            mixer.conv.weight[:, mixer.conv.weight.shape[1] - 1 - mixer.conv.after] = 1
        if mixer.g_proj is not None:
            mixer.g_proj.weight.zero_()
            mixer.g_proj.bias.zero_()


@torch.no_grad()
def fit_output_projections(
    student: Any, teacher: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], ridge: float = 1e-3
) -> list[float]:
    """Fit every o projection of a LamModel, given the teacher's inputs of its layer, to the teacher's attention.

    Ridge regression in closed form, with a bias: min |F W + b - A|^2 + ridge * mean(diag(F^T F)) |W|^2 over all real
    tokens, F what enters the student's o projection and A what leaves the teacher's.

    Args:
        batches: tokenized texts: `input_ids` and `attention_mask [B, T]`; a few hundred texts are enough.

    Returns:
        the relative error |F W + b - A| / |A - mean A| of each layer, on the same texts.

    Raises:
        ValueError: there is no text.
    """
    teacher.eval()
    student.eval()
    blocks: list[Any] = list(student.layers)
    size = blocks[0].mixer.o_proj.in_features
    sums: list[torch.Tensor | None] = [None] * len(blocks)
    for batch in batches:
        mask = batch["attention_mask"].bool()
        inputs, targets = attention_of(teacher, batch)
        for index, (layer, x, target) in enumerate(zip(blocks, inputs, targets, strict=True)):
            features = mixer_features(layer.mixer, x, mask)[mask].double()
            ones = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
            both = torch.cat([ones, target[mask].double()], dim=1)
            gram = both.T @ both
            before = sums[index]
            sums[index] = gram if before is None else before + gram
    errors = []
    if sums[0] is None:
        raise ValueError("There is no text to fit the output projections on.")
    for layer, gram in zip(blocks, cast(list[torch.Tensor], sums), strict=True):
        count = gram[size, size]
        left, right = gram[: size + 1, : size + 1], gram[: size + 1, size + 1 :]
        penalty = left.diagonal()[:size].mean() * ridge * torch.eye(size + 1, dtype=gram.dtype, device=gram.device)
        penalty[size, size] = 0
        weight = torch.linalg.solve(left + penalty, right)
        layer.mixer.o_proj.weight.copy_(weight[:size].T)
        layer.mixer.o_proj.bias.copy_(weight[size])
        squares = gram[size + 1 :, size + 1 :].diagonal().sum()
        left_over = squares - 2 * (weight * right).sum() + (weight * (left @ weight)).sum()
        spread = squares - right[size].square().sum() / count
        errors.append(float((left_over.clamp(min=0) / spread).sqrt()))
    return errors


def attention_of(
    teacher: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and outputs of each attention of a BERT-like teacher (before the residual), `[B, T, D]` per layer."""
    _, layers = _bert_parts(teacher)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_watch(layer.attention.self, lambda args, _: inputs.append(args[0])))
            stack.enter_context(_watch(layer.attention.output.dense, lambda _, output: outputs.append(output)))
        teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return inputs, outputs


def mixer_features(mixer: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What enters the o projection of a student's mixer for its input `x [B, T, D]` and bool mask `[B, T]`."""
    found: list[torch.Tensor] = []
    layout = build_layout(mask, None, None, None, (x.shape[0], x.shape[1]), fresh=True, reorder=False)
    with _watch(mixer.o_proj, lambda args, _: found.append(args[0])):
        mixer(x, layout=layout, rotary={})
    return found[0]


@contextmanager
def _watch(module: nn.Module, see: Callable):
    handle = module.register_forward_hook(lambda _, args, output: see(args, output))
    try:
        yield
    finally:
        handle.remove()


def _bert_parts(teacher: PreTrainedModel) -> tuple[Any, Any]:
    """Embeddings and layers of a BERT-like model, with or without a head."""
    base: Any = getattr(teacher, teacher.base_model_prefix, teacher)
    try:
        embeddings, layers = base.embeddings, base.encoder.layer
        for layer in layers:
            _ = layer.attention.self.query, layer.attention.output.LayerNorm, layer.intermediate.dense
        _ = embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings
    except AttributeError as error:
        raise ValueError(
            f"{type(teacher).__name__} is not of BERT's shape ({error}): from_softmax_encoder takes BertModel and "
            "models that name their parts as it does."
        ) from None
    if base.config.model_type != "bert":
        raise ValueError(f"from_softmax_encoder takes a teacher of model_type 'bert', got {base.config.model_type!r}.")
    return embeddings, layers


@torch.no_grad()
def _copy(to: Any, source: Any) -> None:
    to.weight.copy_(source.weight)
    to.bias.copy_(source.bias)


__all__ = ["attention_of", "copy_weights", "fit_output_projections", "mixer_features", "student_config"]
