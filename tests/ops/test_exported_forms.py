"""What exported programs compute in another way, held against what runs otherwise."""

import pytest
import torch

from lalm.modeling.ops import chunks
from lalm.modeling.ops.diagonal import diagonal_recurrence
from lalm.modeling.ops.sequence_layout import stable_order
from tests.modeling.exact import assert_close


@pytest.mark.parametrize("size", [1, 2, 16, 24, 64])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_triangular_solve_by_products(size, strength, monkeypatch):
    # Keys that are alike, where the powers of the system grow to 10^18 and cancel.
    system = strength * torch.ones(2, size, size, dtype=torch.float32) + 0.01 * torch.randn(2, size, size)
    right = torch.randn(2, size, 5)
    expected = torch.linalg.solve_triangular(
        system.double(), right.double(), upper=False, unitriangular=True
    )  # the diagonal is taken for 1 by both
    monkeypatch.setattr(chunks, "has_open_length", lambda: True)
    found = chunks.solve_unit_lower(system, right).double()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bounded_scores_by_joining(monkeypatch):
    q, k = torch.randn(2, 2, 3, 16, 5, dtype=torch.float64), torch.randn(2, 2, 3, 16, 5, dtype=torch.float64)
    g = -torch.rand(2, 2, 3, 16, 5, dtype=torch.float64) * 30
    expected = diagonal_recurrence._bounded_scores(q, k, g).tril()
    monkeypatch.setattr(diagonal_recurrence, "has_open_length", lambda: True)
    assert_close(diagonal_recurrence._bounded_scores(q, k, g), expected, "scores")


def test_stable_order():
    keys = torch.randint(0, 4, (5, 40))
    assert torch.equal(stable_order(keys), keys.argsort(dim=1, stable=True))
    assert torch.equal(stable_order(keys > 1), (keys > 1).int().argsort(dim=1, stable=True))
