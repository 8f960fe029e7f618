"""Padding is as if it were not there: on the left, the right, in between, at batch size one, and in later pieces."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.modeling.exact import (
    add_gradients,
    assert_close,
    assert_same_gradients,
    assert_same_states,
    backward,
    run,
    tokens,
    weights_like,
)
from tests.variants import ENCODERS, ROWS, every_row, few_rows

LENGTH = 21
KINDS = ("left", "right", "interior", "scattered")
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH + 9),
}


def mask_of(kind):
    """[3, LENGTH]: two rows padded in the given way and one that is whole."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    if kind == "left":
        mask[0, :4] = mask[1, :17] = 0
    elif kind == "right":
        mask[0, 9:] = mask[1, 2:] = 0
    elif kind == "interior":
        mask[0, 3:5] = mask[1, 1:19] = 0
    elif kind == "scattered":
        mask[0, ::2] = mask[1, [0, 1, 5, 6, 11, 20]] = 0
    return mask


@every_row
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_their_real_tokens_alone(row, kind):
    """Logits and states of each row, in a batch and at batch size one."""
    model, ids, mask = row.build(), tokens(3, LENGTH), mask_of(kind)
    logits, cache = run(model, ids, attention_mask=mask)
    assert logits.isfinite().all()
    for b in range(3):
        real = mask[b].bool()
        expected, expected_cache = run(model, ids[b : b + 1, real])
        assert_close(logits[b : b + 1, real], expected, f"row {b}")
        assert_same_states(cache, expected_cache, rows=slice(b, b + 1))
        single, single_cache = run(model, ids[b : b + 1], attention_mask=mask[b : b + 1])
        assert_close(single[:, real], expected, f"row {b} at batch size one")
        assert_same_states(single_cache, expected_cache)


@every_row
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_real_tokens(row, kind):
    model, ids, mask = row.build(), tokens(3, LENGTH), mask_of(kind)
    real = mask.bool()
    embeds = model.get_input_embeddings()(ids)
    cotangent = weights_like(torch.empty(3, LENGTH, model.config.vocab_size, dtype=torch.float64))
    cotangent = cotangent * real[..., None]
    _, grad, parameters = backward(model, embeds, cotangent, attention_mask=mask)
    assert (grad[~real] == 0).all(), "a padded embedding got a gradient"
    total = {}
    for b in range(3):
        alone = embeds[b : b + 1, real[b]]
        _, expected, more = backward(model, alone, cotangent[b : b + 1, real[b]])
        assert_close(grad[b : b + 1, real[b]], expected, f"embeddings of row {b}")
        total = add_gradients(total, more)
    assert_same_gradients(parameters, total)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in (*ROWS, *ENCODERS)])
def test_padded_tokens_do_not_see_how_much_padding_there_is(row):
    """Nobody reads their logits, but tools compare whole batches."""
    model = row.build("AutoModelForCausalLM" if row.config().is_causal else "AutoModelForMaskedLM")
    ids, mask = tokens(3, LENGTH), mask_of("right")
    more = torch.zeros(3, 8, dtype=torch.long)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        longer = model(torch.cat([more, ids], 1), attention_mask=torch.cat([more, mask], 1)).logits
    assert_close(longer[:, 8:], logits, "logits")


@every_row
def test_what_stands_in_padding_does_not_matter(row):
    model, ids, mask = row.build(), tokens(3, LENGTH), mask_of("scattered")
    logits, _ = run(model, ids, attention_mask=mask)
    junk, _ = run(model, torch.where(mask.bool(), ids, 0), attention_mask=mask)
    assert_close(junk[mask.bool()], logits[mask.bool()], "logits")


@every_row
def test_all_ones_is_no_mask(row):
    model, ids = row.build(), tokens(2, LENGTH)
    plain, _ = run(model, ids)
    masked, _ = run(model, ids, attention_mask=torch.ones(2, LENGTH, dtype=torch.long))
    assert_close(masked, plain, "logits")


@few_rows
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_types(row, dtype):
    model, ids, mask = row.build(), tokens(3, LENGTH), mask_of("left")
    expected, _ = run(model, ids, attention_mask=mask)
    actual, _ = run(model, ids, attention_mask=mask.to(dtype))
    assert_close(actual[mask.bool()], expected[mask.bool()], str(dtype))


