# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Weights of the pip package linear-attention-transformer 0.19.1: equal logits, there and back, and refusals."""

import pytest
import torch
from linear_attention_transformer import LinearAttentionTransformerLM, LinformerSettings
from linear_attention_transformer.autoregressive_wrapper import AutoregressiveWrapper

from lalm.convert.linear_attention_transformer import (
    from_linear_attention_transformer,
    to_linear_attention_transformer,
)
from lalm.modeling.layers import sinusoidal_positions
from tests.modeling.exact import tokens

LENGTH = 16  # upstream wants multiples of the window and the blindspot
SIZES = {
    "num_tokens": 61,
    "dim": 24,
    "depth": 2,
    "max_seq_len": 32,
    "heads": 4,
    "dim_head": 6,
    "local_attn_window_size": 4,
}
CAUSAL = {"causal": True}
OPTIONS = {
    "plain": CAUSAL,
    "both_sides": {},
    "blindspot": CAUSAL | {"blindspot_size": 4},
    "local": CAUSAL | {"n_local_attn_heads": 2},
    "local_both_sides": {"n_local_attn_heads": 1},
    "local_by_layer_blindspot": CAUSAL | {"n_local_attn_heads": (4, 1), "blindspot_size": 2},
    "rotary": CAUSAL | {"use_rotary_emb": True, "n_local_attn_heads": 2},
    "rotary_both_sides": {"use_rotary_emb": True, "n_local_attn_heads": 2, "dim_head": 8},
    "learned": CAUSAL | {"use_axial_pos_emb": False},
    "emb_dim": CAUSAL | {"emb_dim": 10, "dim_head": 5},
    "shift": CAUSAL | {"shift_tokens": True, "n_local_attn_heads": 1},
    "shift_odd_width": CAUSAL | {"shift_tokens": True, "dim": 25},
    "shift_both_sides": {"shift_tokens": True, "dim": 26, "emb_dim": 12},
    "reversible": CAUSAL | {"reversible": True, "n_local_attn_heads": 1},
    "reversible_shift_both_sides": {"reversible": True, "shift_tokens": True},
    "chunks": CAUSAL | {"ff_chunks": 3, "ff_glu": True},
    "memory": CAUSAL | {"pkm_layers": (2,)},
    "memory_context_shift": CAUSAL | {"pkm_layers": (1, 2), "receives_context": True, "shift_tokens": True},
    "context": CAUSAL | {"receives_context": True},
    "context_reversible_shift_blindspot": CAUSAL
    | {"receives_context": True, "reversible": True, "shift_tokens": True, "blindspot_size": 4, "emb_dim": 10},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def upstream(options, seed=0):
    """Upstream's model in float64; its fixed position tables are computed in float32, and differ in the last bits."""
    torch.manual_seed(seed)
    model = LinearAttentionTransformerLM(**SIZES | options).double().eval()
    for name, table in model.named_buffers():
        exact = sinusoidal_positions(torch.arange(len(table)), table.shape[1], 10000.0)
        torch.testing.assert_close(table, exact.double(), rtol=0, atol=1e-5, msg=name)
        table.copy_(exact)
    return model


def context_of(options):
    if not options.get("receives_context"):
        return {}, {}
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 9, (SIZES | options)["dim"], generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    theirs = {"context": context, "context_mask": mask}
    return theirs, {"encoder_hidden_states": context, "encoder_attention_mask": mask}


@each_option
@torch.no_grad()
def test_logits_equal_upstream(options):
    model, ids = upstream(options), tokens(2, LENGTH)
    ours = from_linear_attention_transformer(model.state_dict(), **SIZES | options)
    theirs, context = context_of(options)
    torch.testing.assert_close(ours(ids, **context).logits, model(ids, **theirs), rtol=0, atol=1e-10)


@each_option
@torch.no_grad()
def test_logits_with_padding_equal_upstream(options):
    if options.get("shift_tokens") and not options.get("causal"):
        pytest.skip("upstream shifts padding into the last real token")
    model, ids = upstream(options), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 11:] = False
    ours = from_linear_attention_transformer(model.state_dict(), **SIZES | options)
    theirs, context = context_of(options)
    logits = ours(ids, attention_mask=mask, **context).logits
    torch.testing.assert_close(logits[mask], model(ids, input_mask=mask, **theirs)[mask], rtol=0, atol=1e-10)


