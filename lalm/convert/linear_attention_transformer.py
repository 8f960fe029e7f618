# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""State dicts of linear-attention-transformer 0.19.1 (its `LinearAttentionTransformerLM`) to our models and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch

from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.layers import sinusoidal_positions
from lalm.modeling.modeling_local_global import LocalGlobalForCausalLM, LocalGlobalForMaskedLM, LocalGlobalModel

StateDict = dict[str, torch.Tensor]
AnyModel = LocalGlobalForCausalLM | LocalGlobalForMaskedLM | LocalGlobalModel

# Options of upstream's constructor that no weight tells, with upstream's defaults, and our names for them.
_OPTIONS: dict[str, tuple[str, Any]] = {
    "heads": ("num_attention_heads", 8),
    "causal": ("is_causal", False),
    "n_local_attn_heads": ("num_local_heads", 0),
    "local_attn_window_size": ("local_attn_window_size", 128),
    "blindspot_size": ("blindspot_size", 1),
    "receives_context": ("receives_context", False),
    "ff_chunks": ("ff_chunks", 1),
    "ff_dropout": ("ff_dropout", 0.0),
    "attn_layer_dropout": ("dropout", 0.0),
    "attn_dropout": ("attention_dropout", 0.0),
}
# Options that the weights tell; giving one too holds it against them.
_INFERRED = {
    "num_tokens": "vocab_size",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "dim_head": "head_dim",
    "emb_dim": "embedding_size",
    "max_seq_len": "max_position_embeddings",
    "reversible": "reversible",
    "shift_tokens": "shift_tokens",
    "pkm_layers": "pkm_layers",
}
_IGNORED = {"return_embeddings", "use_axial_pos_emb", "use_rotary_emb", "pkm_num_keys", "ff_glu"}
_UNSUPPORTED = {"attend_axially", "linformer_settings", "context_linformer_settings"}

_LAYER = re.compile(r"transformer\.(?:fn\.)?layers\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.")
# What keys that do not fit come from; the first that any of them matches is named.
_ORIGINS = {
    r".*\.net\.[02]\.weight$": "version 0.2.1, whose MLP is another one",
    r".*\.to_kv\.": "a version before 0.19, which has joint key and value projections",
    r".*\.(proj_k|proj_v)$": "linformer_settings or context_linformer_settings, which we do not have",
}


def from_linear_attention_transformer(state_dict: StateDict, **options) -> AnyModel:
    """Our model of the weights of upstream's `LinearAttentionTransformerLM(**options)`, in eval mode.

    Args:
        state_dict: of that model, or of an AutoregressiveWrapper or Autopadder around it; its floating dtype becomes
            that of our model.
        options: those that upstream's constructor was given, under its names and with its defaults. Only `heads`,
            `causal`, `n_local_attn_heads`, `local_attn_window_size`, `blindspot_size`, `receives_context`, `ff_chunks`
            and the dropouts matter; the weights tell the rest. Give `depth` too: a model with cross-attention has the
            weights of one without that is twice as deep.

    Returns:
        LocalGlobalForCausalLM under `causal=True`, else LocalGlobalForMaskedLM; LocalGlobalModel for the weights of an
        encoder (`return_embeddings=True`), which have no head.

    Raises:
        ValueError: weights of another version, of an option that we do not have, or that contradict `options`.
    """
    while state_dict and all(key.startswith("net.") for key in state_dict):
        state_dict = {key.removeprefix("net."): tensor for key, tensor in state_dict.items()}
    _check_options(options)
    config = LocalGlobalConfig(**_fields(state_dict, options))
    has_head = "out.weight" in state_dict
    pairs = dict(_names(config, has_head))
    _check_keys(state_dict, pairs)
    head_class = LocalGlobalForCausalLM if config.is_causal else LocalGlobalForMaskedLM
    model: AnyModel = head_class(config) if has_head else LocalGlobalModel(config)
    ours = cast(Any, model).to(state_dict["token_emb.weight"].dtype).state_dict()
    for theirs, name in pairs.items():
        tensor = state_dict[theirs]
        if tensor.squeeze().shape != ours[name].squeeze().shape:
            shapes = f"{tuple(tensor.shape)}, our {name} {tuple(ours[name].shape)}"
            raise ValueError(f"{theirs} is {shapes}: check the options.")
        ours[name].copy_(tensor.reshape(ours[name].shape))
    return model.eval()


