# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The files of a Trainer checkpoint: whether they are whole, and what they hold, in the layout of any engine."""

import json
import tempfile
import zipfile
import zlib
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import TrainerCallback

from lalm.training.results import read_json, write_json

CHECKSUMS = "checksums.json"
PIECE = 1 << 24
# accelerate's names: a file each under FULL_STATE_DICT, a folder each under SHARDED_STATE_DICT
FULL = ("pytorch_model_fsdp.bin", "optimizer.bin")
SHARDED = ("pytorch_model_fsdp_0", "optimizer_0")


class Layout(Enum):
    """How a checkpoint stores weights and optimizer."""

    PLAIN = "one process or DDP"
    FSDP_FULL = "FSDP with FULL_STATE_DICT"
    FSDP_SHARDED = "FSDP with SHARDED_STATE_DICT"
    DEEPSPEED = "DeepSpeed"


class NotResumableError(ValueError):
    """A checkpoint is whole, but was saved without what a training goes on with."""


def crc32_of(path: Path) -> str:
    """Return the CRC-32 of a file in hexadecimal: no guard against forgers, but against holes and flipped bits."""
    value = 0
    with open(path, "rb") as handle:
        while piece := handle.read(PIECE):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def write_checksums(folder: Path) -> None:
    """Note the checksum of every file of a checkpoint; to be called when all of them are written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): crc32_of(path) for path in paths})


class ChecksumCallback(TrainerCallback):
    """Notes the checksums of each checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        args.distributed_state.wait_for_everyone()  # every process writes the state of its random numbers
        if args.should_save and folder.is_dir():
            write_checksums(folder)


def check_safetensors(path: Path) -> None:
    """Raise ValueError if a safetensors file is shorter than its header promises."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        header_size = int.from_bytes(handle.read(8), "little")
        if size < 8 or 8 + header_size > size:
            raise ValueError(f"{path.name} is cut off")
        header = json.loads(handle.read(header_size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if size < 8 + header_size + max(ends, default=0):
        raise ValueError(f"{path.name} is cut off")


def check_weights(folder: Path) -> None:
    """Raise ValueError or OSError if a folder lacks weights, or if they are cut off."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        adapter = (folder / "adapter_model.safetensors").is_file()
        names = ["adapter_model.safetensors" if adapter else "model.safetensors"]
    for name in names:
        check_safetensors(folder / name)


def check_archive(path: Path) -> None:
    """Raise ValueError if a file of torch.save is missing or cut off: it is a zip file, whose directory comes last."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path.name} is missing or cut off")


def is_json(path: Path) -> bool:
    """Tell whether a file is JSON from its beginning to its end."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def is_whole_archive(path: Path) -> bool:
    """Tell whether the content of a zip file is what its own checksums say."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error):
        return False


def check_checksums(folder: Path, expected: dict[str, str]) -> None:
    """Raise ValueError or OSError that names the first file that is not what was saved."""
    for name, checksum in expected.items():
        if crc32_of(folder / name) != checksum:
            raise ValueError(f"{name} is damaged: its checksum is not that in {CHECKSUMS}")


def check_contents(folder: Path) -> None:
    """Raise ValueError that names a damaged file of a checkpoint without checksums, as far as the formats tell."""
    for path in sorted(folder.glob("*.json")):
        if not is_json(path):
            raise ValueError(f"{path.name} is damaged")
    archives = [folder / name for name in ("optimizer.pt", "scheduler.pt", *FULL)]
    for path in [*archives, *folder.glob("rng_state*.pth")]:
        if path.is_file() and not is_whole_archive(path):
            raise ValueError(f"{path.name} is damaged")


def layout_of(folder: Path) -> Layout:
    """Tell which engine saved a checkpoint."""
    if any(folder.glob("global_step*")):
        return Layout.DEEPSPEED
    if any((folder / name).is_dir() for name in SHARDED):
        return Layout.FSDP_SHARDED
    return Layout.FSDP_FULL if any((folder / name).is_file() for name in FULL) else Layout.PLAIN


def check_layout(folder: Path, layout: Layout) -> None:
    """Raise ValueError or OSError that says what of the weights and of the optimizer is missing or cut off."""
    if layout is Layout.PLAIN:
        check_weights(folder)
        if not any(folder.glob("rng_state*.pth")) and not any(
            (folder / name).exists() for name in ("optimizer.pt", "scheduler.pt")
        ):
            raise NotResumableError("it was saved with --save_only_model and has no optimizer to go on with")
        check_archive(folder / "optimizer.pt")
    elif layout is Layout.FSDP_FULL:
        for name in FULL:
            check_archive(folder / name)
    elif layout is Layout.FSDP_SHARDED:
        for name in SHARDED:
            if not (folder / name / ".metadata").is_file() or not any((folder / name).glob("*.distcp")):
                raise ValueError(f"{name} is missing or has lost files")


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError or OSError that says what is missing, cut off or damaged in a Trainer checkpoint.

    Raises:
        NotResumableError: nothing but the model was saved (--save_only_model).
    """
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    if "global_step" not in state:
        raise ValueError("trainer_state.json has no global_step")
    check_layout(folder, layout_of(folder))
    check_archive(folder / "scheduler.pt")
    states = list(folder.glob("rng_state*.pth"))
    if not states:
        raise ValueError("rng_state.pth is missing")
    for path in states:
        check_archive(path)
    if checksums := read_json(folder / CHECKSUMS):
        check_checksums(folder, checksums)
    else:
        check_contents(folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a checkpoint by name, whatever its layout (not DeepSpeed's)."""
    layout = layout_of(folder)
    if layout is Layout.FSDP_FULL:
        return torch.load(folder / FULL[0], map_location="cpu", weights_only=True)
    if layout is Layout.FSDP_SHARDED:
        return read_shards(folder / SHARDED[0])["model"]
    index = read_json(folder / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    return {key: value for name in names for key, value in load_file(folder / name).items()}


def read_optimizer(folder: Path, names: list[str]) -> dict:
    """Return the whole state of a checkpoint's optimizer, by the names of the weights.

    Args:
        names: those of the weights in the order of the optimizer, which a plain checkpoint counts.

    Raises:
        ValueError: the optimizer of the checkpoint has another number of weights.
    """
    layout = layout_of(folder)
    if layout is Layout.FSDP_FULL:
        return torch.load(folder / FULL[1], map_location="cpu", weights_only=True)
    if layout is Layout.FSDP_SHARDED:
        return read_shards(folder / SHARDED[1])["optimizer"]
    found = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    count = sum(len(group["params"]) for group in found["param_groups"])
    if count != len(names):
        raise ValueError(f"the optimizer of {folder} has {count} weights, this run's has {len(names)}")
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in found["param_groups"]]
    return {"state": {names[i]: state for i, state in found["state"].items()}, "param_groups": groups}


def read_shards(folder: Path) -> dict:
    """Return what the shards of torch.distributed.checkpoint in a folder make together."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole.pt"
        dcp_to_torch_save(folder, whole)
        return torch.load(whole, map_location="cpu", weights_only=True)
