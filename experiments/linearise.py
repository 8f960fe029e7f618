# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a linear student keeps of its softmax teacher (model_cards/linearised.md).

    python -m experiments.linearise runs/teacher runs/distill --text wiki.test.raw --tokens 16384

Prints tables in Markdown for the teacher, the student, the student with its linear part zeroed ("window only") and
with its window zeroed ("linear only": each head sees its own token and, linearly, all others): perplexity by length of
context and by position, needles found, and the speed and cache of decoding.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lalm  # noqa: F401  registers our models with the Auto classes
from lalm.convert.centroids import window_linear_layers

# Log of a feature that is as good as 0.
NOTHING = -1e4
WARM_UP, STEPS = 2, 16
ROWS = ["teacher", "student", "window only", "linear only"]


@contextmanager
def window_only(student: Any) -> Iterator[None]:
    """Inside, far tokens have no weight."""
    mixers = window_linear_layers(student).values()
    for mixer in mixers:
        features = mixer.log_q_features
        mixer.log_q_features = lambda q, features=features: torch.full_like(features(q), NOTHING)  # type: ignore
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.log_q_features


@contextmanager
def linear_only(student: Any) -> Iterator[None]:
    """Inside, a token attends only itself by softmax."""
    config = student.config
    before = config.window_size, config.num_sink_tokens
    config.window_size, config.num_sink_tokens = 1, 0
    try:
        yield
    finally:
        config.window_size, config.num_sink_tokens = before


def contestants(teacher: Any, student: Any) -> list[tuple[str, Any, Callable[[], AbstractContextManager]]]:
    """What is measured: a name, the model, and the context to run it in."""
    return [
        ("teacher", teacher, nullcontext),
        ("student", student, nullcontext),
        ("window only", student, lambda: window_only(student)),
        ("linear only", student, lambda: linear_only(student)),
    ]


@torch.no_grad()
def losses(model: Any, tokens: torch.Tensor, context: int) -> torch.Tensor:
    """-log p `[N, context - 1]` of the tokens of whole blocks, each block read from its beginning."""
    found = []
    for block in tokens[: len(tokens) // context * context].view(-1, context):
        hidden = model.model(block[None], use_cache=False).last_hidden_state[0, :-1]
        pieces = zip(hidden.split(512), block[1:].split(512), strict=True)
        found.append(
            torch.cat([torch.nn.functional.cross_entropy(model.lm_head(h), y, reduction="none") for h, y in pieces])
        )
    return torch.stack(found)


def perplexity_tables(models: list, tokens: torch.Tensor, contexts: list[int]) -> None:
    """Print perplexity by context, and by position in the longest."""
    measured = {}
    print("| perplexity |", " | ".join(f"{context} tokens" for context in contexts), "|")
    print("|---" * (len(contexts) + 1) + "|")
    for name, model, inside in models:
        with inside():
            found = measured[name] = {context: losses(model, tokens, context) for context in contexts}
        print(f"| {name} |", " | ".join(f"{found[c].mean().exp():.2f}" for c in contexts), "|", flush=True)
    longest = max(contexts)
    edges = [0] + [2**n for n in range(6, int(math.log2(longest)) + 1)]
    ranges = [(low, min(high, longest - 1)) for low, high in itertools.pairwise(edges)]
    print(f"\n| perplexity at position, {longest} tokens |", " | ".join(f"{a} to {b}" for a, b in ranges), "|")
    print("|---" * (len(ranges) + 1) + "|")
    for name, by_context in measured.items():
        means = (by_context[longest][:, low:high].mean().exp() for low, high in ranges)
        print(f"| {name} |", " | ".join(f"{mean:.2f}" for mean in means), "|", flush=True)


@torch.no_grad()
def finds(model: Any, tokenizer: Any, text: torch.Tensor, depth: int, number: str) -> tuple[bool, float]:
    """Whether a greedy reader gives the number that stood `depth` tokens before the question, and its mean log p."""
    needle = tokenizer(f"\nThe secret number is {number}.\n")["input_ids"]
    question = tokenizer("\nThe secret number is")["input_ids"]
    answer = tokenizer(f" {number}")["input_ids"]
    ids = torch.tensor([[*text[:32].tolist(), *needle, *text[32 : 32 + depth].tolist(), *question, *answer]])
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, -len(answer) - 1 : -1]
    logits, wanted = model.lm_head(hidden), torch.tensor(answer)
    log_p = -torch.nn.functional.cross_entropy(logits, wanted).item()
    return bool((logits.argmax(-1) == wanted).all()), log_p


