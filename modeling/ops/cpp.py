# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""C++ kernels for the CPU, compiled by the machine's own compiler when first used and kept in its cache folder.

A kernel is one source file (and `kernel.h`), compiled for fixed sizes in about a second. Where there is no
compiler, or the source is absent (a checkpoint loaded as remote code), the forms in plain torch run instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger("transformers.lalm")

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
# The second try is for compilers without OpenMP or without these names for the processor and its registers.
_OPTIONAL = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())


@cache
def load_kernel(name: str, **sizes: int) -> ctypes.CDLL | None:
    """The library made of `<name>.cpp` with `sizes` defined, which has a `forward` and a `backward`; None where it
    cannot be had, which is logged once.

    `LALM_CPP=0` in the environment turns compiling off; `LALM_CACHE` names the folder of the compiled libraries.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("LALM_CPP") == "0" or not source.is_file() or not compiler:
        logger.info(f"{name}: no C++ kernel ({'no compiler' if not compiler else 'switched off or no source'}).")
        return None
    defines = [f"-D{key}={value}" for key, value in sorted(sizes.items())]
    headers = b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.h")))
    text = (
        headers
        + source.read_bytes()
        + " ".join([compiler, *_FLAGS, *defines, platform.machine(), _cpu_flags()]).encode()
    )
    library = _folder() / f"{name}-{hashlib.sha256(text).hexdigest()[:20]}.so"
    try:
        if not library.is_file():
            _compile(compiler, source, defines, library)
        kernel = ctypes.CDLL(str(library))
        kernel.forward.restype = kernel.backward.restype = None
        return kernel
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.info(f"{name}: no C++ kernel, plain torch runs instead ({str(detail).strip()[-300:]}).")
        return None


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p | None:
    """The address of a contiguous tensor, for a kernel; the caller keeps the tensor alive."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def _folder() -> Path:
    given = os.environ.get("LALM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lalm"


def _cpu_flags() -> str:
    """What tells processors apart, for a home folder that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(compiler: str, source: Path, defines: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        for index, optional in enumerate(_OPTIONAL):
            command = [compiler, *_FLAGS, *optional, *defines, str(source), "-o", str(made)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                break
            except subprocess.CalledProcessError:
                if index == len(_OPTIONAL) - 1:
                    raise
        os.replace(made, library)  # at once, so that another process never loads half a file
