# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The delta rule, with one memory per head, or several that leak into each other, by a C++ kernel for the CPU.

`cpp_delta` and `cpp_dual` are the float32 forms of `recurrent_delta` and `recurrent_dual`, in blocks of tokens that
stay in the caches of a core. Time and memory grow linearly; for the backward pass they keep the inputs and a state
every `SEGMENT` tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from lalm.modeling.ops.cpp_kernels import LANES, HeadKernel, boundaries, pointer, refuse_float64
from lalm.modeling.ops.delta.dual_recurrence import run_dual
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.kernels.kernel_op import KernelOp, address, fresh, pack
from lalm.modeling.ops.sequence_layout import SequenceLayout

# Tokens whose states the backward pass recomputes at once, in a second-level cache.
SEGMENT = 256


class DualTensors(NamedTuple):
    """q, k `[B, T, G, K]`, v `[B, T, H, V]`, and with a first axis for the directions, gates `[D, B, T, H, M]`, the
    coupling `[D, B, T, H, M, M]` and starts `[D, B, T]`; state `[B, H, M, K, V]`, skip `[B, T]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor | None
    beta: torch.Tensor
    read: torch.Tensor | None
    coupling: torch.Tensor | None
    state: torch.Tensor | None
    skip: torch.Tensor | None
    starts: torch.Tensor | None

    def direction(self, index: int) -> DualTensors:
        """Those of one pass over the tokens."""
        gates = (None if x is None else x[index] for x in self[3:7])
        return DualTensors._make((*self[:3], *gates, *self[7:9], None if self.starts is None else self.starts[index]))


class DualOptions(NamedTuple):
    scale: float
    eps: float | None  # for q and k made unit vectors
    use_delta_rule: bool
    wants_state: bool


class _DeltaRule(KernelOp):
    """The kernels of delta_rule.cpp, once for every direction."""

    name, Tensors, Options = "delta_rule", DualTensors, DualOptions
    masks, outputs, extras = 2, 2, 1

    def kernel(self, x: DualTensors, options: DualOptions) -> HeadKernel | None:
        return delta_kernel(x.q.shape[-1], x.v.shape[-1], x.beta.shape[-1], options.use_delta_rule)

    def dense(self, x: DualTensors) -> DualTensors:
        return DualTensors(*(as_rows(y) for y in x[:3]), *(None if y is None else y.contiguous() for y in x[3:]))

    def allocate(self, x: DualTensors, options: DualOptions, keeps: bool) -> tuple[torch.Tensor | None, ...]:
        batch, length, heads, value_size = x.v.shape
        sizes = (x.beta.shape[-1], x.q.shape[-1], value_size)
        final = x.v.new_empty(batch, heads, *sizes) if options.wants_state else None
        kept = None  # the states that enter segments
        if keeps:
            kept = x.v.new_empty(x.beta.shape[0], batch, heads, max(0, length - 1) // SEGMENT, *sizes)
        return fresh(x.v, x.skip), final, kept

    def forward(self, library, x: DualTensors, options: DualOptions, made) -> None:
        o, final, kept = made
        for direction in range(x.beta.shape[0]):
            inputs = pack_inputs(self.name, x.direction(direction), options.scale, options.eps, direction)
            to = None if kept is None else pointer(kept[direction])
            library.forward(ctypes.byref(inputs), pointer(o), pointer(final), to)

    def backward(self, library, x: DualTensors, options: DualOptions, saved, gradients) -> tuple:
        (do, d_final), (kept,) = gradients, saved
        found: list[Any] = [key_gradient(y, x.v, x.skip) for y in (x.q, x.k)]
        found += [None if y is None else fresh(y, x.skip) for y in x[2:7]]
        do, d_state = whole_gradients(x.v, x.state, do, d_final)
        for direction in range(x.beta.shape[0]):
            own = x.direction(direction)
            inputs = pack_inputs(self.name, own, options.scale, options.eps, direction)
            gates = (None if y is None else y[direction] for y in found[3:])
            to = pack_gradients(self.name, (*found[:3], *gates), d_state)
            library.backward(ctypes.byref(inputs), pointer(do), pointer(kept[direction]), ctypes.byref(to))
        found[:2] = (of_groups(y, x.q) for y in found[:2])
        return *found, None if x.state is None else d_state, None, None

    def plain(self, x: DualTensors, options: DualOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v, decay, beta, read, coupling, state, skip, starts = x
        q, k = as_taken(q, k, v, options.eps)
        decay, read = (torch.ones_like(beta) if y is None else y for y in (decay, read))
        eye = torch.eye(beta.shape[-1], dtype=q.dtype, device=q.device)
        coupling = eye.expand(*beta.shape, -1) if coupling is None else coupling
        if skip is not None:
            padding = skip[..., None, None]
            q, k, v, beta = (y.masked_fill(padding, 0) for y in (q, k, v, beta))
            decay, coupling = decay.masked_fill(padding, 1), torch.where(padding[..., None], eye, coupling)
        gates, outputs, final = (decay, beta, read, coupling), [], state
        for direction in range(beta.shape[0]):
            tensors: list[Any] = [q * options.scale, k, v, *(y[direction] for y in gates)]
            tensors.append(None if starts is None else starts[direction])
            if direction:
                tensors = [None if y is None else y.flip(1) for y in tensors]
            arguments: Any = (*tensors[:-1], state, tensors[-1], options.use_delta_rule)
            o, final = run_dual(*arguments)
            outputs.append(o.flip(1) if direction else o)
        return sum(outputs[1:], outputs[0]), final


def as_taken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float | None) -> tuple[torch.Tensor, ...]:
    """q and k `[B, T, G, K]` as a rule for `v [B, T, H, V]` takes them: `[B, T, H, K]`, each head for H / G
    consecutive heads of values; with `eps`, times 1 / sqrt(|x|^2 + eps)."""
    if eps is not None:
        dtype = compute_dtype(q, k)
        q, k = (x.to(dtype) * torch.rsqrt(x.to(dtype).square().sum(-1, keepdim=True) + eps) for x in (q, k))
    shared = v.shape[2] // q.shape[2]
    return (q, k) if shared == 1 else tuple(x.repeat_interleave(shared, dim=2) for x in (q, k))


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


def whole_gradients(v, state, do, d_final) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of the outputs as the kernel reads it, and memory for that of a state: it holds that of the final
    state at first, and that of the initial one afterwards. None if neither counts."""
    d_state = None
    if d_final is not None:
        d_state = d_final.clone(memory_format=torch.contiguous_format)
    elif state is not None:
        d_state = torch.zeros_like(state)
    do = torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else do.contiguous()
    return do, d_state


