# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The machine, versions and settings of a benchmark run."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from lalm.modeling.ops.dense.matrix_product import linear

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "transformers", "numpy", "linear-attention-transformer", "flash-linear-attention", "triton")
# Instruction sets that determine matrix-product throughput.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
# Environment variables that affect speed: threads, the allocator, our kernels.
_ENVIRONMENT = ("OMP_", "MKL_", "KMP_", "MALLOC_", "GLIBC_", "THP_", "LD_PRELOAD", "LALM_CPP", "ONEDNN_", "ATEN_CPU")


def describe() -> dict[str, Any]:
    """Date, commit, versions, threads, hardware, and the current throughput of large matrix products."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()} | _versions(),
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "hardware": hardware(),
        "matrix_product_gflops": matrix_product_rates(),
    }


def matrix_product_rates() -> dict[str, float]:
    """GFLOP/s of large matrix products by dtype: the practical peak of this machine at this moment."""
    return {str(dtype)[6:]: matrix_product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}


def hardware() -> dict[str, Any]:
    """CPU model, instruction sets, cores, memory in GiB, and the GPU if there is one."""
    found = _cpuinfo()
    flags = set(found.get("flags", found.get("Features", "")).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": found.get("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def matrix_product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of square matrix products on the CPU: the best of at least three runs and two seconds."""
    a = torch.randn(size, size).to(dtype)
    times: list[float] = []
    while len(times) < 4 or sum(times) < 2:
        start = time.perf_counter()
        linear(a, a)  # with the faster of MKL and oneDNN
        times.append(time.perf_counter() - start)
    return round(2e-9 * size**3 / min(times[1:]), 1)


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _versions() -> dict[str, str]:
    installed = {name: distribution.version for distribution in distributions() if (name := distribution.name)}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
