"""A served chat over real HTTP: several turns, streamed and not, each from the state after the last."""

import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.cli.transformers import app as transformers_command

from lalm import serve
from lalm.errors import exit_on_user_error
from tests.modeling.exact import run, tokens
from tests.variants import ROWS, each_variant

pytestmark = pytest.mark.slow

USING = Path(__file__).parents[1] / "docs" / "using.md"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def chat_tokenizer():
    """A word a token, so that an answer read back is the tokens that were generated."""
    names = ["<pad>", "<s>", "</s>", "user", "assistant", "system"] + [f"t{i}" for i in range(6, 61)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_chat(row, folder, **changes):
    model = row.build(dtype=torch.float32, **changes)
    # Only words, so that what is said survives decoding; the end comes by length.
    model.generation_config.suppress_tokens = list(range(6))
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return model


def ask(url, model, messages, stream=False, **options):
    body = {"model": model, "messages": messages, "stream": stream, "temperature": 0.0, "max_tokens": 6} | options
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read().decode()
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert len(events) > 4, "it comes in pieces"
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


@pytest.fixture
def server(tmp_path):
    """A server of a tiny chat model, in this process: its url, the model's name, what it serves, the same unserved."""
    from transformers.cli.serve import Serve

    model = save_chat(next(row for row in ROWS if row.name == "gla_conv_tied"), tmp_path)
    name = str(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for key, served in serve.served_classes().items():
            patch.setattr(transformers, key, served, raising=False)
        running = Serve(force_model=name, port=0, host="127.0.0.1", device="cpu", non_blocking=True)
        while not running.server.started:
            time.sleep(0.01)
        port = running.server.servers[0].sockets[0].getsockname()[1]
        (timed,) = running._model_manager.loaded_models.values()
        yield f"http://127.0.0.1:{port}", name, timed.model, model
        running.kill_server()


def by_hand(model, messages):
    """The same answer from the whole text at once."""
    tokenizer = chat_tokenizer()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_chat_of_several_turns(server):
    url, name, served, model = server
    read, forward = [], served.forward

    def counted(*args, **kwargs):
        read.append((args[0] if args else kwargs["input_ids"]).shape[1])
        return forward(*args, **kwargs)

    served.forward = counted
    messages = []
    for turn, stream in enumerate((False, True, True, False)):
        messages.append({"role": "user", "content": f"t{7 + turn} t9 t{30 - turn}"})
        read.clear()
        answer = ask(url, name, messages, stream)
        assert answer.split() == by_hand(model, messages).split()
        if turn:
            # What is new: the answer's last token, its end, and the user's message with the roles around it.
            assert sum(read) <= 8 + 6, f"turn {turn} read {read}"
        messages.append({"role": "assistant", "content": answer})


def test_the_documented_chat_client(server, monkeypatch, tmp_path):
    url, name, _, model = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    lines = iter(["t7 t8 t9", "n", "t10 t11", "n", "!exit"])  # "n" to "Continue generating?"
    monkeypatch.setattr("builtins.input", lambda *args: next(lines))
    printed = io.StringIO()
    monkeypatch.setattr("sys.stdout", printed)
    documented = re.search(r"`transformers (chat .*)` connects", USING.read_text(encoding="utf-8"))[1]
    words = [{"http://localhost:8000": url, "runs/demo": name}.get(word, word) for word in documented.split()]
    with contextlib.suppress(SystemExit):
        transformers_command([*words, "max_new_tokens=6", "do_sample=False"])
    messages = []
    for said in ("t7 t8 t9", "t10 t11"):
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": by_hand(model, messages)})
        assert messages[-1]["content"] in " ".join(printed.getvalue().split())


def test_an_edited_chat_starts_from_what_it_shares(server):
    url, name, _, model = server
    first = [{"role": "user", "content": "t7 t8 t9"}]
    for messages in (
        first,
        first,  # asked for another answer
        [*first, {"role": "assistant", "content": "t20 t21"}, {"role": "user", "content": "t22"}],
        [{"role": "user", "content": "t7 t8 t10"}],
        [{"role": "user", "content": "t7"}],
    ):
        assert ask(url, name, messages).split() == by_hand(model, messages).split()


def test_two_chats_in_turns_and_many_at_once(server):
    url, name, _, model = server
    chats = [[{"role": "user", "content": f"t{10 + i} t{11 + i}"}] for i in range(3)]
    for _ in range(2):
        answers = [None] * len(chats)

        def talk(i, answers=answers):
            answers[i] = ask(url, name, chats[i], stream=i % 2 == 0)

        threads = [threading.Thread(target=talk, args=(i,)) for i in range(len(chats))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for chat, answer in zip(chats, answers, strict=True):
            assert answer.split() == by_hand(model, chat).split()
            chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "t40 t41"}]


def remembering(row):
    model = row.build(dtype=torch.float64)
    model.generation_config.eos_token_id = None
    served = serve.served_classes()[type(model).__name__](model.config).double().eval()
    served.load_state_dict(model.state_dict())
    served.generation_config.eos_token_id = None
    return model, served


@each_variant
def test_every_type_continues_exactly(row):
    model, served = remembering(row)
    ids = tokens(1, 9)
    for turn in range(3):
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        out = served.generate(ids, **options)
        assert torch.equal(out, model.generate(ids, **options))
        seen, cache = served.memory.recall(torch.cat([out, out[:, :1]], 1))
        assert seen == out.shape[1] - 1
        assert torch.allclose(run(model, out)[0][:, -1], run(model, out[:, -1:], past_key_values=cache)[0][:, -1])
        ids = torch.cat([out, tokens(1, 4, seed=turn)], 1)


def test_what_does_not_continue():
    model, served = remembering(next(row for row in ROWS if row.name == "gla_plain"))
    one, two = tokens(1, 6), tokens(2, 6)
    padded = torch.ones_like(one)
    padded[:, :2] = 0
    for ids, options in (
        (two, {}),
        (one, {"num_beams": 2, "num_return_sequences": 2}),
        (one, {"attention_mask": padded}),
        (one, {"use_cache": False}),
        (one, {"cache_implementation": "static"}),
        (one[:, :1], {}),
    ):
        options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
        assert torch.equal(served.generate(ids, **options), model.generate(ids, **options))
    assert not hasattr(served, "memory")


def test_memory_forgets_the_oldest():
    _, served = remembering(next(row for row in ROWS if row.name == "gla_plain"))
    for seed in range(20):
        ids = tokens(1, 5, seed=seed)
        served.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert len(served.memory.caches) == 16


def test_a_broken_stream_leaves_no_false_state():
    """A client that goes away raises inside generate(); what was kept before is still right."""
    model, served = remembering(next(row for row in ROWS if row.name == "gla_plain"))
    ids = tokens(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    class Gone:
        def put(self, value):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        served.generate(ids, streamer=Gone(), **options)
    assert torch.equal(served.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize(
    ("head", "arguments", "message"),
    [
        (None, ["--continuous-batching"], "recurrent state"),
        ("AutoModel", [], "holds a GLAModel; a server needs a causal language model"),
        (None, [], "nowhere"),
    ],
)
def test_one_line(head, arguments, message, tmp_path, monkeypatch, capsys):
    for name in serve.served_classes():
        monkeypatch.setattr(transformers, name, None, raising=False)  # taken back afterwards
    folder, row = tmp_path / "nowhere", next(row for row in ROWS if row.name == "gla_plain")
    if head:
        save_chat(row, folder)
        row.build(head).save_pretrained(folder)
    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(lambda: serve.main([str(folder), *arguments]))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_the_command(tmp_path):
    """`python -m lalm.serve`, as README has it."""
    model = save_chat(next(row for row in ROWS if row.name == "delta_net_plain"), tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lalm.serve", str(tmp_path), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None
            time.sleep(0.1)
        messages = [{"role": "user", "content": "t7 t9"}]
        answer = ask(f"http://127.0.0.1:{port}", str(tmp_path), messages, stream=True)
        assert answer.split() == by_hand(model, messages).split()
    finally:
        process.terminate()
        process.wait(20)
