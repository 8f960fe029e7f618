"""The benchmark runner: what it reports, what it withholds, and what it draws."""

import json
import resource
from functools import partial

import numpy as np
import pytest
import torch

import lalm
from benchmarks import cases_ops, gates, memory, plot, run, timing
from benchmarks.forks import in_a_fork, make_own, touched_pages
from benchmarks.gates import all_near, gradients, near
from benchmarks.memory import peaks, resident
from benchmarks.models import VARIANTS, build, decodes_exactly, tokens, train_step, trains_exactly
from benchmarks.registry import CASES, Comparison, GateError, Ratio, Run, register, select
from benchmarks.timing import alternate, spread

pytestmark = pytest.mark.slow

TINY = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture
def cases(monkeypatch):
    """A registry of the test's own, on a machine without a GPU."""
    own = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("benchmarks.registry.CASES", own)
    monkeypatch.setattr(run, "describe", lambda: machine())
    monkeypatch.setattr(run, "matrix_product_rates", lambda: {"float32": 45.0, "bfloat16": 10.0})
    threads = torch.get_num_threads()
    yield own
    torch.set_num_threads(threads)


def machine():
    rates = {"float32": 50.0, "bfloat16": 10.0}
    versions = {"torch": torch.__version__, "transformers": "5"}
    common = {"date": "2026-01-01T00:00:00+00:00", "commit": "0" * 40, "threads": 1, "load": 0.0}
    return common | {"versions": versions, "hardware": {"cpu": "a CPU", "gpu": None}, "matrix_product_gflops": rates}


def fixed(seconds, gate=None, **facts):
    return Run(lambda: seconds, gate, facts)


def wrong():
    raise GateError("output: relative error 1.0e+00 over 1e-04")


def comparison(gate=None, facts=None):
    facts = facts or {}
    runs = {"slow": fixed(0.4, **facts), "fast": fixed(0.1, gate, **facts), "even": fixed(0.4)}
    ratios = [Ratio("fast", "slow", "[1, 8]", 3), Ratio("even", "slow", "[1, 8]", 3)]
    return Comparison(runs, [*ratios, Ratio("fast", "slow", "[1, 8]", 0.3, at_most=True)])


def test_the_registry_has_every_row_of_the_targets():
    wanted = {"ops_2048", "ops_8192", "gated_delta_2048", "gated_delta_8192", "decode", "linear_time", "memory"}
    wanted |= {f"{what}_{length}" for what in ("train", "prefill") for length in (512, 2048, 8192)}
    wanted |= {"autocast", "package", "import", "first_forward", "gpu_train_2048", "gpu_train_16384"}
    wanted |= {f"encoder_{shape}" for shape in ("64x16", "32x32", "32x64", "1x512", "1x2048", "1x8192_bf16")}
    assert wanted | {"encoder_memory", "gpu_dual_state"} <= set(CASES)
    assert all(case.what and case.name == name for name, case in CASES.items())
    assert len(VARIANTS) == len(lalm.VARIANTS) + 1  # and gated DeltaNet


def test_selection(cases):
    register("a_1", "", comparison)
    register("a_2", "", comparison, long=True)
    register("b", "", comparison, extra=True)
    assert [case.name for case in select([])] == ["a_1", "a_2"]
    assert [case.name for case in select([], full=True, quick=True)] == ["a_1", "b"]
    assert [case.name for case in select(["b", "a*"])] == ["a_1", "a_2", "b"]
    with pytest.raises(ValueError, match="No case is called 'c'"):
        select(["c"])
    with pytest.raises(ValueError, match="'b' already"):
        register("b", "", comparison)


def test_a_sample_that_had_to_get_memory_is_taken_again(monkeypatch):
    sizes = iter([0, 1 << 30, 1 << 30, 1 << 30, 0, 1, 0, 1 << 30, 0, 1 << 30, 0, 1 << 30])
    monkeypatch.setattr(timing, "resident", lambda: (next(sizes), None))
    results = iter([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert [timing.sample(lambda: next(results)) for _ in range(3)] == [1.0, 2.0, 6.0]  # three times at most


def test_a_round_of_peaks_is_measured_at_once_and_the_next_anew(monkeypatch):
    rounds = iter([1.0, 2.0])

    def measured_apart(job, names, lengths):
        figure = next(rounds)
        return {name: {str(length): figure for length in lengths} for name in names}

    monkeypatch.setattr(memory, "measured_apart", measured_apart)
    peak = memory.in_rounds("encode", ("a", "b"), (8, 16))
    asked = [(name, length) for name in "ab" for length in (8, 16)]
    assert [[peak(*one) for one in asked] for _ in range(2)] == [[1.0] * 4, [2.0] * 4]


def test_rounds_alternate_and_follow_the_budget(monkeypatch):
    calls = []
    runs = {name: partial(calls.append, name) for name in "ab"}
    samples = alternate(runs, budget=0, least_rounds=2)
    assert calls == list("ababab")  # the first two are the warm-up
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}
    assert all(value >= 0 for values in samples.values() for value in values)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 5)
    assert len(alternate({"a": lambda: 1.0}, budget=60)["a"]) == 5
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.5, 2.5, 3)


