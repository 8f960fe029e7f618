"""What the tests of the C++ kernels share."""

import platform
import shutil

import pytest
import torch

from lalm.modeling.ops import cpp_kernels as cpp


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """A function that has kernels compiled for another x86 processor, `x86-64-v2` or `-v3`, while the test runs."""

    def choose(processor: str):
        if platform.machine() != "x86_64":
            pytest.skip("registers of x86 processors")
        if processor == "x86-64-v3" and "AVX" not in torch.backends.cpu.get_cpu_capability():
            pytest.skip("this processor has no AVX2")
        compiler = tmp_path / "compiler"
        chosen = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        compiler.write_text(f'#!/bin/bash\nexec {chosen} "${{@/-march=native/-march={processor}}}"\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("LALM_CACHE", str(tmp_path))
        cpp._plan.cache_clear()

    yield choose
    made = len(list(tmp_path.glob("*.so")))
    cpp._plan.cache_clear()
    assert made == 1
