# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Products of a model's Hessian with a vector are those of its definition, by whatever forms and kernels it runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.modeling.exact import assert_same_gradients, tokens
from tests.variants import each_variant, every_encoder, every_row

LENGTH = 9


def hessian_product(model, **inputs):
    """Of the loss, with one fixed vector, by parameter."""
    weights = {name: x for name, x in model.named_parameters() if x.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):  # torch's faster ones refuse second derivatives
        loss = model(**inputs).loss
    first = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
    gen = torch.Generator().manual_seed(3)
    along = sum((g * torch.randn(g.shape, generator=gen, dtype=torch.float64).to(g)).sum() for g in first)
    return dict(zip(weights, torch.autograd.grad(along, list(weights.values()), materialize_grads=True), strict=True))


def batch(head):
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, -3:] = 0, 0
    if "Sequence" in head:
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2] = -100  # what padding predicts is unspecified
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def check(row, head, **more):
    inputs = batch(head) | more
    if row.config().to_dict().get("reversible"):
        with pytest.raises(RuntimeError, match="reversible=False"):
            hessian_product(row.build(head), **inputs)
        return
    expected = hessian_product(row.build(head, linear_attn_implementation="recurrent"), **inputs)
    assert_same_gradients(hessian_product(row.build(head), **inputs), expected)


@every_row
def test_language_model(row):
    check(row, "AutoModelForCausalLM", logits_to_keep=1, use_cache=False)


@every_encoder
def test_encoder(row):
    check(row, "AutoModelForMaskedLM")


@each_variant
def test_classifier(row):
    check(row, "AutoModelForSequenceClassification")


@each_variant
def test_float32(row):
    """With heads that are large enough for the kernels, and a text of two chunks."""
    sizes = {"hidden_size": 64, "num_hidden_layers": len(row.config().layer_types)}
    ids = tokens(1, 70)
    found, expected = (
        hessian_product(row.build(dtype=dtype, linear_attn_implementation=form, **sizes), input_ids=ids, labels=ids)
        for dtype, form in ((torch.float32, "auto"), (torch.float64, "recurrent"))
    )
    norm = torch.stack([x.norm() for x in expected.values()]).norm()
    error = torch.stack([(found[name] - x).norm() for name, x in expected.items()]).norm()
    assert error / norm < 1e-3