def test_table_json_and_picture(cases, tmp_path, capsys):
    register("train_64", "", partial(comparison, facts={"tokens": 64, "matrix_parameters": 10**6}), budget=0)
    register("gpu_something", "our model against theirs", comparison, needs="cuda")
    path = tmp_path / "out.json"
    assert run.main(["--json", str(path), "--quick"]) == 0
    table = capsys.readouterr().out
    lines = [line.split() for line in table.splitlines() if line.startswith("train_64")]
    assert [line[-1] for line in lines] == ["met", "missed", "met"]
    for part in ("4.00x one round", "1.00x", "0.25x", "400 ms", ">= 3x", "<= 0.3x", "2 met, 1 missed, 1 no GPU"):
        assert part in table
    report = json.loads(path.read_text())
    assert report["machine"] == machine()
    first = report["lines"][0]
    assert {"case", "ours", "baseline", "shape", "dtype", "unit", "target", "at_most", "ratio", "met"} <= first.keys()
    assert first["ours_value"] == {"median": 100, "q1": 100, "q3": 100, "n": 1}
    assert report["cases"]["train_64"]["runs"]["fast"]["facts"]["tokens"] == 64
    assert "our model against theirs: no GPU" in table
    picture = tmp_path / "speed.png"
    plot.main([str(path), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failed_gate_withholds_its_figures(cases, tmp_path, capsys):
    register("op", "", partial(comparison, wrong), budget=0)
    path = tmp_path / "out.json"
    assert run.main(["--json", str(path)]) == 1
    report = json.loads(path.read_text())
    statuses = [line["status"] for line in report["lines"]]
    assert statuses == ["gate failed", "measured", "gate failed"]
    assert not {"ratio", "met", "ours_value"} & report["lines"][0].keys()
    assert report["cases"]["op"]["runs"]["fast"]["samples"] == []
    table = capsys.readouterr().out
    for part in ("gate failed fast: output: relative error", "1.00x [1.00, 1.00]"):
        assert part in table


def test_a_broken_case_does_not_stop_the_others(cases, capsys):
    def broken():
        raise TypeError("a bug")

    def absent():
        raise ImportError("No module named 'theirs'")

    register("broken", "this", broken)
    register("absent", "that", absent)
    register("op", "", comparison, budget=0)
    assert run.main(["--only", "fast"]) == 1
    table = capsys.readouterr().out
    for part in ("broke TypeError: a bug", "not installed No module named 'theirs'", "2 met"):
        assert part in table
    assert run.main(["--case", "absent"]) == 0


def test_gates_see_differences():
    x = torch.ones(3)
    near("x", x, x + 1e-6, 1e-5)
    for other, message in ((x * 2, "relative error"), (x * torch.nan, "nan"), (x[:2], "is not")):
        with pytest.raises(GateError, match=message):
            near("x", other, x, 1e-5)
    with pytest.raises(GateError, match="on one side only"):
        all_near("x", {"a": x}, {"b": x}, 1)
    found = gradients(lambda q, v: q * v, {"q": x, "v": 2 * x}, x)
    assert [found[name].tolist() for name in ("output", "d_q", "d_v")] == [[2.0] * 3, [2.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("name", ["linear", "gated_delta", "dual_state"])
def test_ops_pass_their_gates_and_a_wrong_one_does_not(name):
    op = cases_ops.OPS[name]
    x = op.inputs(80)
    ours, specification = (partial(cases_ops.output_of, form) for form in (op.auto, op.recurrent))
    cases_ops.follows(ours, specification, x)
    cases_ops.forward_backward(ours, x)()
    with pytest.raises(GateError, match="output"):
        cases_ops.follows(lambda **x: 1.01 * ours(**x), specification, x)


@pytest.mark.parametrize("name", ["gated_delta_net", "local_global"])
def test_models_pass_their_gates(name, monkeypatch):
    monkeypatch.setattr(gates, "PASSED", set())
    model = build(name, **TINY)
    trains_exactly(model)
    decodes_exactly(model)
    assert len(gates.PASSED) == 2


def test_a_gate_runs_once_for_a_configuration_and_again_after_it_failed(monkeypatch):
    monkeypatch.setattr(gates, "PASSED", set())
    ran: list[object] = []

    @gates.once
    def gate(model):
        ran.append(model)
        if model is wrong:
            raise GateError("wrong")

    right, wrong = build("linear", **TINY), build("gla", **TINY)
    for _ in range(2):
        gate(right)
        with pytest.raises(GateError, match="wrong"):
            gate(wrong)
    assert ran == [right, wrong, wrong]


@pytest.mark.skipif(not touched_pages(), reason="this system does not tell which pages a process has touched")
def test_a_fork_can_own_its_memory():
    block = np.ones(32 << 20, dtype=np.uint8)
    pages = touched_pages()

    def faults(own):
        if own:
            make_own(pages)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block[::4096] = 2
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert 10 * in_a_fork(partial(faults, True)) < in_a_fork(partial(faults, False))
    assert (block == 1).all(), "a fork's memory is a copy"


def test_a_train_step_trains_and_takes_memory():
    model = build("gla", **TINY)
    before = model.lm_head.weight.clone()
    train_step(model, tokens(16, vocabulary=61))()
    assert not torch.equal(before, model.lm_head.weight)
    now, most = resident()
    assert 0 < now <= most
    kept = []
    found = peaks(lambda length: kept.append(torch.ones(length << 18)), [64, 128])
    assert 0 <= found[64] <= found[128] >= 60
