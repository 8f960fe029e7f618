# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Embeddings that are no numbers spoil what may read them: nothing from padding, nothing in another document."""

import pytest
import torch

from tests.modeling.exact import assert_close, tokens
from tests.variants import ENCODERS, ROWS, Row, _params

LENGTH = 23
every_model = pytest.mark.parametrize("row", _params(ROWS + ENCODERS))
CORNERS = {"left": range(5), "right": range(LENGTH - 4, LENGTH), "inside": (0, 3, 4, 5, 11, LENGTH - 1)}


def spoiled(row: Row, bad: torch.Tensor, **inputs):
    """Hidden states and the gradient of the embeddings, whole and with NaN and infinity at the tokens `bad [B, T]`."""
    model = row.build("AutoModel")
    embeds = model.get_input_embeddings()(tokens(2, LENGTH)).detach()
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=embeds.dtype).repeat(embeds.shape[-1])
    found = []
    for x in (embeds, torch.where(bad[..., None], junk[: embeds.shape[-1]], embeds)):
        x = x.clone().requires_grad_()
        hidden = model(inputs_embeds=x, use_cache=False, **inputs).last_hidden_state
        weight = torch.linspace(-1, 1, hidden[~bad].numel(), dtype=x.dtype).view_as(hidden[~bad])
        (slope,) = torch.autograd.grad((hidden[~bad] * weight).sum(), x)
        found.append((hidden, slope))
    return found


@every_model
@pytest.mark.parametrize("kind", CORNERS)
def test_padding(row, kind):
    bad = torch.zeros(2, LENGTH, dtype=torch.bool)
    bad[0, list(CORNERS[kind])] = True
    (expected, exact), (hidden, slope) = spoiled(row, bad, attention_mask=(~bad).long())
    assert hidden.isfinite().all()
    assert_close(hidden[~bad], expected[~bad], "hidden states")
    assert_close(slope, exact, "gradients")
    assert (slope[bad] == 0).all()


@every_model
def test_documents(row):
    lengths = torch.tensor([4, 9, 1, 6, 3])
    documents = torch.arange(5).repeat_interleave(lengths).expand(2, -1)
    bad = documents % 2 == 1
    (expected, exact), (hidden, slope) = spoiled(row, bad, seq_idx=documents.int())
    assert_close(hidden[~bad], expected[~bad], "hidden states")
    assert_close(slope[~bad], exact[~bad], "gradients")
