# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of flash-linear-attention to ours and back, held against its version 0.6.0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig
from transformers.utils import cached_file

import lalm
from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.modeling_heads import LalmForCausalLM
from lalm.modeling.saving import staged_save

StateDict = dict[str, torch.Tensor]


class Family(NamedTuple):
    """How one model_type of flash-linear-attention relates to one of our configurations."""

    config: type[LalmConfig]
    fields: dict[str, str]  # theirs -> ours, in addition to `_FIELDS`
    required: dict[str, tuple]  # theirs -> the values that we can represent
    ours: dict[str, Any]  # our fields that are the same for every checkpoint
    output_norm: str = "o_norm"


_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "norm_eps",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "use_cache": "use_cache",
}
_WIDTHS = {"expand_k": "expand_k", "expand_v": "expand_v"}
_CONVOLUTION = {"use_short_conv": "use_short_conv", "conv_size": "conv_size"}
_SWISH = ("swish", "silu")
_REQUIRED = {"attn": (None,), "hidden_act": _SWISH, "attnres_block_size": (None,), "conv_bias": (False,)}
_PLAIN_NORM = {"elementwise_affine": (True, None)}
_OURS = {"mlp_type": "gated", "hidden_act": "silu", "norm_type": "rmsnorm", "qk_norm": False, "is_causal": True}
_OURS |= {"full_attention_layers": [], "sliding_attention_layers": [], "dropout": 0.0}
_OURS |= {"attention_bias": False, "mlp_bias": False}
_NO_POSITIONS = _OURS | {"position_embedding_type": "none"}
# How kernels run, fields that a layer never sees, and those that are read apart from `fields`.
_IGNORED = {
    "model_type", "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy",
    "use_l2warp", "hidden_ratio", "use_output_norm", "num_kv_heads", "num_v_heads", "head_dim",
    "expand_v", "conv_size", "architectures",
    "torch_dtype", "dtype", "transformers_version", "auto_map", "_name_or_path",
}  # fmt: skip

FAMILIES = {
    "gla": Family(
        lalm.GLAConfig,
        _WIDTHS | _CONVOLUTION | {"use_output_gate": "use_output_gate"},
        _REQUIRED
        | _PLAIN_NORM
        | {"feature_map": (None,), "clamp_min": (None,), "use_gk": (True,), "use_gv": (False,)},
        _NO_POSITIONS | {"gate_low_rank_dim": 16, "gate_logit_normalizer": 16},
        "g_norm",
    ),
    "retnet": Family(
        lalm.RetNetConfig,
        _WIDTHS | {"use_output_gate": "use_output_gate"},
        # Their block does not hand the convolution to the layer.
        _REQUIRED | _PLAIN_NORM | {"feature_map": (None,), "use_short_conv": (False, True)},
        _OURS | {"position_embedding_type": "rope", "rope_theta": 10000.0, "use_short_conv": False},
        "g_norm",
    ),
    "delta_net": Family(
        lalm.DeltaNetConfig,
        _WIDTHS | _CONVOLUTION | {"use_gate": "use_output_gate", "allow_neg_eigval": "allow_neg_eigval"},
        _REQUIRED | {"use_beta": (True,), "qk_norm": ("l2",), "qk_activation": ("silu",)},
        _NO_POSITIONS | {"decay": "none"},
    ),
    "gated_deltanet": Family(
        lalm.DeltaNetConfig,
        _CONVOLUTION | {"use_gate": "use_output_gate", "allow_neg_eigval": "allow_neg_eigval"},
        _REQUIRED | {"output_gate_activation": _SWISH},
        _NO_POSITIONS | {"decay": "head"},
    ),
    "kda": Family(
        lalm.DeltaNetConfig,
        _CONVOLUTION | {"allow_neg_eigval": "allow_neg_eigval"},
        # A gate with a bound has another formula.
        _REQUIRED | {"safe_gate": (False,), "lower_bound": (None,)},
        _NO_POSITIONS | {"decay": "channel", "use_output_gate": True},
    ),
    "linear_attn": Family(
        lalm.LinearAttentionConfig,
        _WIDTHS | {"feature_map": "feature_map"},
        _REQUIRED
        | _PLAIN_NORM
        | {"feature_map": ("elementwise_product", "elu", "relu", "identity", "dpfp")}
        | dict.fromkeys(("tie_feature_map_qk", "norm_q", "norm_k", "norm_feature_map"), (False,)),
        _NO_POSITIONS | {"normalize": False, "output_norm": True, "use_short_conv": False, "dpfp_nu": 4},
        "norm",
    ),
}
_BY_HEAD = ("gated_deltanet", "kda")  # whose configurations give the size of a head
# Where fla's own defaults differ from "absent" in config.json.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gla": {"expand_k": 0.5, "hidden_size": 2048, "num_heads": 4, "num_hidden_layers": 24},
    "retnet": {"expand_v": 2.0, "hidden_ratio": 2, "hidden_size": 2048, "num_heads": 8, "num_hidden_layers": 24},
    "delta_net": {"use_short_conv": True, "hidden_size": 2048, "num_heads": 16, "num_hidden_layers": 24},
    "gated_deltanet": {
        "expand_v": 2.0, "use_gate": True, "use_short_conv": True, "hidden_size": 2048, "head_dim": 256,
        "num_heads": 6, "num_hidden_layers": 21,
    },
    "kda": {
        "use_short_conv": True, "hidden_size": 2048, "head_dim": 128, "num_heads": 16, "num_hidden_layers": 24,
    },
    "linear_attn": {
        "feature_map": "elementwise_product", "hidden_size": 2048, "num_heads": 4, "num_hidden_layers": 24
    },
}  # fmt: skip
_COMMON_DEFAULTS = {
    "expand_k": 1.0, "expand_v": 1.0, "hidden_ratio": 4, "intermediate_size": None, "use_output_gate": True,
    "use_gate": False, "use_short_conv": False, "conv_size": 4, "allow_neg_eigval": False, "norm_eps": 1e-6,
    "vocab_size": 32000, "max_position_embeddings": 2048, "initializer_range": 0.02, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
}  # fmt: skip


