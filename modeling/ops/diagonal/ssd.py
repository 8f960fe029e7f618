# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The state-space scan of Mamba-2 (SSD), under the names and with the arguments of the `mamba_ssm` package.

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t

(Dao and Gu, arXiv 2405.21060, eq. 1 with section 7: A a number per head, B and C shared by the heads of a group.) It
is a diagonal recurrence with q = C, k = B, v = dt x and the log decay dt A. In C++ it runs in the blocks of
delta_rule.cpp, which without their delta rule write beta v with beta = dt, and share keys among heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from lalm.modeling.ops.delta.delta_rule_cpp import as_taken, cpp_delta, delta_kernel
from lalm.modeling.ops.dense.causal_conv1d import causal_conv1d_fn
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal, recurrent_diagonal
from lalm.modeling.ops.dispatch import choose
from lalm.modeling.ops.dtypes import compute_dtype, without_autocast
from lalm.modeling.ops.rules import Call, check_gate, refuse_states, run_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 64,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    *,
    mask: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The scan of Mamba-2 over whole sequences.

    Args:
        x: `[B, T, H, P]`. Like B and C it may be a slice of wider tokens, which the C++ kernel reads as it lies.
        dt: time steps `[B, T, H]`, before bias, softplus and limits.
        A: `[H]`, at most 0.
        B, C: `[B, T, G, N]`; each group serves H / G consecutive heads.
        chunk_size: tokens of a chunk of the plain torch form, a power of two.
        D: `[H]` or `[H, P]`, the weight of x itself in y.
        z: `[B, T, H, P]`; y is multiplied by silu(z).
        dt_bias: `[H]`.
        initial_states: `[B, H, P, N]`, or with `cu_seqlens` one for each document.
        seq_idx: integer `[B, T]`; where it changes a document begins, from an empty state.
        cu_seqlens: integer `[N + 1]`, boundaries of documents packed in one row, each with its own states.
        dt_softplus: take softplus(dt + dt_bias).
        dt_limit: what dt is clamped to then.
        return_final_states: also return the states after the last token `[B, H, P, N]`.
        mask: bool `[B, T]`, False on padding, which leaves the state as it is; y is unspecified there.
        implementation: "recurrent", "chunk", "cpp" or "auto", as for `gla`.

    Returns:
        y `[B, T, H, P]` in the dtype of x, and the final states (float32, or float64 if an input is) if asked for.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    check_shapes(C, B, x, shares_heads=True)
    check_gate("dt", dt, x.shape[:3], "one time step per token and head")
    for name, given in (("A", A), ("dt_bias", dt_bias), ("D", D)):
        if given is not None and given.shape != x.shape[2:3] and not (name == "D" and given.shape == x.shape[2:]):
            raise ValueError(f"{name} must be [H] = {tuple(x.shape[2:3])}, got {tuple(given.shape)}.")
    dtype = compute_dtype(x, dt, B, C)
    with without_autocast(x.device):
        steps = _time_steps(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
        g = steps * A.to(dtype)
    state = None if initial_states is None else initial_states.transpose(2, 3)
    is_given = mask is not None or seq_idx is not None  # cu_seqlens makes its own
    layout = SequenceLayout(mask, None if seq_idx is None else seq_idx.long()) if is_given else None
    call = Call(1.0, state, return_final_states, cu_seqlens, layout, True)
    forms: dict[str, Callable] = {
        "recurrent": partial(_by_keys, recurrent_diagonal),
        "chunk": partial(_by_keys, partial(chunk_diagonal, chunk_size=chunk_size)),
        "cpp": partial(cpp_delta, wants_state=return_final_states, use_delta_rule=False),
    }
    kernel = delta_kernel(B.shape[-1], x.shape[-1], use_delta_rule=False)
    core = forms[choose("mamba_chunk_scan_combined", implementation, C, x, forms, kernel)]
    y, final = run_rule(core, (C, B, x, g, steps), call, (x.shape[2], B.shape[-1], x.shape[-1]), refuse_states)
    y = y if D is None else torch.addcmul(y, x, (D if D.ndim == 2 else D[:, None]).to(y.dtype))
    y = y if z is None else y * F.silu(z)
    return (y, final.transpose(2, 3).contiguous()) if final is not None else y


def _time_steps(
    dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool, limit: tuple[float, float]
) -> torch.Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if softplus else dt
    return dt if tuple(limit) == (0.0, float("inf")) and softplus else dt.clamp(*limit)


def _by_keys(form: Callable, q, k, v, g, beta, scale, state, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """A form of the diagonal recurrence, of what the delta rule's blocks take: q and k by groups, beta for v."""
    q, k = as_taken(q, k, v, None)
    return form(q, k, v.to(beta.dtype) * beta[..., None], g[..., None], scale, state, layout)


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int = 64,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A whole Mamba-2 layer behind its input projection: convolution, scan, gated RMS norm (over each group), output
    projection.

    Args:
        zxbcdt: `[B, T, 2 H P + 2 G N + H]`: gate, x, B, C and dt of each token.
        conv1d_weight, conv1d_bias: `[H P + 2 G N, W]` and `[H P + 2 G N]`.
        D: `[H]`, or `[H, P]` without `headdim`.
        rmsnorm_weight: `[H P]`; None gates without a norm.
        outproj_weight, outproj_bias: of a linear layer; None leaves it out.
        headdim: P.
        ngroups: G.
        norm_before_gate: norm y, then multiply by silu(z), instead of the other way round.

    The other arguments are those of `mamba_chunk_scan_combined`, softplus included; returns `[B, T, *]`, and the final
    states if asked for.
    """
    heads = dt_bias.shape[0]
    size = D.shape[1] if headdim is None and D.ndim == 2 else headdim
    if size is None:
        raise ValueError("headdim must be given unless D is [H, P].")
    z, mixed, dt = _split(zxbcdt, conv1d_weight.shape[0], heads, size, ngroups)
    convolved = causal_conv1d_fn(
        mixed.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation, mask=mask
    )
    assert isinstance(convolved, torch.Tensor)
    keys = (mixed.shape[-1] - heads * size) // 2
    x, B, C = convolved.transpose(1, 2).split([heads * size, keys, keys], -1)
    found = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, size)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
        mask=mask,
    )
    y, final = found if isinstance(found, tuple) else (found, None)
    y = _gate(y.flatten(2), z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    y = y if outproj_weight is None else F.linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return y if final is None else (y, final)


def _split(zxbcdt: torch.Tensor, channels: int, heads: int, size: int, groups: int) -> tuple[torch.Tensor, ...]:
    """The gate, what the convolution reads, and dt, of each token."""
    inner = heads * size
    if zxbcdt.shape[-1] != inner + channels + heads or (channels - inner) % (2 * groups):
        raise ValueError(
            f"zxbcdt must be [B, T, {inner} + {channels} + {heads}], {channels} - {inner} a multiple of 2 ngroups, "
            f"got {tuple(zxbcdt.shape)} and ngroups = {groups}."
        )
    return zxbcdt.split([inner, channels, heads], -1)


def _gate(y, z, weight, eps, groups, norm_first) -> torch.Tensor:
    dtype, gate = y.dtype, F.silu(z.to(compute_dtype(z)))
    if weight is None:
        return (y * gate).to(dtype)
    y = y.to(gate.dtype) if norm_first else y * gate
    y = F.rms_norm(y.unflatten(-1, (groups, -1)), (y.shape[-1] // groups,), eps=eps).flatten(-2) * weight
    return (y * gate if norm_first else y).to(dtype)


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """One token of a state-space layer, of Mamba-2 (dt, A and D expanded from a number per head) or Mamba.

    Args:
        state: `[B, H, P, N]`, moved on in place.
        x, dt, z: `[B, H, P]`.
        A: `[H, P, N]`.
        B, C: `[B, G, N]`; each group serves H / G consecutive heads.
        D, dt_bias: `[H, P]`.

    Returns:
        y `[B, H, P]` in the dtype of x.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    batch, heads, size, keys = state.shape
    groups = B.shape[1]
    for name, given, shape in (
        ("x", x, (batch, heads, size)),
        ("dt", dt, (batch, heads, size)),
        ("A", A, (heads, size, keys)),
        ("B", B, (batch, groups, keys)),
        ("C", C, (batch, groups, keys)),
    ):
        if tuple(given.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for a state [B, H, P, N] = {tuple(state.shape)}, got {tuple(given.shape)}."
            )
    if groups == 0 or heads % groups:
        raise ValueError(f"B must be [B, G, N] with G a divisor of the {heads} heads, got {tuple(B.shape)}.")
    dtype = compute_dtype(state, x)
    if all(y is None or y.stride(-1) == 0 for y in (dt, dt_bias)) and A.stride(1) == A.stride(2) == 0:
        dt, A = dt[..., :1], A[:, :1, :1]  # one number per head
        dt_bias = None if dt_bias is None else dt_bias[:, :1]
    steps = _time_steps(dt.to(dtype), dt_bias, dt_softplus, (-float("inf"), float("inf")))
    by_group = (batch, groups, heads // groups, size)
    written = (steps * x.to(dtype)).reshape(*by_group, 1) * B.to(dtype)[:, :, None, None]
    moved = state.to(dtype) * (steps[..., None] * A.to(dtype)).exp() + written.reshape(state.shape)
    state.copy_(moved)
    y = (moved.reshape(batch, groups, -1, keys) @ C.to(dtype)[..., None]).view(batch, heads, size)
    y = y if D is None else y + x * D
    return (y if z is None else y * F.silu(z)).to(x.dtype)
