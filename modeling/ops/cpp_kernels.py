# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""C++ kernels for the CPU, compiled by the machine's own compiler when first asked for and kept in its cache folder.

A kernel is one source file (and headers), compiled for fixed sizes in one to four seconds. `dispatch.py` decides from
the shapes of a call whether to ask; here is how to get the library. Without a compiler, plain torch runs instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout

logger = logging.get_logger("transformers.lalm")

# -O2 compiles these faster, and they run as fast as with -O3.
_LEVELS = {"diagonal": "-O2", "delta_rule": "-O2", "delta_channels": "-O2"}
_FLAGS = ("-march=native", "-std=c++17", "-shared", "-fPIC")
# The second try is for compilers without OpenMP or without these names for the processor and its registers.
_OPTIONAL = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())
# Values per head are padded to a multiple of this: the kernels work in registers of so many numbers.
LANES = 16
# Seconds that a process waits for a compiler that is not done, once: it takes one to ten.
_PATIENCE = 60.0
# Bytes of the checksum at the end of a library that is kept.
_CHECKSUM_SIZE = 20


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_sources() -> dict[str, str]:
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [name for name in names if name.endswith((".cpp", ".h"))]
    return {name: _read(os.path.join(folder, name)).decode() for name in names}


# By file name. In the code that is saved with a checkpoint the sources themselves stand here (lalm/bundle.py).
KERNEL_SOURCES: dict[str, str] = _read_sources()
_INCLUDE = re.compile(r'^#include "(\w+\.h)"', re.MULTILINE)


def kernel_files(name: str) -> list[str]:
    """The file of a kernel and the headers that it includes."""
    found = [f"{name}.cpp"]
    for file in found:  # which grows on the way
        found += [header for header in _INCLUDE.findall(KERNEL_SOURCES[file]) if header not in found]
    return found


def _cpu_flags() -> bytes:
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return b""


@cache
def _processor() -> bytes:
    """What tells processors apart, for a home folder that several machines share."""
    return platform.machine().encode() + _cpu_flags()


@cache
def _hash(name: str) -> bytes:
    """What the libraries of a kernel depend on, along with their sizes: its source, its headers, the processor."""
    sources = "".join(KERNEL_SOURCES[file] for file in kernel_files(name))
    return hashlib.blake2b(sources.encode() + _processor(), digest_size=10).digest()


class HeadKernel(NamedTuple):
    """A kernel compiled for given head sizes.

    Args:
        name: of its source file.
        state_size: numbers in the state of one head.
        sizes: what is defined when it is compiled.
    """

    name: str
    state_size: int
    sizes: tuple[tuple[str, int], ...]


def load_kernel(name: str, **sizes: int) -> ctypes.CDLL | None:
    """The library compiled from `<name>.cpp` with `sizes` defined, with a `forward` and mostly a `backward` function;
    it is compiled if the cache folder does not hold it. None if it cannot be compiled, which is logged once.

    `LALM_CPP=0` in the environment turns compiling off; `LALM_CACHE` names the folder of the compiled libraries.
    """
    return _load(name, tuple(sizes.items()))


def _load(name: str, sizes: tuple[tuple[str, int], ...]) -> ctypes.CDLL | None:
    plan = _plan(name, sizes)
    if plan is not None and not plan.is_tried:
        plan.load()
    return None if plan is None else plan.kernel


