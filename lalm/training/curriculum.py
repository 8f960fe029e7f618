# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The order of lengths in a training, for language models and sentence encoders."""

from collections.abc import Sequence

import numpy as np


def grow_p2(buckets: Sequence[Sequence], odds: Sequence[float], cycles: int, source: np.random.Generator) -> list:
    """Draw the items of buckets, short lengths first, in an order of growing length within each of some cycles.

    Dataset Decomposition (Pouransari et al. 2024, arXiv 2405.13226), "Grow-P2" with odds that halve from bucket to
    bucket: a cycle holds an even share of every bucket; its next item comes from bucket i with a probability of odds_i
    times the size of that share, until the share is used up.
    """
    order = []
    for cycle in range(cycles):
        ends = [(len(bucket) * cycle // cycles, len(bucket) * (cycle + 1) // cycles) for bucket in buckets]
        shares = [list(bucket[start:end]) for bucket, (start, end) in zip(buckets, ends, strict=True)]
        weights = np.array([odd * len(share) for odd, share in zip(odds, shares, strict=True)], dtype=float)
        while weights.any():
            index = int(source.choice(len(shares), p=weights / weights.sum()))
            order.append(shares[index].pop())
            weights[index] *= bool(shares[index])
    return order
