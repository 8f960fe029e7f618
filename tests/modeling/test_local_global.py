# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What is particular to the local-global transformer; parity with upstream's code is in
tests/test_convert_linear_attention_transformer.py, the reversible backward pass in test_reversible.py."""

import pytest
import torch
from torch.nn import functional as F

from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.modeling_local_global import LocalGlobalForCausalLM, LocalGlobalMLP, shift_tokens
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.modeling.exact import assert_close, run_in_pieces, tokens
from tests.variants import Row, _local_global

LENGTH = 11
ENCODER = {"is_causal": False, "num_local_heads": 1}

REFUSED = [
    ({"num_local_heads": 9}, "num_local_heads must be 0 to num_attention_heads = 8"),
    ({"num_local_heads": [1, -1] * 3}, "num_local_heads must be 0"),
    ({"num_local_heads": [1, 2]}, "num_local_heads lists 2 layers.*one number per layer"),
    ({"local_attn_window_size": 0}, "local_attn_window_size must be at least 1"),
    ({"local_attn_window": 64, "local_attn_window_size": 32}, "two names of one field"),
    ({"blindspot_size": 0}, "blindspot_size must be at least 1"),
    ({"blindspot_size": 4, "is_causal": False}, "blindspot_size = 4.*set blindspot_size=1"),
    ({"ff_chunks": 0}, "ff_chunks must be at least 1"),
    ({"ff_dropout": 1.0}, "ff_dropout must be"),
    ({"head_dim": 7, "position_embedding_type": "rope"}, "even head_dim, got 7"),
    ({"embedding_size": 7, "position_embedding_type": "sinusoidal"}, "even embedding_size, got 7"),
    ({"head_dim": 0}, "head_dim must be at least 1"),
    ({"expand_k": 2}, "no expand_k.*set head_dim"),
    ({"use_short_conv": True}, "no use_short_conv.*shift_tokens"),
    ({"full_attention_layers": [0]}, "no full_attention_layers.*num_local_heads"),
    ({"sliding_window": 4}, "no sliding_window.*local_attn_window_size"),
    ({"qk_norm": True}, "no qk_norm"),
    ({"mlp_type": "gated"}, "no mlp_type.*ff_glu=True"),
    ({"num_key_value_heads": 1}, "no num_key_value_heads.*one_kv_head=True"),
    ({"linear_attn_implementation": "fla"}, "no fla kernels"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LocalGlobalConfig(**fields)


def test_names_and_defaults():
    config = LocalGlobalConfig(local_attn_window=64, num_local_heads=[1, 2, 3, 4, 5, 6])
    assert config.local_attn_window_size == 64
    assert "local_attn_window" not in config.to_dict()
    assert LocalGlobalConfig.from_dict({"local_attn_window": 32}).local_attn_window_size == 32
    assert (config.head_dim, config.embedding_size, config.intermediate_size) == (64, 512, 2048)
    assert [config.local_heads(i) for i in range(6)] == [1, 2, 3, 4, 5, 6]
    assert LocalGlobalConfig().local_attn_window_size == 128
    assert LocalGlobalConfig(semantics="v0.2.1").hidden_act == "leaky_relu"


def test_tools_may_set_a_sliding_window(tmp_path):
    """They do so on every configuration that has the attribute, and save it; there is no such window here."""
    config = LocalGlobalConfig(local_attn_window_size=4)
    config.sliding_window = 2
    config.save_pretrained(tmp_path)
    loaded = LocalGlobalConfig.from_pretrained(tmp_path)
    assert (loaded.sliding_window, loaded.local_attn_window_size) == (None, 4)


def test_parameter_count_of_the_published_example():
    """Width 512, 12 layers, 8,192 positions: 58,409,504 parameters upstream."""
    config = LocalGlobalConfig(vocab_size=20000, num_hidden_layers=12, max_position_embeddings=8192, num_local_heads=4)
    with torch.device("meta"):
        model = LocalGlobalForCausalLM(config)
    assert model.num_parameters() == 58_409_504


def visible(length, bucket):
    """How many keys each token sees."""
    index = torch.arange(length)
    return index + 1 if bucket == 1 else index // bucket * bucket


def reference_global(q, k, v, config):
    """One head, q, k, v `[T, K]`, sums over the visible keys as they are written."""
    size, old = q.shape[1], config.semantics == "v0.2.1"
    q = q.softmax(-1)
    if not config.is_causal:
        return q @ (k.softmax(0).T @ v) * (1 if old else size**-0.5)
    rows = []
    for i, count in enumerate(visible(len(q), config.blindspot_size).tolist()):
        if old:
            features = F.elu(k[:count]) + 1
            rows.append(q[i] @ (features.T @ v[:count] / (features.sum(0)[:, None] + 1e-6)))
        else:
            weights = k[:count].exp() @ q[i] * size**-0.5
            rows.append(weights @ v[:count] / weights.sum().clamp(min=1e-3))
    return torch.stack(rows)


def reference_local(q, k, v, config):
    window = torch.arange(len(q)) // config.local_attn_window_size
    seen = (window[:, None] - window).abs() <= 1
    seen = seen.tril() if config.is_causal else seen
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def reference_mixer(mixer, x, config, layer):
    local, size = config.local_heads(layer), config.head_dim
    q, k, v = (x @ p.weight.T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    outputs = []
    for head in range(config.num_attention_heads):
        # With shared keys and values the local heads have the first pair, where there are local heads.
        shared = int(head >= local and local > 0)
        own = slice(head * size, (head + 1) * size)
        kv = slice(shared * size, (shared + 1) * size) if config.one_kv_head else own
        attend = reference_local if head < local else reference_global
        outputs.append(attend(q[:, own], k[:, kv], v[:, kv], config))
    return mixer.o_proj(torch.cat(outputs, -1))


def reference_model(model, ids, config):
    """Logits `[T, vocabulary]` of one row."""
    body = model.model
    x = body.embed_tokens.weight[ids] + body.embed_positions.table.weight[: len(ids)]
    for number, block in enumerate(body.layers):
        x = x + reference_mixer(block.mixer, block.mixer_norm(x), config, number)
        hidden = block.mlp.up_proj(block.mlp_norm(x))
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden) if config.semantics == "v0.2.1" else F.gelu(hidden)
        x = x + block.mlp.down_proj(hidden)
    if config.semantics == "0.19":
        x = F.layer_norm(x, x.shape[-1:], body.norm.weight, body.norm.bias)
    return model.lm_head(x)


REFERENCES = {
    "old": {"semantics": "v0.2.1"},
    "old_blindspot_shared": {"semantics": "v0.2.1", "blindspot_size": 3, "one_kv_head": True},
    "old_shared_local": {"semantics": "v0.2.1", "one_kv_head": True, "num_local_heads": [2, 4]},
    "old_both_sides": {"semantics": "v0.2.1", "one_kv_head": True, **ENCODER},
    "shared": {"one_kv_head": True},
    "shared_local": {"one_kv_head": True, "num_local_heads": [1, 3], "blindspot_size": 2},
    "shared_both_sides": {"one_kv_head": True, **ENCODER},
}


@pytest.mark.parametrize("fields", REFERENCES.values(), ids=REFERENCES)
@torch.no_grad()
def test_equals_the_formulas(fields):
    fields = {"num_attention_heads": 4, "head_dim": 6, "position_embedding_type": "learned"} | fields
    row = _local_global("reference", **fields)
    model = row.build("AutoModelForCausalLM" if row.config().is_causal else "AutoModelForMaskedLM")
    ids = tokens(1, LENGTH)
    assert_close(model(ids).logits[0], reference_model(model, ids[0], model.config))


def test_the_older_semantics_has_its_parts():
    model = _local_global("old", semantics="v0.2.1").build()
    names = {name for name, _ in model.named_parameters()}
    assert not any("mlp.up_proj.bias" in name or "model.norm" in name for name in names)
    assert "lm_head.bias" in names


def test_axial_positions():
    model = _local_global("axial", max_position_embeddings=10).build()
    table = model.model.embed_positions
    assert (table.windows.weight.shape, table.places.weight.shape) == ((3, 32), (4, 32))
    expected = torch.stack([table.windows.weight[i // 4] + table.places.weight[i % 4] for i in range(10)])
    assert_close(table(torch.arange(10)[None])[0], expected)
    with pytest.raises(ValueError, match="position ids run from 0 to 10; max_position_embeddings = 10"):
        model(tokens(1, 11))


@torch.no_grad()
def test_rotary_positions_also_enter_the_embeddings():
    model = _local_global("rope", position_embedding_type="rope").build()
    ids = tokens(1, 5)
    for block in model.model.layers:
        block.mixer.o_proj.weight.zero_()  # what remains depends on a token and its sinusoid
    assert not torch.allclose(model(ids.new_full((1, 2), 5)).logits[:, 0], model(ids.new_full((1, 2), 5)).logits[:, 1])


def test_embeddings_of_another_width():
    model = _local_global("factorised", embedding_size=20, tie_word_embeddings=True).build()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.model.embed_tokens.weight.shape, model.model.norm.weight.shape) == ((61, 20), (20,))
    assert model.model(tokens(1, 3)).last_hidden_state.shape == (1, 3, 20)
    out = model(inputs_embeds=model.get_input_embeddings()(tokens(1, 3)))
    assert_close(out.logits, model(tokens(1, 3)).logits)


def test_shifted_features():
    x = torch.arange(1.0, 29).view(1, 4, 7)
    y, state = shift_tokens(x, None, SequenceLayout(), causal=True)
    assert torch.equal(y[0, :, :3], F.pad(x[0, :3, :3], (0, 0, 1, 0)))
    assert torch.equal(y[0, :, 3:], x[0, :, 3:])
    assert torch.equal(state, x[:, -1:])
    y, _ = shift_tokens(x, None, SequenceLayout(), causal=False)
    assert torch.equal(y[0, :, :2], F.pad(x[0, :3, :2], (0, 0, 1, 0)))
    assert torch.equal(y[0, :, 2:4], x[0, :, 2:4])
    assert torch.equal(y[0, :, 4:6], F.pad(x[0, 1:, 4:6], (0, 0, 0, 1)))
    assert torch.equal(y[0, :, 6:], x[0, :, 6:])


def test_a_shift_knows_real_tokens_and_documents():
    x = torch.randn(1, 6, 6)
    mask = torch.tensor([[True, False, True, True, False, True]])
    layout = SequenceLayout(mask, torch.tensor([[0, 0, 0, 1, 1, 1]]), mask.int().argsort(dim=1, stable=True))
    for causal in (True, False):
        y, state = shift_tokens(x.masked_fill(~mask[..., None], torch.nan), None, layout, causal)
        for own in ([0, 2], [3, 5]):
            assert torch.equal(y[:, own], shift_tokens(x[:, own], None, SequenceLayout(), causal)[0])
        assert torch.equal(state, x[:, 5:])


@pytest.mark.parametrize("glu", [False, True])
def test_mlp_options_act_on_every_mlp(glu):
    """Upstream ignores both in its main MLP."""
    row = _local_global("mlp", ff_glu=glu, ff_dropout=0.5, receives_context=True)
    for mlp in (row.build().model.layers[0].mlp, row.build().model.layers[0].context_mlp):
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        hidden = mlp.up_proj(x)
        hidden = F.gelu(hidden[..., :40]) * hidden[..., 40:] if glu else F.gelu(hidden)
        assert_close(mlp(x), mlp.down_proj(hidden))
        torch.manual_seed(0)
        dropped = mlp.train()(x)
        torch.manual_seed(0)
        assert_close(dropped, mlp.down_proj(F.dropout(hidden, 0.5)))


def gradients_of(mlp, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])


def test_chunks_change_nothing_but_memory():
    fields = {"hidden_size": 16, "num_attention_heads": 2, "ff_glu": True}
    plain = LocalGlobalMLP(LocalGlobalConfig(**fields)).double()
    pieces = LocalGlobalMLP(LocalGlobalConfig(ff_chunks=4, **fields)).double()
    pieces.load_state_dict(plain.state_dict())
    for length in (1, 3, 64):
        x = torch.randn(2, length, 16, dtype=torch.float64)
        assert_close(pieces(x), plain(x))
        for actual, expected in zip(gradients_of(pieces, x), gradients_of(plain, x), strict=True):
            assert_close(actual, expected)
    kept = {}
    for name, mlp in (("plain", plain), ("pieces", pieces)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            mlp(torch.randn(2, 64, 16, dtype=torch.float64, requires_grad=True))
        kept[name] = max(sizes)
    # All that is kept for the backward pass is narrow: the wide activations live one piece at a time.
    assert kept == {"plain": 2 * 64 * 64, "pieces": 2 * 16 * 16}


CONTEXT = {
    "plain": {},
    "reversible_shift": {"reversible": True, "shift_tokens": True, "num_local_heads": 1, "blindspot_size": 3},
    "old_shared": {"semantics": "v0.2.1", "one_kv_head": True, "ff_glu": True},
}
contexts = pytest.mark.parametrize("fields", CONTEXT.values(), ids=CONTEXT)


def decoder(fields) -> Row:
    return _local_global("decoder", receives_context=True, **fields)


def context_for(batch, length=7):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 4:] = 0
    hidden = torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


@contexts
@torch.no_grad()
def test_decoding_with_a_context(fields):
    model, ids, context = decoder(fields).build(), tokens(2, LENGTH), context_for(2)
    whole = model(ids, **context).logits
    logits, _ = run_in_pieces(model, ids, 4, **context)
    assert_close(logits, whole, "in pieces")
    alone = model(ids[:1], encoder_hidden_states=context["encoder_hidden_states"][:1, :4]).logits
    assert_close(whole[:1], alone, "padding of the context")
    changed = context | {"encoder_hidden_states": context["encoder_hidden_states"].flip(0)}
    assert (model(ids, **changed).logits - whole).abs().amax(-1).min() > 1e-6


@contexts
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_a_context(fields, beams):
    model, ids, context = decoder(fields).build(), tokens(2, 3), context_for(2)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    generated = model.generate(ids, **context, **settings)
    if beams > 1:
        assert torch.equal(generated, model.generate(ids, **context, **settings, use_cache=False))
        return
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False, **context).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


@contexts
def test_encoder_and_decoder_train_together(fields):
    old = {"semantics": fields["semantics"]} if "semantics" in fields else {}
    encoder = _local_global("encoder", **ENCODER, **old).build("AutoModel")
    model, source, target = decoder(fields).build(), tokens(2, 9, seed=4), tokens(2, LENGTH)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0

    def loss():
        hidden = encoder(source, attention_mask=mask).last_hidden_state
        logits = model(target, encoder_hidden_states=hidden, encoder_attention_mask=mask).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())

    weight = encoder.layers[0].mixer.v_proj.weight
    loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*encoder.parameters(), *model.parameters()])
    step, slope = 1e-5, weight.grad[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += step
        above = loss()
        weight[0, 0] -= 2 * step
        below = loss()
    assert abs((above - below).item() / (2 * step) - slope) < 1e-3 * abs(slope) + 1e-9


def test_context_errors():
    model, ids, context = decoder({}).build(), tokens(2, 3), context_for(2)
    with pytest.raises(ValueError, match="receives_context=True needs encoder_hidden_states"):
        model(ids)
    with pytest.raises(ValueError, match="encoder_hidden_states needs receives_context=True"):
        _local_global("plain").build()(ids, **context)
    with pytest.raises(ValueError, match=r"encoder_hidden_states must be .*32\)"):
        model(ids, encoder_hidden_states=context["encoder_hidden_states"][..., :8])
    with pytest.raises(ValueError, match="encoder_attention_mask must be"):
        model(ids, **context | {"encoder_attention_mask": torch.ones(2, 3)})
