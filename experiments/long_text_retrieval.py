# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Find whole Wikipedia articles by their title, and by a sentence of their second half, at several lengths of reading.

    python -m experiments.long_text_retrieval checkpoints/lam-minilm-l6 sentence-transformers/all-MiniLM-L6-v2 \\
        --articles data/wikipedia-en/articles.jsonl.gz --split test --tokens 256 4096

Only articles of 1,000 words and more take part. --split takes those that experiments/long_text_articles/ names:
`test`, 600 articles, for published figures, or `validation`, 150, for choosing. recipes/lam_documents.yaml trains on
neither.
Each model reads as much of an article as --tokens and its own limit let it; recall@1 and @10 are the shares of queries
whose article is the nearest, or among the ten nearest, by cosine.
A bar shows the texts that are read, and how long the rest will take.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm  # type: ignore[import-untyped]

import lalm  # noqa: F401  registers our models
from lalm.errors import UserError, exit_on_user_error
from lalm.training.sts.evaluation import encode
from lalm.training.sts.stages import backbone

FEWEST_WORDS, TEXTS_AT_ONCE, QUERY_TOKENS = 1000, 32, 128
SPLITS = Path(__file__).with_name("long_text_articles")


def read_articles(path: Path, split: str | None = None) -> list[dict[str, str]]:
    """Return title, body (without the title in front) and a sentence of the second half of long articles."""
    titles = split and set((SPLITS / f"{split}.txt").read_text(encoding="utf-8").splitlines())
    source = random.Random(0)
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            body = row["text"].removeprefix(row["title"]).strip()
            if len(body.split()) < FEWEST_WORDS:
                continue
            late = re.split(r"(?<=[.!?])\s+", body[len(body) // 2 :])[1:]
            late = [sentence for sentence in late if 8 <= len(sentence.split()) <= 40]
            sentence = source.choice(late) if late else ""
            if late and (not titles or row["title"] in titles):
                found.append({"title": row["title"], "body": body, "sentence": sentence})
    if not found:
        which = f" of the split {split}" if split else ""
        raise UserError(f"{path} holds no article of {FEWEST_WORDS} words{which}")
    return found


def recalls(queries: np.ndarray, articles: np.ndarray) -> tuple[float, float]:
    """Return recall@1 and recall@10 of unit vectors `[N, D]`, row i of one belonging to row i of the other."""
    similarity = queries @ articles.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(axis=1)
    return float((rank < 1).mean()), float((rank < 10).mean())


def read(model: SentenceTransformer, texts: list[str], title: str) -> np.ndarray:
    """Return the vectors `[N, D]` of long texts, with a progress bar on stderr."""
    parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
    bar = tqdm(total=len(texts), desc=title, unit=" texts")
    found = []
    for part in parts:
        found.append(encode(model, part, batch_size=8))
        bar.update(len(part))
    bar.close()
    return np.concatenate(found)


def readable(model: SentenceTransformer) -> int | None:
    """Return how many tokens a model can read, None if there is no limit."""
    positions = getattr(backbone(model).config, "max_position_embeddings", -1)
    return positions if positions > 0 else None


def score(
    model: SentenceTransformer, articles: list[dict[str, str]], lengths: list[int], name: str
) -> Iterator[tuple[int, str, float, float]]:
    """Yield tokens read, kind of query, recall@1 and recall@10 for every length and kind."""
    limit = readable(model)
    model.max_seq_length = QUERY_TOKENS
    queries = {kind: encode(model, [row[kind] for row in articles]) for kind in ("title", "sentence")}
    for tokens in lengths:
        model.max_seq_length = min(tokens, limit or tokens)
        vectors = read(model, [row["body"] for row in articles], f"{name}, {model.max_seq_length:,} tokens")
        for kind, asked in queries.items():
            yield model.max_seq_length, kind, *recalls(asked, vectors)


def main() -> None:
    """Encode, rank, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders or Hub names")
    parser.add_argument("--articles", type=Path, required=True, help="JSON lines, gzip: title, text")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--split", choices=["test", "validation"], help="default: every long article")
    arguments = parser.parse_args()
    articles = read_articles(arguments.articles, arguments.split)
    print(
        f"{len(articles):,} articles\n\n| model | tokens read | query | recall@1 | recall@10 |\n|---|---|---|---|---|"
    )
    for name in arguments.models:
        model = SentenceTransformer(name, device="cpu")
        for tokens, kind, first, ten in score(model, articles, arguments.tokens, name):
            print(f"| {name} | {tokens:,} | {kind} | {first:.3f} | {ten:.3f} |", flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
