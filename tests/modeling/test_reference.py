"""Whole models against other implementations: the papers' formulas token by token, and stock transformers models."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from lalm.configuration.configuration_gla import GLAConfig
from lalm.configuration.configuration_linear_attention import LinearAttentionConfig
from lalm.modeling.feature_maps import FeatureMap
from lalm.modeling.layers import ShortConvolution
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.modeling.exact import assert_close, run, tokens
from tests.variants import Row

LENGTH = 12
EPS = 1e-5


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def gla_by_paper(p, x, heads):
    """arXiv 2312.06635, section 4.4, one token and head at a time: eq. 3 and the output layer below it."""
    outputs, states = [], {}
    for x_t in x:
        alpha = torch.sigmoid(p["gk_proj.1.weight"] @ (p["gk_proj.0.weight"] @ x_t) + p["gk_proj.1.bias"]) ** (1 / 16)
        q, k, v, alpha = (
            t.chunk(heads)
            for t in (p["q_proj.weight"] @ x_t, p["k_proj.weight"] @ x_t, p["v_proj.weight"] @ x_t, alpha)
        )
        o = []
        for h in range(heads):
            states[h] = alpha[h][:, None] * states.get(h, 0) + torch.outer(k[h], v[h])
            o.append(rms(q[h] @ states[h] * len(q[h]) ** -0.5, p["o_norm.weight"]))
        outputs.append(p["o_proj.weight"] @ (torch.cat(o) * F.silu(p["g_proj.weight"] @ x_t)))
    return torch.stack(outputs)


def linear_by_paper(p, x, heads):
    """arXiv 2006.16236, eq. 8: o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j), over j <= i."""
    q, k, v = (x @ p[f"{n}_proj.weight"].T for n in "qkv")
    heads_out = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        weights = ((F.elu(q_h) + 1) @ (F.elu(k_h) + 1).T).tril()
        heads_out.append(weights @ v_h / (weights.sum(-1, keepdim=True) + 1e-6))
    return torch.cat(heads_out, -1) @ p["o_proj.weight"].T


@pytest.mark.parametrize(
    ("row", "mixer"),
    [
        (Row("gla", GLAConfig, {"num_hidden_layers": 2}), gla_by_paper),
        (Row("linear", LinearAttentionConfig, {"num_hidden_layers": 2}), linear_by_paper),
    ],
    ids=["gla", "linear"],
)
def test_language_model_is_the_paper(row, mixer):
    model, ids = row.build(), tokens(1, LENGTH)
    weights = model.state_dict()
    x = weights["model.embed_tokens.weight"][ids[0]]
    for index in range(2):
        prefix = f"model.layers.{index}."
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        mix = {name.removeprefix("mixer."): w for name, w in layer.items() if name.startswith("mixer.")}
        x = x + mixer(mix, rms(x, layer["mixer_norm.weight"]), heads=2)
        h = rms(x, layer["mlp_norm.weight"])
        up = h @ layer["mlp.up_proj.weight"].T
        gated = "mlp.gate_proj.weight" in layer
        up = F.silu(h @ layer["mlp.gate_proj.weight"].T) * up if gated else F.gelu(up)
        x = x + up @ layer["mlp.down_proj.weight"].T
    logits = rms(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    assert_close(run(model, ids)[0][0], logits, "logits")


SOFTMAX = {
    "mlp_type": "gated",
    "hidden_act": "silu",
    "position_embedding_type": "rope",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STOCK_NAMES = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mixer": "self_attn"}


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left_padded"])
def test_softmax_layers_are_llama_and_mistral(kind, padded):
    """A stack of softmax layers only is Llama, with a window Mistral: the same weights must give the same logits."""
    layers = {f"{kind}_attention_layers": [0, 1]}
    window = {"sliding_window": 5} if kind == "sliding" else {}
    row = Row(kind, LinearAttentionConfig, SOFTMAX | layers | window)
    model, ids = row.build(), tokens(2, LENGTH)
    config_class = transformers.LlamaConfig if kind == "full" else transformers.MistralConfig
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: getattr(model.config, name) for name in (*names, "num_key_value_heads", "pad_token_id")}
    config = config_class(**fields, **window, rms_norm_eps=EPS, head_dim=8, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    stock = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    renamed = {}
    for name, weight in model.state_dict().items():
        renamed[".".join(STOCK_NAMES.get(part, part) for part in name.split("."))] = weight
    stock.load_state_dict(renamed)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask, position_ids=positions).logits
        actual = model(ids, attention_mask=mask).logits
    # Stock norms work in float32.
    assert_close(actual[mask.bool()], expected[mask.bool()], "logits", tolerance=1e-5)


def test_short_convolution_is_a_depthwise_conv1d():
    conv = ShortConvolution(6, 4).double()
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    (first, second), state = conv((x[..., :2], x[..., 2:]), None, SequenceLayout())
    expected = F.conv1d(F.pad(x.mT, (3, 0)), conv.weight[:, None], groups=6).mT
    assert_close(torch.cat([first, second], dim=-1), F.silu(expected), "outputs")
    assert torch.equal(state, x[:, -3:])


@pytest.mark.parametrize(("width", "sides"), [(3, (1, 1)), (4, (2, 1)), (5, (2, 2))])
def test_short_convolution_of_an_encoder_is_centred(width, sides):
    conv = ShortConvolution(6, width, causal=False, activation=False).double()
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = F.conv1d(F.pad(x.mT, sides), conv.weight[:, None], groups=6).mT
    assert_close(conv((x,), None, SequenceLayout())[0][0], expected, "outputs")


def feature(name, x, **kwargs):
    maps = FeatureMap(name, x.shape[-1], **kwargs)
    if hasattr(maps, "map"):
        maps.map.reset_parameters()
    return maps(x)


def test_fixed_feature_maps():
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    assert_close(feature("elu", x), F.elu(x) + 1, "elu")
    assert torch.equal(feature("relu", x), x.clamp(min=0))
    assert torch.equal(feature("exp", x), x.exp())
    assert torch.equal(feature("identity", x), x)
    assert_close(feature("softmax", x).sum(-1), torch.ones(2, 3, 2, dtype=torch.float64), "softmax")
    y = torch.randn_like(x)
    s = (x * y).sum(-1) / 5**0.5
    assert_close((feature("taylor", x) * feature("taylor", y)).sum(-1), 1 + s + s**2 / 2, "taylor")
    both = torch.cat([x.relu(), (-x).relu()], -1)
    shifted = torch.cat([both.roll(1, -1), both.roll(2, -1)], -1)
    assert_close(feature("dpfp", x, dpfp_nu=2), torch.cat([both, both], -1) * shifted, "dpfp")


def test_favor_features_estimate_the_softmax_kernel():
    """Unbiased for every pair: needs directions that are uniform on the sphere, which bare QR factors are not."""
    x, y = torch.randn(2, 50, 1, 1, 8, dtype=torch.float64) * 0.2
    maps = FeatureMap("favor", 8, num_features=20_000)
    maps.map.reset_parameters()
    kernel = (x * y).sum(-1) / 8**0.5
    assert_close((maps(x) * maps(y)).sum(-1), kernel.exp(), "kernel", tolerance=0.02)
    assert "map.directions" in maps.state_dict(), "random directions must be saved with the weights"


def test_hedgehog_starts_at_the_identity_and_learns():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    maps = FeatureMap("hedgehog", 4).double()
    maps.map.reset_parameters()
    assert_close(maps(x), torch.cat([x.softmax(-1), (-x).softmax(-1)], -1), "features")
    maps(x).square().sum().backward()
    assert maps.map.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["elu", "relu", "softmax", "taylor", "dpfp", "favor", "hedgehog"])
def test_feature_maps_stay_finite_and_wide(name):
    """Large inputs, zeros and bfloat16: finite values and gradients, in float32."""
    x = torch.tensor([-80.0, -10.0, 0.0, 10.0, 80.0, 1e-30]).bfloat16()[None, None, None].requires_grad_()
    y = feature(name, x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, {}) for name in ("elu", "relu", "exp", "softmax", "taylor", "identity", "hedgehog", "elementwise_product")]
    + [("dpfp", {"dpfp_nu": 2}), ("favor", {}), ("favor", {"num_features": 9})],
)
def test_number_of_features(name, fields):
    assert feature(name, torch.randn(1, 2, 3, 6), **fields).shape[-1] == FeatureMap(name, 6, **fields).num_features


def test_elu_keeps_small_values_in_bfloat16():
    """elu(-10) + 1 = 4.5e-5 is rounded to 0 beside a 1 in bfloat16, and to 4.5299e-5 in float32."""
    y = feature("elu", torch.full((1, 1, 1, 1), -10.0, dtype=torch.bfloat16))
    assert abs(y.item() / 4.539992976e-05 - 1) < 1e-6
