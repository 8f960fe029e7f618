# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The dual-state delta rule of LAM: coupled memories with decays of their own, step by step and in chunks.

Per head M memories S_a (two: fast and slow), each corrected towards v by the delta rule, and leaking into each other:
    S_a  = exp(g_a) Z_a        u_a = beta_a (v - S_a^T k)        S_a <- S_a + k u_a^T        Z_a = sum_b C_ab S_b
    o    = scale sum_a r_a Z_a^T q
Z is the state from token to token. With C = I these are M gated delta rules (arXiv 2412.06464, eq. 10), with M = 1 and
g = 0 the delta rule (arXiv 2406.06484). If |k| = 1, beta in [0, 1] and the rows of C >= 0 sum to 1 at most, then
    max_a |Z_a| <= max_t |v_t| * min(T, 1 / (1 - max exp(g)))                                            (the bound)
since (I - beta k k^T) and C only ever shorten the longest memory, and one write adds at most |v|.

The chunk form is derived in dual_chunks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lalm.modeling.ops.delta.delta_rule_cpp import cpp_dual, delta_kernel
from lalm.modeling.ops.delta.dual_chunks import chunk_dual
from lalm.modeling.ops.delta.dual_recurrence import DualInputs, recurrent_dual
from lalm.modeling.ops.dispatch import choose, in_form
from lalm.modeling.ops.rules import Call, both_ways, layout_both_ways, run_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_cu_seqlens, check_shapes, segments_of


def _with_leak(core: Callable, use_delta_rule: bool, *arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The core of a rule (see rules.py) from one that takes `DualInputs`: the leak stands for the coupling, and gates
    let padding neither write, decay nor leak."""
    q, k, v, g, beta, read, coupling, scale, state, layout = arguments
    leak = g.new_zeros(*g.shape, g.shape[-1])
    if coupling is not None:
        leak = coupling - torch.eye(g.shape[-1], dtype=coupling.dtype, device=coupling.device)
    if layout.mask is not None:
        padding = ~layout.mask[:, :, None, None]
        q, k, v, g, beta, read = (x.masked_fill(padding, 0) for x in (q, k, v, g, beta, read))
        leak = leak.masked_fill(padding[..., None], 0)
    o, state = core(DualInputs(q, k, v, g, beta, read, leak), scale, state, layout, use_delta_rule)
    return layout.zero_padding(o), state


def _both_ways(
    core: Callable, x: DualInputs, scale: float, state: None, layout: SequenceLayout, use_delta_rule: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of what a token reads from its left and from its right; each side has its own gates `[2, B, T, ...]` and
    its own write included."""
    batch = x.q.shape[0]
    doubled = DualInputs._make([*(both_ways(y) for y in x[:3]), *(torch.cat([y[0], y[1].flip(1)]) for y in x[3:])])
    o, state = core(doubled, scale, None, layout_both_ways(layout), use_delta_rule)
    return o[:batch] + o[batch:].flip(1), state


def _cpp_core(*arguments, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`cpp_dual` as a core of a rule."""
    *tensors, scale, state, layout = arguments
    return cpp_dual(tensors, scale, state, layout, **options)


def _triton_dual(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_dual`, whose module needs Triton."""
    from lalm.modeling.ops.delta.dual_state_triton import triton_dual

    return triton_dual(*arguments)


def dual_state_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    read: torch.Tensor,
    coupling: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    use_delta_rule: bool = True,
    implementation: str = "auto",
    chunk_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The dual-state delta rule.

    Args:
        q, k, v: `[B, T, H, K]` and `[B, T, H, V]`; k of unit length, or the states may grow without bound.
        g: log decay of every memory `[B, T, H, M]`, at most 0, natural log. Any size is safe.
        beta: write strength of every memory `[B, T, H, M]`, in [0, 1].
        read: weight of every memory in the output `[B, T, H, M]`, of either sign.
        coupling: C `[B, T, H, M, M]`, what memory a takes from memory b after the write; None for no leak. The states
            stay bounded if its entries are not negative and no row sums to more than 1.
        scale: factor on q; None for `K ** -0.5`.
        initial_state: `[N, H, M, K, V]`; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, boundaries of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document boundaries of a batch; its rows have one state each (N = B).
        causal: False adds what each token reads from a second pass over the reversed document, without states. g,
            beta, read and coupling then have a first axis of 2: those of the first and of the second pass, both in
            the order of the sequence.
        use_delta_rule: False writes beta_a v instead of beta_a times the error v - S_a^T k.
        implementation: "recurrent", "chunk", "cpp" or "auto", as for `gla`, or "triton": Triton kernels on a GPU, for
            1, 2 or 4 memories, not in float64.
        chunk_size: tokens of a chunk; the backward pass keeps the inputs and a few states and recomputes the rest.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[N, H, M, K, V]` or None. States and sums are float32,
        or float64 if an input is.

    Raises:
        ValueError: a shape does not fit, or the implementation does not exist for this input.
    """
    check_shapes(q, k, v, layout)
    _check_gates(q, (g, beta, read, coupling), causal)
    keys, values, memories = q.shape[-1], v.shape[-1], g.shape[-1]
    forms: dict[str, Callable] = {
        "recurrent": recurrent_dual,
        "chunk": partial(chunk_dual, chunk_size=chunk_size),
        "cpp": _cpp_core,
        "triton": _triton_dual,
    }
    kernel = delta_kernel(keys, values, memories, use_delta_rule)
    form = choose("dual_state_delta", implementation, q, v, forms, kernel)
    if form == "cpp":  # which passes over padding and reads both ways by itself
        options = {"causal": causal, "wants_state": output_final_state}
        core = both_directions = partial(_cpp_core, use_delta_rule=use_delta_rule, **options)
    else:
        core = partial(_with_leak, forms[form], use_delta_rule)
        both_directions = partial(_with_leak, partial(_both_ways, forms[form]), use_delta_rule)
    if cu_seqlens is not None and layout is None and not causal:  # gates have an axis more, but nothing has a state
        layout, cu_seqlens = _documents(cu_seqlens, q), None
    call = Call(keys**-0.5 if scale is None else scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    shape = (q.shape[2], memories, keys, values)
    return run_rule(core, (q, k, v, g, beta, read, coupling), call, shape, lambda _: both_directions)


def _documents(cu_seqlens: torch.Tensor, q: torch.Tensor) -> SequenceLayout:
    check_cu_seqlens(cu_seqlens, *q.shape[:2])
    return SequenceLayout(segments=segments_of(cu_seqlens.to(q.device), q.shape[1]))


def _check_gates(q: torch.Tensor, gates: tuple[torch.Tensor | None, ...], causal: bool) -> None:
    """Raise ValueError unless g, beta, read and coupling have a value per token, head and (pair of) memories."""
    assert gates[0] is not None
    memories, shape = gates[0].shape[-1], tuple(q.shape[:3]) if causal else (2, *q.shape[:3])
    for name, x, size in zip(("g", "beta", "read", "coupling"), gates, (1, 1, 1, 2), strict=True):
        if x is not None and x.shape != (*shape, *[memories] * size):
            axes = ("" if causal else "2, ") + "B, T, H" + ", M" * size
            raise ValueError(f"{name} must be [{axes}] = {(*shape, *[memories] * size)}, got {tuple(x.shape)}.")


recurrent_dual_state_delta = in_form(dual_state_delta, "recurrent")
chunk_dual_state_delta = in_form(dual_state_delta, "chunk")
