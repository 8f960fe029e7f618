"""The mixers of the local-global transformer against the formulas: heads, shared keys, rotary pairs, context."""

import pytest
import torch
from transformers import DynamicCache

from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.layers import rotary_tables
from lalm.modeling.local_global_mixer import CrossMixer, LocalGlobalMixer
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.modeling.exact import assert_close
from tests.ops.efficient_oracle import efficient
from tests.ops.test_local_attention import pairs

LENGTH = 13
PLAIN = SequenceLayout()


def config(**fields):
    sizes = {"hidden_size": 10, "num_attention_heads": 4, "head_dim": 6, "num_hidden_layers": 1, "vocab_size": 61}
    return LocalGlobalConfig(**(sizes | {"local_attn_window_size": 4, "position_embedding_type": "none"} | fields))


def build(kind, fields, *args):
    torch.manual_seed(0)
    return kind(config(**fields), *args).double().eval()


def hidden(batch=2, length=LENGTH, seed=1):
    return torch.randn(batch, length, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotate_upstream(x):
    """systems.md 1.6: t cos + rot(t) sin with rot(x)_2j = -x_2j+1 and rot(x)_2j+1 = x_2j."""
    frequencies = 10000.0 ** -(torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])
    angles = (torch.arange(x.shape[1])[:, None].float() * frequencies).repeat_interleave(2, -1)[:, None].double()
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def expected(mixer, x, rotary):
    """Every head by itself, from the dense formulas."""
    settings = mixer.config
    local, outputs = settings.local_heads(0), []
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, 6)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if rotary:
        q, k = rotate_upstream(q), rotate_upstream(k)
    for head in range(4):
        key = head
        if settings.one_kv_head:
            key = 1 if head >= local > 0 else 0
        one = {"q": q[:, :, head : head + 1], "k": k[:, :, key : key + 1], "v": v[:, :, key : key + 1]}
        if head < local:
            outputs.append(pairs(one, PLAIN, 4, settings.is_causal))
        else:
            outputs.append(
                efficient(one, PLAIN, settings.semantics, settings.blindspot_size, causal=settings.is_causal)
            )
    return torch.cat(outputs, -1).flatten(-2) @ mixer.o_proj.weight.T + mixer.o_proj.bias


@pytest.mark.parametrize("local", [0, 1, 3, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["", "one_kv_head"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"blindspot_size": 3},
        {"semantics": "v0.2.1", "blindspot_size": 2},
        {"position_embedding_type": "rope"},
        {"is_causal": False, "position_embedding_type": "rope"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_heads_are_the_formulas(local, shared, fields):
    mixer = build(LocalGlobalMixer, fields | {"num_local_heads": local, "one_kv_head": shared}, 0)
    keys = {0: 1, 4: 1}.get(local, 2) if shared else 4
    assert mixer.k_proj.weight.shape == mixer.v_proj.weight.shape == (keys * 6, 10)
    x, rotary = hidden(), {}
    if "position_embedding_type" in fields:
        rotary = {6: rotary_tables(torch.arange(LENGTH)[None], 6, 10000.0)}
    # The tables are float32: angles of up to 13 rad to 1e-6.
    tolerance = 1e-6 if rotary else 1e-12
    assert_close(mixer(x, PLAIN, rotary)[0], expected(mixer, x, rotary), "output", tolerance)


@pytest.mark.parametrize("local", [0, 2, 4])
def test_tokens_are_counted_once(local):
    mixer = build(LocalGlobalMixer, {"num_local_heads": local, "blindspot_size": 3}, 0)
    cache = DynamicCache(config=mixer.config)
    for piece in hidden().split([6, 1, 6], 1):
        mixer(piece, PLAIN, {}, cache)
    assert cache.get_seq_length() == LENGTH


def test_shared_keys_share_their_state():
    fields = {"num_local_heads": 2, "blindspot_size": 3, "one_kv_head": True}
    mixer = build(LocalGlobalMixer, fields, 0)
    cache = DynamicCache(config=mixer.config)
    mixer(hidden(), PLAIN, {}, cache)
    layer = cache.layers[0]
    assert layer.recurrent_states[0].shape == layer.recurrent_states[1].shape == (2, 1, 6, 8)
    assert layer.conv_states[0].shape == layer.conv_states[1].shape == (2, 1, 8, 6)


def test_dropout_is_for_local_weights_in_training():
    x = hidden()
    for local, differs in ((4, True), (0, False)):
        mixer = build(LocalGlobalMixer, {"num_local_heads": local, "attention_dropout": 0.5}, 0)
        plain = mixer(x, PLAIN, {})[0]
        assert torch.equal(mixer(x, PLAIN, {})[0], plain)
        assert torch.equal(mixer.train()(x, PLAIN, {})[0], plain) != differs


@pytest.mark.parametrize("fields", [{}, {"one_kv_head": True}, {"semantics": "v0.2.1"}], ids=str)
def test_cross_attention_is_the_formula(fields):
    """systems.md 1.3 with q from x and k, v from the real tokens of the context."""
    mixer, x, context = build(CrossMixer, fields), hidden(), hidden(length=5, seed=2)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    out = mixer(x, context, mask)
    for b in range(2):
        real = context[b : b + 1, mask[b].bool()]
        q, k, v = (
            (y @ p.weight.T).unflatten(-1, (-1, 6))
            for y, p in ((x[b : b + 1], mixer.q_proj), (real, mixer.k_proj), (real, mixer.v_proj))
        )
        k, v = (y.expand(-1, -1, 4, -1).softmax(1) if y is k else y.expand(-1, -1, 4, -1) for y in (k, v))
        scale = 1.0 if fields.get("semantics") else 6**-0.5
        o = torch.einsum("bihk,bjhk,bjhv->bihv", q.softmax(-1) * scale, k, v).flatten(-2)
        assert_close(out[b : b + 1], o @ mixer.o_proj.weight.T + mixer.o_proj.bias, "row", 1e-12)
    assert_close(mixer(x, context), mixer(x, context, torch.ones(2, 5)), "no mask", 1e-12)


def test_bad_context_is_named():
    mixer, x = build(CrossMixer, {}), hidden()
    with pytest.raises(ValueError, match=r"encoder_hidden_states must be .* = \(2, S, 10\), got \(1, 5, 10\)"):
        mixer(x, hidden(batch=1, length=5))
    with pytest.raises(ValueError, match=r"encoder_attention_mask must be .* = \(2, 5\), got \(2, 4\)"):
        mixer(x, hidden(length=5), torch.ones(2, 4))
