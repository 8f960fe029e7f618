"""Batches: every row once, lengths together, curricula in their order, shares kept, the same again with a seed."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset

from lalm.training.curriculum import grow_p2
from lalm.training.sts.batches import LengthSampler, MixtureSampler, cut, token_estimates

LENGTHS = np.random.default_rng(0).integers(3, 120, size=1000)


def rows_of(sampler) -> list[int]:
    return [row for batch in sampler for row in batch]


def test_lengths_are_those_of_the_longest_text():
    rows = {
        "anchor": ["abc", "a" * 70, "é" * 35],
        "positive": ["a" * 35, "b", "c"],
        "row": [0, 1, 2],
        "score": [1.0] * 3,
    }
    assert token_estimates(Dataset.from_dict(rows), 1000).tolist() == [12, 22, 12]
    assert token_estimates(Dataset.from_dict(rows), 15).tolist() == [12, 15, 12]
    assert token_estimates(Dataset.from_dict(rows).select([2, 1]), 15).tolist() == [12, 15]


def test_batches_hold_every_row_once_and_similar_lengths():
    sampler = LengthSampler(LENGTHS, 8)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 125
    assert sorted(rows_of(sampler)) == list(range(1000))
    assert np.mean([np.ptp(LENGTHS[batch]) for batch in batches]) < 8
    means = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(125))[0, 1]) < 0.3, "no order of lengths is left between batches"


def test_epochs_differ_and_a_seed_repeats():
    sampler, again = LengthSampler(LENGTHS, 8, seed=3), LengthSampler(LENGTHS, 8, seed=3)
    first = list(sampler)
    assert first == list(sampler) == list(again)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(LengthSampler(LENGTHS, 8, seed=4)) != first


def test_long_texts_make_smaller_batches():
    assert [part.tolist() for part in cut(np.arange(5), np.array([1, 1, 2, 9, 50]), 3, 10)] == [[0, 1, 2], [3], [4]]
    sampler = LengthSampler(LENGTHS, 32, max_batch_tokens=600)
    batches = list(sampler)
    assert sorted(rows_of(sampler)) == list(range(1000))
    assert max(len(batch) * LENGTHS[batch].max() for batch in batches) <= 600
    assert len(sampler) == len(batches)


def test_incomplete_batches_are_dropped_on_demand():
    assert {len(batch) for batch in LengthSampler(LENGTHS[:30], 8, drop_last=True)} == {8}
    assert sorted(len(batch) for batch in LengthSampler(LENGTHS[:30], 8)) == [6, 8, 8, 8]


def test_grow_p2_uses_everything_and_grows():
    buckets = [[(kind, i) for i in range(160)] for kind in range(3)]
    order = grow_p2(buckets, [4, 2, 1], 4, np.random.default_rng(0))
    assert sorted(order) == sorted(item for bucket in buckets for item in bucket)
    kinds = np.array([kind for kind, _ in order]).reshape(4, 120)
    for cycle in kinds:
        assert cycle[:40].mean() < 0.9
        assert cycle[-20:].mean() > 1.5
        assert [int((cycle == kind).sum()) for kind in range(3)] == [40, 40, 40]


@pytest.mark.parametrize("curriculum", ["grow_p2", "phases"])
def test_curricula_hold_every_row_once_and_begin_short(curriculum):
    sampler = LengthSampler(LENGTHS, 8, curriculum=curriculum, cycles=1)
    assert sorted(rows_of(sampler)) == list(range(1000))
    means = np.array([LENGTHS[batch].mean() for batch in sampler])
    assert means[:25].mean() < 40
    assert means[-25:].mean() > 80
    if curriculum == "phases":
        assert means[:50].max() <= np.median(means) + 2
        assert means[-25:].min() >= np.median(means) - 2


def test_a_curriculum_fits_into_the_steps_there_are():
    sampler = LengthSampler(LENGTHS, 8, curriculum="phases", most=20)
    assert len(list(sampler)) == 20
    means = np.array([LENGTHS[batch].mean() for batch in sampler])
    assert means[:8].mean() < means[-4:].mean() - 30
    assert len(LengthSampler(LENGTHS, 8, most=20)) == 125, "without a curriculum the Trainer stops by itself"


def mixture(shares, epoch: int = 0) -> list[list[int]]:
    parts = [range(100), range(1000, 1400), range(5)]
    samplers = [LengthSampler(np.arange(len(part)), 5, seed=index) for index, part in enumerate(parts)]
    sampler = MixtureSampler(ConcatDataset(parts), samplers, shares, seed=1, generator=torch.Generator())
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 20 + 80 + 1
    return batches


def test_shares_of_a_mixture():
    batches = mixture([0.6, 0.2, 0.2])
    kinds = [0 if batch[0] < 100 else 1 if batch[0] < 500 else 2 for batch in batches]
    assert [kinds.count(kind) for kind in range(3)] == pytest.approx([60, 20, 20], abs=12)
    small = [tuple(sorted(batch)) for batch, kind in zip(batches, kinds, strict=True) if kind == 2]
    assert set(small) == {(500, 501, 502, 503, 504)}, "a data set that ends begins anew"
    first = [row for batch, kind in zip(batches, kinds, strict=True) if kind == 0 for row in batch]
    assert sorted(first[:100]) == list(range(100))
    assert batches == mixture([0.6, 0.2, 0.2])
    assert batches != mixture([0.6, 0.2, 0.2], epoch=1)
    assert {batch[0] < 100 for batch in mixture([1, 0, 0])} == {True}


def test_a_mixture_needs_batches():
    with pytest.raises(ValueError, match="no whole batch"):
        MixtureSampler(ConcatDataset([range(3)]), [LengthSampler(np.arange(3), 8, drop_last=True)], [1.0])
