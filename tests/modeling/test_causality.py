"""No token sees the future, and no row sees another row."""

import pytest
import torch

from tests.modeling.exact import assert_close, run, tokens
from tests.variants import HEADS, each_variant, every_row, few_rows

LENGTH = 21


@every_row
@pytest.mark.parametrize("position", [0, 1, 10, 20])
def test_outputs_before_a_changed_token_stay(row, position):
    model, ids = row.build(), tokens(2, LENGTH)
    before, _ = run(model, ids)
    changed = ids.clone()
    changed[:, position] = (changed[:, position] - 3 + 1) % 58 + 3
    after, _ = run(model, changed)
    if position:
        assert_close(after[:, :position], before[:, :position], "earlier logits", tolerance=1e-12)
    assert (after[:, position] - before[:, position]).abs().amax(-1).min() > 1e-3, "the change must show at once"


@every_row
def test_changes_reach_the_end(row):
    """The other half of causality: what was said is remembered (all rows have a global layer)."""
    model, ids = row.build(), tokens(2, LENGTH)
    before, _ = run(model, ids)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] - 3 + 1) % 58 + 3
    after, _ = run(model, changed)
    assert (after[:, -1] - before[:, -1]).abs().amax(-1).min() > 1e-6


@every_row
def test_future_has_no_gradient(row):
    model, ids = row.build(), tokens(1, LENGTH)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    (grad,) = torch.autograd.grad(logits[:, 8].square().sum(), embeds)
    assert (grad[:, 9:] == 0).all()
    assert (grad[:, 8] != 0).any()


@few_rows
def test_long_inputs_across_chunks(row):
    model, ids = row.build(max_position_embeddings=256), tokens(1, 150)
    before, _ = run(model, ids)
    for position in (63, 64, 65, 128, 149):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] - 3 + 1) % 58 + 3
        after, _ = run(model, changed)
        assert_close(after[:, :position], before[:, :position], f"before {position}", tolerance=1e-12)


@every_row
def test_rows_are_independent(row):
    model, ids = row.build(), tokens(3, LENGTH)
    together, _ = run(model, ids)
    for b in range(3):
        assert_close(together[b : b + 1], run(model, ids[b : b + 1])[0], f"row {b}", tolerance=1e-12)
    other = ids.clone()
    other[1] = tokens(1, LENGTH, seed=8)[0]
    assert_close(run(model, other)[0][::2], together[::2], "batch mates", tolerance=1e-12)


@each_variant
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_causal_and_deterministic(row, head):
    """Token-level outputs of every head; the same call twice is the same to the last bit."""
    model, ids = row.build(head, num_labels=3), tokens(2, LENGTH)
    with torch.no_grad():
        first, second = model(ids)[0], model(ids)[0]
        assert torch.equal(first, second)
        if first.shape[1:2] == (LENGTH,):
            assert_close(model(ids[:, :9])[0], first[:, :9], head, tolerance=1e-12)


@few_rows
def test_dropout_acts_in_training_only(row):
    model, ids = row.build(dropout=0.3), tokens(2, LENGTH)
    assert_close(run(model, ids)[0], run(row.build(), ids)[0], "eval mode")
    model.train()
    assert (run(model, ids)[0] - run(model, ids)[0]).abs().max() > 1e-3