@each_option
def test_round_trip(options):
    state = upstream(options).state_dict()
    model = from_linear_attention_transformer(state, **SIZES | options)
    back = to_linear_attention_transformer(model)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    LinearAttentionTransformerLM(**SIZES | options).load_state_dict(back)


def test_what_the_weights_tell():
    options = CAUSAL | {"emb_dim": 10, "shift_tokens": True, "reversible": True}
    config = from_linear_attention_transformer(upstream(options).state_dict(), causal=True, heads=4).config
    told = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_dim, config.embedding_size)
    assert told == (61, 24, 2, 6, 10)
    assert config.shift_tokens
    assert config.reversible
    assert (config.local_attn_window_size, config.max_position_embeddings) == (4, 32)


def test_wrapper_and_dtype():
    model = AutoregressiveWrapper(upstream(CAUSAL).bfloat16())
    ours = from_linear_attention_transformer(model.state_dict(), **SIZES | CAUSAL)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.lm_head.weight, model.net.net.out.weight)


@torch.no_grad()
def test_encoder_and_decoder():
    encoder, decoder = upstream({"return_embeddings": True}), upstream(CAUSAL | {"receives_context": True})
    source, target = tokens(2, 12, seed=3), tokens(2, LENGTH)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 7:] = False
    expected = decoder(target, context=encoder(source, input_mask=mask), context_mask=mask)
    ours = from_linear_attention_transformer(encoder.state_dict(), **SIZES)
    other = from_linear_attention_transformer(decoder.state_dict(), **SIZES | CAUSAL, receives_context=True)
    context = ours(source, attention_mask=mask).last_hidden_state
    logits = other(target, encoder_hidden_states=context, encoder_attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def renamed(state, old, new):
    return {key.replace(old, new): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"linformer_settings": LinformerSettings(4)}, {}, "linformer_settings"),
        ({"attend_axially": True}, {}, "attend_axially"),
        ({}, {"attend_axially": True}, "attend_axially.*not have"),
        (CAUSAL | {"receives_context": True}, {"depth": 2}, "depth = 2.*say 4 with this receives_context"),
        ({"depth": 1}, {"receives_context": True}, "receives_context"),
        ({}, {"heads": 7}, "heads = 7"),
        ({}, {"dim": 32}, "dim = 32 does not fit the weights"),
        ({}, {"max_seq_len": 64}, "max_seq_len = 64"),
        ({}, {"local_attn_window_size": 8}, "local_attn_window_size = 8"),
        ({}, {"local_attn_heads": 8}, "no option 'local_attn_heads'"),
        ({}, {"ff_glu": True, "receives_context": True}, "ff_glu"),
    ],
)
def test_other_options_are_named(options, given, message):
    state = upstream(options).state_dict()
    with pytest.raises(ValueError, match=message):
        from_linear_attention_transformer(state, **{"heads": 4} | given)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (".fn.fn.w1.", ".fn.fn.net.0.", "version 0.2.1"),
        (".to_k.", ".to_kv.", "to_kv.*before 0.19"),
        ("norm.bias", "norm.beta", "norm.bias.*missing"),
        ("token_emb", "embedding", "token_emb.weight.*missing"),
        ("pos_emb", "positions", "pos_emb.*missing"),
    ],
)
def test_other_versions_are_named(old, new, message):
    with pytest.raises(ValueError, match=message):
        from_linear_attention_transformer(renamed(upstream({}).state_dict(), old, new), heads=4)


def test_wrong_shape_is_named():
    state = upstream({}).state_dict()
    state["out.bias"] = state["out.bias"][:-1]
    with pytest.raises(ValueError, match=r"out.bias is \(60,\)"):
        from_linear_attention_transformer(state, heads=4)


@pytest.mark.parametrize(
    "fields",
    [
        {"semantics": "v0.2.1"},
        {"one_kv_head": True},
        {"ff_glu": True},
        {"position_embedding_type": "none"},
        {"intermediate_size": 40},
    ],
)
def test_what_upstream_lacks_is_named(fields):
    model = from_linear_attention_transformer(upstream({}).state_dict(), heads=4)
    model.config.update(fields)
    with pytest.raises(ValueError, match=f"0.19.1 has no {next(iter(fields))}"):
        to_linear_attention_transformer(model)
