"""Models on a Hub (tests/hub_server.py): pushed, loaded with lalm and without, replaced, refused, interrupted."""

import _thread
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lalm
from lalm.configuration.configuration_gla import GLAConfig
from lalm.modeling.modeling_gla import GLAForCausalLM
from tests.hub_server import client_environment, use_hub
from tests.test_hub import INPUT_IDS, SCRIPT, contents, expected_output, tiny_config, tiny_model

pytestmark = pytest.mark.slow

CODE = {"configuration_gla.py", "linear_attention_ops.py", "modeling_gla.py"}


def remote_names(hub, repo="me/tiny"):
    return set(hub.repositories[repo].files())


def load(repo="me/tiny", **options):
    return AutoModelForCausalLM.from_pretrained(repo, **options).eval()


def assert_same(model, other):
    torch.testing.assert_close(expected_output(model), expected_output(other), rtol=0, atol=0)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A causal model of every type pushed to one server, and what each computes."""
    from tests.hub_server import start_hub

    folder = tmp_path_factory.mktemp("pushed")
    with pytest.MonkeyPatch.context() as patch:
        server = start_hub()
        use_hub(server, folder / "home", patch)
        expected = {}
        for row in lalm.VARIANTS:
            model = row.models["AutoModelForCausalLM"](tiny_config(row.config, is_causal=True)).eval()
            model.push_to_hub(row.config.model_type)
            expected[row.config.model_type] = expected_output(model)
        yield server, folder, expected
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("model_type", [row.config.model_type for row in lalm.VARIANTS])
def test_every_type_loads_by_its_name_with_lalm(pushed, model_type, monkeypatch):
    server, folder, expected = pushed
    use_hub(server, folder / "home", monkeypatch)
    got = expected_output(load(f"me/{model_type}"))
    torch.testing.assert_close(got, expected[model_type], rtol=0, atol=0)


def test_every_type_loads_by_its_name_without_lalm(pushed):
    """In a fresh process that finds no lalm."""
    server, folder, expected = pushed
    tasks = [
        {"path": f"me/{name}", "auto_class": "AutoModelForCausalLM", "output": str(folder / f"{name}.out")}
        for name in expected
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    environment = os.environ | client_environment(server, folder / "fresh") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(SCRIPT), str(folder / "tasks.json")]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    for name, output in expected.items():
        torch.testing.assert_close(load_file(folder / f"{name}.out")["output"], output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharded_first", [False, True])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_the_weights_of_the_last_push_load(hub, tmp_path, way, sharded_first):
    """Stock transformers leaves model.safetensors next to new shards, and loads it."""
    for sharded in (sharded_first, not sharded_first):
        model, options = tiny_model(), {"max_shard_size": "4KB"} if sharded else {}
        if way == "push_to_hub":
            model.push_to_hub("tiny", **options)
        else:
            model.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="me/tiny", **options)
            assert_same(load(tmp_path / "tiny"), model)
        assert_same(load(force_download=True), model)
    weights = {name for name in remote_names(hub) if name.startswith("model") and name.endswith(("tensors", "json"))}
    assert (weights == {"model.safetensors"}) == sharded_first
    assert {name for name in remote_names(hub) if name.endswith(".py")} == CODE


def test_a_push_replaces_no_other_variant_and_no_other_file(hub):
    model = tiny_model()
    model.push_to_hub("tiny")
    files = hub.repositories["me/tiny"].files() | {
        "model.fp16.safetensors": b"",
        "notes.txt": b"mine",
        "model-card.json": b"",
    }
    hub.repositories["me/tiny"].commit("main", files)
    model.push_to_hub("tiny", max_shard_size="4KB")
    assert {"model.fp16.safetensors", "notes.txt", "model-card.json"} <= remote_names(hub)
    assert "model.safetensors" not in remote_names(hub)


def test_a_branch_and_a_message(hub):
    first, second = tiny_model(), tiny_model()
    first.push_to_hub("tiny")
    info = second.push_to_hub("tiny", revision="next", commit_message="Better", tags="small")
    assert info.commit_message == "Better"
    assert_same(load(), first)
    assert_same(load(revision="next"), second)


def test_an_unchanged_model_makes_no_commit(hub):
    model = tiny_model()
    model.push_to_hub("tiny")
    before = dict(hub.repositories["me/tiny"].heads)
    model.push_to_hub("tiny")
    assert hub.repositories["me/tiny"].heads == before


def test_a_private_model_is_for_its_owner(hub, tmp_path, monkeypatch):
    model = tiny_model()
    model.push_to_hub("tiny", private=True)
    assert hub.repositories["me/tiny"].private
    assert_same(load(token="hf_me"), model)
    use_hub(hub, tmp_path / "stranger", monkeypatch, token=None)
    with pytest.raises(OSError, match="me/tiny is not a local folder and is not a valid model identifier"):
        load()


@pytest.mark.parametrize(
    ("token", "reason"), [("hf_wrong", "Invalid username or password"), ("hf_reader", "403 Forbidden")]
)
def test_a_wrong_token_is_told_before_anything_is_saved(hub, token, reason, monkeypatch):
    monkeypatch.setattr(GLAForCausalLM, "save_pretrained", lambda *args, **kwargs: pytest.fail("it was saved"))
    with pytest.raises((HfHubHTTPError, RepositoryNotFoundError), match=reason):
        tiny_model().push_to_hub("tiny", token=token)
    assert not hub.repositories


FAULTS = {
    "the commit fails": ("/commit/", (500, "the storage is on fire")),
    "an upload fails": ("/storage/", (503, "the storage is on fire")),
    "the connection ends": ("/commit/", "close"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_fails_leaves_repository_and_folder_whole(hub, tmp_path, fault):
    first, second = tiny_model(), tiny_model()
    first.push_to_hub("tiny")
    first.save_pretrained(tmp_path / "tiny")
    before = dict(hub.repositories["me/tiny"].heads)
    place, answer = FAULTS[fault]
    hub.faults = lambda method, path: answer if place in path and method != "GET" else None
    with pytest.raises((HfHubHTTPError, RuntimeError, HTTPError)) as caught:
        second.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="me/tiny", max_shard_size="4KB")
    assert answer == "close" or "on fire" in str(caught.value) + str(caught.value.__cause__)
    assert hub.repositories["me/tiny"].heads == before
    hub.faults = lambda method, path: None
    assert_same(load(), first)
    assert_same(load(tmp_path / "tiny"), second)
    second.push_to_hub("tiny")
    assert_same(load(force_download=True), second)


def test_an_interrupted_push_leaves_the_repository_as_it_was(hub):
    first, second = tiny_model(), tiny_model()
    first.push_to_hub("tiny")
    before = dict(hub.repositories["me/tiny"].heads)

    def interrupt(method, path):
        if "/preupload/" in path:
            _thread.interrupt_main()

    hub.faults = interrupt
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell switches off in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            second.push_to_hub("tiny")
    finally:
        signal.signal(signal.SIGINT, handler)
    hub.faults = lambda method, path: None
    assert hub.repositories["me/tiny"].heads == before
    assert_same(load(), first)
    second.push_to_hub("tiny")
    assert_same(load(force_download=True), second)


def card(hub, repo="me/tiny"):
    return ModelCard(hub.repositories[repo].files()["README.md"].decode())


def test_the_card_of_a_new_model(hub):
    model = tiny_model()
    model.push_to_hub("tiny", tags=["mine"])
    data = card(hub).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.tags == ["lalm", "lalm_gla", "linear-attention", "mine"]
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)' in card(hub).text
    hub.repositories["me/tiny"].commit("main", hub.repositories["me/tiny"].files() | {"README.md": b"of my own"})
    tiny_model().push_to_hub("tiny")
    assert hub.repositories["me/tiny"].files()["README.md"] == b"of my own"


CARD = """---
license: mit
language: [de, en]
datasets: [me/corpus]
base_model: me/older
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {type: me/corpus, name: corpus, split: test}
    metrics: [{type: perplexity, value: 12.5}]