def to_linear_attention_transformer(model: AnyModel) -> StateDict:
    """The state dict that upstream's LinearAttentionTransformerLM of the same options loads, copies of the weights.

    Raises:
        ValueError: the model has something that upstream does not.
    """
    config = model.config
    _check_expressible(config)
    weights, state = model.state_dict(), {}
    for theirs, ours in _names(config, has_head=not isinstance(model, LocalGlobalModel)):
        tensor = weights[ours].detach().clone()
        if theirs == "pos_emb.weights.0":
            tensor = tensor[None, :, None]
        elif theirs == "pos_emb.weights.1":
            tensor = tensor[None, None]
        state[theirs] = tensor
    if config.position_embedding_type == "rope":  # upstream keeps the fixed tables
        like, positions = state["token_emb.weight"], torch.arange(config.max_position_embeddings)
        for name, size in (("pos_emb.emb", config.embedding_size), ("layer_pos_emb.emb", config.head_dim)):
            state[name] = sinusoidal_positions(positions, cast(int, size), config.rope_theta).to(like)
    return state


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _UNSUPPORTED and value:
            raise ValueError(f"{name} is an option of linear-attention-transformer that we do not have.")
        if name == "ff_glu" and value and options.get("receives_context"):
            raise ValueError(
                "ff_glu with receives_context: upstream gates only the MLP after a cross-attention, we all or none."
            )
        known = _OPTIONS.keys() | _INFERRED.keys() | _IGNORED | _UNSUPPORTED
        if name not in known:
            raise ValueError(f"linear-attention-transformer has no option {name!r}; it has {sorted(known)}.")


def _fields(state: StateDict, options: dict[str, Any]) -> dict[str, Any]:
    """Fields of our configuration, from shapes, keys and options."""
    fields = {ours: options.get(name, default) for name, (ours, default) in _OPTIONS.items()}
    if isinstance(fields["num_local_heads"], tuple):
        fields["num_local_heads"] = list(fields["num_local_heads"])
    found = _shape_of_model(state, fields) | _position_fields(state, fields, options)
    for name, ours in _INFERRED.items():
        given = options.get(name)
        if name == "pkm_layers" and given is not None:  # upstream counts from 1, and takes one number too
            given = sorted(layer - 1 for layer in ([given] if isinstance(given, int) else given))
        if given is not None and given != found[ours]:
            hint = " with this receives_context" if name == "depth" else ""
            raise ValueError(f"{name} = {given} does not fit the weights, which say {found[ours]}{hint}.")
    return fields | found


