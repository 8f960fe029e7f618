"""experiments/recall.py end to end, resumed, and what it says of a plan that does not fit."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from experiments import recall
from lalm.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BASED = {"model_type": "lalm_based", "linear_attention_layers": [1], "sliding_attention_layers": []}
PLAN = {
    "vocab_size": 34,
    "train_length": 16,
    "train_pairs": [2, 4],
    "train_texts": 16,
    "test": [[16, 4], [32, 4]],
    "evaluation_texts": 12,
    "batch_size": 8,
    "max_steps": 3,
    "learning_rates": [1e-3, 1e-2],
    "seeds": [1, 2],
    "decode_after": 16,
    "decode_batch": 3,
    "decode_steps": 2,
    "decode_seconds": 0.01,
    "sizes": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 16},
    "models": {
        "llama": {"model_type": "llama", "num_key_value_heads": 1},
        "based f=2": BASED | {"feature_dim": 2},
        "based f=3": BASED | {"feature_dim": 3},
    },
}


def write(folder, **changes):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes), encoding="utf-8")
    return str(path)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _the_machine_is_not_measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.machine.matrix_product_rate", lambda dtype: 1.0)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished plan, and its results."""
    folder = tmp_path_factory.mktemp("recall")
    recall.main([write(folder), "--output_dir", str(folder / "out")])
    return folder, json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


