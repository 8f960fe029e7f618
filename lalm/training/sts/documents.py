# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Documents and what finds them: an article, its title, and sentences of it, for the stage finetune.

Legend: B documents of a batch, Q queries of each, M remembered documents, E size of an embedding.
"""

import math
import random
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lalm.errors import UserError
from lalm.training.sts.data import normalise
from lalm.training.sts.record_files import lines_of, read_records, text_of
from lalm.training.text_rows import check_file

# words of the shortest document, and of a sentence that may be a query
FEWEST_WORDS, SENTENCE_WORDS = 400, (8, 40)
CHARACTERS_A_TOKEN = 4.5
SHORTEST = 256
QUERIES = ("title", "late", "later", "random")


def sentences_of(text: str) -> list[str]:
    """Return the whole sentences of a text that are neither very short nor very long, the first piece left out."""
    found = re.split(r"(?<=[.!?])\s+", text)[1:-1]
    return [sentence for sentence in found if SENTENCE_WORDS[0] <= len(sentence.split()) <= SENTENCE_WORDS[1]]


def document_row(title: str, body: str, most_tokens: int, source: random.Random) -> dict[str, str] | None:
    """Cut an article to a random length and draw its queries; None if it has too few sentences.

    The length is log-uniform between 256 tokens and `most_tokens`. Two queries come from the second half of what is
    left, one from anywhere in it; they stay in the document.
    """
    tokens = math.exp(source.uniform(math.log(min(SHORTEST, most_tokens)), math.log(most_tokens)))
    text = body[: int(tokens * CHARACTERS_A_TOKEN)]
    late, everywhere = sentences_of(text[len(text) // 2 :]), sentences_of(text)
    if len(late) < 2:
        return None
    first, second = source.sample(late, 2)
    drawn = (title, first, second, source.choice(everywhere))
    return {"document": text} | dict(zip(QUERIES, drawn, strict=True))


def load_documents(
    files: Sequence[str], held_out: Collection[str], most_tokens: int, seed: int, flag: str = "--document_file"
) -> Dataset:
    """Load articles as rows of document, title, late, later, random (str) and label (number of the article).

    Args:
        files: records with title and text; a title in front of its text is cut off.
        held_out: titles of articles that are left out, compared without case and punctuation.
        most_tokens: length of the longest document, about.

    Raises:
        UserError: a file is missing or wrong, or no article of 400 words is left.
    """
    source, forbidden = random.Random(seed), {normalise(title) for title in held_out}
    rows: list[dict[str, Any]] = []
    for path in (Path(name).expanduser() for name in files):
        for number, record in read_records(path, flag, ("title", "text")):
            title, text = (text_of(record, name, path, number) for name in ("title", "text"))
            body = text.removeprefix(title).strip()
            if normalise(title) in forbidden or len(body.split()) < FEWEST_WORDS:
                continue
            if row := document_row(title, body, most_tokens, source):
                rows.append(row | {"label": len(rows)})
    if not rows:
        raise UserError(f"{flag}: no article of {FEWEST_WORDS} words is left in {', '.join(files)}")
    return Dataset.from_list(rows)


def titles_in(files: Sequence[str], flag: str = "--held_out_file") -> set[str]:
    """Return the titles that text files list, one a line.

    Raises:
        UserError: a file cannot be read.
    """
    lines: list[str] = []
    for path in (Path(name).expanduser() for name in files):
        check_file(path, flag)
        lines += lines_of(path)
    return {line.strip() for line in lines if line.strip()}


class DocumentLoss(nn.Module):
    """Cross-entropy of finding a document by each of its queries, among this batch and the documents of earlier ones.

    Few long documents fit into a batch. The vectors of the last `memory` documents, without gradients, are further
    negatives: the queue of MoCo (He et al. 2020, arXiv 1911.05722), with vectors of the model itself, which changes
    little in so few steps. The queue is not saved: a resumed run fills it anew.

    Args:
        memory: M, documents that are remembered.
        scale: what cosines are multiplied by.

    Columns: the document first, then its queries. Labels `[B]`: the number of the document; the vectors of the same
    document in the queue are no negatives.
    """

    def __init__(self, model: SentenceTransformer, memory: int = 1024, scale: float = 20.0):
        super().__init__()
        self.model, self.memory, self.scale = model, memory, scale
        self.remembered: list[tuple[Tensor, Tensor]] = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        columns = [cast(Tensor, self.model(dict(column))["sentence_embedding"]) for column in sentence_features]
        documents_BE, *queries = (F.normalize(vectors.float(), dim=-1) for vectors in columns)
        all_documents = torch.cat([documents_BE, *(vectors for vectors, _ in self.remembered)])
        numbers = torch.cat([labels, *(known for _, known in self.remembered)])
        target = torch.arange(len(labels), device=labels.device)
        same = labels[:, None] == numbers
        same[target, target] = False
        losses = []
        for query_BE in queries:
            scores = self.scale * query_BE @ all_documents.T
            losses.append(F.cross_entropy(scores.masked_fill(same, -torch.inf), target))
        if self.training:
            self._remember(documents_BE.detach(), labels)
        return {"document": torch.stack(losses).mean()}

    def _remember(self, documents_BE: Tensor, labels: Tensor) -> None:
        vectors, numbers = (torch.cat(parts) for parts in zip((documents_BE, labels), *self.remembered, strict=True))
        self.remembered = [(vectors[: self.memory], numbers[: self.memory])]

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {"memory": self.memory, "scale": self.scale}
