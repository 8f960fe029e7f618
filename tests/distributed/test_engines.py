"""Training by several processes equals training by one: loss and all gradients, with the head limited to one logit as
in run_clm.py."""

import importlib.util
import json

import pytest

from tests.distributed.engines import trained_by
from tests.distributed.launch import launch

pytestmark = pytest.mark.slow
RUNS = {2: ("ddp", "fsdp2", "fsdp2-bfloat16", "zero2", "zero3"), 4: ("ddp", "fsdp2")}
CASES = [
    (processes, engine, row.name)
    for processes, engines in RUNS.items()
    for engine in engines
    for row in trained_by(processes, engine)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of processes and engine, what tests/distributed/engines.py found."""
    found, folder = {}, tmp_path_factory.mktemp("engines")
    for processes, engines in RUNS.items():
        output = folder / f"{processes}.json"
        if importlib.util.find_spec("deepspeed") is None:
            engines = [engine for engine in engines if not engine.startswith("zero")]
        launch(processes, "tests.distributed.engines", ",".join(engines), str(output))
        found[processes] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("processes", "engine", "row"), CASES)
def test_equals_one_process(processes, engine, row, results):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    errors = results[processes][engine][row]
    assert isinstance(errors, dict), errors  # a traceback
    if engine == "fsdp2-bfloat16":
        assert errors["loss"] < 5e-3
        assert errors["all gradients"] < 5e-2
    else:
        assert max(errors.values()) < 1e-4, max(errors, key=errors.get)
