# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of texts of very unequal lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# English has about 4.5 characters per token; fewer here, so that a batch rarely exceeds its budget of tokens
CHARACTERS_A_TOKEN = 3.5
# tokens from which on a text is long
LONG = 512


def encode_by_length(model: Any, texts: Sequence[str], batch_size: int, **options) -> np.ndarray:
    """Return `model.encode` of N texts `[N, D]`, in batches of fewer texts the longer these are.

    `encode` sorts texts by length, but pads whatever meets in a batch to the longest. Here texts of up to 512 tokens
    make batches of `batch_size`, those of up to 1024 of half as many, and so on, and do not meet each other.
    """
    limit = getattr(model, "max_seq_length", None) or np.inf
    tokens = np.minimum([len(text) / CHARACTERS_A_TOKEN for text in texts], limit)
    doublings = np.ceil(np.log2(np.maximum(tokens / LONG, 1))).astype(int)
    parts = [np.flatnonzero(doublings == count) for count in np.unique(doublings)]
    sizes = [max(1, batch_size >> int(doublings[part[0]])) for part in parts]
    found = [
        model.encode([texts[int(row)] for row in part], batch_size=size, **options)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return np.concatenate(found)[np.argsort(np.concatenate(parts))]