def pack_inputs(kernel: str, x: DualTensors, scale: float, eps: float | None, reverse: int = 0) -> ctypes.Structure:
    """The arguments of the kernels for one pass over the tokens; valid while the tensors live."""
    batch, length, heads = x.v.shape[:3]
    strides = [y.stride() for y in x[:3]]
    return pack(
        kernel,
        "Inputs",
        q=x.q.data_ptr(),
        k=x.k.data_ptr(),
        v=x.v.data_ptr(),
        decay=address(x.decay),
        beta=x.beta.data_ptr(),
        read=address(x.read),
        coupling=address(x.coupling),
        state=address(x.state),
        skip=address(x.skip),
        starts=address(x.starts),
        scale=scale,
        eps=-1.0 if eps is None else eps,
        batch=batch,
        length=length,
        heads=heads,
        key_heads=x.q.shape[2],
        reverse=reverse,
        threads=torch.get_num_threads(),
        parts=parts_of(x.q, x.v),
        row=tuple(stride[0] for stride in strides),
        token=tuple(stride[1] for stride in strides),
    )


def pack_gradients(kernel: str, found: tuple[torch.Tensor | None, ...], d_state: torch.Tensor | None):
    """Where the kernel writes the gradients of q, k, v and the gates, and that of the state."""
    places = {name: address(y) for name, y in zip(DualTensors._fields[:7], found, strict=True)}
    return pack(kernel, "Gradients", state=address(d_state), **places)


@cache
def delta_kernel(key_size: int, value_size: int, memories: int = 1, use_delta_rule: bool = True) -> HeadKernel | None:
    """The kernel for heads of these sizes; None for more than 4 memories."""
    if memories > 4:
        return None
    sizes = {"KEY": key_size, "VALUE": value_size + -value_size % LANES, "M": memories, "SEGMENT": SEGMENT}
    sizes["DELTA"] = int(use_delta_rule)
    return HeadKernel("delta_rule", key_size * value_size * memories, tuple(sizes.items()))


_delta_rule = _DeltaRule()


def cpp_dual(
    tensors: Sequence[torch.Tensor | None],
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
    use_delta_rule: bool = True,
    causal: bool = True,
    wants_state: bool = True,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_dual` in C++ of q, k, v, g, beta, read and the coupling; not causal, in both directions at once.

    Without g nothing decays, without read every memory counts once, without coupling none leaks. Without `wants_state`
    (always so if not causal) there is no final state, nor the work for it. q and k may have fewer heads than v, and
    are made unit vectors if `norm_eps` is given (see `as_taken`).
    """
    q, k, v, g, beta, read, coupling = cast(Any, tensors)
    value_size = v.shape[-1]
    refuse_float64(*tensors, state)
    if missing := -value_size % LANES:  # columns of zeros that make whole registers
        v, state = F.pad(v, (0, missing)), None if state is None else F.pad(state, (0, missing))
    if g is not None and layout.mask is not None:  # the gradient of exp is not the kernel's
        g = g.masked_fill(~layout.mask[..., None, None], 0)
    gates = [None if g is None else g.float().exp(), beta, read, coupling]
    gates = [x if x is None or not causal else x[None] for x in gates]
    taken: Any = [as_rows(x) for x in (q, k, v)]
    taken += [None if x is None else x.float().contiguous() for x in (*gates, state)]
    skip, starts = boundaries(layout)
    if starts is not None:
        ends = torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], dim=1)  # where the way back begins anew
        starts = torch.stack([starts, ends])
    options = DualOptions(scale, norm_eps, use_delta_rule, wants_state and causal)
    o, final = _delta_rule(DualTensors._make((*taken, skip, starts)), options)
    if missing:
        o, final = o[..., :value_size], None if final is None else final[..., :value_size]
    return o, final if options.wants_state else None


def cpp_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_delta` in C++: `cpp_dual` with one memory per head, and the same `options`."""
    g, state = None if g is None else g[..., None], None if state is None else state[:, :, None]
    o, final = cpp_dual((q, k, v, g, beta[..., None], None, None), scale, state, layout, **options)
    return o, None if final is None else final[:, :, 0]
