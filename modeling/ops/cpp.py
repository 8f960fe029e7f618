# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""C++ kernels for the CPU, compiled by the machine's own compiler when first needed and kept in its cache folder.

A kernel is one source file (and headers), compiled for fixed sizes in one to three seconds once a call is long enough.
Where there is no compiler, or the source is absent (a checkpoint loaded as remote code), plain torch runs instead.
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
from typing import NamedTuple

import torch
from transformers.utils import logging

from lalm.modeling.ops.diagonal_recurrence import compute_dtype
from lalm.modeling.ops.layout import SequenceLayout

logger = logging.get_logger("transformers.lalm")

# Made sooner, they are as fast.
_LEVELS = {"diagonal": "-O2", "delta_rule": "-O2"}
_FLAGS = ("-march=native", "-std=c++17", "-shared", "-fPIC")
# The second try is for compilers without OpenMP or without these names for the processor and its registers.
_OPTIONAL = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())


# Values a head: kernels for heads work in registers of this many.
LANES = 16
# A head with fewer numbers in its state is not worth a compilation.
SMALLEST_STATE = 512
# Multiply-adds of a call that earn the second of waiting for a compiler: some milliseconds in plain torch.
_EARNS_COMPILING = 1 << 21


def load_kernel(name: str, *, work: int | None = None, **sizes: int) -> ctypes.CDLL | None:
    """The library made of `<name>.cpp` with `sizes` defined, which has a `forward` and a `backward`; None where it
    cannot be had, which is logged once, and for a call of little `work` (multiply-adds) while it is not compiled.

    `LALM_CPP=0` in the environment turns compiling off; `LALM_CACHE` names the folder of the compiled libraries.
    """
    plan = _plan(name, tuple(sorted(sizes.items())))
    if plan is None or (work is not None and work < _EARNS_COMPILING and not plan.library.is_file()):
        return None
    return _load(plan)


class _Plan(NamedTuple):
    name: str
    compiler: str
    source: Path
    defines: tuple[str, ...]
    library: Path


@cache
def _plan(name: str, sizes: tuple[tuple[str, int], ...]) -> _Plan | None:
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("LALM_CPP") == "0" or not source.is_file() or not compiler:
        logger.info(f"{name}: no C++ kernel ({'no compiler' if not compiler else 'switched off or no source'}).")
        return None
    defines = tuple(f"-D{key}={value}" for key, value in sizes)
    texts = b"".join(path.read_bytes() for path in (*sorted(source.parent.glob("*.h")), source))
    texts += " ".join(
        [compiler, _LEVELS.get(name, "-O3"), *_FLAGS, *defines, platform.machine(), _cpu_flags()]
    ).encode()
    library = _folder() / f"{name}-{hashlib.sha256(texts).hexdigest()[:20]}.so"
    return _Plan(name, compiler, source, defines, library)


@cache
def _load(plan: _Plan) -> ctypes.CDLL | None:
    try:
        if not plan.library.is_file():
            _compile(plan)
        kernel = ctypes.CDLL(str(plan.library))
        kernel.forward.restype = kernel.backward.restype = None
        return kernel
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.info(f"{plan.name}: no C++ kernel, plain torch runs instead ({str(detail).strip()[-300:]}).")
        return None


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p | None:
    """The address of a contiguous tensor, for a kernel; the caller keeps the tensor alive."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def fits(q: torch.Tensor, state_size: int) -> bool:
    """Whether there are kernels for heads like those of `q` with `state_size` numbers in their state."""
    known = q.device.type == "cpu" and q.dtype != torch.float64 and not torch.compiler.is_compiling()
    return known and state_size >= SMALLEST_STATE


def needed(kernel: ctypes.CDLL | None, *tensors: torch.Tensor | None) -> ctypes.CDLL:
    """The kernel for these tensors.

    Raises:
        RuntimeError: there is none.
    """
    if kernel is None or compute_dtype(*tensors) == torch.float64:
        raise RuntimeError(
            "There is no C++ kernel for these tensors: it needs the CPU, a C++ compiler, float32 or less, and heads "
            f"with a state of at least {SMALLEST_STATE} numbers. Use linear_attn_implementation='auto'."
        )
    return kernel


def borders(layout: SequenceLayout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where a row has padding and where documents start, `[B, T]` each, for a kernel."""
    skip, starts = None if layout.mask is None else (~layout.mask).contiguous(), layout.starts()
    return skip, None if starts is None else starts.contiguous()


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


def _compile(plan: _Plan) -> None:
    plan.library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.library.parent) as folder:
        made = Path(folder) / plan.library.name
        for index, optional in enumerate(_OPTIONAL):
            flags = (_LEVELS.get(plan.name, "-O3"), *_FLAGS, *optional, *plan.defines)
            command = [plan.compiler, *flags, str(plan.source), "-o", str(made)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                break
            except subprocess.CalledProcessError:
                if index == len(_OPTIONAL) - 1:
                    raise
        os.replace(made, plan.library)  # at once, so that another process never loads half a file