def test_results(done):
    folder, results = done
    assert results["plan"] == PLAN
    assert list(results["models"]) == sorted(PLAN["models"])  # write_json sorts
    for model in results["models"].values():
        rates = model["validation_by_rate"]
        assert rates[str(model["learning_rate"])] == max(rates.values())
        assert [set(scores) for scores in model["test"]] == [{"16/4", "32/4"}] * 2
        assert all(0 <= score <= 1 for scores in model["test"] for score in scores.values())
        speed = model["decode_tokens_per_second"]
        assert 0 < speed["q1"] <= speed["median"] <= speed["q3"]
        assert speed["n"] >= 3
        assert model["decoding_error"] < recall.TOLERANCE
    held = {name: model["state_bytes"] for name, model in results["models"].items()}
    assert held["llama"] == {"16": 4 * 2 * 2 * 16 * 16, "32": 4 * 2 * 2 * 16 * 32}
    assert held["based f=2"]["16"] == held["based f=2"]["32"] < held["based f=3"]["32"]
    assert (folder / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.part")) + list(folder.rglob("*.tmp"))


def test_one_rate_goes_on_and_the_other_is_not_scored_on_test(done):
    folder, results = done
    place = folder / "out" / "llama"
    chosen = f"lr{results['models']['llama']['learning_rate']:g}"
    (other,) = {f"lr{rate:g}" for rate in PLAN["learning_rates"]} - {chosen}
    assert {path.name for path in place.iterdir()} == {f"{chosen}-seed1", f"{chosen}-seed2", f"{other}-seed1"}
    assert {path.parent.name for path in place.rglob("test.json")} == {f"{chosen}-seed1", f"{chosen}-seed2"}


def test_table_and_picture_show_every_model(done):
    _, results = done
    table = recall.table(results).splitlines()
    assert table[0].startswith("| model | parameters | rate | 16/4 | 32/4 | bytes after 32 | tokens/s after 16 |")
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == list(results["models"])
    drawn = recall.panels(results)
    assert list(drawn) == ["recall, 16 tokens, 4 pairs", "recall, 32 tokens, 4 pairs", "tokens/s of 3 texts, after 16"]
    for families in drawn.values():
        assert {family: len(points) for family, points in families.items()} == {"llama": 1, "based": 2}
    assert recall.span([0.5]) == "0.500"
    assert recall.span([0.25, 0.75]) == "0.500 (0.250-0.750)"


def test_a_finished_plan_trains_nothing_and_measures_the_cost_again(done, monkeypatch):
    folder, results = done
    before = files(folder / "out")
    monkeypatch.setattr(recall, "train", lambda *args: pytest.fail("trained again"))
    recall.main([str(folder / "plan.yaml"), "--output_dir", str(folder / "out")])
    after = files(folder / "out")
    assert {path.name for path in after if before.get(path) != after[path]} == {"results.json", "recall.png"}
    again = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    for name, model in again["models"].items():
        assert model["test"] == results["models"][name]["test"]


def test_a_lost_run_comes_out_the_same(done):
    """Deterministic by seed; and what is left of a run without its run.json counts as no run."""
    folder, _ = done
    plan = recall.Plan.read(str(folder / "plan.yaml"))
    place = folder / "out" / "based_f_2" / "lr0.001-seed1"
    first, weights = json.loads((place / "run.json").read_text()), (place / "model.safetensors").read_bytes()
    (place / "run.json").unlink()
    (place / "model.safetensors").write_bytes(b"half of a file")
    again = recall.Runs(plan, folder / "out").run("based f=2", 1e-3, 1)
    assert again["validation"] == first["validation"]
    assert again["losses"] == first["losses"]
    assert (place / "model.safetensors").read_bytes() == weights


def test_a_failing_run_leaves_the_results(done, monkeypatch):
    folder, _ = done
    before = files(folder / "out")

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recall, "train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        recall.main([write(folder, seeds=[1, 2, 3]), "--output_dir", str(folder / "out")])
    assert files(folder / "out") == before


def test_training_validation_and_test_share_no_text(tmp_path, monkeypatch):
    drawn, make = {}, recall.multi_query_associative_recall

    def recorded(*sizes, seed):
        texts = make(*sizes, seed=seed)
        drawn.setdefault(seed, set()).update(map(tuple, texts["input_ids"]))
        return texts

    monkeypatch.setattr(recall, "multi_query_associative_recall", recorded)
    plan = {"learning_rates": [1e-3], "seeds": [1], "models": {"based": BASED | {"feature_dim": 2}}}
    recall.main([write(tmp_path, **plan), "--output_dir", str(tmp_path / "out")])
    del drawn[0]  # the check that the slices can be made
    assert len(drawn) == 4  # two numbers of pairs in training, then validation and test
    assert len(set().union(*drawn.values())) == sum(map(len, drawn.values())) == 2 * 16 + 2 * 12 + 2 * 12


def test_runs_of_another_plan_are_refused(done):
    folder, _ = done
    with pytest.raises(UserError, match="another batch_size; choose a new --output_dir"):
        recall.main([write(folder, batch_size=4), "--output_dir", str(folder / "out")])


def test_speed_is_not_reported_of_a_model_that_decodes_wrongly(done, monkeypatch):
    folder, _ = done
    monkeypatch.setattr(recall, "decoding_error", lambda *args: float("nan"))
    with pytest.raises(UserError, match="llama: logits while decoding are off by nan"):
        recall.cost(recall.Runs(recall.Plan.read(write(folder)), folder / "out"), {"llama": 1e-3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 4}, "unknown field 'batch'"),
        ({"max_steps": "ten"}, "max_steps must be of type int and not empty or 0, got 'ten'"),
        ({"seeds": []}, "seeds must be of type list and not empty"),
        ({"seeds": [0, 1]}, "seeds must be 1 or more"),
        ({"batch_size": -4}, "batch_size must be positive, got -4"),
        ({"learning_rates": ["1e-3"]}, "learning_rates must be positive numbers"),
        ({"test": [[16, 5]]}, "length must be at least 20, or num_pairs at most 4"),
        ({"test": [[16]]}, "train_length, train_pairs and test do not fit"),
        ({"models": {"a": {"feature_dim": 4}}}, "a has no model_type"),
        ({"models": {"a": {"model_type": "lalm_base"}}}, "did you mean 'lalm_based'"),
        ({"models": {"a": BASED | {"feature_dims": 4}}}, "a has no field 'feature_dims' .did you mean 'feature_dim'"),
        ({"models": {"a": BASED | {"feature_dim": 0}}}, "models: a: feature_dim must be at least 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        recall.Plan.read(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_script_exit_code_and_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recall.py", "nowhere.yaml"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("experiments.recall", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip().startswith("error: cannot read the recipe nowhere.yaml")


def test_the_recipe_of_the_repository_reads():
    plan = recall.Plan.read(str(ROOT / "recipes" / "recall.yaml"))
    assert {config.model_type for config in map(plan.config, plan.models)} >= {"llama", "lalm_based", "lalm_gla"}
    assert plan.config("llama").num_hidden_layers == plan.config("based f=8").num_hidden_layers == 2


@pytest.mark.parametrize("document", ["docs/training.md", "model_cards/based.md"])
def test_the_command_in_the_documents_names_the_recipe(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    (command,) = re.findall(r"python -m experiments\.recall (.*)$", text, flags=re.MULTILINE)
    plan, *rest = command.split()
    assert (ROOT / plan).samefile(ROOT / "recipes" / "recall.yaml")
    assert rest == ["--output_dir", "runs/recall"]
