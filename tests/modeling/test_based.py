"""What Based adds to the common table: its published sizes, its three kinds of layers, and the paper's formulas."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import DynamicCache

from lalm.configuration.configuration_based import BasedConfig
from lalm.modeling.feature_maps import FeatureMap
from lalm.modeling.layers import rotary_tables, rotate
from lalm.modeling.modeling_based import BasedForCausalLM, BasedMixer, GatedConvolution
from lalm.modeling.ops.diagonal.linear_attention import chunk_linear_attention, recurrent_linear_attention
from lalm.modeling.softmax_attention import SoftmaxAttention
from tests.modeling.exact import assert_close, run, run_in_pieces, tokens
from tests.ops.test_op_golden import assert_golden, inputs
from tests.ops.test_op_golden import taylor as full_taylor
from tests.variants import TINY, Row

LENGTH = 12
LAYERS = {"num_hidden_layers": 4, "feature_dim": 6, "sliding_window": 5}


def based(**fields):
    return Row("based", BasedConfig, LAYERS | fields)


@pytest.mark.parametrize(("name", "count"), [("360m", 362_620_928), ("1.3b", 1_349_453_056)])
def test_presets_have_the_published_sizes(name, count):
    config = BasedConfig.from_preset(name)
    with torch.device("meta"):
        model = BasedForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    kinds = [type(layer.mixer) for layer in model.model.layers]
    pairs = {27: 5, 36: 7}[len(kinds)]
    assert kinds.count(BasedMixer) == kinds.count(SoftmaxAttention) == pairs
    assert kinds.count(GatedConvolution) == len(kinds) - 2 * pairs
    assert config.sliding_window == 129, "128 tokens back and the token itself"
    assert config.linear_key_dim == config.num_attention_heads == 16


def test_presets_take_overrides_and_refuse_other_names():
    config = BasedConfig.from_preset("360m", sliding_window=65, num_hidden_layers=24, pad_token_id=3)
    assert (config.sliding_window, config.num_hidden_layers, config.pad_token_id) == (65, 24, 3)
    assert config.linear_attention_layers == [1, 6, 11, 16, 21]
    with pytest.raises(ValueError, match=r"360M.*1\.3b.*360m"):
        BasedConfig.from_preset("360M")
    with pytest.raises(ValueError, match="linear_attention_layers.*0 to 19"):
        BasedConfig.from_preset("360m", num_hidden_layers=20)


@pytest.mark.parametrize(
    ("fields", "linear", "sliding"),
    [
        ({"num_hidden_layers": 1}, [0], []),
        ({"num_hidden_layers": 2}, [1], []),
        ({"num_hidden_layers": 3}, [1], [2]),
        ({"num_hidden_layers": 8}, [1, 6], [2, 7]),
        ({"num_hidden_layers": 27}, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
        ({"num_hidden_layers": 8, "full_attention_layers": [1, 7]}, [6], [2]),
        ({"num_hidden_layers": 8, "linear_attention_layers": [0, 2]}, [0, 2], [7]),
        ({"num_hidden_layers": 8, "sliding_attention_layers": [6]}, [1], [6]),
        ({"num_hidden_layers": 8, "linear_attention_layers": [], "sliding_attention_layers": []}, [], []),
    ],
    ids=str,
)
def test_layers_that_no_list_names(fields, linear, sliding):
    config = BasedConfig(**(TINY | fields))
    assert config.linear_attention_layers == linear
    assert config.sliding_attention_layers == sliding


BAD_FIELDS = [
    ({"feature_dim": 0}, "feature_dim"),
    ({"conv_size": 0}, "conv_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"sliding_window": None, "sliding_attention_layers": [0]}, "sliding_window"),
    ({"sliding_window": 0, "sliding_attention_layers": [0]}, "sliding_window"),
    ({"linear_attention_layers": [2]}, "linear_attention_layers.*0 to 1"),
    ({"linear_attention_layers": [-1]}, "linear_attention_layers"),
    ({"sliding_attention_layers": [5]}, "sliding_attention_layers.*0 to 1"),
    ({"linear_attention_layers": [0], "sliding_attention_layers": [0]}, "linear_.*sliding_attention_layers"),
    ({"linear_attention_layers": [1], "full_attention_layers": [1]}, "linear_.*full_attention_layers"),
    ({"sliding_attention_layers": [1], "full_attention_layers": [1]}, "full_.*sliding_attention_layers"),
    ({"is_causal": False}, "is_causal=True"),
    ({"hidden_size": 6, "sliding_attention_layers": [0]}, "rope.*even softmax head"),
    ({"feature_dims": 8}, "feature_dim"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[str(fields) for fields, _ in BAD_FIELDS])
def test_bad_field_is_named(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        BasedConfig(**(TINY | fields))


def test_what_writes_to_the_residual_stream_starts_smaller():
    torch.manual_seed(0)
    model = BasedForCausalLM(based(hidden_size=64, intermediate_size=128, num_hidden_layers=8).config())
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(16) if writes else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.1, name


def test_packed_features_are_the_kernel_of_the_full_ones():
    x, y = torch.randn(2, 4, 3, 2, 16, dtype=torch.float64)
    packed = FeatureMap("taylor", 16)

    def full(x):
        outer = (x[..., :, None] * x[..., None, :]).flatten(-2) / (math.sqrt(2) * 16**0.5)
        return torch.cat([torch.ones_like(x[..., :1]), x / 16**0.25, outer], -1)

    assert (packed(x).shape[-1], full(x).shape[-1]) == (153, 273)
    kernel = (full(x) * full(y)).sum(-1)
    assert_close((packed(x) * packed(y)).sum(-1), kernel, "kernel", tolerance=1e-14)
    s = (x * y).sum(-1) / 4
    assert_close(kernel, 1 + s + s**2 / 2, "series", tolerance=1e-13)
    assert kernel.min() >= 0.5


@pytest.mark.parametrize("fn", [recurrent_linear_attention, chunk_linear_attention])
def test_golden_rows(fn):
    _, q, k, v = inputs()
    packed = FeatureMap("taylor", 2)
    assert packed(q).shape[-1] == full_taylor(q).shape[-1] - 1
    assert_golden(fn(packed(q), packed(k), v, scale=1.0, eps=1e-12)[0], "taylor")


def test_normaliser_is_safe_in_float32():
    """2 000 tokens, queries and keys of norm 8: the sums stay exact to float32's own rounding."""
    q, k, v = torch.randn(3, 1, 2000, 2, 16, dtype=torch.float64)
    features = FeatureMap("taylor", 16)

    def attend(q, k, v):
        return chunk_linear_attention(features(2 * q), features(2 * k), v, scale=1.0, eps=1e-12)[0]

    assert_close(attend(q.float(), k.float(), v.float()).double(), attend(q, k, v), "outputs", tolerance=2e-5)