@every_row
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_class", CACHES)
def test_continued_after_a_padded_prompt(row, kind, cache_class):
    """Prompt at once, then token by token with the mask of everything so far, as generate passes it."""
    model, ids, mask = row.build(), tokens(3, LENGTH + 4), mask_of(kind)
    mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    cache = CACHES[cache_class](model.config)
    logits, cache = run(model, ids[:, :LENGTH], attention_mask=mask[:, :LENGTH], past_key_values=cache)
    for t in range(LENGTH, LENGTH + 4):
        step, cache = run(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        logits = torch.cat([logits, step], 1)
    for b in range(3):
        real = mask[b].bool()
        expected, expected_cache = run(model, ids[b : b + 1, real])
        assert_close(logits[b : b + 1, real], expected, f"row {b}")
        assert_same_states(cache, expected_cache, rows=slice(b, b + 1))


@every_row
@pytest.mark.parametrize("cache_class", CACHES)
def test_padding_in_later_pieces(row, cache_class):
    """Rows that grow at different speeds: padding inside and at both ends of continued forwards."""
    model, ids = row.build(), tokens(2, 16)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, [0, 1, 6, 9, 12, 13, 15]] = 0
    mask[1, [4, 8, 9, 10, 11]] = 0
    cache, logits = CACHES[cache_class](model.config), []
    for start, stop in ((0, 5), (5, 8), (8, 12), (12, 13), (13, 16)):
        out, cache = run(model, ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        logits.append(out)
    logits = torch.cat(logits, 1)
    for b in range(2):
        real = mask[b].bool()
        expected, expected_cache = run(model, ids[b : b + 1, real])
        assert_close(logits[b : b + 1, real], expected, f"row {b}")
        assert_same_states(cache, expected_cache, rows=slice(b, b + 1))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if "sliding_window" in row.fields])
def test_static_sliding_cache_refuses_later_padding(row):
    """What cannot be exact is an error that says what to do, not a wrong number."""
    model, ids, mask = row.build(), tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 9] = 0
    _, cache = run(model, ids[:, :8], past_key_values=CACHES["static"](model.config))
    with pytest.raises(ValueError, match="attention_mask.*DynamicCache"):
        model(ids[:, 8:], attention_mask=mask, past_key_values=cache, use_cache=True)


@every_row
@pytest.mark.parametrize("kind", ["left", "interior"])
def test_given_positions_agree_with_derived_ones(row, kind):
    """generate passes position_ids counted over the mask; without them the model counts itself."""
    model, ids, mask = row.build(), tokens(3, LENGTH), mask_of(kind)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    derived, derived_cache = run(model, ids, attention_mask=mask)
    given, given_cache = run(model, ids, attention_mask=mask, position_ids=positions)
    assert_close(given[mask.bool()], derived[mask.bool()], "logits")
    assert_same_states(given_cache, derived_cache)


@every_row
def test_a_row_of_padding_only(row):
    """The last batch of a data set may be filled up with empty rows; they must not poison the others."""
    model, ids = row.build(), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1] = 0
    logits, cache = run(model, ids, attention_mask=mask)
    expected, expected_cache = run(model, ids[:1])
    assert logits.isfinite().all()
    assert_close(logits[:1], expected, "logits")
    assert_same_states(cache, expected_cache, rows=slice(0, 1))


@few_rows
def test_padding_across_chunks(row):
    """Padding longer than a chunk of 64, and real tokens on both sides of it."""
    model, ids = row.build(max_position_embeddings=256), tokens(2, 210)
    mask = torch.ones(2, 210, dtype=torch.long)
    mask[0, 50:140] = mask[1, :129] = 0
    logits, cache = run(model, ids, attention_mask=mask)
    for b in range(2):
        real = mask[b].bool()
        expected, expected_cache = run(model, ids[b : b + 1, real])
        assert_close(logits[b : b + 1, real], expected, f"row {b}")
        assert_same_states(cache, expected_cache, rows=slice(b, b + 1))
