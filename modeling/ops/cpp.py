# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""C++ kernels for the CPU, compiled by the machine's own compiler when first needed and kept in its cache folder.

A kernel is one source file (and headers), compiled for fixed sizes in one to four seconds once a call is long enough.
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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers.utils import logging

from lalm.modeling.ops.diagonal_recurrence import compute_dtype
from lalm.modeling.ops.layout import SequenceLayout
from lalm.modeling.ops.transforms import is_looked_into

logger = logging.get_logger("transformers.lalm")

_SOURCES = os.path.dirname(os.path.abspath(__file__))
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


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _cpu_flags() -> bytes:
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return b""


def _hashes() -> dict[str, Any]:
    """By kernel, the hash of what its libraries depend on beside their sizes: its source, the headers, and what tells
    processors apart, for a home folder that several machines share."""
    files = sorted(os.listdir(_SOURCES)) if os.path.isdir(_SOURCES) else []
    headers = [_read(os.path.join(_SOURCES, name)) for name in files if name.endswith(".h")]
    shared = hashlib.blake2b(b"".join([*headers, platform.machine().encode(), _cpu_flags()]), digest_size=10)
    hashes = {name.removesuffix(".cpp"): shared.copy() for name in files if name.endswith(".cpp")}
    for name, key in hashes.items():
        key.update(_read(_source(name)))
    return hashes


def _source(name: str) -> str:
    return os.path.join(_SOURCES, f"{name}.cpp")


_HASHES = _hashes()


def load_kernel(name: str, *, work: int | None = None, **sizes: int) -> ctypes.CDLL | None:
    """The library made of `<name>.cpp` with `sizes` defined, which has a `forward` and mostly a `backward`; None where
    it cannot be had, which is logged once, for a call of little `work` (multiply-adds) while it is not compiled, and
    inside what would have to look into a kernel (`is_looked_into`).

    `LALM_CPP=0` in the environment turns compiling off; `LALM_CACHE` names the folder of the compiled libraries.
    """
    plan = _plan(name, tuple(sizes.items()))
    if plan is None or is_looked_into():
        return None
    if not plan.is_tried:
        if work is not None and work < _EARNS_COMPILING and not os.path.isfile(plan.library):
            return None
        plan.load()
    return plan.kernel


def open_kernel(name: str, **sizes: int) -> None:
    """Load what `load_kernel` would, if it is compiled: a model opens when it is made what its first forward needs."""
    load_kernel(name, work=0, **sizes)


@dataclass
class _Plan:
    """A kernel of fixed sizes, and where its library lies."""

    name: str
    compiler: str | None  # None for the machine's own
    defines: tuple[str, ...]
    library: str
    is_tried: bool = False
    kernel: ctypes.CDLL | None = None

    def load(self) -> None:
        try:
            if not os.path.isfile(self.library):
                _compile(self)
            kernel = ctypes.CDLL(self.library)
            for entry in ("forward", "backward"):
                if hasattr(kernel, entry):
                    getattr(kernel, entry).restype = None
            self.kernel = kernel
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or error
            logger.info(f"{self.name}: no C++ kernel, plain torch runs instead ({str(detail).strip()[-300:]}).")
        self.is_tried = True  # last, for another thread must not take a kernel being made for one that cannot be had


# The first forward of a process waits for this: hence strings for paths, and no look for a compiler.
@cache
def _plan(name: str, sizes: tuple[tuple[str, int], ...]) -> _Plan | None:
    if os.environ.get("LALM_CPP") == "0" or name not in _HASHES:
        logger.info(f"{name}: no C++ kernel (switched off or no source).")
        return None
    compiler, defines = os.environ.get("CXX"), tuple(f"-D{key}={value}" for key, value in sorted(sizes))
    key = _HASHES[name].copy()
    key.update(" ".join([compiler or "", _LEVELS.get(name, "-O3"), *_FLAGS, *defines]).encode())
    return _Plan(name, compiler, defines, os.path.join(_folder(), f"{name}-{key.hexdigest()}.so"))


class _Unrecorded:
    """In place of the context of an autograd function of which nobody wants a gradient."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, or its forward pass alone where there is nothing to differentiate: with few
    tokens, what autograd does around a kernel takes longer than the kernel."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
        return function.apply(*arguments)
    return function.forward(_Unrecorded(), *arguments)


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


class CompiledForm:
    """A form of an op that runs where its kernel can be had; made with the mixer that calls it.

    Args:
        form: a function on top of the kernel.
        name, sizes: the kernel, as for `load_kernel`.
        state_size: numbers in the state of a head.
    """

    def __init__(self, form: Callable, name: str, state_size: int, **sizes: int):
        self.form, self.name, self.state_size, self.sizes = form, name, state_size, sizes
        if state_size >= SMALLEST_STATE:
            open_kernel(name, **sizes)

    def where_had(self, implementation: str, q: torch.Tensor) -> Callable | None:
        """`form`, if there is a kernel for heads like those of `q [B, T, H, K]`, else None. Unless `implementation` is
        "cpp", a short text must find it compiled."""
        if not fits(q, self.state_size):
            return None
        work = None if implementation == "cpp" else q.shape[:3].numel() * self.state_size
        return self.form if load_kernel(self.name, work=work, **self.sizes) else None


def borders(layout: SequenceLayout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where a row has padding and where documents start, `[B, T]` each, for a kernel."""
    skip, starts = None if layout.mask is None else (~layout.mask).contiguous(), layout.starts()
    return skip, None if starts is None else starts.contiguous()


def _folder() -> str:
    kept = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("LALM_CACHE") or os.path.join(kept, "lalm")


def _compile(plan: _Plan) -> None:
    compiler = plan.compiler or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise FileNotFoundError("there is no C++ compiler")
    folder, file = os.path.split(plan.library)
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = os.path.join(scratch, file)
        for index, optional in enumerate(_OPTIONAL):
            flags = (_LEVELS.get(plan.name, "-O3"), *_FLAGS, *optional, *plan.defines)
            command = [compiler, *flags, _source(plan.name), "-o", made]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                break
            except subprocess.CalledProcessError:
                if index == len(_OPTIONAL) - 1:
                    raise
        os.replace(made, plan.library)  # at once, so that another process never loads half a file
