# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""A new model from a type and overrides, or a checkpoint; both fitted to the tokenizer."""

import logging
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lalm.configuration.configuration_base import MOST_LAYERS
from lalm.errors import UserError, is_disk_full, nearest_hint, one_line, refusal
from lalm.training.clm.arguments import ModelArguments
from lalm.training.divergence import broken_weights
from lalm.training.flag_names import name_hint

logger = logging.getLogger(__name__)

# the model of a command line that names no size: small enough for a first try on a CPU
DEFAULT_MODEL_TYPE = "lalm_gla"
DEFAULT_SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": True}
POSITIONS_WITHOUT_LIMIT = ("none", "rope")


def our_model_types() -> list[str]:
    """Return the model types that lalm registers."""
    from lalm import VARIANTS

    return [variant.config.model_type for variant in VARIANTS]


def config_class_of(model_type: str) -> type:
    """Return the config class of a model type that can be a causal language model."""
    ours = our_model_types()
    known = [*ours, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if model_type not in known:
        raise UserError(
            f"--model_type: there is no causal language model '{model_type}'{nearest_hint(model_type, known)}; "
            f"ours are {', '.join(ours)}, and any of transformers will do"
        )
    return type(AutoConfig.for_model(model_type))


def config_field_names(config_class: type) -> list[str]:
    """Return the names `--config_overrides` may set for a config class."""
    if is_dataclass(config_class):
        names = [item.name for item in fields(config_class) if item.init]
    else:
        names = list(vars(config_class()))
    return [*names, *getattr(config_class, "attribute_map", {})]


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return bos, eos and pad ids for the config.

    A pad id equal to eos is left out: stock models freeze the embedding row of the pad id.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if ids["pad_token_id"] in (ids["bos_token_id"], ids["eos_token_id"]):
        ids["pad_token_id"] = None
    return {name: value for name, value in ids.items() if value is not None}


def chosen_overrides(arguments: ModelArguments) -> dict[str, Any]:
    """Return the config overrides; for a type of ours without any, small sizes."""
    is_ours = (arguments.model_type or DEFAULT_MODEL_TYPE) in our_model_types()
    return arguments.overrides or (DEFAULT_SIZES if is_ours else {})


def new_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase | None, block_size: int):
    """Make the config of a new model: defaults, sizes that follow tokenizer and blocks, then the overrides.

    Args:
        tokenizer: None before there is one: the config then has the vocabulary that is asked for.

    Raises:
        UserError: unknown model type or field (the nearest is named), a wrong value, a vocabulary too small.
    """
    model_type = arguments.model_type or DEFAULT_MODEL_TYPE
    config_class = config_class_of(model_type)
    overrides = chosen_overrides(arguments)
    names = config_field_names(config_class)
    for key, value in overrides.items():
        if key not in names:
            raise UserError(f"--config_overrides: {model_type} has no field '{key}'{name_hint(key, names)}")
        if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"--config_overrides: {key} is {value:,}; more than {MOST_LAYERS:,} are not built")
    tokens = arguments.tokenizer_vocab_size if tokenizer is None else len(tokenizer)
    given = overrides.get("vocab_size", tokens)
    if tokenizer is not None and isinstance(given, int) and given < tokens:
        raise UserError(f"--config_overrides: vocab_size {given} is below the tokenizer's {tokens}")
    values: dict[str, Any] = {"vocab_size": tokens}
    if tokenizer is not None:
        values |= special_token_ids(tokenizer)
    if "is_causal" in names:
        values["is_causal"] = True  # LAM is an encoder unless told otherwise
    # stock defaults (Llama: 1 and 2) would name ordinary tokens of this tokenizer
    absent: dict[str, Any] = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in names}
    try:
        if "max_position_embeddings" in names:
            kind = {key: value for key, value in overrides.items() if key == "position_embedding_type"}
            positions = getattr(config_class(**kind), "max_position_embeddings", None) or 0
            values["max_position_embeddings"] = max(positions, block_size)
        config = config_class(**{**absent, **values, **overrides})
    except Exception as error:
        raise UserError(f"--config_overrides: {one_line(error)}") from None
    check_positions(config, block_size)
    return config


