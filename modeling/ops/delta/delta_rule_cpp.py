# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The delta rule, with one memory per head, or several that leak into each other, by a C++ kernel for the CPU.

`cpp_delta` and `cpp_dual` are the float32 forms of `recurrent_delta` and `recurrent_dual`, in blocks of tokens that
stay in the caches of a core. Time and memory grow linearly; for the backward pass they keep the inputs and a state
every `SEGMENT` tokens.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import differentiable_by
from lalm.modeling.ops.cpp_kernels import LANES, HeadKernel, apply_function, boundaries, pointer, require_kernel
from lalm.modeling.ops.delta.dual_recurrence import run_dual
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout

# Tokens whose states the backward pass recomputes at once, in a second-level cache.
SEGMENT = 256
_GATES = ("decay", "beta", "read", "coupling")


_Strides = ctypes.c_int64 * 3


class _Inputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", *_GATES, "state", "skip", "starts")),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "key_heads", "reverse", "threads", "parts")),
        *((name, _Strides) for name in ("row", "token")),
    ]


class Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", *_GATES, "state")]


def _plain(ctx, q, k, v, decay, beta, read, coupling, state, skip, starts, _) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = as_taken(q, k, v, ctx.eps)
    decay, read = (torch.ones_like(beta) if x is None else x for x in (decay, read))
    eye = torch.eye(beta.shape[-1], dtype=q.dtype, device=q.device)
    coupling = eye.expand(*beta.shape, -1) if coupling is None else coupling
    if skip is not None:
        padding = skip[..., None, None]
        q, k, v, beta = (x.masked_fill(padding, 0) for x in (q, k, v, beta))
        decay, coupling = decay.masked_fill(padding, 1), torch.where(padding[..., None], eye, coupling)
    gates, outputs, final = (decay, beta, read, coupling), [], state
    for direction in range(beta.shape[0]):
        tensors = [q * ctx.scale, k, v, *(x[direction] for x in gates)]
        tensors.append(None if starts is None else starts[direction])
        if direction:
            tensors = [None if x is None else x.flip(1) for x in tensors]
        arguments: Any = (*tensors[:-1], state, tensors[-1], ctx.delta)
        o, final = run_dual(*arguments)
        outputs.append(o.flip(1) if direction else o)
    return sum(outputs[1:], outputs[0]), final


class _CppDeltaRule(torch.autograd.Function):
    """The kernels of delta_rule.cpp, once for every direction; gates and starts have a first axis for it."""

    @staticmethod
    def forward(ctx, kernel, scale, eps, delta, wants_state, *tensors):
        q, _, v, _, beta, *_, skip, _ = tensors
        ctx.kernel, ctx.scale, ctx.eps, ctx.delta = kernel, scale, eps, delta
        ctx.set_materialize_grads(False)
        o = fresh(v, skip)
        batch, length, heads, value_size = v.shape
        sizes = (beta.shape[-1], q.shape[-1], value_size)
        final = v.new_empty(batch, heads, *sizes) if wants_state else None
        kept = None  # the states that enter segments
        if any(ctx.needs_input_grad):
            kept = v.new_empty(beta.shape[0], batch, heads, max(0, length - 1) // SEGMENT, *sizes)
        for direction, inputs in enumerate(_directions(scale, eps, *tensors)):
            to = None if kept is None else pointer(kept[direction])
            kernel.forward(ctypes.byref(inputs), pointer(o), pointer(final), to)
        ctx.save_for_backward(*tensors, kept)
        return o, final

    @staticmethod
    @differentiable_by(_plain, constants=5)
    def backward(ctx, do, d_final):
        *saved, kept = ctx.saved_tensors
        v, state, skip = saved[2], saved[7], saved[8]
        found: list[torch.Tensor | None] = [key_gradient(x, v, skip) for x in saved[:2]]
        found += [None if x is None else fresh(x, skip) for x in saved[2:7]]
        d_state = None  # in, that of the final state; out, that of the initial one
        if d_final is not None:
            d_state = d_final.clone(memory_format=torch.contiguous_format)
        elif state is not None:
            d_state = torch.zeros_like(state)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        for direction, inputs in enumerate(_directions(ctx.scale, ctx.eps, *saved)):
            gates = (None if x is None else x[direction] for x in found[3:])
            gradients = Gradients(*(pointer(x) for x in (*found[:3], *gates, d_state)))
            ctx.kernel.backward(ctypes.byref(inputs), pointer(do), pointer(kept[direction]), ctypes.byref(gradients))
        found[:2] = (of_groups(x, saved[0]) for x in found[:2] if x is not None)
        return None, None, None, None, None, *found, None if state is None else d_state, None, None


def as_taken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float | None) -> tuple[torch.Tensor, ...]:
    """q and k `[B, T, G, K]` as a rule for `v [B, T, H, V]` takes them: `[B, T, H, K]`, each head for H / G
    consecutive heads of values; with `eps`, times 1 / sqrt(|x|^2 + eps)."""
    if eps is not None:
        dtype = compute_dtype(q, k)
        q, k = (x.to(dtype) * torch.rsqrt(x.to(dtype).square().sum(-1, keepdim=True) + eps) for x in (q, k))
    shared = v.shape[2] // q.shape[2]
    return (q, k) if shared == 1 else tuple(x.repeat_interleave(shared, dim=2) for x in (q, k))


