"""--push_to_hub against a server that stands in for the Hub: figures first, then the push, one line if it fails."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, Response

import run_clm
from lalm.errors import UserError, exit_on_user_error
from tests.training.conftest import TINY_MODELS

pytestmark = pytest.mark.slow

ROOT = Path(run_clm.__file__).parent


class Hub(BaseHTTPRequestHandler):
    """Makes repositories, or refuses to; every other request is an error of the server."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        refused = self.server.refused
        if self.path == "/api/repos/create" and not refused:
            self.answer(200, {"url": f"http://{self.headers['Host']}/me/run", "name": "me/run"})
        elif refused:
            self.answer(401, {"error": refused})
        else:
            self.answer(500, {"error": "the storage is on fire"})

    do_GET = do_PUT = do_POST

    def answer(self, code: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """A server; `refused` is the reason for which it takes no token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.refused = ""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(texts, tmp_path, address: str) -> subprocess.CompletedProcess:
    """A whole run in a process of its own, whose Hub is at `address`."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "LALM_DEBUG": "0"}
    argv = [
        *("--model_type", "lalm_linear", "--config_overrides", TINY_MODELS["lalm_linear"], "--block_size", "24"),
        *("--train_file", str(texts["train"]), "--validation_file", str(texts["validation"]), "--max_steps", "2"),
        *(
            "--tokenizer_vocab_size",
            "300",
            "--output_dir",
            str(tmp_path / "run"),
            "--push_to_hub",
            "--save_steps",
            "1",
        ),
        *("--hub_token", "hf_x", "--hub_strategy", "end", "--cache_dir", str(tmp_path / "cache")),
    ]
    command = [sys.executable, str(ROOT / "run_clm.py"), *argv]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)


def test_a_refused_token_is_told_with_the_servers_reason_before_any_work(hub, texts, tmp_path):
    hub.refused = "This token has expired on Monday."
    done = push(texts, tmp_path, f"http://127.0.0.1:{hub.server_port}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "tokens in" not in done.stderr, "no text is read"
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: --push_to_hub: the Hub gives no repository 'run': ")
    assert "This token has expired on Monday." in line
    assert not (tmp_path / "run").exists()


def test_no_network_is_one_line(texts, tmp_path):
    done = push(texts, tmp_path, "http://127.0.0.1:9")  # nobody listens there
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --push_to_hub: the Hub gives no repository 'run': ")


@pytest.mark.parametrize("error", ["server", "connection"])
def test_a_push_that_fails_costs_no_figures(tiny_run, tmp_path, capsys, monkeypatch, error):
    class ConnectError(Exception):
        """As that of the Hub's HTTP library, no OSError."""

    def fail(*args, **kwargs):
        if error == "connection":
            raise ConnectError("[Errno -2] Name or service not known")
        http = sys.modules[Response.__module__.partition(".")[0]]  # httpx or httpx2
        response = http.Response(500, request=http.Request("POST", "http://hub/api"))
        raise HfHubHTTPError("500 Server Error: the storage is on fire", response=response)

    made = type("Url", (), {"repo_id": "me/run"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: made)
    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: tiny_run("--do_train", "--do_eval", "--push_to_hub", "--save_steps", "2"))
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "validation perplexity" in output.out
    assert "results are in" in output.out
    (line,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert {"server": "the storage is on fire", "connection": "Name or service not known"}[error] in line
    folder = tmp_path / "run"
    assert f"everything is saved: push it later with `hf upload run {folder} --exclude 'checkpoint-*'`" in line
    for name in ("model.safetensors", "README.md", "all_results.json"):
        assert (folder / name).is_file()


def test_a_full_disk_while_pushing_is_a_full_disk(tiny_run, monkeypatch):
    made = type("Url", (), {"repo_id": "me/run"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: made)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        tiny_run("--do_train", "--push_to_hub", "--hub_strategy", "end")
    assert not isinstance(caught.value, UserError)
