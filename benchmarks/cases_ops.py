# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Ops on [1, T, 8, 64] in float32, forward and backward, against SDPA and transformers' own delta rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.nn import functional as F

from benchmarks import gates
from benchmarks.registry import Comparison, Ratio, Run, register
from lalm.modeling import ops

HEADS, SIZE = 8, 64
LENGTHS = (2048, 8192)
CHECKED = 256  # tokens whose gradients the gate compares; outputs are compared for all
TOLERANCE = 5e-4  # float32, over sums of thousands of terms
Inputs = dict[str, torch.Tensor]


def qkv(length: int) -> Inputs:
    """Random q, k and v, with q and k normalised."""
    x = {name: torch.randn(1, length, HEADS, SIZE) for name in "qkv"}
    return x | {name: F.normalize(x[name], dim=-1) for name in "qk"}


def gates_of(*shape: int, keep: float = 2.0) -> torch.Tensor:
    """Random log decays; a larger `keep` decays less."""
    return F.logsigmoid(torch.randn(*shape) + keep)


def for_linear(length: int) -> Inputs:
    x = qkv(length)
    return x | {name: F.elu(8 * x[name]) + 1 for name in "qk"}


def for_gla(length: int) -> Inputs:
    return qkv(length) | {"g": gates_of(1, length, HEADS, SIZE, keep=0) / 16}


def for_delta(length: int) -> Inputs:
    return qkv(length) | {"beta": torch.rand(1, length, HEADS)}


def for_gated_delta(length: int) -> Inputs:
    return for_delta(length) | {"g": gates_of(1, length, HEADS)}


def for_dual_state(length: int) -> Inputs:
    shape = (1, length, HEADS, 2)
    taken = 0.5 * torch.rand(shape)
    fast, slow = taken.unbind(-1)
    return qkv(length) | {
        "g": torch.cat([gates_of(*shape[:3], 1, keep=0), gates_of(*shape[:3], 1, keep=6)], dim=-1),
        "beta": torch.rand(shape),
        "read": torch.randn(shape),
        "coupling": torch.stack([1 - fast, fast, slow, 1 - slow], dim=-1).unflatten(-1, (2, 2)),
    }


@dataclass(frozen=True)
class Op:
    """A rule as `auto` runs it, its token-by-token reference, its inputs, and its targets at LENGTHS."""

    auto: Callable
    recurrent: Callable
    inputs: Callable[[int], Inputs]
    targets: tuple[float, float]


OPS = {
    "linear": Op(ops.linear_attention, ops.recurrent_linear_attention, for_linear, (5, 20)),
    "retention": Op(ops.retention, ops.recurrent_retention, qkv, (5, 20)),
    "gla": Op(ops.gla, ops.recurrent_gla, for_gla, (3, 10)),
    "delta": Op(ops.delta_rule, ops.recurrent_delta_rule, for_delta, (2.5, 8)),
    "gated_delta": Op(ops.gated_delta_rule, ops.recurrent_gated_delta_rule, for_gated_delta, (2.5, 8)),
    "dual_state": Op(ops.dual_state_delta, ops.recurrent_dual_state_delta, for_dual_state, (1.2, 4)),
}


def output_of(function: Callable, **x: torch.Tensor) -> torch.Tensor:
    return function(**x)[0]


