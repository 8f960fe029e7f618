# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What can be known of a run's model before any text is read: its names, its config, its size."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lalm.configuration.configuration_base import MOST_LAYERS
from lalm.errors import UserError, one_line
from lalm.training.clm.arguments import ModelArguments
from lalm.training.clm.model_builder import attention_choice, checkpoint_config, new_config, torch_dtype
from lalm.training.clm.tokenizer import load_tokenizer

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def check_model(arguments: ModelArguments, block_size: int) -> None:
    """Refuse a tokenizer, a checkpoint or a config with which the run would end after its text is tokenized.

    Raises:
        UserError: it names the flag and what is wrong.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    tokenizer = load_tokenizer(name, arguments) if name else None
    if arguments.model_name_or_path:
        config = checkpoint_config(arguments, block_size)
        folder = Path(arguments.model_name_or_path).expanduser()
        if folder.is_dir() and not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            raise UserError(f"--model_name_or_path: the folder {folder} holds no weights (*.safetensors)")
    else:
        config = new_config(arguments, tokenizer, block_size)
    check_size(config, arguments)


def check_size(config: PreTrainedConfig, arguments: ModelArguments) -> None:
    """Refuse a model that this machine cannot hold, or that the libraries at hand cannot build."""
    flag = "--model_name_or_path" if arguments.model_name_or_path else "--config_overrides"
    layers = getattr(config, "num_hidden_layers", None) or 0
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"{flag}: num_hidden_layers is {layers:,}; more than {MOST_LAYERS:,} are not built")
    size, memory = size_in_bytes(config, arguments), memory_in_bytes()
    if size > memory:
        shown = f"{size / 1e9:,.1f} GB" if size < float("inf") else "more than can be counted"
        raise UserError(
            f"{flag}: the weights of this {config.model_type} model take {shown}, and the machine has "
            f"{memory / 1e9:,.1f} GB; lower hidden_size, num_hidden_layers or vocab_size"
        )


def size_in_bytes(config: PreTrainedConfig, arguments: ModelArguments) -> float:
    """Return the memory of a model's weights and buffers, from a copy without storage; 0 where there is no telling."""
    dtype = torch.float32 if arguments.dtype == "auto" else torch_dtype(arguments.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": arguments.trust_remote_code}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options, **attention_choice(arguments))
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot build a {config.model_type} model: {one_line(error)}") from None
    except (RuntimeError, OverflowError, TypeError) as error:
        # sizes whose product is no 64-bit number; anything else is a model that cannot be made without storage
        return float("inf") if "overflow" in str(error).lower() else 0
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_in_bytes() -> float:
    """Return the memory of this machine, or of the container that the process runs in."""
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on Windows
        return float("inf")
    try:
        return min(memory, float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no container, or "max"
        return memory
