"""Token by token == in pieces == at once, and everything generate does to a cache in between."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lalm.modeling.cache import RecurrentLayer
from tests.modeling.exact import (
    assert_close,
    assert_same_gradients,
    assert_same_states,
    parameter_gradients,
    run,
    run_in_pieces,
    states,
    tokens,
    weights_like,
)
from tests.variants import every_row, few_rows, recurrent_rows

LENGTH = 23


@every_row
def test_token_by_token_is_one_forward(row):
    model, ids = row.build(), tokens(2, LENGTH)
    logits, cache = run(model, ids)
    stepped, stepped_cache = run_in_pieces(model, ids, 1)
    assert_close(stepped, logits, "logits")
    assert_same_states(stepped_cache, cache)


@every_row
@pytest.mark.parametrize("sizes", [[5, 1, 9, 2, 6], [1, 22], [17, 6]], ids=str)
def test_pieces_are_one_forward(row, sizes):
    model, ids = row.build(), tokens(2, LENGTH)
    logits, cache = run(model, ids)
    pieces, pieces_cache = run_in_pieces(model, ids, sizes)
    assert_close(pieces, logits, "logits")
    assert_same_states(pieces_cache, cache)
    assert cache.get_seq_length() == pieces_cache.get_seq_length() == LENGTH


@few_rows
def test_pieces_across_chunks(row):
    """Long enough for several chunks of 64, cut inside and at their boundaries."""
    model, ids = row.build(max_position_embeddings=256), tokens(1, 200)
    logits, cache = run(model, ids)
    pieces, pieces_cache = run_in_pieces(model, ids, [64, 1, 100, 35])
    assert_close(pieces, logits, "logits")
    assert_same_states(pieces_cache, cache)


@few_rows
def test_implementations_agree(row):
    ids = tokens(2, 70)
    logits, cache = run(row.build(linear_attn_implementation="recurrent"), ids)
    for name in ("chunk", "auto"):
        other, other_cache = run(row.build(linear_attn_implementation=name), ids)
        assert_close(other, logits, name)
        assert_same_states(other_cache, cache)


@every_row
def test_no_cache_gives_the_same(row):
    model, ids = row.build(), tokens(2, LENGTH)
    with torch.no_grad():
        without = model(ids, use_cache=False)
    assert without.past_key_values is None
    assert_close(without.logits, run(model, ids)[0], "logits")


@every_row
def test_caches_made_by_hand(row):
    """Users and other libraries build the stock caches from the config themselves."""
    model, ids = row.build(), tokens(2, LENGTH)
    logits, cache = run(model, ids)
    for own in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 4)):
        pieces, own = run_in_pieces(model, ids, [7, 1, 1, 14], cache=own)
        assert_close(pieces, logits, type(own).__name__)
        assert_same_states(own, cache)


@every_row
def test_cache_made_without_a_configuration(row):
    """An empty `DynamicCache()`, as much code makes it, gets the layers of the model it is handed to."""
    model, ids = row.build(), tokens(2, LENGTH)
    pieces, cache = run_in_pieces(model, ids, [7, 1, 15], cache=DynamicCache())
    logits, expected = run(model, ids)
    assert_close(pieces, logits, "logits")
    assert_same_states(cache, expected)


@every_row
def test_deepcopy_forks_the_cache(row):
    """A prompt is read once and continued twice; neither continuation sees the other."""
    model, ids = row.build(), tokens(2, LENGTH)
    _, cache = run(model, ids[:, :10])
    fork = copy.deepcopy(cache)
    run_in_pieces(model, tokens(2, 5, seed=9), 1, cache=fork)
    rest, _ = run_in_pieces(model, ids[:, 10:], [1, 12], cache=cache)
    assert_close(rest, run(model, ids)[0][:, 10:], "logits")


def check_continuation_after(row, change, order, batch=3):
    """Logits after `change(cache)` must be those of the rows in the new order."""
    model, ids = row.build(), tokens(batch, LENGTH)
    _, cache = run(model, ids[:, :14])
    change(cache)
    order = torch.tensor(order)
    rest, cache = run_in_pieces(model, ids[order, 14:], [1, 8], cache=cache)
    expected, expected_cache = run(model, ids[order])
    assert_close(rest, expected[:, 14:], "logits")
    assert_same_states(cache, expected_cache)


@every_row
def test_reorder_cache(row):
    check_continuation_after(row, lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0])


@every_row
def test_batch_repeat_interleave(row):
    check_continuation_after(row, lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])


@every_row
def test_batch_select_indices(row):
    check_continuation_after(row, lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0])


@recurrent_rows
def test_reset_dynamic(row):
    model, ids = row.build(), tokens(2, LENGTH)
    _, cache = run(model, tokens(2, 9, seed=7))
    assert cache.has_previous_state()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.has_previous_state()
    assert_close(run_in_pieces(model, ids, [10, 13], cache=cache)[0], run(model, ids)[0], "logits after reset")


@every_row
def test_reset_static(row):
    model, ids = row.build(), tokens(2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    run(model, tokens(2, 9, seed=7), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(run_in_pieces(model, ids, [10, 13], cache=cache)[0], run(model, ids)[0], "logits after reset")


@every_row
def test_states_have_a_fixed_size_and_wide_type(row):
    """The promise of the family: memory does not grow with the text, and sums are kept in float32."""
    model = row.build(dtype=torch.bfloat16)
    _, short = run(model, tokens(1, 5))
    _, long = run(model, tokens(1, 60))
    for name, state in states(long).items():
        assert state.shape == states(short)[name].shape, name
        if "recurrent" in name:
            assert state.dtype == torch.float32, name


@few_rows
def test_bfloat16_decode_stays_near_one_forward(row):
    """Steps and one forward round differently in bfloat16 (2^-8 an operation), but do not drift apart."""
    model, ids = row.build(dtype=torch.bfloat16), tokens(1, 60)
    logits, stepped = run(model, ids)[0].float(), run_in_pieces(model, ids, 1)[0].float()
    exact = run(row.build(), ids)[0].float()
    assert (stepped - exact).norm() < 2 * (logits - exact).norm() + 1e-2 * exact.norm()


@every_row
def test_gradients_with_a_cache_in_the_forward(row):
    """`model(ids, labels=ids).loss.backward()` runs with the default use_cache=True."""
    model, ids = row.build(), tokens(2, LENGTH)
    gradients = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append(parameter_gradients(model))
    assert_same_gradients(*gradients)


@every_row
def test_gradients_reach_back_through_a_cache(row):
    """A loss on later pieces trains what earlier pieces wrote, exactly as in one forward."""
    model, ids = row.build(), tokens(2, LENGTH)
    logits = model(ids, use_cache=False).logits
    cotangent = weights_like(logits)
    (logits * cotangent).sum().backward()
    expected = parameter_gradients(model)
    model.zero_grad()
    cache, loss = None, 0
    for piece, weight in zip(ids.split([9, 1, 13], 1), cotangent.split([9, 1, 13], 1), strict=True):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache, loss = out.past_key_values, loss + (out.logits * weight).sum()
    loss.backward()
    assert_same_gradients(parameter_gradients(model), expected)


def test_a_cache_keeps_what_it_is_given_and_copies_the_rest():
    layer, whole = RecurrentLayer(), torch.ones(1, 2, 3)
    assert layer.update_conv_state(whole, given_away=True) is whole
    later = torch.zeros(1, 2, 3)
    assert layer.update_conv_state(later, given_away=True) is whole, "the address holds"
    assert not whole.any()
    lent, part = torch.ones(1, 2, 3), torch.ones(2, 2, 3)[:1]
    for index, value in ((1, lent), (2, part)):
        kept = layer.update_recurrent_state(value, state_idx=index, given_away=value is part)
        assert kept.data_ptr() != value.data_ptr()
        assert kept.untyped_storage().nbytes() == value.numel() * 4
