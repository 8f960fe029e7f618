# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Pretrained softmax decoders of transformers as students of one of our types, with the weights that fit.

    python -m lalm.convert from_softmax HuggingFaceTB/SmolLM2-135M student/ --keep_softmax_layers 7 15 23 29

With every layer kept softmax the student computes what the teacher does. The layers that become linear have new
parameters (feature maps, gates), which `run_clm.py --stage transfer` and `--stage distill` train.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

import lalm
from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.mixers import Mixer
from lalm.modeling.modeling_heads import LalmForCausalLM

# Types whose mixers have projections of softmax attention's form.
STUDENTS = ("lalm_linear", "lalm_gla", "lalm_delta_net", "lalm_retnet")
# What the heads of `lalm_linear` become unless told otherwise.
WINDOW = {"window_size": 64, "num_sink_tokens": 4, "feature_map": "centroids"}


class Family(NamedTuple):
    """How one model_type of transformers relates to our backbone."""

    fields: dict[str, str]  # theirs -> ours
    ours: dict[str, Any]  # our fields that are the same for every checkpoint
    required: dict[str, tuple]  # theirs -> the values that we can represent
    weights: tuple[tuple[str, str, str], ...]  # ours, theirs, how; {} is the number of the layer


_COMMON = {
    name: name
    for name in ("vocab_size", "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id",
                 "eos_token_id")
}  # fmt: skip
_LLAMA_FIELDS = _COMMON | {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "norm_eps",
    "attention_dropout": "attention_dropout",
}
_BIASES = {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_ROTARY = {"position_embedding_type": "rope", "norm_type": "rmsnorm", "mlp_type": "gated"}


def _llama(norm: str = "same", embedding: str = "same", o_bias: str = "same") -> tuple[tuple[str, str, str], ...]:
    layer, theirs = "model.layers.{}.", "model.layers.{}."
    rows = [
        ("model.embed_tokens.weight", "model.embed_tokens.weight", embedding),
        ("model.norm.weight", "model.norm.weight", norm),
        ("lm_head.weight", "lm_head.weight", "same"),
        (layer + "mixer_norm.weight", theirs + "input_layernorm.weight", norm),
        (layer + "mlp_norm.weight", theirs + "post_attention_layernorm.weight", norm),
    ]
    parts = [("mixer", f"{part}_norm", "weight", norm) for part in "qk"]
    parts += [("mixer", f"{part}_proj", "weight", "same") for part in "qkvo"]
    parts += [("mixer", f"{part}_proj", "bias", o_bias if part == "o" else "same") for part in "qkvo"]
    parts += [("mlp", f"{part}_proj", kind, "same") for part in ("gate", "up", "down") for kind in ("weight", "bias")]
    attention = {"mixer": "self_attn", "mlp": "mlp"}
    rows += [(f"{layer}{a}.{b}.{kind}", f"{theirs}{attention[a]}.{b}.{kind}", how) for a, b, kind, how in parts]
    return tuple(rows)


def _gpt2() -> tuple[tuple[str, str, str], ...]:
    layer, theirs = "model.layers.{}.", "transformer.h.{}."
    rows = [
        ("model.embed_tokens.weight", "transformer.wte.weight", "same"),
        ("model.embed_positions.table.weight", "transformer.wpe.weight", "same"),
        ("lm_head.weight", "lm_head.weight", "same"),
    ]
    for kind in ("weight", "bias"):
        rows.append((f"model.norm.{kind}", f"transformer.ln_f.{kind}", "same"))
        rows.append((f"{layer}mixer_norm.{kind}", f"{theirs}ln_1.{kind}", "same"))
        rows.append((f"{layer}mlp_norm.{kind}", f"{theirs}ln_2.{kind}", "same"))
        # Their matrices are stored transposed, those of q, k and v in one.
        for number, part in enumerate("qkv"):
            rows.append((f"{layer}mixer.{part}_proj.{kind}", f"{theirs}attn.c_attn.{kind}", f"third {number}"))
        rows.append((f"{layer}mixer.o_proj.{kind}", f"{theirs}attn.c_proj.{kind}", "transposed"))
        rows.append((f"{layer}mlp.up_proj.{kind}", f"{theirs}mlp.c_fc.{kind}", "transposed"))
        rows.append((f"{layer}mlp.down_proj.{kind}", f"{theirs}mlp.c_proj.{kind}", "transposed"))
    return tuple(rows)


FAMILIES = {
    "llama": Family(_LLAMA_FIELDS | _BIASES, _ROTARY, {}, _llama()),
    "mistral": Family(_LLAMA_FIELDS, _ROTARY, {}, _llama()),
    # q, k and v have biases, o has none: ours starts at 0.
    "qwen2": Family(_LLAMA_FIELDS, _ROTARY | {"attention_bias": True}, {}, _llama(o_bias="zeros")),
    "qwen3": Family(_LLAMA_FIELDS | {"attention_bias": "attention_bias"}, _ROTARY | {"qk_norm": True}, {}, _llama()),
    # Norms that multiply by 1 + weight, and embeddings that are multiplied by the root of their size.
    "gemma": Family(
        _LLAMA_FIELDS | {"attention_bias": "attention_bias"},
        _ROTARY | {"tie_word_embeddings": False},
        {"use_bidirectional_attention": (None, False)},
        _llama(norm="plus one", embedding="times root"),
    ),
    "gpt2": Family(
        _COMMON
        | {
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_inner": "intermediate_size",
            "n_positions": "max_position_embeddings",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "norm_eps",
            "attn_pdrop": "attention_dropout",
            "resid_pdrop": "dropout",
        },
        {"position_embedding_type": "learned", "norm_type": "layernorm", "mlp_type": "mlp"}
        | {"attention_bias": True, "mlp_bias": True, "hidden_ratio": 4},
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        _gpt2(),
    ),
}


def student_config(
    theirs: Any, model_type: str = "lalm_linear", keep_softmax_layers: Sequence[int] = (), **changes
) -> LalmConfig:
    """Our configuration in the shape of a teacher's configuration `theirs`.

    Args:
        model_type: of the student, one of `STUDENTS`.
        keep_softmax_layers: indices of the layers that stay softmax attention, full or sliding as the teacher's.
        changes: further fields of the student.

    Raises:
        ValueError: a model type or a setting that we cannot represent exactly; the message names it.
    """
    name = theirs.model_type
    if getattr(theirs, "is_encoder_decoder", False):
        raise ValueError(f"is_encoder_decoder = True ({name}): from_softmax takes decoders only.")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} has no mapping to ours; these have: {', '.join(FAMILIES)}.")
    if model_type not in STUDENTS:
        raise ValueError(f"model_type {model_type!r} cannot be a student; these can: {', '.join(STUDENTS)}.")
    family = FAMILIES[name]
    for field, allowed in family.required.items():
        if getattr(theirs, field, allowed[0]) not in allowed:
            raise ValueError(f"{field} = {getattr(theirs, field)!r} of {name} has no counterpart here.")
    fields = {ours: getattr(theirs, field) for field, ours in family.fields.items() if hasattr(theirs, field)}
    fields |= family.ours
    if fields["position_embedding_type"] == "rope":
        fields["rope_theta"] = _rope_theta(theirs)
    if fields.get("dropout") and theirs.embd_pdrop != fields["dropout"]:
        raise ValueError(f"embd_pdrop = {theirs.embd_pdrop} differs from resid_pdrop = {fields['dropout']}.")
    fields |= _softmax_layers(theirs, fields["num_hidden_layers"], keep_softmax_layers)
    if model_type == "lalm_linear":
        fields |= WINDOW
    size = fields["num_attention_heads"] * (fields.get("head_dim") or 0) or fields["hidden_size"]
    fields |= dict.fromkeys(("expand_k", "expand_v"), size / fields["hidden_size"])
    (variant,) = [row for row in lalm.VARIANTS if row.config.model_type == model_type]
    return variant.config(**(fields | changes))


