"""Training by several processes equals training by one: loss and all gradients, with the head limited to one logit as
in run_clm.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.engines import TRAINED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUNS = {"ddp": 2, "fsdp2": 2, "fsdp2-bfloat16": 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By engine, what tests/distributed/engines.py found."""
    found, folder = {}, tmp_path_factory.mktemp("engines")
    for engine, processes in RUNS.items():
        output = folder / f"{engine}.json"
        launch = ["torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d"]
        launch += ["--rdzv_endpoint", "localhost:0", "-m", "tests.distributed.engines", engine, str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *launch], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
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