def _shape_of_model(state: StateDict, fields: dict[str, Any]) -> dict[str, Any]:
    layers = [match for match in map(_LAYER.match, state) if match]
    queries = [key for key in state if re.match(_LAYER.pattern + r"(fn\.)+to_q\.weight$", key)]
    if "token_emb.weight" not in state or not queries:
        raise ValueError(_complain(state, {"token_emb.weight", "...to_q.weight"} - state.keys()))
    count = 1 + max(int(match[1] or match[3]) for match in layers)
    each = 2 if fields["receives_context"] else 1
    if count % each:
        raise ValueError(f"receives_context=True has two pairs of sublayers per layer, the weights have {count}.")
    heads, (size, dim) = fields["num_attention_heads"], state[queries[0]].shape
    if size % heads:
        raise ValueError(f"heads = {heads} does not divide the {size} rows of {queries[0]}: give the right heads.")
    vocab_size, embedding_size = state["token_emb.weight"].shape
    memories = {key: match for key in state if (match := _LAYER.match(key)) and key.endswith(".keys")}
    return {
        "pkm_layers": sorted(int(match[1] or match[3]) // each for match in memories.values()),
        "pkm_num_keys": next((state[key].shape[1] for key in memories), 128),
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "num_hidden_layers": count // each,
        "head_dim": size // heads,
        "embedding_size": embedding_size,
        "reversible": layers[0][3] is not None,
        "shift_tokens": re.search(r"\.fn\.fn\.to_q", queries[0]) is not None,
    }


def _position_fields(state: StateDict, fields: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    if "pos_emb.weights.1" in state:
        window, rows = state["pos_emb.weights.1"].shape[2], state["pos_emb.weights.0"].shape[1]
        if options.get("local_attn_window_size", window) != window:
            raise ValueError(
                f"local_attn_window_size = {options['local_attn_window_size']} does not fit the position tables, "
                f"whose rows have {window}."
            )
        length = options.get("max_seq_len", rows * window)
        if -(-length // window) != rows:
            raise ValueError(f"max_seq_len = {length} does not fit the position tables of {rows} x {window}.")
        return {
            "position_embedding_type": "axial",
            "local_attn_window_size": window,
            "max_position_embeddings": length,
        }
    for key, kind in (("pos_emb.emb.weight", "learned"), ("pos_emb.emb", "rope")):
        if key in state:
            return {"position_embedding_type": kind, "max_position_embeddings": state[key].shape[0]}
    raise ValueError(_complain(state, {"pos_emb.weights.0", "pos_emb.weights.1"}))


def _names(config: LocalGlobalConfig, has_head: bool) -> Iterator[tuple[str, str]]:
    """Upstream's name and ours of every weight."""
    model = "model." if has_head else ""
    yield "token_emb.weight", f"{model}embed_tokens.weight"
    if config.position_embedding_type == "axial":
        yield "pos_emb.weights.0", f"{model}embed_positions.windows.weight"
        yield "pos_emb.weights.1", f"{model}embed_positions.places.weight"
    elif config.position_embedding_type == "learned":
        yield "pos_emb.emb.weight", f"{model}embed_positions.table.weight"
    factorised = config.embedding_size != config.hidden_size
    if factorised:
        yield from _both("transformer.project_in", f"{model}embedding_in")
        yield from _both("transformer.project_out", f"{model}embedding_out")
    stack = "transformer.fn.layers" if factorised else "transformer.layers"
    parts = [".blocks.{}.f.net", ".blocks.{}.g.net"] if config.reversible else [".layers.{}.0", ".layers.{}.1"]
    each = 2 if config.receives_context else 1
    for layer in range(config.num_hidden_layers):
        for extra, prefix in enumerate(("", "context_")[:each]):
            shift = "fn." if config.shift_tokens and not extra else ""
            pair, ours = each * layer + extra, f"{model}layers.{layer}.{prefix}"
            attention, mlp = (stack + part.format(pair) for part in parts)
            yield from _both(f"{attention}.norm", f"{ours}mixer_norm")
            for name in "qkv":
                yield f"{attention}.fn.{shift}to_{name}.weight", f"{ours}mixer.{name}_proj.weight"
            yield from _both(f"{attention}.fn.{shift}to_out", f"{ours}mixer.o_proj")
            yield from _both(f"{mlp}.norm", f"{ours}mlp_norm")
            if layer in config.pkm_layers and not extra:
                for name in ("to_queries.weight", "norm.weight", "norm.bias", "keys", "values.weight"):
                    yield f"{mlp}.fn.{shift}{name}", f"{ours}mlp.{name}".replace("values.weight", "values")
                continue
            yield from _both(f"{mlp}.fn.{shift}fn.w1", f"{ours}mlp.up_proj")
            yield from _both(f"{mlp}.fn.{shift}fn.w2", f"{ours}mlp.down_proj")
    yield from _both("norm", f"{model}norm")
    if has_head:
        yield from _both("out", "lm_head")


def _both(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{theirs}.{kind}", f"{ours}.{kind}"


def _check_keys(state: StateDict, pairs: dict[str, str]) -> None:
    fixed = {"pos_emb.emb", "layer_pos_emb.emb"}
    missing, unexpected = pairs.keys() - state.keys(), state.keys() - pairs.keys() - fixed
    if missing or unexpected:
        others = "other options than given (receives_context), or attend_axially, which we do not have"
        in_layers = any(_LAYER.match(key) for key in missing | unexpected)
        raise ValueError(_complain(unexpected, missing, others if in_layers else ""))


def _complain(unexpected: Iterable[str], missing: set[str], otherwise: str = "") -> str:
    found = (text for pattern, text in _ORIGINS.items() if any(re.match(pattern, key) for key in unexpected))
    origin = next(found, otherwise)
    return (
        "These are not the weights of LinearAttentionTransformerLM of linear-attention-transformer 0.19.1 with these "
        f"options: {sorted(missing)[:3]} are missing, {sorted(unexpected)[:3]} have no place."
        + (f" They look like {origin}." if origin else "")
    )


def _check_expressible(config: LocalGlobalConfig) -> None:
    wanted = {
        "semantics": ("0.19",),
        "one_kv_head": (False,),
        "ff_glu": (False,),
        "norm_type": ("layernorm",),
        "norm_eps": (1e-5,),
        "hidden_act": ("gelu",),
        "intermediate_size": (4 * config.hidden_size,),
        "position_embedding_type": ("axial", "learned", "rope"),
        "rope_theta": (10000,),
        "pkm_num_keys": (128,),
    }
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"linear-attention-transformer 0.19.1 has no {name} = {getattr(config, name)!r}, only "
                f"{' or '.join(map(repr, values))}."
            )
