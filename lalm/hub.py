# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Saved checkpoints that load anywhere: the code they need, written next to the weights.

transformers loads a class named in config.json's `auto_map` from files that lie flat next to it and import each other
as `from .name import ...`. Saving merges the package into a few such files, C++ sources included (bundle.py).
`LalmConfig.save_pretrained` calls `export_code`; models, the Trainer and push_to_hub all pass through there.
"""

import os
from pathlib import Path

from transformers import PreTrainedConfig

from lalm.bundle import checkpoint_sources
from lalm.modeling.saving import staged_save


def export_code(config: PreTrainedConfig, save_directory: str | os.PathLike) -> None:
    """Write the modeling and configuration code of `config` into `save_directory` and set `config.auto_map`.

    Every head of the variant gets an entry, so `AutoModel` loads a saved causal language model with
    `trust_remote_code=True` where lalm is not installed. Call it before config.json is written. Does nothing for a
    class that is not a row of `lalm.VARIANTS`: a subclass made elsewhere, or a class loaded from a checkpoint.

    Raises:
        OSError: if the files cannot be written; `save_directory` and `config.auto_map` are then as they were.
    """
    from lalm import VARIANTS  # not at the top: lalm imports the configurations, which import this module

    variant = next((row for row in VARIANTS if row.config is type(config)), None)
    if variant is None:
        return
    classes = {"AutoConfig": variant.config, **variant.models}
    sources = checkpoint_sources(*sorted({cls.__module__ for cls in classes.values()}))
    with staged_save(save_directory) as staging:
        for name, source in sources.items():
            (staging / name).write_text(source, encoding="utf-8")
    auto_map = {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()}
    config.auto_map = _foreign_entries(config, Path(save_directory), set(sources)) | auto_map


def _foreign_entries(config: PreTrainedConfig, folder: Path, ours: set[str]) -> dict[str, object]:
    """Entries of `auto_map` for code that is not ours and lies in `folder`, such as a user's own head.

    Entries that point into a repository ("user/repo--module.Class") go: they would load that repository's code.
    """
    kept = {}
    for name, reference in (getattr(config, "auto_map", None) or {}).items():
        file = f"{str(reference).partition('.')[0]}.py"
        if file not in ours and (folder / file).is_file():
            kept[name] = reference
    return kept
