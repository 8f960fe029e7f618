# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other libraries to ours and back, and softmax models to linear students.

python -m lalm.convert from_fla fla-hub/gla-340M-15B ours/
python -m lalm.convert to_fla ours/ theirs/
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lalm.convert.adapters import load_adapter, save_adapter
from lalm.convert.fla import from_fla, to_fla
from lalm.convert.linear_attention_transformer import (
    from_linear_attention_transformer,
    to_linear_attention_transformer,
)
from lalm.convert.softmax import STUDENTS, from_softmax
from lalm.errors import UserError, one_line, refusal
from lalm.network import go_offline_without_network


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lalm.convert", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("from_fla", "to_fla", "from_linear_attention_transformer", "to_linear_attention_transformer",
                 "from_softmax", "to_adapter", "from_adapter"):  # fmt: skip
        command = commands.add_parser(name)
        command.add_argument("source", help="folder or Hub name; of a linear-attention-transformer a .pt state dict")
        command.add_argument("target", type=Path, help="folder, or the .pt file to write")
        if name == "from_linear_attention_transformer":
            command.add_argument("--options", default="{}", help="JSON of the constructor's options, as heads, causal")
        if name == "from_softmax":
            command.add_argument("--model_type", default="lalm_linear", help=f"of the student: {', '.join(STUDENTS)}")
            command.add_argument("--keep_softmax_layers", type=int, nargs="*", default=[], help="as 7 15 23 29")
            command.add_argument("--options", default="{}", help="JSON of further fields of the student")
        if name.endswith("_adapter"):
            required = name == "to_adapter"
            command.add_argument("--teacher", required=required, help="the student's softmax teacher, folder or name")
    arguments = parser.parse_args(argv)
    go_offline_without_network()
    try:
        _convert(arguments)
    except (ValueError, OSError, KeyError, ImportError) as error:
        is_missing = isinstance(error, OSError) and error.errno is None  # of a name that gives nothing
        reason = refusal(arguments.source, "checkpoint", error) if is_missing else one_line(error)
        raise UserError(f"{arguments.command}: {reason}") from error
    print(f"{arguments.command}: {arguments.target} is written")


def _convert(arguments: argparse.Namespace) -> None:
    source, target = arguments.source, arguments.target
    load: Any = AutoModelForCausalLM.from_pretrained
    if arguments.command == "from_fla":
        from_fla(source).save_pretrained(target)
    elif arguments.command == "from_softmax":
        changes = json.loads(arguments.options)
        student = from_softmax(load(source), arguments.model_type, arguments.keep_softmax_layers, True, **changes)
        student.save_pretrained(target)
    elif arguments.command == "to_adapter":
        save_adapter(load(source), load(arguments.teacher), target, arguments.teacher)
    elif arguments.command == "from_adapter":
        load_adapter(source, arguments.teacher).save_pretrained(target)
    elif arguments.command == "to_fla":
        to_fla(load(source), target)
    elif arguments.command == "from_linear_attention_transformer":
        state = torch.load(source, map_location="cpu", weights_only=True)
        from_linear_attention_transformer(state, **json.loads(arguments.options)).save_pretrained(target)
    else:
        torch.save(to_linear_attention_transformer(load(source)), target)
    if target.is_dir():
        _copy_tokenizer(source, target)


def _copy_tokenizer(source: str, target: Path) -> None:
    """Copy what a tokenizer may consist of, from a local folder."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "*.jinja"):
        for path in Path(source).glob(pattern) if Path(source).is_dir() else ():
            shutil.copy(path, target)
