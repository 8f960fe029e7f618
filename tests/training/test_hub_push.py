"""--push_to_hub of both scripts (tests/hub_server.py): what arrives, figures before the push, one line if it fails."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lalm.errors import UserError, exit_on_user_error
from lalm.training import trainer
from tests.hub_server import use_hub
from tests.training.sts.tiny_models import sentences

pytestmark = pytest.mark.slow

TOKEN = "hf_secret_token"
FLAGS = ("--do_train", "--do_eval", "--push_to_hub", "--hub_token", TOKEN, "--save_steps", "2")


@pytest.fixture(autouse=True)
def _only_the_token_of_the_flag(hub, tmp_path, monkeypatch):
    hub.tokens[TOKEN] = "me"
    use_hub(hub, tmp_path / "home", monkeypatch, token=None)


def files_of(hub, repo="me/run") -> dict[str, bytes]:
    return hub.repositories[repo].files()


def assert_no_token(hub, folder: Path, output: str = "") -> None:
    local = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    held = {name: content for commit in hub.repositories.values() for name, content in commit.files().items()}
    assert any(name.endswith("training_args.bin") for name in local)
    assert not [name for name, content in (local | held).items() if TOKEN.encode() in content]
    assert TOKEN not in output


def card_data(hub, repo="me/run"):
    return ModelCard(files_of(hub, repo)["README.md"].decode()).data


def test_a_run_arrives_whole_and_without_its_token(hub, tiny_run, tmp_path, capsys, caplog):
    """Twice, over weights in shards, which would not load; pickles stay here."""
    tiny_run(*FLAGS, model_type="lalm_gla")
    hub.repositories["me/run"].commit("main", files_of(hub) | {"model-00001-of-00002.safetensors": b"old"})
    second = tiny_run(*FLAGS, "--max_steps", "6", "--license", "mit", "--language", "en", model_type="lalm_gla")
    names = set(files_of(hub))
    assert {"model.safetensors", "config.json", "modeling_gla.py", "tokenizer.json", "README.md"} <= names
    assert {"all_results.json", "loss_curve.png"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]
    assert not [name for name in names if ".saving" in name or "-00001-of" in name]
    assert not list((tmp_path / "run").rglob(".saving*"))
    model, local = (AutoModelForCausalLM.from_pretrained(name, token=TOKEN) for name in ("me/run", tmp_path / "run"))
    ids = AutoTokenizer.from_pretrained("me/run", token=TOKEN)("a state", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, local(ids).logits)
    data = card_data(hub)
    assert (data.license, data.language, data.library_name) == ("mit", ["en"], "transformers")
    found = {(result.metric_type, result.dataset_split): result.metric_value for result in data.eval_results}
    assert found[("perplexity", "validation")] == pytest.approx(second["eval_perplexity"])
    captured = capsys.readouterr()
    assert_no_token(hub, tmp_path / "run", captured.out + captured.err + caplog.text)


def test_checkpoints_are_pushed_on_the_way(hub, tiny_run, tmp_path):
    """With what another machine needs to go on."""
    tiny_run(*FLAGS, "--hub_strategy", "checkpoint", "--hub_always_push", "--hub_private_repo", "true")
    names = set(files_of(hub))
    assert hub.repositories["me/run"].private
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        assert f"last-checkpoint/{name}" in names
    assert not [name for name in names if "training_args" in name]
    assert len(hub.repositories["me/run"].commits) >= 5, "two checkpoints of two commits each, and the end"
    assert_no_token(hub, tmp_path / "run")


def test_a_push_that_fails_on_the_way_is_told_and_the_training_goes_on(hub, tiny_run, tmp_path, caplog):
    def once(method, path):
        fails = "/commit/" in path and not (tmp_path / "run" / "model.safetensors").exists()
        return (500, "the storage is on fire") if fails else None

    hub.faults = once
    results = tiny_run(*FLAGS, "--hub_always_push")
    assert results["steps"] == 4
    assert "checkpoint-2 was not pushed: " in caplog.text
    assert "the storage is on fire" in caplog.text
    assert "model.safetensors" in files_of(hub)


@pytest.mark.parametrize(("token", "reason"), [("hf_wrong", "Invalid username or password"), ("hf_reader", "403")])
def test_a_refused_token_is_told_before_any_work(hub, tiny_run, tmp_path, caplog, token, reason):
    with pytest.raises(UserError, match=f"--push_to_hub: the Hub gives no repository 'run': .*{reason}") as caught:
        tiny_run(*FLAGS, "--hub_token", token)
    assert token not in str(caught.value)
    assert "tokens in" not in caplog.text, "no text is read"
    assert not (tmp_path / "run").exists()


def test_no_network_is_one_line(hub, tiny_run):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="the Hub gives no repository 'run': .*; see to network"):
        tiny_run(*FLAGS)


@pytest.mark.parametrize("fault", [(500, "the storage is on fire"), "close"])
def test_a_push_that_fails_costs_no_figures(hub, tiny_run, tmp_path, capsys, fault):
    hub.faults = lambda method, path: fault if "/commit/" in path else None
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: tiny_run(*FLAGS, "--hub_strategy", "end"))
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "validation perplexity" in output.out
    assert "results are in" in output.out
    (line,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert fault == "close" or "the storage is on fire" in line
    folder = tmp_path / "run"
    assert f"everything is saved: push it later with `hf upload run {folder} --exclude 'checkpoint-*'`" in line
    for name in ("model.safetensors", "README.md", "all_results.json"):
        assert (folder / name).is_file()
    hub.faults = lambda method, path: None
    tiny_run(*FLAGS, "--hub_strategy", "end")  # nothing is left but the push
    assert files_of(hub)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_full_disk_while_pushing_is_a_full_disk(tiny_run, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "commit_folder", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        tiny_run("--do_train", "--push_to_hub", "--hub_token", TOKEN, "--hub_strategy", "end")
    assert not isinstance(caught.value, UserError)


def test_a_run_of_sts_arrives(hub, sts_world):
    flags = ("--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "me/encoder", "--hub_strategy", "end")
    sts_world.run("distill", *flags, "--max_steps", "2", "--license", "mit", output="pushed")
    folder = Path(sts_world.path("pushed"))
    assert_no_token(hub, folder)
    assert {"modules.json", "1_Pooling/config.json", "modeling_lam.py"} <= set(files_of(hub, "me/encoder"))
    texts = sentences(4)
    loaded = SentenceTransformer("me/encoder", token=TOKEN, device="cpu").encode(texts)
    np.testing.assert_array_equal(loaded, SentenceTransformer(str(folder), device="cpu").encode(texts))
    data = card_data(hub, "me/encoder")
    assert (data.license, data.language, data.library_name) == ("mit", ["en"], "sentence-transformers")
    assert {(r.metric_type, r.dataset_split) for r in data.eval_results} >= {("pearson_cosine", "validation")}
