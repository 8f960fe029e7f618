# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The delta rule, with an optional decay per head and token.

    S_t = exp(g_t) S_{t-1}     u_t = beta_t (v_t - S_t^T k_t)     S_t <- S_t + k_t u_t^T     o_t = scale S_t^T q_t

(Schlag et al., arXiv 2102.11174, eq. 24; DeltaNet, Yang et al., arXiv 2406.06484; with g Gated DeltaNet, Yang et al.,
arXiv 2412.06464, eq. 10.) The recurrence itself, step by step and in chunks, is in delta_recurrence.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lalm.modeling.ops.delta.delta_recurrence import chunk_delta, recurrent_delta
from lalm.modeling.ops.delta.delta_rule_cpp import as_taken, cpp_delta, delta_kernel
from lalm.modeling.ops.dispatch import choose, in_form
from lalm.modeling.ops.fla_kernels import fla_delta
from lalm.modeling.ops.rules import Call, bidirectional_delta, check_gate, run_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes

# What fla adds to the squared length of a vector before it divides by the root.
NORM_EPS = 1e-6


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    implementation: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule.

    Args:
        q, k: `[B, T, H, K]`; k of unit length, or the state may grow without bound.
        v: `[B, T, H, V]`.
        beta: write strength `[B, T, H]`, in [0, 1]; up to 2 gives transitions with negative eigenvalues.
        scale: factor on q; None for `K ** -0.5`.
        initial_state: `[N, H, K, V]`; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, boundaries of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document boundaries of a batch; its rows have one state each (N = B).
        causal: False adds up what is read from both sides of every document, without states.
        implementation: "recurrent", "chunk", "cpp", "fla" or "auto", as for `gla`.
        chunk_size: tokens of a chunk.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[N, H, K, V]` or None. States and sums are float32,
        or float64 if an input is.

    Raises:
        ValueError: a shape does not fit, or the implementation does not exist for this input; the message names the
            argument.
    """
    call = Call(scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    return _run("delta_rule", (q, k, v, None, beta), call, implementation, chunk_size)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    implementation: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule: `delta_rule` with a log decay, grouped heads, and q and k normed on request.

    Args:
        q, k: `[B, T, G, K]`, G a divisor of H: each head serves H / G consecutive heads of v. The C++ kernel reads
            them, and v, as slices of wider tokens (the output of a convolution) without copying.
        v: `[B, T, H, V]`.
        g: log decay `[B, T, H]`, at most 0, natural log. Any size is safe.
        use_qk_l2norm_in_kernel: take q and k times `1 / sqrt(|x|^2 + 1e-6)`.

    The other arguments, the results and the errors are those of `delta_rule`.
    """
    call = Call(scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    norm_eps = NORM_EPS if use_qk_l2norm_in_kernel else None
    return _run("gated_delta_rule", (q, k, v, g, beta), call, implementation, chunk_size, norm_eps)


def _run(
    rule: str, tensors: tuple, call: Call, implementation: str, chunk_size: int, norm_eps: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v, g, beta = tensors
    shares_heads = rule == "gated_delta_rule"
    check_shapes(q, k, v, shares_heads=shares_heads)
    for name, x in (("g", g), ("beta", beta)):
        if x is not None:
            check_gate(name, x, v.shape[:3], "one value per token and head")
    forms: dict[str, Callable] = {
        "recurrent": recurrent_delta,
        "chunk": partial(chunk_delta, chunk_size=chunk_size),
        "fla": fla_delta,
        "cpp": partial(cpp_delta, wants_state=call.output_final_state, norm_eps=norm_eps),
    }
    keys, values = q.shape[-1], v.shape[-1]
    form = choose(rule, implementation, q, v, forms, delta_kernel(keys, values))
    if form != "cpp":
        tensors = (*as_taken(q, k, v, norm_eps), v, g, beta)
    call, state_shape = (
        call._replace(scale=keys**-0.5 if call.scale is None else call.scale),
        (v.shape[2], keys, values),
    )
    return run_rule(forms[form], tensors, call, state_shape, bidirectional_delta)


recurrent_delta_rule, chunk_delta_rule = in_form(delta_rule, "recurrent"), in_form(delta_rule, "chunk")
recurrent_gated_delta_rule = in_form(gated_delta_rule, "recurrent")
chunk_gated_delta_rule = in_form(gated_delta_rule, "chunk")