def test_rows_that_begin_with_padding_have_finite_gradients():
    model = based().build(dtype=torch.float32).train()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :7] = 0
    ids = tokens(2, LENGTH)
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def linear_by_paper(p, x, heads):
    """o_i = sum_j w_ij v_j / sum_j w_ij over j <= i, w = 1 + s + s^2 / 2, s = q_i . k_j / sqrt(f); no rotation."""
    q, k, v = ((x @ p[f"{n}_proj.weight"].T).chunk(heads, -1) for n in "qkv")
    outputs = []
    for h in range(heads):
        s = q[h] @ k[h].T / q[h].shape[-1] ** 0.5
        weights = (1 + s + s**2 / 2).tril()
        outputs.append(weights @ v[h] / weights.sum(-1, keepdim=True))
    return torch.cat(outputs, -1) @ p["o_proj.weight"].T


def window_by_paper(p, x, heads, window=5):
    """Rotary softmax attention from token i to the tokens i - 4 ... i."""
    q, k, v = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (heads, -1)) for n in "qkv")
    tables = rotary_tables(torch.arange(len(x))[None], q.shape[-1], 10000.0)
    q, k = rotate(q[None], tables)[0], rotate(k[None], tables)[0]
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    weights = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(-2) @ p["o_proj.weight"].T