@torch.compiler.assume_constant_result
def has_library(name: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    """Whether `load_kernel` gives a library. A graph that is compiled takes the answer of that moment."""
    return _load(name, sizes) is not None


def why_no_kernel(name: str, **sizes: int) -> str | None:
    """Why `load_kernel` gives None, which it is asked first; None if it gives a library."""
    if load_kernel(name, **sizes) is not None:
        return None
    if (plan := _plan(name, tuple(sizes.items()))) is not None:
        return plan.problem
    return "LALM_CPP=0 is set" if os.environ.get("LALM_CPP") == "0" else "its source is not installed"


def preload_kernel(name: str, **sizes: int) -> None:
    """Load a library that is compiled already: models call this when they are made, so that their first forward does
    not wait for the disk."""
    plan = _plan(name, tuple(sizes.items()))
    if plan is not None and not plan.is_tried and os.path.isfile(plan.library):
        plan.load()


def preload_heads(kernel: HeadKernel | None) -> None:
    """`preload_kernel` for the heads of a mixer."""
    if kernel is not None:
        preload_kernel(kernel.name, **dict(kernel.sizes))


@dataclass
class _Plan:
    """A kernel of fixed sizes, and where its library lies."""

    name: str
    compiler: tuple[str, ...]  # words of a command; none for the machine's own
    defines: tuple[str, ...]
    library: str
    is_tried: bool = False
    kernel: ctypes.CDLL | None = None
    problem: str = ""  # why there is no kernel

    def load(self) -> None:
        with _loading.lock:
            if self.is_tried:  # by a thread that this one has waited for
                return
            try:
                self.kernel = _load_cached(self.library) or _build(self)
            except (_NoCompiler, OSError, subprocess.SubprocessError) as error:
                _log_failure(self, error)
            self.is_tried = True  # set last: a thread that reads it takes the kernel as it then is


class _NoCompiler(Exception):
    """There is none, or it has been waited for in vain."""


class _Loading:
    """Who loads: one thread at a time, so that no two wait for a compiler to make the same library."""

    def __init__(self):
        self.has_timed_out = False  # a compiler was not done in time
        self.renew()

    def renew(self) -> None:
        self.lock = threading.Lock()


_loading = _Loading()
if hasattr(os, "register_at_fork"):  # a child has not the thread that may hold the lock
    os.register_at_fork(after_in_child=_loading.renew)


# The first forward of a process waits for this: hence strings for paths, and no look for a compiler.
@cache
def _plan(name: str, sizes: tuple[tuple[str, int], ...]) -> _Plan | None:
    if os.environ.get("LALM_CPP") == "0" or f"{name}.cpp" not in KERNEL_SOURCES:
        logger.info(f"{name}: no C++ kernel (switched off or no source).")
        return None
    compiler = _named_compiler(os.environ.get("CXX"))
    defines = tuple(f"-D{key}={value}" for key, value in sorted(sizes))
    options = " ".join([*compiler, _LEVELS.get(name, "-O3"), *_FLAGS, *defines])
    key = hashlib.blake2b(_hash(name) + options.encode(), digest_size=10)
    return _Plan(name, compiler, defines, os.path.join(_folder(), f"{name}-{key.hexdigest()}.so"))


@cache
def _named_compiler(name: str | None) -> tuple[str, ...]:
    """The command that `CXX` holds, a path or words as for a shell ("ccache g++"). Empty, for the machine's own
    compiler, if it holds nothing or, with a warning, no program of this machine."""
    if not name or not name.strip():
        return ()
    if shutil.which(name):  # a path with spaces
        return (name,)
    try:
        words = tuple(shlex.split(name))
    except ValueError:  # an open quotation
        words = ()
    if words and shutil.which(words[0]):
        return words
    logger.warning(f"CXX={name!r} names no program on this machine: C++ kernels are made by its own compiler instead.")
    return ()


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p | None:
    """The address of a contiguous tensor, for a kernel; the caller keeps the tensor alive."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


_NO_KERNEL = (
    "There is no C++ kernel for these tensors: it needs the CPU, a C++ compiler and float32 or less. Use "
    "implementation='auto'."
)


def require_kernel(kernel: HeadKernel | None, *tensors: torch.Tensor | None) -> ctypes.CDLL:
    """The library of the kernel for these tensors.

    Raises:
        RuntimeError: there is none.
    """
    for x in tensors:
        if x is not None and not x.is_cpu:
            raise RuntimeError(_NO_KERNEL)
    library = None if kernel is None else _load(kernel.name, kernel.sizes)
    if library is None:
        raise RuntimeError(_NO_KERNEL)
    return library


def refuse_float64(*tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError if a tensor is of float64, which no kernel computes in."""
    if compute_dtype(*tensors) == torch.float64:
        raise RuntimeError(_NO_KERNEL)


def boundaries(layout: SequenceLayout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where a row has padding and where documents start, `[B, T]` each, for a kernel."""
    skip, starts = None if layout.mask is None else (~layout.mask).contiguous(), layout.starts()
    return skip, None if starts is None else starts.contiguous()


def _folder() -> str:
    if given := os.environ.get("LALM_CACHE"):
        return os.path.abspath(given)
    kept = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(kept):  # which does not count, says the standard
        kept = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(kept, "lalm")


def _load_cached(path: str) -> ctypes.CDLL | None:
    """The library that is kept there. None if it is not, or not as it was written: running one that was cut off kills
    the process. Nor is one loaded that another user may have put there."""
    if not (os.path.isfile(path) and _is_private(os.path.dirname(path)) and _is_private(path)):
        return None
    try:
        content = _read(path)
        if content[-_CHECKSUM_SIZE:] == _checksum(content[:-_CHECKSUM_SIZE]):
            return _load_library(path)
    except OSError as error:
        logger.info(f"{path} cannot be loaded ({error}).")
    logger.warning(f"{path} is damaged or not for this machine: it is compiled again.")
    return None


def _is_private(path: str) -> bool:
    """Whether only this user, or root, can have written there."""
    if not hasattr(os, "getuid"):  # Windows
        return True
    found = os.stat(path)
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_SIZE).digest()


def _load_library(path: str) -> ctypes.CDLL:
    kernel = ctypes.CDLL(path)
    for entry in ("forward", "backward"):
        if hasattr(kernel, entry):
            getattr(kernel, entry).restype = None
    return kernel


def _build(plan: _Plan) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="lalm-") as scratch:
        made = os.path.join(scratch, os.path.basename(plan.library))
        _compile(plan, made)
        try:
            _store(made, plan.library)
            return _load_library(plan.library)
        except OSError as error:
            folder = os.path.dirname(plan.library)
            logger.warning_once(
                f"C++ kernels cannot be kept in {folder} ({error.strerror or error}), so every process compiles them "
                "again: set LALM_CACHE to a folder that you, and nobody else, can write to."
            )
            return _load_library(made)


def _store(made: str, library: str) -> None:
    """Put a library where later processes look, whole or not at all, even if the machine stops."""
    folder, content = os.path.dirname(library), _read(made)
    if not os.path.isabs(folder):  # no home folder
        raise NotADirectoryError(f"{folder} is no absolute path")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if not _is_private(folder):
        raise PermissionError(f"it belongs to another user, or others may write there; try chmod 700 {folder}")
    scratch = f"{library}.{uuid.uuid4().hex}"
    try:
        with open(scratch, "xb", opener=partial(os.open, mode=0o600)) as file:
            file.write(content + _checksum(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, library)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(scratch)
        raise


def _compile(plan: _Plan, made: str) -> None:
    if _loading.has_timed_out:
        raise _NoCompiler("the compiler was not done in time before")
    own = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = plan.compiler or ((own,) if own else ())
    if not compiler:
        logger.warning_once(
            "There is no C++ compiler: plain torch runs in place of the kernels, slower. Install g++, or set CXX."
        )
        raise _NoCompiler("there is no C++ compiler")
    folder = os.path.dirname(made)
    for file in kernel_files(plan.name):
        with open(os.path.join(folder, file), "w", encoding="utf-8") as source:
            source.write(KERNEL_SOURCES[file])
    end = time.monotonic() + _PATIENCE
    for index, optional in enumerate(_OPTIONAL):
        flags = (_LEVELS.get(plan.name, "-O3"), *_FLAGS, *optional, *plan.defines)
        try:
            _run([*compiler, *flags, os.path.join(folder, f"{plan.name}.cpp"), "-o", made], end)
            break
        except subprocess.CalledProcessError:
            if index == len(_OPTIONAL) - 1:
                raise


def _run(command: list[str], end: float) -> None:
    """Run a command, which with all that it starts is stopped at `end`.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be started, fails, or is not done in time.
    """
    streams: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **streams) as process:
        try:
            _, problem = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except BaseException:  # an interrupt, too
            with contextlib.suppress(OSError, AttributeError):  # Windows has no groups
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=problem)


def _log_failure(plan: _Plan, error: Exception) -> None:
    """Log why there is no kernel; a warning where the machine has a compiler."""
    detail = str(getattr(error, "stderr", None) or error).strip()[-300:]
    if isinstance(error, subprocess.TimeoutExpired):
        _loading.has_timed_out = True
        detail = f"the compiler was not done in {_PATIENCE:g} seconds and is not asked again in this process"
    plan.problem = detail
    given = f" by CXX={shlex.join(plan.compiler)!r}" if plan.compiler else ""
    say = logger.info if isinstance(error, _NoCompiler) else logger.warning
    say(f"{plan.name}: no C++ kernel{given}, plain torch runs instead ({detail}).")
