# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The dual-state delta rule of LAM: coupled memories with decays of their own, step by step and in chunks.

Per head M memories S_a (two: fast and slow), each corrected towards v by the delta rule, and leaking into each other:
    S_a  = exp(g_a) Z_a        u_a = beta_a (v - S_a^T k)        S_a <- S_a + k u_a^T        Z_a = sum_b C_ab S_b
    o    = scale sum_a r_a Z_a^T q
Z is the state from token to token. With C = I these are M gated delta rules (arXiv 2412.06464, eq. 10), with M = 1 and
g = 0 the delta rule (arXiv 2406.06484). If |k| = 1, beta in [0, 1] and the rows of C >= 0 sum to 1 at most, then
    max_a |Z_a| <= max_t |v_t| * min(T, 1 / (1 - max exp(g)))                                            (the bound)
since (I - beta k k^T) and C only ever shorten the longest memory, and one write adds at most |v|.

Chunk form. Let B_i = diag(exp(g_i)) C_{i-1} (C_{-1} = I as the chunk begins), N_ij = B_i ... B_{j+1}, N_ii = I and
P_i = B_i ... B_0. The memories before the leak are S_i = P_i Z_in + sum_{j<=i} N_ij u_j (x) k_j, hence
    u_i + beta_i sum_{j<i} (k_i . k_j) N_ij u_j = beta_i (v_i - P_i Z_in^T k_i)      one triangular system of M C rows
    o_i = rho_i^T S_i^T q_i with rho_i = C_i^T r_i                                   Z_out = C_last S_last
so, as for the delta rule, o = inside + reads Z_in and Z_out = passes Z_in + writes. The N_ij are products of small
matrices, built by doubling; nothing is divided, so that any decay is safe. A new document is B_i = 0.

