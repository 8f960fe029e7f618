"""What a cache holds, counted from its tensors, against formulas; and the clock of decoding."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, DynamicCache

from lalm.training.clm.decoding import decoding_error, decoding_seconds, read_texts, state_bytes
from recipes.recall import Plan
from tests.variants import each_variant

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "recall.yaml"
NAMES = list(yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["models"])


@pytest.fixture(scope="module")
def plan():
    return Plan.read(str(RECIPE))


def formula(config, tokens):
    """Bytes a text in float32: the states of the papers, and the windows of convolutions, W - 1 inputs each."""
    width, heads = config.hidden_size, config.num_attention_heads
    if config.model_type == "llama":
        return 4 * config.num_hidden_layers * 2 * width * tokens
    total = 0
    for index, kind in enumerate(config.layer_types):
        if kind == "sliding_attention":
            total += 2 * width * min(tokens, config.sliding_window - 1)
        elif config.model_type == "lalm_based" and index not in config.linear_attention_layers:
            total += 2 * width * (config.conv_size - 1)
        else:
            total += heads * linear_state(config)
            keys, values = heads * config.linear_key_dim, heads * config.linear_value_dim
            total += (2 * keys + values) * (config.conv_size - 1) if config.use_short_conv else 0
    return 4 * total


def linear_state(config):
    """Numbers in the state of one head; classic and Taylor linear attention keep the sum of their features too."""
    key, value = config.linear_key_dim, config.linear_value_dim
    if config.model_type == "lalm_based":
        return (1 + key + key * (key + 1) // 2) * (value + 1)
    return key * (value + 1) if config.model_type == "lalm_linear" else key * value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [5, 64])
def test_bytes_of_the_recipe_are_those_of_the_formulas(plan, name, tokens):
    config = plan.config(name)
    model = AutoModelForCausalLM.from_config(config)
    for batch in (1, 3):
        ids = torch.randint(plan.vocab_size, (batch, tokens))
        assert state_bytes(read_texts(model, ids)) == formula(config, tokens)


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="run the model with past_key_values"):
        state_bytes(DynamicCache())


@each_variant
def test_decoding_is_timed_on_a_copy(row):
    model = row.build(dtype=torch.float32)
    ids = torch.randint(61, (2, 9))
    cache = read_texts(model, ids)
    before = copy.deepcopy(cache)
    assert decoding_seconds(model, cache, ids[:, -1:], steps=3) > 0
    assert int(cache.get_seq_length()) == 9
    assert state_bytes(cache) == state_bytes(before)
    with torch.no_grad():
        again, once = (
            model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True).logits for past in (cache, before)
        )
    assert torch.equal(again, once)


@each_variant
def test_decoding_error_tells_a_wrong_cache(row, monkeypatch):
    model = row.build()
    ids = torch.randint(61, (2, 12))
    assert decoding_error(model, ids, 4) < 1e-10
    monkeypatch.setattr("lalm.training.clm.decoding.read_texts", lambda model, ids: read_texts(model, ids.flip(1)))
    assert decoding_error(model, ids, 4) > 1e-3
