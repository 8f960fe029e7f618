# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The transforms of torch.func see through every model: per-sample gradients, ensembles, Jacobians, Hessians."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.modeling.exact import assert_close, assert_same_gradients, parameter_gradients, tokens
from tests.variants import each_variant, every_encoder, every_row

LENGTH, TOLERANCE = 11, 1e-10


def batch(head):
    """ids, labels and mask `[3, T]`; no label stands where it is padding that predicts it."""
    ids = tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:], mask[2, 4] = 0, 0, 0
    if "Sequence" in head:
        return ids, torch.tensor([0, 1, 1]), mask
    labels = ids if "LM" in head else ids % 2
    unseen = mask == 0
    unseen[:, 1:] |= mask[:, :-1] == 0
    return ids, labels.masked_fill(unseen, -100), mask


def check_per_sample(model, head, tolerance=TOLERANCE, **options):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ids, labels, mask = batch(head)

    def loss(weights, ids, labels, mask):
        padded = {} if mask is None else {"attention_mask": mask[None]}
        return functional_call(model, weights, (ids[None],), padded | {"labels": labels[None]} | options).loss

    for given in (None, mask):
        dims = (None, 0, 0, None if given is None else 0)
        found = vmap(grad(loss), in_dims=dims)(weights, ids, labels, given)
        for row in range(3):
            model.zero_grad()
            padded = {} if given is None else {"attention_mask": given[row : row + 1]}
            model(ids[row : row + 1], labels=labels[row : row + 1], **padded, **options).loss.backward()
            expected = parameter_gradients(model)
            assert_same_gradients({name: found[name][row] for name in expected}, expected, tolerance)


@every_row
def test_per_sample_gradients(row):
    """By the loss in pieces, which is float64 throughout; the stock one rounds logits to float32."""
    check_per_sample(row.build(), "AutoModelForCausalLM", logits_to_keep=1)


@each_variant
@pytest.mark.parametrize("head", ["CausalLM", "SequenceClassification", "TokenClassification"])
@pytest.mark.slow
def test_per_sample_gradients_of_heads(row, head):
    head = f"AutoModelFor{head}"
    check_per_sample(row.build(head), head, 1e-6)


@every_encoder
def test_per_sample_gradients_of_encoders(row):
    check_per_sample(row.build("AutoModelForMaskedLM"), "AutoModelForMaskedLM", 1e-6)


@each_variant
@pytest.mark.slow
def test_per_sample_gradients_in_float32(row):
    """Where kernels would run."""
    check_per_sample(row.build(dtype=torch.float32, hidden_size=64), "AutoModelForCausalLM", 1e-3)


@each_variant
def test_ensemble(row):
    models = [row.build(seed=seed) for seed in range(2)]
    ids, _, mask = batch("LM")
    weights, buffers = stack_module_state(models)

    def logits(weights, buffers):
        return functional_call(models[0], (weights, buffers), (ids,), {"attention_mask": mask}).logits

    found = vmap(logits)(weights, buffers)
    for model, one in zip(models, found, strict=True):
        assert_close(one[mask == 1], model(ids, attention_mask=mask).logits[mask == 1])


@each_variant
@pytest.mark.slow
def test_derivatives_by_inputs(row):
    """Along a direction, all of them, and twice, against reverse mode of the definition."""
    model = row.build(linear_attn_implementation="recurrent")
    model.requires_grad_(False)
    embeds = model.get_input_embeddings()(tokens(1, 3))

    def loss(embeds, model=model):
        return model(inputs_embeds=embeds).logits.sin().sum()

    with sdpa_kernel(SDPBackend.MATH):  # torch's faster ones have no forward mode
        expected = torch.autograd.functional.hessian(loss, embeds)
        slope = torch.autograd.functional.jacobian(loss, embeds)
        model = row.build(linear_attn_implementation="chunk").requires_grad_(False)
        by = lambda embeds: loss(embeds, model)  # noqa: E731
        assert_close(hessian(by)(embeds), expected)
        assert_close(jacrev(by)(embeds), slope)
        direction = torch.randn_like(embeds)
        assert_close(jvp(by, (embeds,), (direction,))[1], (slope * direction).sum())
