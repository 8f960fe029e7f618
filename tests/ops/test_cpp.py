# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""When C++ kernels are compiled, where they lie, and what happens where they cannot be had."""

import shutil

import pytest
import torch
from transformers import AutoModel

import lalm
from lalm.modeling.ops import cpp
from lalm.modeling.ops.diagonal_cpp import compiled_diagonal
from lalm.modeling.ops.gla import cpp_gla
from lalm.modeling.ops.linear import linear

MUCH = 1 << 40


@pytest.fixture
def new_machine(monkeypatch, tmp_path):
    """A cache folder in which nothing is compiled yet."""
    monkeypatch.setenv("LALM_CACHE", str(tmp_path))
    cpp._plan.cache_clear()
    yield tmp_path
    cpp._plan.cache_clear()


def test_without_a_compiler_there_is_no_kernel(monkeypatch, new_machine):
    monkeypatch.setenv("LALM_CPP", "0")
    assert cpp.load_kernel("rms_norm") is None
    monkeypatch.delenv("LALM_CPP")
    monkeypatch.setenv("CXX", "/bin/false")
    cpp._plan.cache_clear()
    assert cpp.load_kernel("rms_norm") is None
    assert not list(new_machine.glob("*.so"))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="this machine has no C++ compiler")
def test_a_short_call_does_not_wait_for_the_compiler(new_machine, monkeypatch):
    """It takes the kernel where a longer one has had it compiled."""
    monkeypatch.setattr(cpp, "_EARNS_COMPILING", 1 << 21)
    short, long = torch.zeros(1, 8, 2, 32), torch.zeros(1, 2048, 2, 32)
    for q, form, files in ((short, None, 0), (long, cpp_gla, 1), (short, cpp_gla, 1)):
        assert compiled_diagonal(cpp_gla, 32, 32, 32).where_had("auto", q) is form
        assert len(list(new_machine.glob("*.so"))) == files
    assert cpp.load_kernel("rms_norm", work=1) is None
    assert cpp.load_kernel("rms_norm", work=MUCH) is not None


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="this machine has no C++ compiler")
@torch.no_grad()
def test_a_large_weight_earns_its_kernel_and_many_rows_do_not(new_machine, monkeypatch):
    monkeypatch.setattr(cpp, "_EARNS_COMPILING", 1 << 21)
    for rows, size, outputs, files in ((15, 128, 1200, 0), (1, 512, 512, 1)):
        linear(torch.zeros(rows, size), torch.zeros(outputs, size))
        assert len(list(new_machine.glob("few_rows*.so"))) == files


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="this machine has no C++ compiler")
@pytest.mark.parametrize(
    ("config_class", "fields", "kernels"),
    [
        (lalm.DeltaNetConfig, {"use_short_conv": True}, {"rms_norm", "short_conv", "delta_rule"}),
        (lalm.BasedConfig, {"feature_dim": 16}, {"rms_norm", "short_conv", "diagonal"}),
        (lalm.LamConfig, {"is_causal": True}, {"rms_norm", "short_conv", "lam_gates", "activation", "delta_rule"}),
    ],
    ids=["delta_net", "based", "lam"],
)
def test_a_model_opens_what_is_compiled(config_class, fields, kernels, new_machine, monkeypatch):
    """So that its first forward loads nothing."""
    config = config_class(vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, **fields)
    ids, loaded, load = torch.arange(1, 20)[None], [], cpp._Plan.load
    monkeypatch.setattr(cpp, "_EARNS_COMPILING", 0)
    with torch.no_grad():
        AutoModel.from_config(config).eval()(input_ids=ids)
        monkeypatch.setattr(cpp, "_EARNS_COMPILING", 1 << 21)
        cpp._plan.cache_clear()
        monkeypatch.setattr(cpp._Plan, "load", lambda plan: (loaded.append(plan.name), load(plan)))
        model = AutoModel.from_config(config).eval()
        assert kernels <= set(loaded)
        opened = len(loaded)
        model(input_ids=ids)
    assert len(loaded) == opened
