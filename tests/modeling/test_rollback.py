"""A cache taken back by some tokens is the cache of the shorter text, and what generate() makes of it."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from tests.modeling.exact import assert_close, assert_same_states, run, run_in_pieces, states, tokens
from tests.variants import ROWS, TINY, every_row, few_rows

NEW = 12


def recording(model):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def skip_without_sliding_records(row):
    """In transformers 5.17 a window that records the past in several forwards has more keys than its mask."""
    layer, new = DynamicSlidingWindowLayer(sliding_window=3), torch.zeros(1, 1, 4, 2)
    layer.activate_past_recording()
    layer.update(new, new)
    width = layer.get_mask_sizes(4)[0]
    if layer.update(new, new)[0].shape[2] != width and "sliding_attention" in row.config().layer_types:
        pytest.skip("this transformers masks a recorded sliding window wrongly, in its own models too")


@every_row
@pytest.mark.parametrize(("sizes", "back"), [([9, 6], 4), ([9, 1, 1, 2, 1], 4), ([9, 1, 3], 4), ([15], 14)], ids=str)
def test_crop_is_the_shorter_text(row, sizes, back):
    """Inside a forward, between forwards, and through several; the text that follows is then as it would have been."""
    skip_without_sliding_records(row)
    model, ids = row.build(), tokens(1, 23)
    length = sum(sizes)
    _, cache = run_in_pieces(model, ids[:, :length], sizes, cache=recording(model))
    cache.crop(-back)
    kept = length - back
    assert cache.get_seq_length() == kept
    assert_same_states(cache, run(model, ids[:, :kept])[1])
    rest, cache = run_in_pieces(model, ids[:, kept:], [2, 23 - kept - 2], cache=cache)
    assert_close(rest, run(model, ids)[0][:, kept:], "logits")
    assert_same_states(cache, run(model, ids)[1])


@few_rows
def test_crop_to_nothing(row):
    model, ids = row.build(), tokens(1, 9)
    _, cache = run(model, ids, past_key_values=recording(model))
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    assert_close(run(model, ids, past_key_values=cache)[0], run(model, ids)[0], "logits")


@few_rows
def test_crop_with_padding_and_again(row):
    """Left padding in the first piece; two rollbacks, the second past the first."""
    model, ids = row.build(), tokens(1, 20)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    cache = recording(model)
    run(model, ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
    cache.crop(-2)
    run(model, ids[:, 10:14], attention_mask=mask[:, :14], past_key_values=cache)
    cache.crop(-4)
    kept = 10
    if row.is_recurrent:  # a stock sliding window forgets at each rollback what that one did not need
        cache.crop(-1)
        kept = 9
    rest = run(model, ids[:, kept:], attention_mask=mask, past_key_values=cache)[0]
    assert_close(rest, run(model, ids, attention_mask=mask)[0][:, kept:], "logits")


@few_rows
def test_what_was_not_recorded_cannot_be_taken_back(row):
    model, ids = row.build(), tokens(1, 9)
    _, cache = run(model, ids)
    before = {name: state.clone() for name, state in states(cache).items()}
    layer = next(layer for layer in cache.layers if hasattr(layer, "recurrent_states"))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="minus"):
        layer.crop(3)
    layer.crop(0)
    assert all(torch.equal(state, before[name]) for name, state in states(cache).items())


@few_rows
def test_history_stays_short(row):
    """Rolled back now and then, a cache keeps no more than the last tokens; one that is not, keeps nothing."""
    model = row.build()
    cache, plain = recording(model), None
    for step in range(8):
        _, cache = run(model, tokens(1, 7), past_key_values=cache)
        cache.crop(-(step % 3))
        _, plain = run(model, tokens(1, 7), past_key_values=plain)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        for steps in getattr(layer, "history", {}).values():
            assert sum(step.tokens for step in steps) < 16 + 7
        assert not getattr(other, "history", None)


@few_rows
def test_rows_that_move_have_no_past(row):
    model = row.build()
    _, cache = run(model, tokens(2, 7), past_key_values=recording(model))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert not any(getattr(layer, "history", None) for layer in cache.layers)


def build(row, **changes):
    model = row.build(**changes)
    model.generation_config.eos_token_id = None
    return model


def llama():
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).double().eval()
    model.generation_config.eos_token_id = None
    return model


def noisy(model, scale=0.02):
    """A draft that is right now and then."""
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return draft


def generate(model, ids, **kwargs):
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | kwargs))


@every_row
@pytest.mark.slow
def test_assisted_generation_is_greedy(row):
    """As target and as draft, of drafts that are always, sometimes and never right."""
    model, ids, other = build(row), tokens(1, 9), llama()
    expected = generate(model, ids)
    torch.manual_seed(0)
    for draft in (copy.deepcopy(model), noisy(model), noisy(model, 0.3), other):
        assert torch.equal(generate(model, ids, assistant_model=draft), expected)
    assert torch.equal(generate(other, ids, assistant_model=model), generate(other, ids))


@every_row
def test_prompt_lookup_is_greedy(row):
    model = build(row)
    ids = tokens(1, 9)
    ids = torch.cat([ids, generate(model, ids)[:, 9:], ids], 1)  # holds what may follow
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), generate(model, ids))


@few_rows
def test_early_exit_is_greedy(row):
    model, ids = build(row), tokens(1, 9)
    assert torch.equal(generate(model, ids, assistant_early_exit=1), generate(model, ids))


@few_rows
def test_assisted_with_left_padding_and_another_turn(row):
    skip_without_sliding_records(row)
    model, ids = build(row), tokens(1, 9)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    torch.manual_seed(0)
    draft = noisy(model)
    expected = generate(model, ids, attention_mask=mask)
    first = generate(model, ids, attention_mask=mask, assistant_model=draft, return_dict_in_generate=True)
    assert torch.equal(first.sequences, expected)
    prompt = torch.cat([expected, tokens(1, 3, seed=5)], 1)
    mask = torch.cat([mask, mask.new_ones(1, NEW + 3)], 1)
    second = generate(model, prompt, attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.equal(second, generate(model, prompt, attention_mask=mask))


@pytest.mark.slow
def test_assisted_sampling_has_the_targets_distribution():
    """Speculative sampling (arXiv 2211.17192) is exact only if the rolled-back state is."""
    row = next(row for row in ROWS if row.name == "gla_plain")
    model, ids = (
        build(row, vocab_size=5, bos_token_id=None, eos_token_id=None, dtype=torch.float32),
        tokens(1, 4, low=1, high=5),
    )
    torch.manual_seed(0)
    draft, counts = noisy(model, 0.3), torch.zeros(5)
    for _ in range(600):
        out = generate(model, ids, assistant_model=draft, do_sample=True, top_k=0, max_new_tokens=3)
        counts[out[0, -1]] += 1
    prefix = torch.cartesian_prod(*[torch.arange(5)] * 2)
    with torch.no_grad():
        logits = model(torch.cat([ids.expand(25, -1), prefix], 1)).logits.softmax(-1)
    reach = logits[:, 3].gather(1, prefix[:, :1]) * logits[:, 4].gather(1, prefix[:, 1:])
    expected = (reach * logits[:, 5]).sum(0)
    assert (counts / 600 - expected).abs().max() < 4 * (expected * (1 - expected) / 600).sqrt().max()
