"""Honours the `off` entries of tests/variants.py."""

import pytest


@pytest.fixture(autouse=True)
def _switched_off(request):
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    reason = row and row.off.get(request.node.originalname)
    if reason:
        pytest.skip(f"{row.name}: {reason}")
