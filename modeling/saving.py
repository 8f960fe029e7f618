# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Saves and pushes of a model: all files or none, and no old weights left where loading would prefer them."""

import contextlib
import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError

# Group 1 is the variant: weights of several (`save_pretrained(variant="fp16")`) may lie side by side.
_WEIGHTS = re.compile(
    r"model(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.(\w+))?\.json"
)
# What a save that was killed, or is going on, leaves in a folder.
UNFINISHED = ".saving"
TASKS = {"CausalLM": "text-generation", "MaskedLM": "fill-mask", "Classification": "text-classification"}
CARD = """
# {name}

A `{model_type}` model of {parameters:,} parameters ({kind}), a linear-attention model of
[lalm](https://pypi.org/project/lalm). {origin}

```python
from transformers import {auto}

model = {auto}.from_pretrained("{repo_id}", trust_remote_code=True)
```

The code in this repository is under the Apache License 2.0, the weights under the licence named above.
No figures were measured for these weights when they were pushed.
"""


@contextlib.contextmanager
def staged_save(save_directory: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder whose files move into `save_directory` once the block has ended without an error.

    The folder lies inside `save_directory`, so a move is one rename and needs no space: a full disk shows itself
    while the old files are untouched. Weights of an older save under names that the new one does not use are
    removed, or from_pretrained could prefer them.

    Raises:
        OSError: if anything cannot be written; what `save_directory` held before is then still whole.
    """
    folder = Path(save_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{UNFINISHED}-", dir=folder) as name:
            yield Path(name)
            move_files(Path(name), folder)
    except (OSError, SafetensorError) as error:
        reason = error.__cause__ or error  # of a save inside this one
        message = (
            f"Could not save to {folder}: {getattr(reason, 'strerror', None) or reason}. What was there before is "
            "untouched. Free some space or choose another folder, then save again."
        )
        code = getattr(error, "errno", None)
        raise (OSError(code, message) if code else OSError(message)) from error


def move_files(source: Path, target: Path) -> None:
    """Move every entry of `source` into `target`, over what is there, weights last; then `stale_weights` go."""
    entries = sorted(source.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
    for entry in entries:
        place = target / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
    for name in stale_weights([entry.name for entry in entries], os.listdir(target)):
        (target / name).unlink()


def stale_weights(saved: Iterable[str], present: Iterable[str]) -> list[str]:
    """The names among `present` of weights, or of an index, that a save of the files `saved` has replaced: loading
    would prefer an old `model.safetensors` to new shards."""
    names = set(saved)
    found = {name: match for name in [*names, *present] if (match := _WEIGHTS.fullmatch(name))}
    variants = {match[1] or match[2] for name, match in found.items() if name in names}
    return sorted(name for name, match in found.items() if name not in names and (match[1] or match[2]) in variants)


def commit_folder(
    folder: str | os.PathLike, repo_id: str, *, message: str, names: Iterable[str] | None = None,
    ignore: Iterable[str] = (), path_in_repo: str = "", token: str | bool | None = None, revision: str | None = None,
    **options: Any,
) -> CommitInfo:  # fmt: skip
    """Upload a folder to the Hub in one commit, which also deletes `stale_weights`: a push that fails or is
    interrupted leaves the repository as it was.

    Args:
        names: the entries of the folder to take; default: all.
        ignore: patterns of entries to leave out, besides checkpoints and unfinished saves.
        options: of `HfApi.create_commit`.

    Raises:
        HfHubHTTPError, OSError: as huggingface_hub.
    """
    api, root, prefix = HfApi(token=token), Path(folder), path_in_repo and f"{path_in_repo}/"
    hidden = (f"{UNFINISHED}*", "checkpoint-*", "_*", ".cache", *ignore)
    chosen = [name for name in sorted(names or os.listdir(root)) if not any(map(partial(fnmatch, name), hidden))]
    files = [path for name in chosen for path in [root / name, *(root / name).rglob("*")] if path.is_file()]
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = [
        name[len(prefix) :] for name in api.list_repo_files(repo_id, revision=revision) if name.startswith(prefix)
    ]
    added = [CommitOperationAdd(prefix + path.relative_to(root).as_posix(), path) for path in files]
    deleted = [CommitOperationDelete(prefix + name) for name in stale_weights(chosen, there)]
    return api.create_commit(repo_id, [*added, *deleted], commit_message=message, revision=revision, **options)


def open_repository(repo_id: str, private: bool | None, token: str | bool | None) -> str:
    """Make the repository if there is none, and return its full name."""
    return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def push_model(
    model: Any, folder: str | os.PathLike, repo_id: str, names: Iterable[str], *, tags: Iterable[str] | None = None,
    token: str | bool | None = None, **options: Any,
) -> CommitInfo:  # fmt: skip
    """Push the files `names` of a folder into which `model` has been saved, with a card if the repository has none.

    Raises:
        HfHubHTTPError, OSError: as huggingface_hub; the repository is then as it was.
    """
    names = {*names} - {"README.md"}
    if not HfApi(token=token).file_exists(repo_id, "README.md"):
        write_card(model, Path(folder), repo_id, tags or (), token)
        names.add("README.md")
    return commit_folder(folder, repo_id, names=names, token=token, **options)


def write_card(model: Any, folder: Path, repo_id: str, tags: Iterable[str], token: str | bool | None) -> None:
    """Write README.md for weights saved in `folder`: the card of the folder that they were loaded from if they are
    still the same, else a short one with the licence, languages and data sets of that card."""
    start = str(model.config.name_or_path or "")
    card = _card_of(start, token)
    saved, loaded = folder / "model.safetensors", Path(start) / "model.safetensors"
    is_same = start and saved.is_file() and loaded.is_file() and filecmp.cmp(saved, loaded, shallow=False)
    if card is None or not is_same:
        kind = type(model).__name__
        known = card.data.to_dict() if card else {}
        data = ModelCardData(
            license=known.get("license", "apache-2.0"),
            language=known.get("language"),
            datasets=known.get("datasets"),
            base_model=known.get("base_model") if Path(start).exists() else start if card else None,
            library_name="transformers",
            pipeline_tag=next((task for end, task in TASKS.items() if kind.endswith(end)), "feature-extraction"),
            tags=["lalm", model.config.model_type, "linear-attention"],
            ignore_metadata_errors=True,
        )
        origin = f"It was loaded from `{Path(start).name if Path(start).exists() else start}`." if start else ""
        auto = next(
            (name for name, place in (model.config.auto_map or {}).items() if place.endswith(f".{kind}")), "AutoModel"
        )
        text = CARD.format(
            name=repo_id.rpartition("/")[2], model_type=model.config.model_type, parameters=model.num_parameters(),
            kind=kind, origin=origin, auto=auto, repo_id=repo_id,
        )  # fmt: skip
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True)
    told: Any = card.data
    told.tags = list(dict.fromkeys([*(told.get("tags") or []), *tags]))
    card.save(folder / "README.md")


def _card_of(name: str, token: str | bool | None) -> ModelCard | None:
    """The card of a folder, or of a repository; None if there is none to be had."""
    try:
        path = Path(name) / "README.md"
        if not name or (Path(name).exists() and not path.is_file()):
            return None
        return ModelCard.load(path if path.is_file() else name, token=token, ignore_metadata_errors=True)  # type: ignore[arg-type]
    except Exception:  # of the client, of its HTTP library, of YAML: a push does not fail for want of an old card
        return None


def lossless(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The weights in a smaller type, or None if any of them would change."""
    smaller = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()}
    same = all(torch.equal(value.to(state_dict[name].dtype), state_dict[name]) for name, value in smaller.items())
    return smaller if same else None