def config_from_fla(theirs: dict[str, Any]) -> LalmConfig:
    """Our configuration of what fla's config.json says.

    Raises:
        ValueError: a model type or a setting that we cannot represent exactly; the message names it.
    """
    name = theirs.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} cannot be converted from fla; these can: {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    known = set(_FIELDS) | set(family.fields) | set(family.required) | _IGNORED | set(PreTrainedConfig().to_dict())
    for field, value in theirs.items():
        if field not in known:
            raise ValueError(f"fla's {name} has a field {field} = {value!r} that this converter does not know.")
    for field, allowed in family.required.items():
        if theirs.get(field, allowed[0]) not in allowed:
            raise ValueError(
                f"{field} = {theirs[field]!r} of fla's {name} has no counterpart here; only {allowed[0]!r} has."
            )
    given = _COMMON_DEFAULTS | _DEFAULTS[name] | theirs
    for field in ("num_kv_heads", "num_v_heads"):
        if given.get(field) not in (None, given["num_heads"]):
            raise ValueError(f"{field} = {given[field]} differs from num_heads = {given['num_heads']}: not available.")
    fields = {ours: given[field] for field, ours in (_FIELDS | family.fields).items() if field in given}
    if fields["intermediate_size"] is None:
        width = int(given["hidden_size"] * (given["hidden_ratio"] or 4) * 2 / 3)
        fields["intermediate_size"] = -(-width // 256) * 256
    if name in _BY_HEAD:
        fields["expand_k"] = given["num_heads"] * given["head_dim"] / given["hidden_size"]
        fields["expand_v"] = fields["expand_k"] * given["expand_v"]
    return family.config(**fields | family.ours)


def config_to_fla(config: LalmConfig) -> dict[str, Any]:
    """What fla's config.json says of our configuration.

    Raises:
        ValueError: a setting that fla cannot represent; the message names it.
    """
    name = _family_of(config)
    family = FAMILIES[name]
    for field, value in family.ours.items():
        if getattr(config, field) != value:
            raise ValueError(f"{field} = {getattr(config, field)!r} has no counterpart in fla's {name}.")
    allowed = family.required.get("feature_map", (None,))
    theirs = {field: getattr(config, ours) for field, ours in (_FIELDS | family.fields).items()}
    if theirs.get("feature_map") not in allowed:
        raise ValueError(f"feature_map = {theirs['feature_map']!r} has no counterpart in fla's {name}.")
    if name in _BY_HEAD:
        theirs["head_dim"] = config.linear_key_dim
        theirs["expand_v"] = config.linear_value_dim / config.linear_key_dim
    class_prefix = {"gla": "GLA", "retnet": "RetNet", "delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet"}
    class_prefix["kda"] = "KDA"
    architecture = f"{class_prefix.get(name, 'LinearAttention')}ForCausalLM"
    return {"model_type": name, "hidden_act": "swish", "architectures": [architecture], **theirs}


def _family_of(config: LalmConfig) -> str:
    for name, family in FAMILIES.items():
        fixed = family.ours.get("decay")
        if family.config is type(config) and fixed in (None, getattr(config, "decay", None)):
            return name
    raise ValueError(f"{config.model_type} has no counterpart in flash-linear-attention.")


def _names(config: LalmConfig) -> Iterator[tuple[str, list[str], list[int]]]:
    """Our name of every weight, the names of what it is made of in fla, and how many rows each of these has."""
    name = _family_of(config)
    yield "model.embed_tokens.weight", ["model.embeddings.weight"], []
    yield "model.norm.weight", ["model.norm.weight"], []
    yield "lm_head.weight", ["lm_head.weight"], []
    norm = FAMILIES[name].output_norm
    if norm == "g_norm" and config.use_output_gate:
        norm = "g_norm_swish_gate"
    same = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    if getattr(config, "use_output_gate", False) and name != "kda":
        same.append("g_proj.weight")
    same += {
        "gla": ["gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias"],
        "delta_net": ["b_proj.weight"],
        "gated_deltanet": ["a_proj.weight", "b_proj.weight"],
        "kda": ["b_proj.weight", "g_proj.0.weight", "g_proj.1.weight", "g_proj.1.bias"],
    }.get(name, [])
    key_size, value_size = (config.num_attention_heads * x for x in (config.linear_key_dim, config.linear_value_dim))
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.mixer_norm.weight", [f"{layer}.attn_norm.weight"], []
        yield f"{layer}.mlp_norm.weight", [f"{layer}.mlp_norm.weight"], []
        yield f"{layer}.mixer.o_norm.weight", [f"{layer}.attn.{norm}.weight"], []
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield f"{layer}.mlp.{part}.weight", [f"{layer}.mlp.{part}.weight"], []
        for part in same:
            yield f"{layer}.mixer.{part}", [f"{layer}.attn.{part}"], []
        if config.use_short_conv:
            parts = [f"{layer}.attn.{x}_conv1d.weight" for x in "qkv"]
            yield f"{layer}.mixer.conv.weight", parts, [key_size, key_size, value_size]
        if name == "kda":
            for part in ("0.weight", "1.weight"):
                yield f"{layer}.mixer.gk_proj.{part}", [f"{layer}.attn.f_proj.{part}"], []
        if name in _BY_HEAD:
            for part in ("A_log", "dt_bias"):
                yield f"{layer}.mixer.gate_bias.{part}", [f"{layer}.attn.{part}"], []
        if getattr(config, "feature_map", None) == "elementwise_product":
            for side in "qk":
                for part in ("weight", "bias"):
                    parts = [f"{layer}.attn.feature_map_{side}.layer{i}.{part}" for i in (1, 2)]
                    yield f"{layer}.mixer.{side}_map.map.{part}", parts, [config.linear_key_dim] * 2


def state_dict_from_fla(theirs: StateDict, config: LalmConfig) -> StateDict:
    """Our weights of fla's, for our configuration.

    Raises:
        ValueError: weights are missing or left over; the message names them.
    """
    rest, ours = dict(theirs), {}
    if config.tie_word_embeddings:
        rest.setdefault("lm_head.weight", rest.get("model.embeddings.weight", torch.empty(0)))
    for name, parts, _ in _names(config):
        if len(parts) == 1 and parts[0] not in rest:  # without fused norms fla calls this one otherwise
            parts = [parts[0].replace("g_norm_swish_gate", "g_norm")]
        missing = [part for part in parts if part not in rest]
        if missing:
            raise ValueError(f"The checkpoint lacks {missing[0]}, which its configuration asks for.")
        pieces = [rest.pop(part) for part in parts]
        ours[name] = torch.cat([x.squeeze(1) if "conv1d" in parts[0] else x for x in pieces])
    if rest:
        raise ValueError(f"The checkpoint holds {sorted(rest)[0]}, which its configuration does not account for.")
    return ours


def state_dict_to_fla(ours: StateDict, config: LalmConfig) -> StateDict:
    """fla's weights of ours."""
    theirs = {}
    for name, parts, rows in _names(config):
        for part, piece in zip(parts, ours[name].split(rows) if rows else [ours[name]], strict=True):
            theirs[part] = (piece[:, None] if "conv1d" in part else piece).contiguous().clone()
    return theirs


def from_fla(source: str) -> LalmForCausalLM:
    """The causal language model of a checkpoint of flash-linear-attention (a folder or Hub name), in eval mode.

    fla itself is not needed. The weights keep their dtype.

    Raises:
        ValueError: the checkpoint cannot be represented; the message names what stands in the way.
        OSError: it cannot be found or read.
    """
    config = config_from_fla(json.loads(Path(_file(source, "config.json")).read_text(encoding="utf-8")))
    state = state_dict_from_fla(_read_weights(source), config)
    (variant,) = [row for row in lalm.VARIANTS if row.config is type(config)]
    with torch.device("meta"):
        model = variant.models["AutoModelForCausalLM"](config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()


def to_fla(model: LalmForCausalLM, folder: str | Path) -> None:
    """Write config.json and model.safetensors as flash-linear-attention reads them; all or nothing.

    Raises:
        ValueError: a setting of the model that fla does not have.
        OSError: something cannot be written.
    """
    theirs = config_to_fla(model.config)
    state = state_dict_to_fla(model.state_dict(), model.config)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    with staged_save(folder) as staging:
        (staging / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
        save_file(state, staging / "model.safetensors", {"format": "pt"})


def _file(source: str, name: str) -> str:
    path = cached_file(source, name)
    if path is None:
        raise OSError(f"{source} has no {name}.")
    return path


def _read_weights(source: str) -> StateDict:
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return load_file(_file(source, "model.safetensors"))
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return {name: x for shard in sorted(set(shards)) for name, x in load_file(_file(source, shard)).items()}
