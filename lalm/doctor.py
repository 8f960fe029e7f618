# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`python -m lalm.doctor [model_type ...]`: which of lalm's kernels run on this machine for models of transformers,
and why not. It compiles them if they are not compiled yet."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Sequence

import torch
from transformers import AutoConfig

from lalm.errors import UserError, exit_on_user_error, nearest_hint
from lalm.modeling.ops.cpp_kernels import HeadKernel, why_no_kernel
from lalm.modeling.ops.delta.delta_channels_cpp import channels_kernel
from lalm.modeling.ops.delta.delta_rule_cpp import delta_kernel
from lalm.modeling.ops.dispatch import has_instructions, mkl_is_slow
from lalm.transformers_models.families import FAMILIES, Family, UnknownSeam

# Fields of the families' configurations: sizes of a state and a head of Mamba-2, and the width of the convolution.
_STATES = ("mamba_d_state", "ssm_state_size", "state_size")
_HEADS = ("mamba_d_head", "mamba_headdim", "mamba_head_dim", "head_dim")
_WIDTHS = ("linear_conv_kernel_dim", "conv_kernel", "mamba_d_conv")


def rule_of(family: Family, config) -> tuple[str, HeadKernel | None]:
    """The name of a family's rule and the kernel for the heads of `config`."""
    if "chunk_kimi_delta_attention" in family.functions:
        return "chunk_kda", channels_kernel(config.linear_head_dim, config.linear_head_dim)
    if "mamba2_chunk_scan" not in family.functions:
        sizes = (config.linear_key_head_dim, config.linear_value_head_dim)
        return "chunk_gated_delta_rule", delta_kernel(*sizes)
    state, size = (next(getattr(config, n) for n in names if hasattr(config, n)) for names in (_STATES, _HEADS))
    if size == "auto":
        size = config.mamba_expand * config.hidden_size // config.mamba_n_heads
    return "mamba_chunk_scan_combined", delta_kernel(state, size, use_delta_rule=False)


def machine() -> list[str]:
    """What of this machine decides."""
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    products = "oneDNN" if mkl_is_slow() else "MKL"
    halves = [name for name in ("bfloat16", "float16") if not has_instructions(getattr(torch, name))]
    return [
        f"processor: {found.get('cpu_name', 'unknown')}, {torch.get_num_threads()} threads",
        f"C++ compiler: {compiler or 'none (or named by CXX)'}",
        f"float32 matrix products: {products}, and lalm's kernel for few rows",
        f"16-bit weights multiplied in float32: {', '.join(halves) or 'none'}",
    ]


def report(family: Family) -> list[str]:
    """One line for each kernel of a family, at the sizes of its default configuration."""
    try:
        replaced = [seam.name for seam in family.seams() if seam.name in family.functions]
    except UnknownSeam as error:
        return [f"{family.model_type}: transformers' own functions run. {error}"]
    config = AutoConfig.for_model(family.model_type).get_text_config()
    name, head = rule_of(family, config)
    width = next((getattr(config, n) for n in _WIDTHS if hasattr(config, n)), 4)
    conv = {"WIDTH": width, "BEFORE": width - 1, "SILU": 1}
    lines = [f"{family.model_type}: use_in_transformers() replaces {', '.join(replaced)}"]
    for label, kernel, sizes in (
        (name, head.name if head else "", dict(head.sizes) if head else {}),
        ("causal_conv1d_fn", "short_conv", conv),
    ):
        problem = why_no_kernel(kernel, **sizes) if kernel else "no kernel has these sizes"
        how = f"C++ kernel {kernel} ({', '.join(f'{k}={v}' for k, v in sizes.items())})"
        lines.append(f"  {label}: {how}" if problem is None else f"  {label}: plain torch. No {how}: {problem}")
    return lines


def lines(model_types: Iterable[str]) -> Iterable[str]:
    yield from machine()
    for name in model_types:
        known = next((n for n in FAMILIES if name in (n, f"{n}_text")), None)
        if known is None:
            hint = nearest_hint(name, tuple(FAMILIES))
            raise UserError(f"model_type {name!r} is unknown{hint}; known are {', '.join(FAMILIES)}.")
        yield ""
        yield from report(FAMILIES[known])
    yield ""
    yield "On a GPU, under torch.compile without packed documents or padding, transformers' functions run."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lalm.doctor", description=__doc__)
    parser.add_argument("model_type", nargs="*", help=f"of {', '.join(FAMILIES)}; all if none is named")
    for line in lines(parser.parse_args(arguments).model_type or FAMILIES):
        print(line)


if __name__ == "__main__":
    exit_on_user_error(main)