def _rope_theta(theirs: Any) -> float:
    rope = getattr(theirs, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind != "default" or "rope_theta" not in rope:
        raise ValueError(f"rope_parameters of rope_type {kind!r} have no counterpart here, only 'default' has.")
    if factor != 1.0:
        raise ValueError(f"partial_rotary_factor = {factor} has no counterpart here, only 1.0 has.")
    return rope["rope_theta"]


def _softmax_layers(theirs: Any, count: int, kept: Sequence[int]) -> dict[str, Any]:
    wrong = [index for index in kept if not 0 <= index < count]
    if wrong:
        raise ValueError(f"keep_softmax_layers names {wrong}; layers are numbered 0 to {count - 1}.")
    window = getattr(theirs, "sliding_window", None)
    default = "sliding_attention" if window and theirs.model_type == "mistral" else "full_attention"
    kinds = getattr(theirs, "layer_types", None) or [default] * count
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layer_types holds {sorted(unknown)}, which have no counterpart here.")
    layers = {f"{kind}_layers": [i for i in sorted(set(kept)) if kinds[i] == kind] for kind in sorted(set(kinds))}
    return layers | ({"sliding_window": window} if layers.get("sliding_attention_layers") else {})


def student_state(teacher: PreTrainedModel, config: LalmConfig) -> dict[str, torch.Tensor]:
    """The student's weights that the teacher has, by our names. Where nothing has to change they are the teacher's own
    tensors. A linear mixer without grouped heads gets each key and value head as often as it has heads for it.

    Raises:
        ValueError: the teacher holds a weight that the mapping does not use; the message names it.
    """
    theirs, ours = dict(teacher.state_dict()), {}
    unused = set(theirs)
    for name, source, how, index in _rows(teacher.config.model_type, config.num_hidden_layers):
        if how == "zeros":
            ours[name] = embeddings_of(teacher).new_zeros(config.hidden_size)
        elif source in theirs:
            unused.discard(source)
            ours[name] = _changed(theirs[source], how)
            if name.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
                ours[name] = _expanded(ours[name], config, index)
    if unused:
        raise ValueError(
            f"The teacher holds {sorted(unused)[0]}, for which {teacher.config.model_type} has no mapping."
        )
    return ours


def _rows(name: str, layers: int) -> Iterator[tuple[str, str, str, int]]:
    for ours, theirs, how in FAMILIES[name].weights:
        for index in range(layers if "{}" in ours else 1):
            yield ours.format(index), theirs.format(index), how, index


def _changed(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "plus one":
        return (1 + x.float()).to(x.dtype)
    if how == "times root":
        return x * torch.tensor(x.shape[1] ** 0.5, dtype=x.dtype)
    if how.startswith("third"):
        x, how = x.chunk(3, dim=-1)[int(how[-1])], "transposed"
    return x.T.contiguous() if how == "transposed" and x.ndim == 2 else x.contiguous()


def _expanded(x: torch.Tensor, config: LalmConfig, index: int) -> torch.Tensor:
    groups = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
    is_linear = config.layer_types[index] == Mixer.layer_type
    if groups == 1 or not is_linear or getattr(config, "window_size", None) is not None:
        return x
    return x.unflatten(0, (config.num_key_value_heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)


def from_softmax(
    teacher: PreTrainedModel,
    model_type: str = "lalm_linear",
    keep_softmax_layers: Sequence[int] = (),
    share: bool = False,
    **changes,
) -> LalmForCausalLM:
    """A student of a causal language model of transformers, in eval mode, with the teacher's weights and dtype.

    Args:
        teacher: a model of one of `FAMILIES`.
        model_type, keep_softmax_layers, changes: as for `student_config`.
        share: keep the teacher's own tensors where nothing has to change: no memory, and training one trains the
            other.

    Raises:
        ValueError: what cannot be represented; the message names it.
    """
    config = student_config(teacher.config, model_type, keep_softmax_layers, **changes)
    (variant,) = [row for row in lalm.VARIANTS if row.config is type(config)]
    with torch.device("meta"):
        student = cast(LalmForCausalLM, variant.models["AutoModelForCausalLM"](config))
    state = student_state(teacher, config)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state = state if share else {name: x.detach().clone() for name, x in state.items()}
    place(student, state, embeddings_of(teacher))
    student.generation_config = teacher.generation_config
    return student.eval()


def embeddings_of(model: PreTrainedModel) -> torch.Tensor:
    """The token embeddings `[vocabulary, D]`."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def place(student: LalmForCausalLM, state: dict[str, torch.Tensor], like: torch.Tensor) -> list[str]:
    """Give a student on the meta device the weights `state`, and new ones, in the dtype and on the device of `like`,
    where there are none. Returns the names of the new ones.

    Raises:
        ValueError: a weight of `state` does not fit; the message names it.
    """
    targets = dict(student.named_parameters())
    for name, x in state.items():
        if name not in targets or targets[name].shape != x.shape:
            shape = tuple(targets[name].shape) if name in targets else "none"
            raise ValueError(f"{name} is {tuple(x.shape)} in the teacher and {shape} in the student.")
    student.load_state_dict(state, strict=False, assign=True)
    student.tie_weights()
    new = [name for name, x in student.named_parameters() if x.is_meta]
    for module in _owners(student, new):
        module.to_empty(device=like.device, recurse=False)
        module.to(like.dtype)
        student.model._init_weights(module)
    return new


def _owners(student: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules that hold these parameters, each once."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [student.get_submodule(path) for path in paths]


__all__ = ["FAMILIES", "STUDENTS", "from_softmax", "student_config", "student_state"]
