"""Bad input: one clear message each, naming the field and what to do."""

import copy
import json
import math
import re
from dataclasses import fields

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

import lalm
from lalm.configuration.configuration_gla import GLAConfig
from lalm.configuration.configuration_linear_attention import LinearAttentionConfig
from tests.modeling.exact import run, tokens
from tests.variants import TINY, each_variant, every_row, few_rows

# Strict dataclasses of huggingface_hub wrap what a validator raises; the message of the ValueError is kept.
CONFIG_ERRORS = (ValueError, StrictDataclassError)
both_configs = pytest.mark.parametrize("config_class", [GLAConfig, LinearAttentionConfig])

MISSPELT = {
    "hiden_size": "hidden_size",
    "n_layers": "",
    "num_layers": "num_hidden_layers",
    "num_attn_heads": "num_attention_heads",
    "use_shortconv": "use_short_conv",
    "tie_embeddings": "tie_word_embeddings",
    "slide_window": "sliding_window",
}


@both_configs
@pytest.mark.parametrize("wrong", MISSPELT)
def test_misspelt_field_names_the_nearest(config_class, wrong):
    with pytest.raises(ValueError, match=rf"{wrong}.*{MISSPELT[wrong]}"):
        config_class(**{wrong: 1})


def test_misspelt_field_of_a_variant():
    with pytest.raises(ValueError, match="featuremap.*feature_map"):
        LinearAttentionConfig(featuremap="elu")
    with pytest.raises(ValueError, match="gate_lowrank_dim.*gate_low_rank_dim"):
        GLAConfig(gate_lowrank_dim=8)


BAD_FIELDS = [
    ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size.*num_attention_heads"),
    ({"expand_k": 0.3}, "expand_k.*num_attention_heads"),
    ({"expand_v": 0.01}, "expand_v.*num_attention_heads"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads.*num_key_value_heads"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"hidden_size": -32}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": "many"}, "vocab_size"),
    ({"conv_size": 0}, "conv_size"),
    ({"intermediate_size": 0}, "intermediate_size"),
    ({"position_embedding_type": "learned", "max_position_embeddings": 0}, "max_position_embeddings"),
    ({"dropout": 1.5}, "dropout"),
    ({"attention_dropout": -0.1}, "attention_dropout"),
    ({"hidden_act": "sillu"}, "hidden_act.*silu"),
    ({"mlp_type": "glu"}, "mlp_type"),
    ({"norm_type": "batchnorm"}, "norm_type"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type"),
    ({"linear_attn_implementation": "triton"}, "linear_attn_implementation"),
    ({"full_attention_layers": [2]}, "full_attention_layers.*0 to 1"),
    ({"full_attention_layers": [-1]}, "full_attention_layers"),
    ({"sliding_attention_layers": [7], "sliding_window": 4}, "sliding_attention_layers.*0 to 1"),
    ({"sliding_attention_layers": [0]}, "sliding_attention_layers.*sliding_window"),
    ({"sliding_attention_layers": [0], "sliding_window": 0}, "sliding_window"),
    (
        {"full_attention_layers": [1], "sliding_attention_layers": [1], "sliding_window": 4},
        "full_attention_layers.*sliding_attention_layers",
    ),
    ({"layer_types": ["full_attention", "full_attention"]}, "layer_types.*full_attention_layers"),
    ({"hidden_size": 6, "expand_k": 1, "position_embedding_type": "rope"}, "rope.*even"),
    (
        {"hidden_size": 33, "num_attention_heads": 3, "position_embedding_type": "sinusoidal", "expand_k": 1},
        "hidden_size",
    ),
    ({"pad_token_id": 61}, "pad_token_id.*vocab_size"),
    ({"rope_theta": 0, "position_embedding_type": "rope"}, "rope_theta"),
    ({"norm_eps": -1.0}, "norm_eps"),
]


