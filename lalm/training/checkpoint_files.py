# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Whether the files of a Trainer checkpoint are whole: checksums of our own, and what the formats tell."""

import json
import zipfile
import zlib
from pathlib import Path

from transformers import TrainerCallback

from lalm.training.results import read_json, write_json

CHECKSUMS = "checksums.json"
PIECE = 1 << 24
# accelerate's names: a file or a folder of FSDP, a folder of DeepSpeed
SHARDED = ("pytorch_model_fsdp*", "global_step*")


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
    for path in [folder / "optimizer.pt", folder / "scheduler.pt", *folder.glob("rng_state*.pth")]:
        if path.is_file() and not is_whole_archive(path):
            raise ValueError(f"{path.name} is damaged")


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError or OSError that says what is missing, cut off or damaged in a Trainer checkpoint.

    Raises:
        NotResumableError: nothing but the model was saved (--save_only_model).
    """
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    if "global_step" not in state:
        raise ValueError("trainer_state.json has no global_step")
    is_sharded = any(any(folder.glob(pattern)) for pattern in SHARDED)
    states = list(folder.glob("rng_state*.pth"))
    if not is_sharded:
        check_weights(folder)
        if not (states or (folder / "optimizer.pt").exists() or (folder / "scheduler.pt").exists()):
            raise NotResumableError("it was saved with --save_only_model and has no optimizer to go on with")
        check_archive(folder / "optimizer.pt")
    check_archive(folder / "scheduler.pt")
    if not states:
        raise ValueError("rng_state.pth is missing")
    for path in states:
        check_archive(path)
    if checksums := read_json(folder / CHECKSUMS):
        check_checksums(folder, checksums)
    else:
        check_contents(folder)
