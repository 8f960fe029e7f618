# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The text used when no data is named: the language reference that ships with every CPython."""

from lalm.training.errors import UserError


def python_reference() -> dict[str, list[str]]:
    """Return the topics of `pydoc_data.topics` as documents, split into train, validation and test.

    The split is by rank in the sorted topic names: of every ten, the eighth is validation and the sixth is test. It
    depends on nothing but the Python version, whose reference differs a little from release to release.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no pydoc_data.topics (the built-in text); name text with --train_file or --dataset_name"
        ) from None
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for rank, name in enumerate(sorted(topics)):
        split = {7: "validation", 5: "test"}.get(rank % 10, "train")
        splits[split].append(topics[name])
    return splits