def convolution_by_paper(p, x, heads):
    """Zoology's BaseConv in Based: out(silu(conv3(u1)) * u2)."""
    u1, u2 = (x @ p["in_proj.weight"].T + p["in_proj.bias"]).chunk(2, -1)
    convolved = F.conv1d(F.pad(u1.T, (2, 0)), p["conv.weight"][:, None], groups=u1.shape[-1]).T
    return (F.silu(convolved) * u2) @ p["o_proj.weight"].T + p["o_proj.bias"]


def test_language_model_is_the_paper():
    model, ids = based().build(), tokens(1, LENGTH)
    weights = model.state_dict()
    x = weights["model.embed_tokens.weight"][ids[0]]
    for index, mixer in enumerate((convolution_by_paper, linear_by_paper, window_by_paper, convolution_by_paper)):
        prefix = f"model.layers.{index}."
        p = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        mix = {name.removeprefix("mixer."): w for name, w in p.items() if name.startswith("mixer.")}
        x = x + mixer(mix, rms(x, p["mixer_norm.weight"]), heads=2)
        h = rms(x, p["mlp_norm.weight"])
        x = (
            x
            + (F.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
        )
    logits = rms(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
    # Rotary tables are float32.
    assert_close(run(model, ids)[0][0], logits, "logits", tolerance=1e-7)


def test_only_the_softmax_layers_know_positions():
    ids = tokens(1, LENGTH)
    for layers, knows in (
        ({"sliding_attention_layers": []}, False),
        ({}, True),
        ({"full_attention_layers": [3]}, True),
    ):
        rope = run(based(**layers).build(), ids)[0]
        none = run(based(position_embedding_type="none", **layers).build(), ids)[0]
        assert torch.equal(rope, none) != knows
    odd = based(feature_dim=5).build()
    assert run(odd, ids)[0].isfinite().all(), "an odd feature_dim is not rotated"


def test_decoding_keeps_a_window_of_keys():
    """After 500 tokens the sliding layer holds less than its window, and the other layers what they held at once."""
    model = based(sliding_window=9).build(dtype=torch.float32)
    model.generation_config.eos_token_id = None
    cache = DynamicCache(config=model.config)
    out = model.generate(tokens(1, 4), max_new_tokens=500, do_sample=False, past_key_values=cache)
    assert out.shape == (1, 504)
    assert cache.get_seq_length() == 503
    assert cache.layers[2].keys.shape == (1, 2, 8, 16)
    _, short = run(model, out[:, :10])
    for index in (0, 1, 3):
        for kind in ("conv_states", "recurrent_states"):
            sizes = [
                [None if state is None else state.shape for state in getattr(c.layers[index], kind).values()]
                for c in (cache, short)
            ]
            assert sizes[0] == sizes[1]


def test_a_stack_of_convolutions_alone():
    """The paper's starting point; its layers count the tokens though none of them has a recurrent state."""
    model, ids = based(linear_attention_layers=[], sliding_attention_layers=[]).build(), tokens(2, LENGTH)
    logits, cache = run(model, ids)
    pieces, pieces_cache = run_in_pieces(model, ids, [1, 7, 4])
    assert_close(pieces, logits, "logits")
    assert cache.get_seq_length() == pieces_cache.get_seq_length() == LENGTH
    assert all(isinstance(layer.mixer, GatedConvolution) for layer in model.model.layers)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] - 3 + 1) % 58 + 3
    difference = (run(model, changed)[0] - logits).abs().amax((0, -1))
    reach = 4 * 2  # layers times tokens back
    assert (difference[: reach + 1] > 1e-7).all()
    assert (difference[reach + 1 :] == 0).all()