def check_positions(config, block_size: int) -> None:
    """Refuse blocks longer than a position table."""
    limit = getattr(config, "max_position_embeddings", None)
    kind = getattr(config, "position_embedding_type", "rope")
    if limit and limit < block_size and kind not in POSITIONS_WITHOUT_LIMIT:
        raise UserError(f"--block_size {block_size} is above the model's max_position_embeddings {limit}; lower it")


def hub_options(arguments: ModelArguments) -> dict[str, Any]:
    """Return the keywords with which a checkpoint is looked up."""
    return {
        "revision": arguments.model_revision,
        "token": arguments.token,
        "cache_dir": arguments.cache_dir,
        "trust_remote_code": arguments.trust_remote_code,
    }


def checkpoint_config(arguments: ModelArguments, block_size: int):
    """Load the config of `model_name_or_path`, checked against `model_type` and the blocks."""
    name = str(arguments.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(name, **hub_options(arguments))
    except Exception as error:
        reason = refusal(name, "model", error)
        raise UserError(f"--model_name_or_path: cannot read a config from '{name}': {reason}") from None
    if arguments.model_type and config.model_type != arguments.model_type:
        raise UserError(
            f"--model_name_or_path: '{name}' is a {config.model_type} checkpoint, not {arguments.model_type}; "
            f"drop --model_type or name another checkpoint"
        )
    check_positions(config, block_size)
    return config


def load_checkpoint(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """Load `model_name_or_path`, with embeddings grown to the tokenizer if needed."""
    name = str(arguments.model_name_or_path)
    options = attention_choice(arguments) | hub_options(arguments)
    config = checkpoint_config(arguments, block_size)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch_dtype(arguments.dtype), **options
        )
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--model_name_or_path: cannot load '{name}': {one_line(error)}") from None
    if broken := broken_weights(model):
        raise UserError(
            f"--model_name_or_path: '{name}' holds NaN or infinity, in {broken[0]} and {len(broken) - 1} other "
            f"weights; take an earlier checkpoint"
        )
    if len(tokenizer) > embedding_table(model).shape[0]:
        logger.info("the tokenizer has %d tokens: the embeddings are resized", len(tokenizer))
        model.resize_token_embeddings(len(tokenizer))
    return model


def attention_choice(arguments: ModelArguments) -> dict:
    """Return the keyword that picks the softmax attention, if one is asked for."""
    return {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}


def torch_dtype(name: str) -> str | torch.dtype:
    """Turn an argument into a dtype; ``auto`` stays."""
    return name if name == "auto" else getattr(torch, name)


def build_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """Build or load the model of a run and say how big it is."""
    if arguments.model_name_or_path:
        model = load_checkpoint(arguments, tokenizer, block_size)
        origin = f"loaded from {arguments.model_name_or_path}"
    else:
        config = new_config(arguments, tokenizer, block_size)
        if not arguments.overrides and config.model_type in our_model_types():
            sizes = " ".join(f"{name}={value}" for name, value in DEFAULT_SIZES.items())
            logger.info("no --config_overrides: a small %s model, %s", config.model_type, sizes)
        dtype = torch.float32 if arguments.dtype == "auto" else torch_dtype(arguments.dtype)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention_choice(arguments))
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot build a {config.model_type} model: {one_line(error)}") from None
        origin = "trained from scratch"
    total, embeddings = count_parameters(model)
    logger.info(
        "%s (%s), %s: %s parameters, %s of them in the token embeddings",
        type(model).__name__, model.config.model_type, origin, f"{total:,}", f"{embeddings:,}",
    )  # fmt: skip
    return model


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return (all parameters, those of the input embeddings); tied weights count once."""
    return sum(p.numel() for p in model.parameters()), embedding_table(model).numel()


def embedding_table(model: PreTrainedModel) -> torch.Tensor:
    """Return the input embeddings [vocabulary, hidden]."""
    return cast(torch.nn.Embedding, model.get_input_embeddings()).weight
