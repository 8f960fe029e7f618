"""Altered copies of rows, and easy rows before hard ones."""

import itertools
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from lalm.errors import UserError
from lalm.training.sts.arguments import parse_sts_arguments
from lalm.training.sts.augmentation import altered, augment_rows, augment_texts
from lalm.training.sts.batches import LengthSampler, token_estimates
from lalm.training.sts.difficulty import EasyToHardSampler, difficulties, overlap, pair_of

TEXT = " ".join(f"w{index}" for index in range(40))
FINETUNE = ("--stage", "finetune", "--model_name_or_path", "x")


def test_altered_texts():
    source = random.Random(0)
    deleted = [altered(TEXT, "word_deletion", 0.25, source).split() for _ in range(200)]
    assert np.mean([len(words) for words in deleted]) == pytest.approx(30, abs=1)
    assert all(words == sorted(words, key=lambda word: int(word[1:])) for words in deleted)
    swapped = altered(TEXT, "word_swap", 0.1, source).split()
    assert sorted(swapped) == sorted(TEXT.split())
    assert 2 <= sum(one != other for one, other in zip(swapped, TEXT.split(), strict=True)) <= 8
    assert altered("word", "word_deletion", 0.5, source) is None
    assert altered("two words", "word_deletion", 0.999, source) in ("two", "words"), "one word is left"
    assert altered("the the", "word_swap", 0.5, source) is None, "nothing has changed"


def test_copies_of_rows_change_the_first_text_alone():
    rows = Dataset.from_dict({"sentence1": [TEXT, "one"], "sentence2": ["as it was", "two"], "score": [0.4, 0.9]})
    found = augment_rows(rows, ["word_deletion", "word_swap"], 0.2, seed=1)
    assert found[:2] == rows[:], "the rows themselves come first"
    assert len(found) == 4, "a text of one word has no copy"
    for row in found.select([2, 3]):
        assert row["sentence1"] != TEXT
        assert (row["sentence2"], row["score"]) == ("as it was", 0.4)
    assert found[:] == augment_rows(rows, ["word_deletion", "word_swap"], 0.2, seed=1)[:]
    assert found[:] != augment_rows(rows, ["word_deletion", "word_swap"], 0.2, seed=2)[:]
    assert len(augment_texts([TEXT, "one"], ["word_swap"], 0.2, seed=1)) == 1


def test_difficulty():
    assert overlap("A dog runs.", "a DOG sleeps") == 0.5
    assert overlap("", "") == 1
    rows = Dataset.from_dict({"anchor": ["a b", "a b"], "positive": ["a b", "c d"]})
    assert difficulties(rows, pair_of(rows)).tolist() == [0, 1]
    triplets = rows.add_column("negative", ["c", "a b"])
    assert difficulties(triplets, pair_of(triplets)).tolist() == [-1, 1]
    scored = rows.rename_columns({"anchor": "sentence1", "positive": "sentence2"}).add_column("score", [0.25, 0.25])
    assert difficulties(scored, pair_of(scored)).tolist() == [0.75, 0.25]
    assert pair_of(Dataset.from_dict({"text": ["a"], "label": [[1.0]]})) is None


def pairs(count: int) -> Dataset:
    source = random.Random(0)
    shared = [source.randint(0, 20) for _ in range(count)]
    anchors = [" ".join(f"x{row}y{index}" for index in range(20)) for row in range(count)]
    others = [
        " ".join([*anchor.split()[:same], *(f"z{row}y{index}" for index in range(20 - same))])
        for row, (anchor, same) in enumerate(zip(anchors, shared, strict=True))
    ]
    return Dataset.from_dict({"anchor": anchors, "positive": others})


@pytest.mark.parametrize("duplicates", [True, False])
def test_easy_rows_come_first(duplicates):
    rows = pairs(160)

    def make(part):
        if duplicates:
            return LengthSampler(token_estimates(part, 128), 4, seed=1)
        return NoDuplicatesBatchSampler(part, 4, False, generator=torch.Generator(), seed=1)

    sampler = EasyToHardSampler(rows, pair_of(rows), make, 4, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 40
    assert sorted(row for batch in batches for row in batch) == list(range(160))
    hardness = difficulties(rows, pair_of(rows))
    tenths = [hardness[[row for batch in batches[start : start + 4] for row in batch]] for start in range(0, 40, 4)]
    assert all(one.max() <= other.min() for one, other in itertools.pairwise(tenths))
    sampler.limit(20)
    few = list(sampler)
    assert len(few) == len(sampler) == 20
    assert np.mean(hardness[few[0]]) < 0.2 < 0.8 < np.mean(hardness[few[-1]]), "a short training sees hard rows too"
    sampler.set_epoch(1)
    assert list(sampler) != few


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*FINETUNE, "--augmentation", "word_delete"), "--augmentation is 'word_delete'; choose among word_deletion"),
        ((*FINETUNE, "--augmentation_rate", "1"), "--augmentation_rate is 1; it must lie between 0 and 1"),
        ((*FINETUNE, "--row_order", "hard"), "--row_order is 'hard'; choose one of random, easy_to_hard"),
        (("--stage", "distill", "--row_order", "easy_to_hard"), "--stage distill has none"),
        ((*FINETUNE, "--row_order", "easy_to_hard", "--curriculum", "phases"), "contradicts --curriculum phases"),
    ],
)
def test_bad_options(flags, message):
    with pytest.raises(UserError, match=message):
        parse_sts_arguments(list(flags))
