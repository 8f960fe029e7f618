# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Whole models of transformers with and without lalm's kernels: prefill, train step and decoding, alternately.

`python -m experiments.transformers_models qwen3_5_text 2048` prints medians of the CPU time of this process on one
thread, which other work on the machine disturbs less than time on the clock. Layers have the sizes of released models,
but there are few of them, and few words; weights are random. Logits must agree first.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import lalm
from lalm.training.clm.peak_memory import PeakMemory

_FEW = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, dict[str, Any]] = {
    # Qwen3.5-0.8B
    "qwen3_5_text": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    },
    # Mamba-2 130M
    "mamba2": {
        "hidden_size": 768, "num_hidden_layers": 3, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1,
        "expand": 2, "chunk_size": 256,
    },
    # Kimi-Linear 48B-A3B at half its width, with 8 of its 256 experts
    "kimi_linear": {
        "hidden_size": 1152, "intermediate_size": 4608, "moe_intermediate_size": 512, "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_attention_heads": 16,
        "num_key_value_heads": 16, "linear_num_heads": 16, "linear_head_dim": 128, "num_experts": 8,
        "num_experts_per_token": 2,
    },
    # Falcon-H1 0.5B
    "falcon_h1": {
        "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64,
        "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_chunk_size": 128,
    },
}  # fmt: skip
WORK = ["prefill", "train", "decode"]
STEPS = 16  # of decoding
TOLERANCE = 1e-5


def make(model_type: str, length: int) -> tuple[Any, torch.Tensor]:
    """A model with random weights, and a text."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **_FEW, **SIZES[model_type])
    return AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 1024, (1, length))


def work(model, ids: torch.Tensor) -> dict[str, Callable[[], float]]:
    """What is timed: each gives its seconds."""

    def prefill() -> float:
        start = time.process_time()
        with torch.no_grad():
            model(ids, use_cache=True)
        return time.process_time() - start

    def train() -> float:
        start = time.process_time()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        return time.process_time() - start

    def decode() -> float:
        with torch.no_grad():
            output = model(ids[:, :-STEPS], use_cache=True)
            name = "cache_params" if "cache_params" in output else "past_key_values"
            cache, start = {name: output[name]}, time.process_time()
            for token in ids[:, -STEPS:].split(1, dim=1):
                model(token, use_cache=True, **cache)
        return time.process_time() - start

    return {"prefill": prefill, "train": train, "decode": decode}


def train_memory(sizes: tuple[str, int], opens: bool, found: Any) -> None:
    """Put into `found` by how much a train step raises the memory of this process, in bytes; the second step, after
    what the first has compiled and loaded."""
    torch.set_num_threads(1)
    model, ids = make(*sizes)
    with lalm.use_in_transformers() if opens else nullcontext():
        run = work(model, ids)["train"]
        run()
        with PeakMemory(ids.device) as peak:
            run()
    found.put(peak.rise)


def compare_memory(model_type: str, length: int) -> None:
    """Print the memory of a train step without and with lalm's kernels, each in a process of its own."""
    context, peaks = multiprocessing.get_context("spawn"), []
    for opens in (False, True):
        found = context.Queue()
        process = context.Process(target=train_memory, args=((model_type, length), opens, found))
        process.start()
        peaks.append(found.get())
        process.join()
    theirs, ours = (peak / 1e6 for peak in peaks)
    print(f"{model_type} {length} memory: transformers {theirs:.0f} MB, lalm {ours:.0f} MB, {ours / theirs:.2f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.transformers_models")
    parser.add_argument("model_type", choices=SIZES)
    parser.add_argument("length", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs="*", default=WORK, choices=[*WORK, "memory"])
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    model, ids = make(options.model_type, options.length)
    with torch.no_grad():
        stock = model(ids).logits
        with lalm.use_in_transformers():
            distance = ((model(ids).logits - stock).norm() / stock.norm()).item()
    if distance > TOLERANCE:
        raise SystemExit(f"logits differ by {distance:.1e} of their size: nothing is timed")
    if "memory" in options.work:
        compare_memory(options.model_type, options.length)
    for name in (name for name in options.work if name != "memory"):
        times: tuple[list[float], list[float]] = ([], [])
        run = work(model, ids)[name]
        for _ in range(options.rounds):
            times[0].append(run())
            with lalm.use_in_transformers():
                times[1].append(run())
        theirs, ours = (statistics.median(x) for x in times)
        print(
            f"{options.model_type} {options.length} {name}: transformers {theirs:.3f} s, lalm {ours:.3f} s, "
            f"{theirs / ours:.2f} times as fast (load {os.getloadavg()[0]:.0f}, logits {distance:.0e})",
            flush=True,
        )


if __name__ == "__main__":
    main()