Shape suffixes: B batch, T time, H heads, M memories, K key size, V value size, N chunks, C tokens of a chunk. Rows and
columns of size `C M` run over tokens and, inside a token, over memories.
"""

from __future__ import annotations

from functools import partial, reduce

import torch

from lalm.modeling.ops.autograd import differentiable_by, has_open_length, is_transformed
from lalm.modeling.ops.bidirectional import both_ways, layout_both_ways, refuse_states
from lalm.modeling.ops.chunks import from_chunks, scan, to_chunks
from lalm.modeling.ops.delta.delta_rule_cpp import cpp_dual
from lalm.modeling.ops.delta.dual_recurrence import recurrent_dual
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.sequence_layout import (
    SequenceLayout,
    check_cu_seqlens,
    check_shapes,
    check_state,
    document_by_document,
    must_part,
    per_document,
    segments_of,
)

# Numbers of one set of pairwise matrices `[B, H, N, C M, C M]` to work on at once: about what a core's cache holds.
_PAIRS_AT_ONCE = 1 << 19


def chunk_dual(
    q, k, v, g, beta, read, leak, scale, state, layout, use_delta_rule=True, chunk_size=32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` in matrix products over chunks, with a backward pass that recomputes."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if is_transformed():
        return recurrent_dual(q, k, v, g, beta, read, leak, scale, state, layout, use_delta_rule)
    if must_part(layout, q, k, v, g, beta, read, leak):

        def alone(q, k, v, g, beta, read, leak, state, layout):
            return chunk_dual(q, k, v, g, beta, read, leak, scale, state, layout, use_delta_rule, chunk_size)

        return document_by_document(alone, (q, k, v, g, beta, read, leak), state, layout)
    length, batch, heads, memories = q.shape[1], q.shape[0], q.shape[2], g.shape[-1]
    chunk_size = chunk_size if has_open_length() else min(chunk_size, -(-length // 8) * 8)
    dtype = compute_dtype(q, k, v, g, beta, read, leak)
    inputs = [to_chunks(x, chunk_size, dtype) for x in (q, k, v, g, beta, read, leak.flatten(-2))]
    inputs[0] = inputs[0] * scale
    starts = layout.starts()
    if starts is not None:
        starts = to_chunks(starts[..., None, None], chunk_size, torch.bool)
    pairs = batch * heads * (chunk_size * memories) ** 2
    one = has_open_length() or pairs * inputs[0].shape[2] <= _PAIRS_AT_ONCE or inputs[0].shape[2] == 1 or not pairs
    run = _one_slab if one else _Slabs.apply
    if state is not None:
        state = state.to(dtype).flatten(2, 3)
    o, state = run(0 if one else max(1, _PAIRS_AT_ONCE // pairs), use_delta_rule, starts, state, *inputs)
    return from_chunks(o, length), state.unflatten(2, (memories, -1))


def _one_slab(size, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return _advance(*arguments)


def _by_slabs(size, delta, starts, state, *inputs) -> tuple[torch.Tensor, torch.Tensor, list]:
    """`_advance` over slabs of `size` chunks; also returns the states that enter them."""
    entering, outputs = [], []
    for n in range(0, inputs[0].shape[2], size):
        entering.append(state)
        o, state = _advance(delta, _cut(starts, n, size), state, *(_cut(x, n, size) for x in inputs))
        outputs.append(o)
    return torch.cat(outputs, dim=2), state, entering


def _plain(ctx, starts, state, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    return _by_slabs(ctx.size, ctx.delta, starts, state, *rest[:7])[:2]


class _Slabs(torch.autograd.Function):
    """`_by_slabs`, of which only the inputs and the entering states are kept."""

    @staticmethod
    def forward(ctx, size, delta, starts, state, *inputs):
        ctx.size, ctx.delta = size, delta
        o, final, entering = _by_slabs(size, delta, starts, state, *inputs)
        ctx.save_for_backward(starts, state, *inputs, *entering[1:])
        return o, final

    @staticmethod
    @differentiable_by(_plain, constants=2)
    def backward(ctx, do, d_state):
        starts, state, *rest = ctx.saved_tensors
        inputs, entering = rest[:7], [state, *rest[7:]]
        found = [
            torch.empty_like(x) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad[4:], strict=True)
        ]
        for index in reversed(range(len(entering))):
            n = index * ctx.size
            with torch.enable_grad():
                pieces = [
                    _cut(x, n, ctx.size).detach().requires_grad_(needed is not None)
                    for x, needed in zip(inputs, found, strict=True)
                ]
                state = entering[index]
                state = None if state is None else state.detach().requires_grad_()
                o, final = _advance(ctx.delta, _cut(starts, n, ctx.size), state, *pieces)
                wanted = [x for x in (*pieces, state) if x is not None and x.requires_grad]
            ends = [(y, dy) for y, dy in ((o, _cut(do, n, ctx.size)), (final, d_state)) if y.requires_grad]
            outputs, cotangents = zip(*ends, strict=True)
            gradients = iter(torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True))
            for x in found:
                if x is not None:
                    _cut(x, n, ctx.size).copy_(next(gradients))
            d_state = None if state is None else next(gradients)
        return None, None, None, d_state, *found


def _cut(x: torch.Tensor | None, start: int, size: int):
    """Chunks `start .. start + size` of `[B, H, N, ...]`."""
    return None if x is None else x[:, :, start : start + size]


def _advance(delta, starts, state, q, k, v, g, beta, read, leak) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks `[B, H, N, C, *]` from the state `[B, H, M K, V]` (None for zeros) -> o `[B, H, N, C, V]`, next state."""
    memories, chunks, value_size = g.shape[-1], q.shape[2], v.shape[-1]
    coupling = leak.unflatten(-1, (memories, memories)) + torch.eye(memories, dtype=leak.dtype, device=leak.device)
    before = torch.cat([torch.zeros_like(leak[..., :1, :]), leak[..., :-1, :]], dim=-2).unflatten(-1, (memories, -1))
    steps = g.exp()[..., None] * (before + torch.eye(memories, dtype=leak.dtype, device=leak.device))
    if starts is not None:
        steps = steps.masked_fill(starts[..., None], 0)
    between, since = _products(steps)
    rho = torch.einsum("...ca,...cab->...cb", read, coupling)

    key = k.repeat_interleave(memories, dim=-2)  # [..., C M, K]
    strong = key * beta.flatten(-2)[..., None]
    system = (strong @ key.transpose(-1, -2)) * between  # its diagonal is taken for 1
    scores = _weigh(rho, between) * (q @ key.transpose(-1, -2))  # [..., C, C M]
    right = v.repeat_interleave(memories, dim=-2) * beta.flatten(-2)[..., None]
    through = has_open_length() or chunks > 1 or state is not None  # whether an entering state matters
    if through:
        right = torch.cat([right, _times_each(strong * delta, since)], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True) if delta else right
    inside = scores @ solved
    last = coupling[..., -1, :, :]
    writing = _times_each(key, (last @ between[..., -memories:, :]).transpose(-1, -2))  # [..., C M, M K]
    writes = writing.transpose(-1, -2) @ solved
    if not through:
        return inside, writes[:, :, 0]
    reads = _times_each(q, _weigh(rho, since)) - inside[..., value_size:]
    kept = (last @ since[..., -memories:, :])[..., :, None, :, None] * torch.eye(
        k.shape[-1], dtype=k.dtype, device=k.device
    )[:, None, :]
    passes = kept.flatten(-2).flatten(-3, -2) - writes[..., value_size:]
    inside, writes = inside[..., :value_size], writes[..., :value_size]
    if state is None:
        state = torch.zeros_like(writes[:, :, 0])
    if has_open_length():
        before, state = scan(lambda state, passed, written: written + passed @ state, [passes, writes], state)
        return inside + reads @ before, state
    entering = []
    for n in range(chunks):
        entering.append(state)
        state = writes[:, :, n] + passes[:, :, n] @ state
    return inside + reads @ torch.stack(entering, dim=2), state


