"""The table of tiny models that every test in tests/modeling runs over.

Adding a variant is adding rows: one for its defaults, one for each switch that changes how tokens, padding, documents
or states meet. A row may switch tests off by the beginning of their names, only with a reason, which pytest prints.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch

import lalm
from lalm.configuration.configuration_based import BasedConfig
from lalm.configuration.configuration_delta_net import DeltaNetConfig
from lalm.configuration.configuration_gla import GLAConfig
from lalm.configuration.configuration_lam import LamConfig
from lalm.configuration.configuration_linear_attention import LinearAttentionConfig
from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.configuration.configuration_retnet import RetNetConfig

HEADS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")
ENCODER_HEADS = tuple(head.replace("CausalLM", "MaskedLM") for head in HEADS)
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Row:
    """One tiny configuration. `off` maps the beginning of a test's name to the reason why this row does not run it."""

    name: str
    config_class: type
    fields: dict = field(default_factory=dict)
    off: dict = field(default_factory=dict)

    def config(self, **changes):
        return self.config_class(**(TINY | self.fields | changes))

    def model_class(self, head="AutoModelForCausalLM"):
        (variant,) = [variant for variant in lalm.VARIANTS if variant.config is self.config_class]
        return variant.models[head]

    def build(self, head="AutoModelForCausalLM", dtype=torch.float64, seed=0, **changes):
        """A model in eval mode whose every parameter matters: unit-scale weights, norms and biases off their defaults.

        The initialisation of training (0.02, gains 1, biases 0) would hide most mistakes under small numbers.
        """
        torch.manual_seed(seed)
        model = self.model_class(head)(self.config(**changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            model.get_input_embeddings().weight.normal_()
        return model.to(dtype).eval()

    @property
    def is_recurrent(self):
        """No softmax layer: the whole memory is the recurrent state."""
        return set(self.config().layer_types) == {"lalm_linear_attention"}


def _linear(name, off=None, **fields):
    return Row(f"linear_{name}", LinearAttentionConfig, fields, off or {})


def _gla(name, off=None, **fields):
    return Row(f"gla_{name}", GLAConfig, fields, off or {})


def _delta_net(name, off=None, **fields):
    return Row(f"delta_net_{name}", DeltaNetConfig, fields, off or {})


def _retnet(name, off=None, **fields):
    return Row(f"retnet_{name}", RetNetConfig, fields, off or {})


def _based(name, off=None, **fields):
    return Row(f"based_{name}", BasedConfig, {"num_hidden_layers": 4, "feature_dim": 6} | fields, off or {})


def _local_global(name, off=None, **fields):
    return Row(f"local_global_{name}", LocalGlobalConfig, {"local_attn_window_size": 4} | fields, off or {})


def _lam(name, off=None, **fields):
    return Row(f"lam_{name}", LamConfig, {"is_causal": True} | fields, off or {})


# test_static_sliding_cache_refuses_later_padding holds the refusal.
STATIC_SLIDING = {"test_padding_in_later_pieces[static": "refused: a static sliding cache cannot move cached tokens"}
# Its sums are held by hand in tests/ops/test_window_linear.py.
ONE_FORM = {"test_language_model": "there is one form, in operations that autograd knows, and no recurrent one"}
HYBRID = {"num_hidden_layers": 3, "position_embedding_type": "rope"}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = (
    _linear("plain"),
    _linear("conv_gated_mlp", use_short_conv=True, conv_size=4, mlp_type="gated", tie_word_embeddings=True),
    _linear("conv_qk_norm_rope", use_short_conv=True, conv_size=3, qk_norm=True, position_embedding_type="rope"),
    _linear("learned_layernorm", position_embedding_type="learned", norm_type="layernorm"),
    _linear("sinusoidal_tied", position_embedding_type="sinusoidal", tie_word_embeddings=True),
    _linear("unnormalized_identity", feature_map="identity", normalize=False),
    _linear("normalized_with_output_norm", output_norm=True, expand_k=0.5, expand_v=2),
    _linear("relu", feature_map="relu", hidden_act="relu"),
    _linear("exp", feature_map="exp"),
    _linear("softmax", feature_map="softmax", expand_v=0.5),
    _linear("taylor", feature_map="taylor", num_attention_heads=4),
    _linear("dpfp", feature_map="dpfp"),
    _linear("favor", feature_map="favor"),
    _linear("hedgehog", feature_map="hedgehog"),
    _linear("elementwise_product", feature_map="elementwise_product", normalize=False),
    _linear("hybrid_full", full_attention_layers=[1], use_short_conv=True, qk_norm=True, **HYBRID),
    _linear("hybrid_learned", full_attention_layers=[0], position_embedding_type="learned"),
    _linear("hybrid_sliding", off=STATIC_SLIDING, sliding_attention_layers=[0, 2], sliding_window=6, **HYBRID),
    _linear(
        "hybrid_both",
        off=STATIC_SLIDING,
        full_attention_layers=[2],
        sliding_attention_layers=[0],
        sliding_window=5,
        **HYBRID | GROUPED,
    ),
    _linear("window_centroids", off=ONE_FORM, feature_map="centroids", window_size=3, num_sink_tokens=2, **GROUPED),
    _linear(
        "window_hedgehog",
        off=ONE_FORM,
        feature_map="hedgehog",
        window_size=4,
        qk_norm=True,
        attention_bias=True,
        mlp_bias=True,
        head_dim=12,
        full_attention_layers=[1],
        **HYBRID | GROUPED,
    ),
    _gla("plain"),
    _gla("conv_tied", use_short_conv=True, conv_size=4, tie_word_embeddings=True),
    _gla("qk_norm_rope", qk_norm=True, position_embedding_type="rope"),
    _gla("no_output_gate", use_output_gate=False, expand_k=1, expand_v=2, gate_logit_normalizer=1, mlp_type="mlp"),
    _gla("hybrid_full", full_attention_layers=[1], use_short_conv=True, **HYBRID | GROUPED),
    _gla(
        "hybrid_sliding",
        off=STATIC_SLIDING,
        sliding_attention_layers=[1],
        sliding_window=6,
        use_short_conv=True,
        **HYBRID,
    ),
    _delta_net("plain"),
    _delta_net("negative_rope", allow_neg_eigval=True, position_embedding_type="rope", use_output_gate=True),
    _delta_net("no_conv_expanded", use_short_conv=False, expand_v=2, qk_norm=True, tie_word_embeddings=True),
    _delta_net("gated", decay="head", expand_v=2),
    _delta_net("channel", decay="channel", expand_v=2),
    _delta_net("gated_no_conv", decay="head", use_output_gate=False, use_short_conv=False, expand_k=0.5),
    _delta_net(
        "hybrid_both",
        off=STATIC_SLIDING,
        decay="head",
        full_attention_layers=[2],
        sliding_attention_layers=[0],
        sliding_window=5,
        **HYBRID | GROUPED,
    ),
    _retnet("plain"),
    _retnet("conv_qk_norm", use_short_conv=True, conv_size=3, qk_norm=True, tie_word_embeddings=True),
    _retnet("no_gate_no_positions", use_output_gate=False, position_embedding_type="none", expand_k=0.5, expand_v=1),
    _retnet(
        "hybrid_both",
        off=STATIC_SLIDING,
        full_attention_layers=[2],
        sliding_attention_layers=[0],
        sliding_window=5,
        use_short_conv=True,
        **HYBRID | GROUPED,
    ),
    _lam("plain"),
    _lam("rope_no_conv", position_embedding_type="rope", use_short_conv=False, tie_word_embeddings=False),
    _lam("no_flux_constant_decay", use_flux=False, use_adaptive_decay=False, qk_norm=True, expand_v=2),
    _lam("no_leak_no_norm", use_leak=False, use_output_norm=False, position_embedding_type="learned"),
    _lam("no_delta_no_gate", use_delta_rule=False, use_output_gate=False, conv_size=3),
    _lam("one_memory", num_memories=1, decay_init=[0.9], use_flux=False, use_leak=False, norm_type="rmsnorm"),
    _lam(
        "hybrid_both",
        off=STATIC_SLIDING,
        full_attention_layers=[2],
        sliding_attention_layers=[0],
        sliding_window=5,
        **HYBRID | GROUPED,
    ),
    # Layers: convolution, linear, sliding, convolution.
    _based("plain", off=STATIC_SLIDING, sliding_window=6),
    _based("without_sliding", sliding_attention_layers=[], conv_size=4, tie_word_embeddings=False),
    _based(
        "full",
        off=STATIC_SLIDING,
        num_hidden_layers=5,
        full_attention_layers=[4],
        linear_attention_layers=[0, 3],
        sliding_attention_layers=[2],
        sliding_window=5,
        qk_norm=True,
        use_short_conv=True,
        feature_dim=3,
    ),
    _local_global("plain", num_local_heads=1),
    _local_global("blindspot", num_local_heads=1, blindspot_size=3, pkm_layers=[0], pkm_num_keys=6),
    _local_global("one_kv_head", num_attention_heads=4, num_local_heads=2, one_kv_head=True),
    _local_global("reversible", reversible=True, num_local_heads=1),
    _local_global("v021", semantics="v0.2.1", one_kv_head=True, position_embedding_type="learned"),
    _local_global("v021_blindspot", semantics="v0.2.1", blindspot_size=4, shift_tokens=True),
    _local_global("rope", position_embedding_type="rope", num_local_heads=1, head_dim=10),
    _local_global("factorised_tied", embedding_size=20, tie_word_embeddings=True, position_embedding_type="learned"),
    _local_global("shift_tokens", shift_tokens=True, num_local_heads=1),
    _local_global("shift_reversible_blindspot", shift_tokens=True, reversible=True, blindspot_size=4),
    _local_global("ff_chunks_glu", ff_chunks=3, ff_glu=True, position_embedding_type="none"),
    _local_global("layer_list", num_local_heads=[2, 0], position_embedding_type="sinusoidal"),
)
# Models that read both sides (tests/modeling/test_bidirectional.py).
ENCODER = {"is_causal": False, "use_short_conv": True, "conv_size": 4}
OWN_GATES = {"test_reversed_text": "each direction has gates of its own"}
ENCODERS = (
    _linear("encoder", is_causal=False),
    _linear("encoder_conv_learned", position_embedding_type="learned", **ENCODER),
    _linear("encoder_unnormalized", normalize=False, feature_map="relu", **ENCODER | {"conv_size": 3}),
    _linear(
        "encoder_hybrid",
        is_causal=False,
        full_attention_layers=[1],
        sliding_attention_layers=[2],
        sliding_window=4,
        **HYBRID,
    ),
    _gla("encoder", is_causal=False),
    _gla("encoder_conv_rope", position_embedding_type="rope", **ENCODER),
    _delta_net("encoder", is_causal=False),
    _delta_net("encoder_gated_rope", decay="head", position_embedding_type="rope", **ENCODER),
    _retnet("encoder", is_causal=False),
    _retnet("encoder_conv_qk_norm", qk_norm=True, **ENCODER),
    _lam("encoder", off=OWN_GATES, is_causal=False),
    _lam("encoder_learned_no_flux", OWN_GATES, is_causal=False, position_embedding_type="learned", use_flux=False),
    _lam(
        "encoder_one_memory",
        off=OWN_GATES,
        is_causal=False,
        num_memories=1,
        decay_init=[0.9],
        use_flux=False,
        use_leak=False,
    ),
    # Windows that divide the length of the tests lie alike in both directions.
    _local_global("encoder", is_causal=False, num_local_heads=1, local_attn_window_size=7),
    _local_global(
        "encoder_shift_v021",
        off={"test_reversed_text": "a shift takes different features from either side"},
        is_causal=False,
        shift_tokens=True,
        semantics="v0.2.1",
        one_kv_head=True,
        num_local_heads=1,
        reversible=True,
    ),
)
# One row for each way of keeping memory: for tests whose subject is the surroundings, not the arithmetic.
FEW = (
    "linear_plain",
    "linear_learned_layernorm",
    "linear_hybrid_both",
    "gla_conv_tied",
    "gla_hybrid_full",
    "delta_net_gated",
    "lam_rope_no_conv",
    "based_plain",
    "local_global_blindspot",
)


def _params(rows):
    return [pytest.param(row, id=row.name) for row in rows]


def _all(rows):
    """Every row; those that are not the only one of their kind are left out of `make test-fast`."""
    fast = [row.name.endswith(("_plain", "_encoder")) or row.name in FEW for row in rows]
    marks = [() if kept else pytest.mark.slow for kept in fast]
    return [pytest.param(row, id=row.name, marks=mark) for row, mark in zip(rows, marks, strict=True)]


every_encoder = pytest.mark.parametrize("row", _all(ENCODERS))
every_row = pytest.mark.parametrize("row", _all(ROWS))
few_rows = pytest.mark.parametrize("row", _params([row for row in ROWS if row.name in FEW]))
each_variant = pytest.mark.parametrize("row", _params([row for row in ROWS if row.name.endswith("_plain")]))
recurrent_rows = pytest.mark.parametrize("row", _all([row for row in ROWS if row.is_recurrent]))
