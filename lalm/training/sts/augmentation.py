# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Altered copies of training rows: words deleted or exchanged (EDA, Wei and Zou, arXiv 1901.11196)."""

import random
from collections.abc import Callable, Sequence

from datasets import Dataset, concatenate_datasets


def delete_words(words: list[str], rate: float, source: random.Random) -> list[str]:
    """Leave out every word with a probability of `rate`; one word is always left."""
    kept = [word for word in words if source.random() >= rate]
    return kept or [source.choice(words)]


def swap_words(words: list[str], rate: float, source: random.Random) -> list[str]:
    """Exchange two words at random places, once for every `1 / rate` words and at least once."""
    words = list(words)
    for _ in range(max(1, round(rate * len(words)))):
        one, other = source.sample(range(len(words)), 2)
        words[one], words[other] = words[other], words[one]
    return words


AUGMENTATIONS: dict[str, Callable[[list[str], float, random.Random], list[str]]] = {
    "word_deletion": delete_words,
    "word_swap": swap_words,
}


def altered(text: str, name: str, rate: float, source: random.Random) -> str | None:
    """Return a text changed by an augmentation; None if it has one word, or nothing has changed."""
    words = text.split()
    if len(words) < 2:
        return None
    changed = AUGMENTATIONS[name](words, rate, source)
    return None if changed == words else " ".join(changed)


def augment_texts(texts: Sequence[str], names: Sequence[str], rate: float, seed: int) -> list[str]:
    """Return the altered copies of texts, one for each augmentation."""
    source = random.Random(seed)
    copies = (altered(text, name, rate, source) for name in names for text in texts)
    return [copy for copy in copies if copy is not None]


def augment_rows(rows: Dataset, names: Sequence[str], rate: float, seed: int) -> Dataset:
    """Return rows followed by copies of them in which the first text is altered, one for each augmentation.

    The other texts and a score stay as they are. What a copy shares with its row keeps the two out of one batch where
    the texts of other rows count as negatives.
    """
    source, column = random.Random(seed), rows.column_names[0]
    parts = [rows]
    for name in names:
        changed = [altered(text, name, rate, source) for text in rows[column]]
        kept = [index for index, text in enumerate(changed) if text is not None]
        copies = rows.select(kept).to_dict() | {column: [changed[index] for index in kept]}
        parts.append(Dataset.from_dict(copies, features=rows.features))
    return concatenate_datasets(parts)