def _products(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B `[..., C, M, M]` -> N `[..., C M, C M]` (lower, with ones on the diagonal) and P `[..., C M, M]`."""
    eye = torch.eye(steps.shape[-1], dtype=steps.dtype, device=steps.device)
    # Blocks of equal size along a new axis; they start as single tokens.
    between, since = eye.expand_as(steps), steps
    while between.shape[-3] % 2 == 0:
        between, since = _join(
            (between[..., 0::2, :, :], since[..., 0::2, :, :]), (between[..., 1::2, :, :], since[..., 1::2, :, :])
        )
    blocks = zip(between.unbind(-3), since.unbind(-3), strict=True)
    return reduce(_join, blocks)


def _join(left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]):
    """N and P of two neighbouring stretches of tokens -> those of both."""
    (left_between, left_since), (right_between, right_since) = left, right
    memories = left_since.shape[-1]
    cross = right_since @ left_between[..., -memories:, :]
    since = torch.cat([left_since, right_since @ left_since[..., -memories:, :]], dim=-2)
    upper = torch.cat([left_between, left_between.new_zeros(*left_between.shape[:-1], right_between.shape[-1])], -1)
    return torch.cat([upper, torch.cat([cross, right_between], dim=-1)], dim=-2), since


def _weigh(rho: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum over the memories of a token: weights `[..., C, M]`, rows `[..., C M, X]` -> `[..., C, X]`."""
    rows = rows.unflatten(-2, rho.shape[-2:])
    terms = (rho[..., a, None] * rows[..., a, :] for a in range(rho.shape[-1]))
    return reduce(torch.add, terms)


def _times_each(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """`[..., R, K]` and `[..., R, M]` -> `[..., R, M K]`."""
    return (factors[..., None] * x[..., None, :]).flatten(-2)


def _inert_padding(core, q, k, v, g, beta, read, coupling, scale, state, layout, use_delta_rule):
    """`core` with the leak for the coupling, and with gates that let padding neither write, decay nor leak."""
    leak = g.new_zeros(*g.shape, g.shape[-1])
    if coupling is not None:
        leak = coupling - torch.eye(g.shape[-1], dtype=coupling.dtype, device=coupling.device)
    if layout.mask is not None:
        padding = ~layout.mask[:, :, None, None]
        q, k, v, g, beta, read = (x.masked_fill(padding, 0) for x in (q, k, v, g, beta, read))
        leak = leak.masked_fill(padding[..., None], 0)
    o, state = core(q, k, v, g, beta, read, leak, scale, state, layout, use_delta_rule)
    return layout.zero_padding(o), state


def _both_ways(
    core, q, k, v, g, beta, read, leak, scale, state, layout, use_delta_rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of what a token reads from its left and from its right; each side has its own gates `[2, B, T, ...]` and
    its own write included."""
    batch = q.shape[0]
    gates = (torch.cat([x[0], x[1].flip(1)]) for x in (g, beta, read, leak))
    o, state = core(*(both_ways(x) for x in (q, k, v)), *gates, scale, None, layout_both_ways(layout), use_delta_rule)
    return o[:batch] + o[batch:].flip(1), state


def _dual_state(
    core, q, k, v, g, beta, read, coupling, scale, initial_state, output_final_state, cu_seqlens, layout, causal, delta
):
    check_shapes(q, k, v, layout)
    memories, shape = g.shape[-1], tuple(q.shape[:3]) if causal else (2, *q.shape[:3])
    for name, x, size in (("g", g, 1), ("beta", beta, 1), ("read", read, 1), ("coupling", coupling, 2)):
        if x is not None and x.shape != (*shape, *[memories] * size):
            axes = ("" if causal else "2, ") + "B, T, H" + ", M" * size
            raise ValueError(f"{name} must be [{axes}] = {(*shape, *[memories] * size)}, got {tuple(x.shape)}.")
    if cu_seqlens is not None:
        if layout is not None:
            raise ValueError("Pass cu_seqlens or layout, not both: a layout's segments already hold the borders.")
        if not causal:
            refuse_states(initial_state, output_final_state)
            check_cu_seqlens(cu_seqlens, *q.shape[:2])
            layout = SequenceLayout(segments=segments_of(cu_seqlens.to(q.device), q.shape[1]))
        else:

            def one_batch(q, k, v, g, beta, read, coupling, initial_state=None, output_final_state=False, layout=None):
                rest = (scale, initial_state, output_final_state, None, layout, causal, delta)
                return _dual_state(core, q, k, v, g, beta, read, coupling, *rest)

            return per_document(
                one_batch, (q, k, v, g, beta, read, coupling), cu_seqlens, initial_state, output_final_state
            )
    if not causal:
        refuse_states(initial_state, output_final_state)
    if core is cpp_dual:
        core = partial(cpp_dual, causal=causal, wants_state=output_final_state)
    else:
        core = partial(_inert_padding, core if causal else partial(_both_ways, core))
    check_state(initial_state, (q.shape[0], q.shape[2], memories, q.shape[3], v.shape[3]))
    layout = layout or SequenceLayout()
    with without_autocast(q.device):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o, state = core(q, k, v, g, beta, read, coupling, scale, initial_state, layout, delta)
        return o.to(v.dtype), state if output_final_state else None


def recurrent_dual_state_delta(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The dual-state delta rule one token at a time: the definition, and the way to decode.

    Args:
        q, k: `[B, T, H, K]`; k of unit length, or the states may grow without bound.
        v: `[B, T, H, V]`.
        g: log decay of every memory `[B, T, H, M]`, at most 0, natural log. Any size is safe.
        beta: write strength of every memory `[B, T, H, M]`, in [0, 1].
        read: weight of every memory in the output `[B, T, H, M]`, of either sign.
        coupling: C `[B, T, H, M, M]`, what memory a takes from memory b after the write; None for no leak. The states
            stay bounded if its entries are not negative and no row sums to more than 1.
        scale: factor on q; None for `K ** -0.5`.
        initial_state: `[N, H, M, K, V]`; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, borders of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document borders of a batch; its rows have one state each (N = B).
        causal: False adds what each token reads from a second pass over the reversed document, without states. g,
            beta, read and coupling then have a first axis of 2: those of the first and of the second pass, both in
            the order of the text.
        use_delta_rule: False writes beta_a v instead of what v has over what the memory holds already.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[N, H, M, K, V]` or None. States and sums are float32,
        or float64 if an input is.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    rest = (scale, initial_state, output_final_state, cu_seqlens, layout, causal, use_delta_rule)
    return _dual_state(recurrent_dual, q, k, v, g, beta, read, coupling, *rest)


def chunk_dual_state_delta(
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
    chunk_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_dual_state_delta` by matrix products over chunks of `chunk_size` tokens.

    Same arguments, same results up to rounding. A text of one chunk is one triangular solve; in a longer one the
    backward pass keeps the inputs and a few states and recomputes the rest.
    """
    core = partial(chunk_dual, chunk_size=chunk_size)
    rest = (scale, initial_state, output_final_state, cu_seqlens, layout, causal, use_delta_rule)
    return _dual_state(core, q, k, v, g, beta, read, coupling, *rest)


def cpp_dual_state_delta(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_dual_state_delta` by the C++ kernel (delta_rule_cpp.py); same arguments, float32 on a CPU."""
    rest = (scale, initial_state, output_final_state, cu_seqlens, layout, causal, use_delta_rule)
    return _dual_state(cpp_dual, q, k, v, g, beta, read, coupling, *rest)


def triton_dual_state_delta(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_dual_state_delta` by Triton kernels on a GPU, which need Triton; not float64, 1, 2 or 4 memories."""
    from lalm.modeling.ops.delta.dual_state_triton import triton_dual

    rest = (scale, initial_state, output_final_state, cu_seqlens, layout, causal, use_delta_rule)
    return _dual_state(triton_dual, q, k, v, g, beta, read, coupling, *rest)