def needle_table(models: list, tokenizer: Any, tokens: torch.Tensor, depths: list[int], count: int) -> None:
    """Print how many needles each model finds, by depth, and the mean log p of their digits."""
    print(f"\n| needles found of {count} (mean log p) |", " | ".join(f"{d} tokens before" for d in depths), "|")
    print("|---" * (len(depths) + 1) + "|")
    for name, model, inside in models:
        cells, chance = [], random.Random(0)
        for depth in depths:
            with inside():
                starts = [chance.randrange(len(tokens) - depth - 32) for _ in range(count)]
                numbers = [str(chance.randrange(10_000, 100_000)) for _ in range(count)]
                found = [
                    finds(model, tokenizer, tokens[start:], depth, number)
                    for start, number in zip(starts, numbers, strict=True)
                ]
            cells.append(f"{sum(hit for hit, _ in found)} ({sum(p for _, p in found) / count:.2f})")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that a cache holds."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        for kind in ("recurrent_states", "conv_states"):
            tensors += list(getattr(layer, kind, {}).values())
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


@torch.no_grad()
def speed_table(models: list, tokens: torch.Tensor, lengths: list[int]) -> None:
    """Print the speed of reading a prompt and of decoding after it, and the size of the cache."""
    print("\n| after a prompt of | model | prefill, tokens/s | decode, tokens/s | cache, MB |\n|---|---|---|---|---|")
    for length in lengths:
        for name, model, _ in models:
            prompt = tokens[None, :length]
            start = time.perf_counter()
            out = model(prompt, use_cache=True, logits_to_keep=1)
            prefill = length / (time.perf_counter() - start)
            cache, size, times = out.past_key_values, cache_bytes(out.past_key_values), []
            for step in range(WARM_UP + STEPS):
                start = time.perf_counter()
                model(tokens[None, length + step : length + step + 1], past_key_values=cache, use_cache=True)
                times.append(time.perf_counter() - start)
            decode = 1 / sorted(times[WARM_UP:])[STEPS // 2]
            print(f"| {length} | {name} | {prefill:,.0f} | {decode:.1f} | {size / 1e6:.1f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--tuned", help="the teacher trained on the student's tokens: the honest baseline, a row more")
    parser.add_argument("--text", type=Path, required=True, help="a plain text, such as WikiText-2's raw test split")
    parser.add_argument("--tokens", type=int, default=16384, help="how many of its tokens to score")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--depths", type=int, nargs="*", default=[32, 256, 1024, 4096])
    parser.add_argument("--needles", type=int, default=10, help="a depth; 0 skips them")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 8192], help="prompts before decoding")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="'linear only' is slow: its window is 1")
    arguments = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher, student = (AutoModelForCausalLM.from_pretrained(x).eval() for x in (arguments.teacher, arguments.student))
    tokens = torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"])
    models = [row for row in contestants(teacher, student) if row[0] in arguments.rows]
    if arguments.tuned:
        tuned = AutoModelForCausalLM.from_pretrained(arguments.tuned).eval()
        models.insert(1, ("teacher, fine-tuned", tuned, nullcontext))
    if arguments.contexts:
        perplexity_tables(models, tokens[: arguments.tokens], arguments.contexts)
    if arguments.needles and arguments.depths:
        needle_table(models, tokenizer, tokens, arguments.depths, arguments.needles)
    if arguments.lengths:
        whole = [row for row in models if row[0] in ROWS[:2]]
        speed_table(whole, tokens, arguments.lengths)


if __name__ == "__main__":
    main()