@both_configs
@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[str(fields) for fields, _ in BAD_FIELDS])
def test_bad_field_is_named(config_class, fields, message):
    with pytest.raises(CONFIG_ERRORS, match=f"(?s){message}"):
        config_class(**(TINY | fields))


BAD_VARIANT_FIELDS = [
    (LinearAttentionConfig, {"feature_map": "cosine"}, "feature_map.*elu"),
    (LinearAttentionConfig, {"feature_map": "identity", "normalize": True}, "feature_map.*normalize"),
    (LinearAttentionConfig, {"feature_map": "favor", "num_features": 0}, "num_features"),
    (LinearAttentionConfig, {"feature_map": "dpfp", "dpfp_nu": 32}, "dpfp_nu"),
    (GLAConfig, {"gate_low_rank_dim": 0}, "gate_low_rank_dim"),
    (GLAConfig, {"gate_logit_normalizer": 0}, "gate_logit_normalizer"),
]


@pytest.mark.parametrize(("config_class", "fields", "message"), BAD_VARIANT_FIELDS, ids=str)
def test_bad_field_of_a_variant(config_class, fields, message):
    with pytest.raises(CONFIG_ERRORS, match=f"(?s){message}"):
        config_class(**(TINY | fields))


FACTORS = ("norm_eps", "rope_theta", "initializer_range", "hidden_ratio", "gate_logit_normalizer")
NOT_NUMBERS = [math.nan, math.inf, -math.inf, True]
each_config = pytest.mark.parametrize("config_class", [variant.config for variant in lalm.VARIANTS])


def number_fields(config_class) -> list[str]:
    """Fields of ours that hold one number or several."""
    ours = [item for item in fields(config_class) if item.init and item.name not in PreTrainedConfig.__annotations__]
    return [item.name for item in ours if re.search("int|float", str(item.type)) and "bool" not in str(item.type)]


@each_config
@pytest.mark.slow
def test_no_field_of_any_configuration_takes_what_is_no_number(config_class, tmp_path):
    """When it is made, when it is loaded with another value, when a stored value is damaged, and when it is set."""
    good = config_class(**TINY)
    good.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {"norm_eps", "expand_k", "vocab_size", "sliding_attention_layers"} <= set(number_fields(config_class))
    for name in number_fields(config_class):
        for value in NOT_NUMBERS:
            bad = [value] if "list" in str(config_class.__dataclass_fields__[name].type) else value
            with pytest.raises(CONFIG_ERRORS, match=name):
                config_class(**(TINY | {name: bad}))
            with pytest.raises(CONFIG_ERRORS, match=name):
                config_class.from_pretrained(tmp_path, **{name: bad})
            with pytest.raises(CONFIG_ERRORS, match=name):
                setattr(copy.copy(good), name, bad)
            (tmp_path / "damaged").mkdir(exist_ok=True)
            (tmp_path / "damaged" / "config.json").write_text(json.dumps(stored | {name: bad}))
            with pytest.raises(CONFIG_ERRORS, match=name):
                config_class.from_pretrained(tmp_path / "damaged")


@each_config
def test_factors_are_positive_and_layers_can_be_counted(config_class, tmp_path):
    config_class(**TINY).save_pretrained(tmp_path)
    names = [name for name in FACTORS if name in config_class.__dataclass_fields__]
    wrong = {name: [-1.0, 0.0] for name in names} | {"num_hidden_layers": [10**9], "hidden_ratio": [-1.0, 0, 1e308]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                config_class(**(TINY | {"intermediate_size": None, name: value}))
            with pytest.raises(ValueError, match=name):
                config_class.from_pretrained(tmp_path, **{name: value})


@both_configs
def test_fields_are_checked_when_set_later(config_class):
    config = config_class(**TINY)
    with pytest.raises(CONFIG_ERRORS, match="hidden_size"):
        config.hidden_size = "wide"


@few_rows
@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (1, 9), (9,), (2, 1, 9, 9)], ids=str)
def test_attention_mask_of_the_wrong_shape(row, shape):
    with pytest.raises(ValueError, match="attention_mask"):
        row.build()(tokens(2, 9), attention_mask=torch.ones(shape, dtype=torch.long))