def fresh(like: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Memory for what a kernel writes; it leaves out padded tokens."""
    return (torch.empty_like if skip is None else torch.zeros_like)(like, memory_format=torch.contiguous_format)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x [B, T, H, D]` in float32 so that a token's heads lie together; a slice of wider tokens is taken as it is."""
    x = x.float()
    together = x.stride(-1) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if together else x.contiguous()


def parts_of(q: torch.Tensor, v: torch.Tensor) -> int:
    """How many heads the gradients of `q [B, T, G, K]` have, each of them one task's: G, or more of them if there are
    fewer than threads."""
    batch, _, heads = v.shape[:3]
    wanted, groups = torch.get_num_threads(), q.shape[2]
    enough = (n for n in range(groups, heads, groups) if heads % n == 0 and batch * n >= wanted)
    return next(enough, heads) if groups < heads else heads


def key_gradient(q: torch.Tensor, v: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Memory for the gradient of q, or k, by parts."""
    return fresh(q.new_empty(1).expand(*q.shape[:2], parts_of(q, v), q.shape[3]), skip)


def of_groups(gradient: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """That by parts -> that of q."""
    groups = q.shape[2]
    return gradient if gradient.shape[2] == groups else gradient.unflatten(2, (groups, -1)).sum(3)


def arguments(tensors: tuple[Any, ...], scale: float, eps: float | None, reverse: int = 0) -> _Inputs:
    """The arguments of the kernels: q, k, v, four gates, the state, skip and starts; valid while the tensors live."""
    q, k, v = tensors[:3]
    sizes = (*v.shape[:3], q.shape[2], reverse, torch.get_num_threads(), parts_of(q, v))
    strides = (_Strides(*(x.stride(axis) for x in (q, k, v))) for axis in (0, 1))
    return _Inputs(*(pointer(x) for x in tensors), scale, -1.0 if eps is None else eps, *sizes, *strides)


def _directions(scale, eps, q, k, v, decay, beta, read, coupling, state, skip, starts):
    """The arguments for each pass over the tokens."""
    for direction in range(beta.shape[0]):
        gates = (None if x is None else x[direction] for x in (decay, beta, read, coupling))
        tensors = (q, k, v, *gates, state, skip, None if starts is None else starts[direction])
        yield arguments(tensors, scale, eps, direction)


@cache
def delta_kernel(key_size: int, value_size: int, memories: int = 1, use_delta_rule: bool = True) -> HeadKernel | None:
    """The kernel for heads of these sizes; None for more than 4 memories."""
    if memories > 4:
        return None
    sizes = {"KEY": key_size, "VALUE": value_size + -value_size % LANES, "M": memories, "SEGMENT": SEGMENT}
    sizes["DELTA"] = int(use_delta_rule)
    return HeadKernel("delta_rule", key_size * value_size * memories, tuple(sizes.items()))


def cpp_dual(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    read: torch.Tensor | None,
    coupling: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
    use_delta_rule: bool = True,
    causal: bool = True,
    wants_state: bool = True,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_dual` in C++, with the coupling for the leak; not causal, in both directions at once.

    Without g nothing decays, without read every memory counts once, without coupling none leaks. Without `wants_state`
    (always so if not causal) there is no final state, nor the work for it. q and k may have fewer heads than v, and
    are made unit vectors if `norm_eps` is given (see `as_taken`).
    """
    value_size = v.shape[-1]
    heads = delta_kernel(q.shape[-1], value_size, beta.shape[-1], use_delta_rule)
    kernel = require_kernel(heads, q, k, v, g, beta, read, coupling, state)
    if missing := -value_size % LANES:  # columns of zeros that make whole registers
        v, state = F.pad(v, (0, missing)), None if state is None else F.pad(state, (0, missing))
    if g is not None and layout.mask is not None:  # the gradient of exp is not the kernel's
        g = g.masked_fill(~layout.mask[..., None, None], 0)
    gates = [None if g is None else g.float().exp(), beta, read, coupling]
    gates = [x if x is None or not causal else x[None] for x in gates]
    tensors: list[torch.Tensor | None] = [as_rows(x) for x in (q, k, v)]
    tensors += [None if x is None else x.float().contiguous() for x in (*gates, state)]
    skip, starts = boundaries(layout)
    if starts is not None:
        ends = torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], dim=1)  # where the way back begins anew
        starts = torch.stack([starts, ends])
    options = (scale, norm_eps, use_delta_rule, wants_state and causal)
    o, final = apply_function(_CppDeltaRule, kernel, *options, *tensors, skip, starts)
    if missing:
        o, final = o[..., :value_size], None if final is None else final[..., :value_size]
    return o, final


def cpp_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
    wants_state: bool = True,
    norm_eps: float | None = None,
    use_delta_rule: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_delta` in C++, as `cpp_dual` with one memory per head."""
    g, state = None if g is None else g[..., None], None if state is None else state[:, :, None]
    arguments: Any = (q, k, v, g, beta[..., None], None, None, scale, state, layout)
    options: Any = {"use_delta_rule": use_delta_rule, "wants_state": wants_state, "norm_eps": norm_eps}
    o, final = cpp_dual(*arguments, **options)
    return o, None if final is None else final[:, :, 0]