def forward_backward(function: Callable[..., torch.Tensor], x: Inputs) -> Callable[[], None]:
    """Forward, and the gradients of all inputs for a random output gradient."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    d_out = torch.randn_like(x["v"])

    def run() -> None:
        torch.autograd.grad(function(**leaves), list(leaves.values()), d_out)

    return run


def follows(function: Callable[..., torch.Tensor], specification: Callable[..., torch.Tensor], x: Inputs) -> None:
    """Gate: equal outputs for all tokens, and equal input gradients for the first `CHECKED`."""
    with torch.no_grad():
        gates.near("output", function(**x), specification(**x), TOLERANCE)
    first = gates.prefix(x, CHECKED)
    d_out = torch.randn_like(first["v"])
    found, expected = (gates.gradients(f, first, d_out) for f in (function, specification))
    gates.all_near("gradients", found, expected, TOLERANCE)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def against_sdpa(length: int) -> Comparison:
    """Every rule against causal SDPA, which gets its preferred layout [1, 8, T, 64]."""
    x = {name: tensor.transpose(1, 2).contiguous() for name, tensor in qkv(length).items()}
    runs = {"sdpa": Run(forward_backward(softmax_attention, x))}
    for name, op in OPS.items():
        x = op.inputs(length)
        function, specification = partial(output_of, op.auto), partial(output_of, op.recurrent)
        runs[name] = Run(forward_backward(function, x), partial(follows, function, specification, x))
    shape = f"[1, {length}, {HEADS}, {SIZE}] fwd+bwd"
    ratios = [Ratio(name, "sdpa", shape, op.targets[LENGTHS.index(length)]) for name, op in OPS.items()]
    return Comparison(runs, ratios)


def against_transformers(length: int) -> Comparison:
    """The gated delta rule against Qwen3-Next's torch fallback; both are checked against the recurrence."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    op = OPS["gated_delta"]
    x = op.inputs(length)
    ours = partial(output_of, op.auto)

    def theirs(q, k, v, g, beta):
        return torch_chunk_gated_delta_rule(q, k, v, g, beta)[0]

    def forward(function: Callable[..., torch.Tensor]) -> None:
        with torch.no_grad():
            function(**x)

    runs, kinds = {}, ("fwd", "fwd+bwd")
    for who, function in (("ours", ours), ("transformers", theirs)):
        gate = cache(partial(follows, function, partial(output_of, op.recurrent), x))
        runs[f"{who} fwd"] = Run(partial(forward, function), gate)
        runs[f"{who} fwd+bwd"] = Run(forward_backward(function, x), gate)
    shape = f"[1, {length}, {HEADS}, {SIZE}]"
    return Comparison(runs, [Ratio(f"ours {kind}", f"transformers {kind}", shape, 2) for kind in kinds])


def fla_references() -> dict[str, Callable[..., torch.Tensor]]:
    """flash-linear-attention's fastest torch reference per rule, if it has one (needs Triton, but no GPU)."""
    from fla.ops.delta_rule.naive import delta_rule_chunkwise
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn
    from fla.ops.retention.naive import naive_retention

    def heads_first(**x: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.transpose(1, 2) for tensor in x.values()]

    return {
        "linear": lambda **x: naive_chunk_linear_attn(**x, normalize=True),
        "retention": lambda **x: naive_retention(*heads_first(**x)).transpose(1, 2),
        "gla": lambda q, k, v, g: naive_recurrent_gla(q, k, v, g)[0],
        "delta": lambda **x: delta_rule_chunkwise(*heads_first(**x))[0].transpose(1, 2),
        "gated_delta": lambda **x: naive_chunk_gated_delta_rule(**x)[0],
    }


def against_fla(length: int) -> Comparison:
    """Every rule against fla's torch reference; both are checked against the recurrence."""
    runs, ratios = {}, []
    for name, theirs in fla_references().items():
        op = OPS[name]
        x, specification = op.inputs(length), partial(output_of, op.recurrent)
        for who, function in ((name, partial(output_of, op.auto)), (f"fla {name}", theirs)):
            gate = partial(follows, function, specification, x)
            runs[who] = Run(forward_backward(function, x), gate)
        ratios.append(Ratio(name, f"fla {name}", f"[1, {length}, {HEADS}, {SIZE}] fwd+bwd", 1))
    return Comparison(runs, ratios)


register(
    "fla_references",
    "ops forward and backward against the torch references of flash-linear-attention, T = 2,048",
    partial(against_fla, 2048),
    budget=10,
    least_rounds=2,
    extra=True,
)
for _length, _budget in zip(LENGTHS, (8, 20), strict=True):
    register(
        f"ops_{_length}",
        f"{len(OPS)} ops forward and backward against SDPA, T = {_length}",
        partial(against_sdpa, _length),
        budget=_budget,
    )
    register(
        f"gated_delta_{_length}",
        f"gated delta rule against transformers' torch chunk, T = {_length}",
        partial(against_transformers, _length),
        budget=_budget / 2,
    )
