"""Training by several processes equals training by one: loss and all gradients, with the head limited to one logit as
in run_clm.py."""

import json

import pytest

from tests.distributed.engines import TRAINED
from tests.distributed.launch import launch

pytestmark = pytest.mark.slow
RUNS = {"ddp": 2, "fsdp2": 2, "fsdp2-bfloat16": 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By engine, what tests/distributed/engines.py found."""
    found, folder = {}, tmp_path_factory.mktemp("engines")
    for engine, processes in RUNS.items():
        output = folder / f"{engine}.json"
        launch(processes, "tests.distributed.engines", engine, str(output))
        found[engine] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("engine", RUNS)
@pytest.mark.parametrize("row", [row.name for row in TRAINED])
def test_equals_one_process(row, engine, results):
    errors = results[engine][row]
    assert isinstance(errors, dict), errors  # a traceback
    if engine == "fsdp2-bfloat16":
        assert errors["loss"] < 5e-3
        assert errors["all gradients"] < 5e-2
    else:
        assert max(errors.values()) < 1e-4, max(errors, key=errors.get)