---
# Measured
"""


@pytest.mark.parametrize("trained", [False, True])
def test_the_card_of_a_model_from_a_folder(hub, tmp_path, trained):
    """Its whole card for the same weights; after more training no figures, which are not those of the new weights."""
    tiny_model().save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "README.md").write_text(CARD)
    model = load(tmp_path / "old")
    if trained:
        next(model.parameters()).data.add_(1)
    model.push_to_hub("tiny")
    data = card(hub).data
    assert (data.license, data.language, data.datasets, data.base_model) == (
        "mit",
        ["de", "en"],
        ["me/corpus"],
        "me/older",
    )
    figures = [(result.metric_type, result.metric_value) for result in data.eval_results or []]
    assert figures == ([] if trained else [("perplexity", 12.5)])
    assert ("# Measured" in card(hub).text) == (not trained)


def test_a_folder_that_has_gone_is_no_base(hub, tmp_path):
    model = tiny_model()
    model.config._name_or_path = "runs/gone"
    model.push_to_hub("tiny")
    assert card(hub).data.base_model is None


def test_the_card_of_a_model_from_the_hub_names_its_base(hub):
    tiny_model().push_to_hub("base")
    files = hub.repositories["me/base"].files() | {"README.md": CARD.encode()}
    hub.repositories["me/base"].commit("main", files)
    load("me/base").push_to_hub("tiny")
    data = card(hub).data
    assert (data.license, data.datasets, data.base_model) == ("mit", ["me/corpus"], "me/base")


def test_weights_are_stored_in_the_type_of_the_configuration_while_that_loses_nothing(tmp_path):
    model = GLAForCausalLM(tiny_config(GLAConfig, stored_dtype="bfloat16")).bfloat16().float().eval()
    model.save_pretrained(tmp_path / "first")
    assert load_file(tmp_path / "first" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    loaded = load(tmp_path / "first")
    assert loaded.dtype == torch.float32
    assert_same(loaded, model)
    next(loaded.parameters()).data.mul_(1 + 2**-12)
    loaded.save_pretrained(tmp_path / "second")
    assert load_file(tmp_path / "second" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert_same(load(tmp_path / "second"), loaded)
    assert contents(tmp_path / "first")["config.json"] == contents(tmp_path / "second")["config.json"]
    assert INPUT_IDS.shape == (1, 6)
