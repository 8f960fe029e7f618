"""Honours the `off` entries of tests/variants.py."""

import pytest


@pytest.fixture(autouse=True)
def _switched_off(request):
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    for name, reason in (row.off if row else {}).items():
        if request.node.name.startswith(name):
            pytest.skip(f"{row.name}: {reason}")