@few_rows
def test_attention_mask_of_a_continued_forward(row):
    """It covers the cached tokens too; the message says how many there are."""
    model, ids = row.build(), tokens(2, 9)
    _, cache = run(model, ids)
    with pytest.raises(ValueError, match="attention_mask.*9"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)


@every_row
@pytest.mark.parametrize("bad", [61, 1000, -1])
def test_token_ids_out_of_range(row, bad):
    ids = tokens(2, 9)
    ids[1, 4] = bad
    with pytest.raises(ValueError, match=rf"(?s){bad}.*vocab_size.*61|vocab_size.*61.*{bad}"):
        row.build()(ids)


@few_rows
def test_neither_or_both_inputs(row):
    model, ids = row.build(), tokens(2, 9)
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@few_rows
def test_positions_beyond_the_table(row):
    model = row.build(max_position_embeddings=8)
    ids = tokens(1, 9)
    if model.config.position_embedding_type in ("learned", "axial"):
        with pytest.raises(ValueError, match="max_position_embeddings"):
            model(ids)
    else:
        assert model(ids).logits.isfinite().all(), "only learned tables limit the length"


@few_rows
def test_cache_of_another_kind(row):
    """The cache of a softmax model, and one made for fewer layers."""
    model, ids = row.build(), tokens(1, 5)
    foreign = transformers.DynamicCache()
    for index in range(model.config.num_hidden_layers):
        foreign.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), index)
    with pytest.raises(ValueError, match="past_key_values.*config"):
        model(ids, past_key_values=foreign, use_cache=True)
    shallow = transformers.DynamicCache(config=row.config(num_hidden_layers=1, full_attention_layers=[],
                                                          sliding_attention_layers=[]))  # fmt: skip
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids, past_key_values=shallow, use_cache=True)


@few_rows
def test_cache_of_another_batch_size(row):
    model = row.build()
    _, cache = run(model, tokens(2, 5))
    with pytest.raises((ValueError, RuntimeError), match="(?i)state|size"):
        model(tokens(3, 1), past_key_values=cache, use_cache=True)


@each_variant
def test_checkpoint_of_another_type(row, tmp_path):
    """A stock Llama, and the other variant of ours: both would load with every weight missing."""
    llama = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    other = LinearAttentionConfig if row.config_class is GLAConfig else GLAConfig
    transformers.AutoModelForCausalLM.from_config(other(**TINY)).save_pretrained(tmp_path / "other")
    for folder, found in (("llama", "llama"), ("other", other.model_type)):
        for load in (row.model_class().from_pretrained, row.config_class.from_pretrained):
            with pytest.raises(ValueError, match=rf"(?s)\b{found}\b.*{row.config_class.model_type}|"
                                                 rf"{row.config_class.model_type}.*\b{found}\b"):  # fmt: skip
                load(tmp_path / folder)


@each_variant
def test_checkpoint_that_is_not_there(row, tmp_path):
    with pytest.raises(OSError, match="no_such_folder|config.json"):
        row.model_class().from_pretrained(tmp_path / "no_such_folder")


@each_variant
def test_stored_fields_of_a_later_version_are_kept(row, tmp_path):
    """A checkpoint may come from a newer library: unknown stored fields warn, they do not stop the load."""
    import json

    config = row.config()
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["field_of_tomorrow"] = 3
    (tmp_path / "config.json").write_text(json.dumps(stored))
    loaded = row.config_class.from_pretrained(tmp_path)
    assert loaded.field_of_tomorrow == 3
    loaded.save_pretrained(tmp_path)
    assert row.config_class.from_pretrained(tmp_path).field_of_tomorrow == 3
