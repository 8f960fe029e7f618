# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""When C++ kernels are compiled, where they are kept, and the fallback if they cannot be compiled."""

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

import lalm
from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops import dispatch
from lalm.modeling.ops.dense.matrix_product import linear
from lalm.modeling.ops.dense.short_conv import cpp_short_conv
from lalm.modeling.ops.diagonal.diagonal_cpp import diagonal_kernel
from lalm.modeling.ops.diagonal.gla import gla
from lalm.modeling.ops.dispatch import in_form
from lalm.modeling.ops.sequence_layout import SequenceLayout

cpp_gla = in_form(gla, "cpp")

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")


@pytest.fixture
def new_machine(monkeypatch, tmp_path):
    """A cache folder in which nothing is compiled yet."""
    monkeypatch.setenv("LALM_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(cpp, "_loading", cpp._Loading())
    forget()
    yield tmp_path / "kernels"
    forget()


@pytest.fixture
def warnings(monkeypatch):
    """What is said to the user."""
    said = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(cpp.logger, name, lambda text, *rest: said.append(text))
    return said


def wait_for_end_of(process):
    """Raises ProcessLookupError once there is no such process, and nothing if it lives for five seconds."""
    for _ in range(50):
        os.kill(process, 0)
        time.sleep(0.1)


def forget():
    """As a new process would begin."""
    cpp._plan.cache_clear()
    cpp._named_compiler.cache_clear()


@pytest.fixture
def quick(tmp_path):
    """A compiler that knows one kernel, that of the RMS norm, and has it made already."""
    assert cpp.load_kernel("rms_norm") is not None
    made = tmp_path / "made"
    made.write_bytes(Path(cpp._plan("rms_norm", ()).library).read_bytes()[: -cpp._CHECKSUM_SIZE])
    forget()
    return write_compiler(tmp_path / "a b" / "g++", f"for last; do :; done; cp {made} $last")


def write_compiler(path, text):
    """A command that stands for a compiler."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_there_is_no_kernel(monkeypatch, new_machine):
    monkeypatch.setenv("LALM_CPP", "0")
    assert cpp.load_kernel("rms_norm") is None
    monkeypatch.delenv("LALM_CPP")
    monkeypatch.setenv("CXX", "/bin/false")
    cpp._plan.cache_clear()
    assert cpp.load_kernel("rms_norm") is None
    assert not list(new_machine.glob("*.so"))


@needs_compiler
def test_a_short_call_of_small_heads_never_takes_the_kernel(new_machine, monkeypatch):
    """Neither before nor after a longer one has had it compiled."""
    monkeypatch.setattr(dispatch, "EARNS_COMPILING", 1 << 21)
    short, long = torch.zeros(1, 8, 2, 32), torch.zeros(1, 2048, 2, 32)
    for q, form, files in ((short, "chunk", 0), (long, "cpp", 1), (short, "chunk", 1)):
        assert dispatch.choose("gla", "auto", q, q, {"cpp": None, "chunk": None}, diagonal_kernel(32, 32, 32)) == form
        assert len(list(new_machine.glob("*.so"))) == files


_BITS = """
import hashlib, torch, lalm
from transformers import AutoModel
torch.manual_seed(0)
sizes = dict(vocab_size=99, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
for config in (lalm.GLAConfig, lalm.BasedConfig, lalm.DeltaNetConfig, lalm.LamConfig):
    model = AutoModel.from_config(config(**sizes, **({"is_causal": True} if config is lalm.LamConfig else {})))
    short, long = torch.randint(99, (1, 9)), torch.randint(99, (1, 1100))
    for ids in (short, long, short):
        model.zero_grad()
        output = model(input_ids=ids)[0]
        output.square().sum().backward()
        with torch.no_grad():
            tensors = [output, model(input_ids=ids)[0], *(p.grad for p in model.parameters() if p.grad is not None)]
        print(hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest())
"""


@needs_compiler
@pytest.mark.slow
def test_an_empty_and_a_full_cache_give_the_same_bits(new_machine):
    """Forward and backward, and a short call before and after a long one."""
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", _BITS], check=True, timeout=300, capture_output=True, text=True)
        runs.append(done.stdout.splitlines())
        assert {"diagonal", "delta_rule", "rms_norm"} <= {path.name.split("-")[0] for path in new_machine.glob("*.so")}
    assert runs[0] == runs[1]
    assert len(runs[0]) == 12
    for first, _, last in zip(*[iter(runs[0])] * 3, strict=True):
        assert first == last


@needs_compiler
@torch.no_grad()
def test_a_large_weight_earns_its_kernel_and_many_rows_do_not(new_machine, monkeypatch):
    many = dispatch.SHORT_SEQUENCE  # on every processor
    for rows, size, outputs, files in ((15, 64, 1000, 0), (many, 512, 512, 0), (1, 512, 512, 1)):
        linear(torch.zeros(rows, size), torch.zeros(outputs, size))
        assert len(list(new_machine.glob("few_rows*.so"))) == files


@needs_compiler
@pytest.mark.parametrize(
    ("config_class", "fields", "kernels"),
    [
        (lalm.DeltaNetConfig, {"use_short_conv": True}, {"rms_norm", "short_conv", "delta_rule"}),
        (lalm.BasedConfig, {"feature_dim": 16}, {"rms_norm", "short_conv", "diagonal"}),
        (lalm.LamConfig, {"is_causal": True}, {"rms_norm", "short_conv", "lam_gates", "activation", "delta_rule"}),
    ],
    ids=["delta_net", "based", "lam"],
)
@pytest.mark.slow
def test_a_model_opens_what_is_compiled(config_class, fields, kernels, new_machine, monkeypatch):
    """So that its first forward loads nothing."""
    config = config_class(vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, **fields)
    ids, loaded, load = torch.arange(1, 20)[None], [], cpp._Plan.load
    monkeypatch.setattr(dispatch, "EARNS_COMPILING", 0)
    with torch.no_grad():
        AutoModel.from_config(config).eval()(input_ids=ids)
        monkeypatch.setattr(dispatch, "EARNS_COMPILING", 1 << 21)
        cpp._plan.cache_clear()
        monkeypatch.setattr(cpp._Plan, "load", lambda plan: (loaded.append(plan.name), load(plan)))
        model = AutoModel.from_config(config).eval()
        assert kernels <= set(loaded)
        opened = len(loaded)
        model(input_ids=ids)
    assert len(loaded) == opened


@needs_compiler
@pytest.mark.parametrize("damage", ["cut off", "another end"])
@pytest.mark.slow
def test_a_damaged_library_is_compiled_again(damage, quick, new_machine, warnings, monkeypatch):
    """In a process of its own, which a library that is cut off would kill."""
    monkeypatch.setenv("CXX", str(quick))
    assert cpp.load_kernel("rms_norm") is not None
    (library,) = new_machine.glob("*.so")
    whole = library.read_bytes()
    damaged = {"cut off": whole[: len(whole) // 2], "another end": whole[:-1] + bytes([whole[-1] ^ 1])}[damage]
    library.unlink()  # this process has it open
    library.write_bytes(damaged)
    code = (
        "import torch; from lalm.modeling.ops import cpp_kernels as cpp; "
        "from lalm.modeling.ops.dense import elementwise; assert cpp.load_kernel('rms_norm'); "
        "x = torch.randn(1 << 10, 1 << 7); y = elementwise.rms_norm(x, torch.ones(1 << 7), 1e-6); "
        "assert (y.square().mean(-1) - 1).abs().max() < 1e-3"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True, text=True)
    assert f"{library} is damaged" in done.stderr
    assert library.read_bytes() == whole
    forget()
    assert cpp.load_kernel("rms_norm") is not None
    assert not warnings


@needs_compiler
def test_threads_wait_for_one_compilation(quick, new_machine, monkeypatch):
    monkeypatch.setenv("CXX", str(quick))
    compiled, compile_one = [], cpp._compile

    def slowly(plan, made):
        compiled.append(plan.name)
        time.sleep(0.2)
        compile_one(plan, made)

    monkeypatch.setattr(cpp, "_compile", slowly)
    gate = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: (gate.wait(), cpp.load_kernel("rms_norm"))[1], range(4)))
    assert None not in found
    assert len(compiled) == len(list(new_machine.iterdir())) == 1


@needs_compiler
@pytest.mark.slow
def test_processes_that_compile_at_once(quick, new_machine, monkeypatch):
    monkeypatch.setenv("CXX", str(quick))
    code = "from lalm.modeling.ops import cpp_kernels as cpp; assert cpp.load_kernel('rms_norm') is not None"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=100) for process in running] == [0, 0]
    assert [path.suffix for path in new_machine.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.parametrize("obstacle", ["a file in the way", "no room", "no home", "read-only"])
def test_where_nothing_can_be_kept(obstacle, quick, new_machine, monkeypatch, warnings, tmp_path):
    """Each process compiles for itself then, and says so."""
    monkeypatch.setenv("CXX", str(quick))

    def read_only(path, mode="r", **options):
        if mode == "xb":
            raise OSError(30, "Read-only file system")
        return open(path, mode, **options)

    def no_room(file):
        raise OSError(28, "No space left on device")

    if obstacle == "a file in the way":
        new_machine.write_text("")
    elif obstacle == "read-only":
        new_machine.mkdir(mode=0o700)
        monkeypatch.setattr(cpp, "open", read_only, raising=False)
    elif obstacle == "no room":
        monkeypatch.setattr(os, "fsync", no_room)
    else:
        monkeypatch.delenv("LALM_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
        monkeypatch.chdir(tmp_path)
    assert cpp.load_kernel("rms_norm") is not None
    assert len(warnings) == 1
    assert "LALM_CACHE" in warnings[0]
    assert not (tmp_path / "~").exists()
    assert obstacle != "no room" or not list(new_machine.iterdir())


@needs_compiler
@pytest.mark.parametrize("words", ["'{}' -g0", "ccache '{}'", "{}"])
def test_the_environment_names_a_compiler(words, quick, new_machine, monkeypatch, warnings, tmp_path):
    """As CXX does for make: a path, or a command with words."""
    write_compiler(tmp_path / "bin" / "ccache", 'exec "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CXX", words.format(quick))
    assert cpp.load_kernel("rms_norm") is not None
    assert not warnings


@needs_compiler
@pytest.mark.parametrize("words", ["/nowhere/g++", "no-such-compiler -O2", "'g++"])
def test_a_compiler_that_is_not_there(words, new_machine, monkeypatch, warnings):
    """The machine's own is taken instead, and the user hears of it once."""
    monkeypatch.setenv("CXX", words)
    assert cpp._plan("rms_norm", ()).compiler == cpp._plan("lam_gates", ()).compiler == ()
    assert len(warnings) == 1
    assert f"CXX={words!r}" in warnings[0]


@needs_compiler
def test_the_cache_is_for_this_user_alone(quick, new_machine, monkeypatch, warnings):
    monkeypatch.setenv("CXX", str(quick))
    assert cpp.load_kernel("rms_norm") is not None
    (library,) = new_machine.glob("*.so")
    assert (new_machine.stat().st_mode & 0o777, library.stat().st_mode & 0o777) == (0o700, 0o600)
    assert not warnings


@needs_compiler
@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("fault", ["writable by others", "of another user"])
def test_nothing_is_loaded_that_another_user_may_have_written(place, fault, quick, new_machine, monkeypatch, warnings):
    """A library with a right seal even so: each process compiles for itself then, or replaces the one file."""
    monkeypatch.setenv("CXX", str(quick))
    assert cpp.load_kernel("rms_norm") is not None
    (library,) = new_machine.glob("*.so")
    target = {"folder": new_machine, "file": library}[place]
    if fault == "writable by others":
        target.chmod(0o777)
    else:
        stat = os.stat
        monkeypatch.setattr(
            os, "stat", lambda path, **rest: SimpleNamespace(st_uid=stat(path).st_uid + 7, st_mode=stat(path).st_mode)
            if Path(path) == target and not rest else stat(path, **rest),
        )  # fmt: skip
    forget()
    opened, open_library = [], cpp._load_library
    monkeypatch.setattr(cpp, "_load_library", lambda path: opened.append(path) or open_library(path))
    made = []
    monkeypatch.setattr(
        cpp, "_compile", lambda plan, path: made.append(path) or shutil.copy(quick.parent.parent / "made", path)
    )
    assert cpp.load_kernel("rms_norm") is not None
    assert len(made) == 1
    if place == "folder":
        assert opened == made
        assert len(warnings) == 1
        assert f"cannot be kept in {new_machine} (it belongs to another user, or others may write there" in warnings[0]
    elif fault == "writable by others":
        assert library.stat().st_mode & 0o777 == 0o600


def test_no_compiler_is_one_line(new_machine, monkeypatch, warnings):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cpp.load_kernel("rms_norm") is cpp.load_kernel("lam_gates") is None
    assert set(warnings) == {warnings[0]}  # transformers says the same text once
    assert "no C++ compiler: plain torch runs" in warnings[0]


def test_a_compiler_that_fails(new_machine, monkeypatch, warnings, tmp_path):
    monkeypatch.setenv("CXX", str(write_compiler(tmp_path / "bad", "echo no licence >&2; exit 1")))
    assert cpp.load_kernel("rms_norm") is None
    assert len(warnings) == 1
    assert "CXX" in warnings[0]
    assert "no licence" in warnings[0]


def test_a_compiler_that_hangs_is_waited_for_once(new_machine, monkeypatch, warnings, tmp_path):
    """And nothing that it has started is left behind."""
    number = tmp_path / "number"
    hangs = write_compiler(tmp_path / "slow", f"sleep 100 & echo $! > {number}; wait")
    monkeypatch.setenv("CXX", str(hangs))
    monkeypatch.setattr(cpp, "_PATIENCE", 0.5)
    begin = time.monotonic()
    assert cpp.load_kernel("rms_norm") is cpp.load_kernel("lam_gates") is None
    assert time.monotonic() - begin < 5
    assert len(warnings) == 1
    assert "not done in 0.5 seconds" in warnings[0]
    with pytest.raises(ProcessLookupError):
        wait_for_end_of(int(number.read_text()))


@needs_compiler
@pytest.mark.slow
def test_wide_windows_do_not_overrun_the_stack():
    """In a process of its own, which would die of it; a thread's stack is smaller still."""
    code = "from tests.ops.test_cpp import check_wide_windows; check_wide_windows(2048)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def check_wide_windows(width):
    torch.manual_seed(0)
    dispatch.EARNS_COMPILING = 0
    x, weight = torch.randn(1, 40, 600, requires_grad=True), torch.randn(600, width, requires_grad=True)
    threading.stack_size(1 << 18)
    with ThreadPoolExecutor(1) as pool:
        (y,) = pool.submit(cpp_short_conv, [x], weight, width - 1, False, SequenceLayout()).result()
    found = torch.autograd.grad(y.sum(), (x, weight))
    padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], groups=600).transpose(1, 2)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    for actual, exact in zip(found, torch.autograd.grad(expected.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(actual, exact, atol=1e-4, rtol=1e-4)
