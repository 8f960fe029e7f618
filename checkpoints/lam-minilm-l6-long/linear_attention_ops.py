# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
# Generated when a model is saved, from the package lalm, which is where to change it.
from __future__ import annotations


# ---- lalm.modeling.ops.dtypes ----
"""The dtypes of the arithmetic: float32, or float64 for float64 inputs, also under autocast."""


from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: the type of all arithmetic, states and accumulated gradients."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products have the dtypes of their factors; it costs nothing where autocast is off."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


# ---- lalm.modeling.ops.autograd ----
"""What autograd, torch.func, tracing and torch.export ask of an op, and gradients that can be differentiated again.

A backward pass written by hand is fast because autograd does not record it, so its result would count as a constant.
(`torch.autograd.grad` of some inputs walks past the error that torch's own `once_differentiable` raises.)
Where a gradient is to be differentiated again, autograd makes it from the plain form of the function, however slow.
"""


from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad



def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work. Both look into every operation, so
    that neither a kernel nor a backward pass written by hand serves them: the plain forms run."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_looked_into() -> bool:
    """Whether a transform or a tracer is at work, to which a kernel is closed."""
    return is_transformed() or torch.jit.is_tracing()


def has_open_length() -> bool:
    """Whether a program is being exported that is to serve every number of tokens: no decision may depend on it."""
    return torch.compiler.is_exporting()


def hides_values() -> bool:
    """Whether no decision may depend on the numbers in a tensor, because one computation stands for many."""
    return torch.compiler.is_compiling() or is_transformed()


class _Unrecorded:
    """A dummy context, for calling the forward of an autograd function directly when no gradient is needed."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, or its forward alone if nothing requires a gradient: with few tokens, autograd's
    own work takes longer than the kernel."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
        return function.apply(*arguments)
    return function.forward(_Unrecorded(), *arguments)


def differentiable_by(plain: Callable, constants: int) -> Callable:
    """Decorator of the backward pass of an autograd function, in the place of `once_differentiable`.

    Args:
        plain: `plain(ctx, *saved)` gives what the forward pass gives, in operations that autograd knows.
        constants: how many arguments of the forward pass come before its tensors. Those, all the others, must be the
            first that it saves, in the same order.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def either(ctx: Any, *gradients: torch.Tensor | None):
            # While the engine runs, gradients are recorded only under create_graph=True.
            recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            if recorded or is_transformed():
                return (None,) * constants + plain_gradients(plain, ctx, ctx.needs_input_grad[constants:], gradients)
            with torch.no_grad():
                return backward(ctx, *gradients)

        return either

    return decorate


def plain_gradients(
    plain: Callable, ctx: Any, needed: tuple[bool, ...], gradients: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that autograd makes from `plain(ctx, *saved)`, of those tensors that are `needed`."""
    saved, create_graph = list(ctx.saved_tensors), torch.is_grad_enabled()
    device = next(dy.device for dy in gradients if dy is not None)
    with torch.enable_grad(), without_autocast(device):
        # Siblings: inputs may be one tensor, or made from each other, and only their own uses here count.
        for index, needs in enumerate(needed):
            if needs:
                saved[index] = saved[index].view_as(saved[index])
        inputs = [x for x, needs in zip(saved, needed, strict=False) if needs]
        outputs = plain(ctx, *saved)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    ends = [
        (y, dy)
        for y, dy in zip(outputs, gradients, strict=True)
        if dy is not None and y is not None and y.requires_grad
    ]
    if not ends:
        return (None,) * len(needed)
    ys, dys = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(ys, inputs, dys, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if needs else None for needs in needed)


# ---- lalm.modeling.ops.sequence_layout ----
"""Where padding is and where documents begin: the one description of a batch that every op and layer reads."""


import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F



@dataclass
class SequenceLayout:
    """Padding and document boundaries of a batch `[B, T]`. All fields are None for a plain batch, which costs nothing.

    Args:
        mask: bool `[B, T]`, False on padding. Padding is inert: the state passes through it unchanged, whatever
            stands there and wherever it stands; the output at a padded token is unspecified.
        segments: int64 `[B, T]`. A change of id between neighbouring tokens starts a new document from an empty
            state. An initial state belongs to the first document of a row, the final state to its last.
        order: int64 `[B, T]`, for layers that look at neighbours: the permutation that moves each row's padding to
            its front and keeps everything else in order; None where nothing has to move.
    """

    mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def to(self, *args, **kwargs) -> SequenceLayout:
        """Every tensor by `Tensor.to`; accelerate calls this when the layers of a model lie on several devices."""
        tensors = (self.mask, self.segments, self.order)
        return SequenceLayout(*(None if tensor is None else tensor.to(*args, **kwargs) for tensor in tensors))

    def first(self, length: int) -> SequenceLayout:
        """The layout of the first `length` tokens."""
        mask, segments = (None if x is None else x[:, :length] for x in (self.mask, self.segments))
        order = None if mask is None or self.order is None else stable_order(mask)
        return SequenceLayout(mask, segments, order)

    def pads_first(self, x: torch.Tensor) -> torch.Tensor:
        """Apply `order` along the time axis of `x [B, T, ...]`."""
        return x if self.order is None else _gather_time(x, self.order)

    def segments_pads_first(self) -> torch.Tensor | None:
        """`document_ids` in that order; the padding at the front counts to the row's first document."""
        segments = self.document_ids()
        if segments is None or self.mask is None:
            return segments
        return self.pads_first(segments).masked_fill(~self.pads_first(self.mask), 0)

    def slide_over_padding(self, past: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """Join `past [B, S, ...]` and `current [B, T, ...]`, whose padding stands first, so that the past follows that
        padding and nothing parts it from the real tokens. What fills the front is unspecified."""
        joined = torch.cat([past, current], dim=1)
        if self.mask is None:
            return joined
        padding = (~self.mask).sum(1, keepdim=True)
        slots = torch.arange(joined.shape[1], device=joined.device)[None]
        source = torch.where(slots < padding + past.shape[1], (slots - padding).clamp(min=0), slots)
        return _gather_time(joined, source)

    def last_inputs(self, parts: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """The last `count` real inputs of each row's last document: `parts` `[B, T, D_i]` -> `[B, count, D]`; zeros
        stand first where there are fewer."""
        length = parts[0].shape[1]
        recent = slice(max(length - count, 0), None)  # [-0:] would be everything
        index = None if self.order is None else self.order[:, recent]
        last = [x[:, recent] if index is None else _gather_time(x, index) for x in parts]
        x = torch.cat(last, dim=-1)
        if self.mask is not None:
            x = x.masked_fill(~self.pads_first(self.mask)[:, recent, None], 0)
        segments = self.segments_pads_first()
        if segments is not None:
            x = x.masked_fill((segments[:, recent] != segments[:, -1:])[..., None], 0)
        return F.pad(x, (0, 0, count - x.shape[1], 0)) if x.shape[1] < count else x

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `pads_first`."""
        return x if self.order is None else _gather_time(x, self.order.argsort(1))

    def zero_padding(self, x: torch.Tensor) -> torch.Tensor:
        """`x [B, T, ...]` with 0 at padded tokens: selected, for 0 times NaN is NaN, in a gradient too."""
        return x if self.mask is None else x.masked_fill(~_broadcast(self.mask, x.ndim), 0)

    def freeze(self, *tensors: Any) -> tuple[Any, ...]:
        """Zero what an op takes (`[B, T, ...]` each, or None) on padding, log decays too: it neither writes nor
        forgets, and whatever stands there reaches nothing."""
        return tuple(None if x is None else self.zero_padding(x) for x in tensors)

    def document_ids(self) -> torch.Tensor | None:
        """`segments` renumbered 0, 1, ... along each row, so that an id which comes back is a new document."""
        starts = self.starts()
        return None if starts is None else starts.cumsum(1)

    def starts(self) -> torch.Tensor | None:
        """bool `[B, T]`, True where a document begins inside the row (never at the row's first token)."""
        if self.segments is None:
            return None
        return torch.diff(self.segments, dim=1, prepend=self.segments[:, :1]) != 0


class DocumentPositions(NamedTuple):
    """`[B, T]`, or `[1, T]` where all rows are alike."""

    documents: torch.Tensor  # int64, 0, 1, ... along each row
    positions: torch.Tensor  # int64, real tokens of the document before this one
    totals: torch.Tensor  # int64 [B], real tokens of each row's last document up to the end of the row


def document_positions(
    layout: SequenceLayout | None, like: torch.Tensor, offset: torch.Tensor | None = None
) -> DocumentPositions:
    """Positions of the tokens of `like [B, T, ...]`; `offset [B]` tokens of each row's first document came before."""
    layout = layout or SequenceLayout()
    length, device = like.shape[1], like.device
    real = torch.ones(1, length, dtype=torch.int64, device=device) if layout.mask is None else layout.mask.long()
    before = real.cumsum(1) - real
    documents, starts = layout.document_ids(), layout.starts()
    if documents is None or starts is None:
        documents = torch.zeros_like(real)
    else:
        before = before - torch.where(starts, before, 0).cummax(1).values
    if offset is not None:
        before = before + torch.where(documents == 0, offset.long()[:, None], 0)
    return DocumentPositions(documents, before, before[:, -1] + real[:, -1])


def stable_order(keys: torch.Tensor) -> torch.Tensor:
    """The permutation int64 `[B, T]` that sorts whole numbers (or bool) `[B, T]` and keeps equal ones in order. ONNX
    has no stable sort, so that no two numbers are left equal."""
    length = keys.shape[1]
    return (keys.long() * length + torch.arange(length, device=keys.device)).argsort(1)


def _gather_time(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, _broadcast(index, x.ndim).expand(-1, -1, *x.shape[2:]))


def _broadcast(x: torch.Tensor, ndim: int) -> torch.Tensor:
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


def document_by_document(
    op: Callable, tensors: Sequence[torch.Tensor | None], state: Any, layout: SequenceLayout
) -> tuple[torch.Tensor, Any]:
    """`op(*tensors, state, layout)`, which gives outputs `[B, T, ...]` and the next state, one document after another:
    slower, but nothing passes between them. A state is None, a tensor or a tuple of these, by rows."""
    starts, rows, states = cast(torch.Tensor, layout.starts()), [], []
    for b in range(len(starts)):
        outputs, after = [], _each(lambda x, b=b: x[b : b + 1], state)
        cuts = [0, *starts[b].nonzero().flatten().tolist(), starts.shape[1]]
        for start, stop in itertools.pairwise(cuts):
            here = slice(b, b + 1), slice(start, stop)
            mask = None if layout.mask is None else layout.mask[here]
            own = SequenceLayout(mask, None, None if mask is None else stable_order(mask))
            o, after = op(*(None if x is None else x[here] for x in tensors), None if start else after, own)
            outputs.append(o)
        rows.append(torch.cat(outputs, dim=1))
        states.append(after)
    return torch.cat(rows), _each(lambda *x: torch.cat(x), *states)


def _each(function: Callable, *states: Any) -> Any:
    """`function` of corresponding tensors of states."""
    if isinstance(states[0], tuple):
        return type(states[0])(*(_each(function, *parts) for parts in zip(*states, strict=True)))
    return None if states[0] is None else function(*states)


def check_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout | None = None,
    shares_heads: bool = False,
) -> None:
    """Raise ValueError unless q, k are `[B, T, H, K]`, v is `[B, T, H, V]` and the layout is `[B, T]`. With
    `shares_heads`, v may have a multiple of the heads of q."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k and v must be [B, T, H, D], got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q [B, T, H, K] = {tuple(q.shape)}, got {tuple(k.shape)}.")
    if shares_heads and v.shape[:2] == q.shape[:2] and v.shape[2] != q.shape[2]:
        if q.shape[2] == 0 or v.shape[2] % q.shape[2]:
            raise ValueError(
                f"v must have a multiple of the {q.shape[2]} heads of q, [B, T, H, V] with H % {q.shape[2]} == 0, got "
                f"{tuple(v.shape)}."
            )
    elif v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with [B, T, H] = {tuple(q.shape[:3])}, got {tuple(v.shape)}.")
    if q.shape[1] == 0:
        raise ValueError("q, k and v hold no token (T = 0); pass at least one.")
    check_layout(layout, q)


def check_layout(layout: SequenceLayout | None, q: torch.Tensor) -> None:
    """Raise ValueError unless the layout is one of the tokens of `q [B, T, ...]`."""
    if layout is None or (layout.mask is None and layout.segments is None):
        return
    for name in ("mask", "segments"):
        value = getattr(layout, name)
        if value is not None and value.shape != q.shape[:2]:
            raise ValueError(f"layout.{name} must be [B, T] = {tuple(q.shape[:2])}, got {tuple(value.shape)}.")
    if layout.mask is not None and layout.mask.dtype != torch.bool:
        raise ValueError(f"layout.mask must be bool, got {layout.mask.dtype}; pass attention_mask.bool().")


def check_state(state: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `state` is None or has `shape`."""
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"initial_state must be {shape}, got {tuple(state.shape)}.")


def segments_of(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Document ids `[1, T]` of `length` tokens packed with boundaries `cu_seqlens [N + 1]`; documents may be empty."""
    positions = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)[None]


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, length: int, name: str = "cu_seqlens") -> None:
    """Raise ValueError unless `cu_seqlens` is a valid list of boundaries of one packed row of `length` tokens."""
    if batch != 1:
        raise ValueError(f"{name} describes one packed row: flatten the batch to B = 1 first, got B = {batch}.")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must be a vector [N + 1] with N >= 1, got shape {tuple(cu_seqlens.shape)}.")
    if cu_seqlens.dtype.is_floating_point or cu_seqlens.dtype is torch.bool:
        raise ValueError(f"{name} must hold integers, got {cu_seqlens.dtype}.")
    if hides_values():
        return
    boundaries = cu_seqlens.tolist()
    if boundaries[0] != 0 or boundaries[-1] != length or any(a > b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"{name} must rise from 0 to T = {length}, got {boundaries}.")


def per_document(
    op: Callable,
    tensors: tuple[torch.Tensor | None, ...],
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run `op` on one packed row `[1, T, ...]` so that each document has its own initial and final state `[N, ...]`.

    Without states the row stays packed. With states, documents whose lengths round up to the same power of two lie
    side by side in a padded batch, so that at most twice the tokens are computed.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    length = first.shape[1]
    check_cu_seqlens(cu_seqlens, first.shape[0], length)
    segments = segments_of(cu_seqlens.to(first.device), length)
    if initial_state is None and not output_final_state:
        return op(*tensors, layout=SequenceLayout(segments=segments), **kwargs)
    if initial_state is not None and initial_state.shape[0] != cu_seqlens.numel() - 1:
        raise ValueError(
            f"initial_state must have one row for each of the {cu_seqlens.numel() - 1} documents of cu_seqlens, got "
            f"shape {tuple(initial_state.shape)}."
        )
    starts, lengths = cu_seqlens[:-1].to(first.device).long(), cu_seqlens.to(first.device).long().diff()
    sizes = [int(length - 1).bit_length() if length else -1 for length in lengths.tolist()]
    tokens, outputs, documents, states = [], [], [], []
    for size in sorted(set(sizes)):
        group = torch.tensor([i for i, other in enumerate(sizes) if other == size], device=first.device)
        steps = torch.arange(max(int(lengths[group].max()), 1), device=first.device)
        index, mask = (starts[group, None] + steps).clamp(max=length - 1), steps < lengths[group, None]
        batch = [None if tensor is None else tensor[0][index] for tensor in tensors]
        entering = None if initial_state is None else initial_state[group]
        o, state = op(
            *batch,
            initial_state=entering,
            output_final_state=output_final_state,
            layout=SequenceLayout(mask=mask),
            **kwargs,
        )
        tokens.append(index[mask])
        outputs.append(o[mask])
        documents.append(group)
        states.append(state)
    o = torch.cat(outputs)[torch.cat(tokens).argsort()][None]
    return o, torch.cat(states)[torch.cat(documents).argsort()] if output_final_state else None


# ---- lalm.modeling.ops.cpp_kernels ----
"""C++ kernels for the CPU, compiled by the machine's own compiler when first asked for and kept in its cache folder.

A kernel is one source file (and headers), compiled for fixed sizes in one to four seconds. `dispatch.py` decides from
the shapes of a call whether to ask; here is how to get the library. Without a compiler, plain torch runs instead.
"""


import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from transformers.utils import logging


logger = logging.get_logger("transformers.lalm")

# -O2 compiles these faster, and they run as fast as with -O3.
_LEVELS = {"diagonal": "-O2", "delta_rule": "-O2", "delta_channels": "-O2"}
_FLAGS = ("-march=native", "-std=c++17", "-shared", "-fPIC")
# The second try is for compilers without OpenMP or without these names for the processor and its registers.
_OPTIONAL = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())
# Values per head are padded to a multiple of this: the kernels work in registers of so many numbers.
LANES = 16
# Seconds that a process waits for a compiler that is not done, once: it takes one to ten.
_PATIENCE = 60.0
# Bytes of the checksum at the end of a library that is kept.
_CHECKSUM_SIZE = 20


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_sources() -> dict[str, str]:
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [name for name in names if name.endswith((".cpp", ".h"))]
    return {name: _read(os.path.join(folder, name)).decode() for name in names}


# By file name. In the code that is saved with a checkpoint the sources themselves stand here (lalm/bundle.py).
KERNEL_SOURCES: dict[str, str] = {
    'activation.cpp': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// y = act(x), or with GATED act(x) * factor, number by number; ACT 0 is the sigmoid, 1 SiLU, 2 GELU (with erf).

#include "kernel.h"

struct Inputs {
  const float *x, *factor;
  int64_t count, threads;
};

namespace {

constexpr int64_t PIECE = 4096;

inline void put(float* x, int64_t place, int64_t count, vec value) {
  std::memcpy(x + place, &value, (place + LANES <= count ? LANES : count - place) * sizeof(float));
}

template <typename Each>
void everywhere(const Inputs& in, Each each) {
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t piece = 0; piece < in.count; piece += PIECE) {
    const int64_t end = piece + PIECE < in.count ? piece + PIECE : in.count;
    for (int64_t place = piece; place < end; place += LANES) each(place);
  }
}

// Beyond 13.2 the share below x is less than float32 holds. The polynomial is a least-squares fit (weighted until its
// errors were even) of exp(z^2 / 2) P(Z > z) in 1 / (1 + 0.3 z), to 6e-8 of its value for z from 0 to 13.
struct Normal {
  vec below, density;  // P(Z < x), of a standard normal Z, and its derivative

  explicit Normal(vec x) {
    const vec zero = {}, z = x < zero ? -x : x, t = 1 / (1 + 0.3f * z), bell = exponential(-0.5f * z * z);
    vec y = 0.03827112540602684f - zero;
    for (const float c : {-0.16864410042762756f, 0.22757908701896667f, -0.07526667416095734f, 0.1416764259338379f,
                          0.09505084156990051f, 0.12182594835758209f, 0.11950098723173141f, 6.383564596035285e-06f})
      y = y * t + c;
    const vec above = z > 13.2f - zero ? zero : y * bell;
    below = x < zero ? above : 1 - above;
    density = 0.3989422804f * bell;
  }
};

inline vec act(vec x) {
  if constexpr (ACT == 2) return x * Normal(x).below;
  return ACT ? x * sigmoid(x) : sigmoid(x);
}

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y) {
  const Inputs in = *inputs;
  everywhere(in, [&](int64_t place) {
    const vec value = act(take(in.x, place, in.count));
    put(y, place, in.count, GATED ? value * take(in.factor, place, in.count) : value);
  });
}

void backward(const Inputs* inputs, const float* dy, float* dx, float* d_factor) {
  const Inputs in = *inputs;
  everywhere(in, [&](int64_t place) {
    const vec x = take(in.x, place, in.count), grad = take(dy, place, in.count);
    vec value, slope;
    if constexpr (ACT == 2) {
      const Normal normal(x);
      value = x * normal.below, slope = normal.below + x * normal.density;
    } else {
      const vec open = sigmoid(x);
      value = ACT ? x * open : open, slope = ACT ? open * (1 + x * (1 - open)) : open * (1 - open);
    }
    if (GATED) put(d_factor, place, in.count, grad * value);
    put(dx, place, in.count, GATED ? grad * take(in.factor, place, in.count) * slope : grad * slope);
  });
}

}  // extern "C"
''',
    'blocks.h': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Small matrix products between blocks of tokens and states, all of them in the caches of a core.

#pragma once

#include "kernel.h"

namespace {

constexpr int TOKENS = 16;           // of a block at most
constexpr int SUMS = REGISTERS / 2;  // the other registers hold operands

inline vec& aligned(float* x) { return *reinterpret_cast<vec*>(x); }
inline const vec& aligned(const float* x) { return *reinterpret_cast<const vec*>(x); }
inline loose& unaligned(float* x) { return *reinterpret_cast<loose*>(x); }
inline const loose& unaligned(const float* x) { return *reinterpret_cast<const loose*>(x); }

// LANES of SIZE numbers, `beyond` after the last.
template <int SIZE>
inline vec part_of(const float* x, int first, float beyond = 0) {
  if (first + LANES <= SIZE) return unaligned(x + first);
  vec found = beyond - vec{};
  std::memcpy(&found, x + first, (SIZE - first) * sizeof(float));
  return found;
}

// Whether a comparison holds anywhere.
template <class Lanes>
inline bool any(Lanes holds) {
  uint64_t words[sizeof(Lanes) / 8], found = 0;
  std::memcpy(words, &holds, sizeof(Lanes));
  for (const uint64_t word : words) found |= word;
  return found;
}

enum Shape { WHOLE, LOWER, UPPER };

// ROWS rows and PARTS vectors of `multiply`, from row `first` on.
template <int ROWS, int PARTS, int COLUMNS, int DOWN, int ALONG, Shape SHAPE, bool ADDS>
inline void tile(float* out, const float* x, const float* y, int first, int count) {
  vec total[ROWS][PARTS];
  _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) EACH_PART(p) {
    total[r][p] = ADDS ? aligned(out + (first + r) * COLUMNS + p * LANES) : vec{};
  }
  const int end = SHAPE == LOWER && first + ROWS < count ? first + ROWS : count;
  for (int i = SHAPE == UPPER ? first : 0; i < end; ++i) {
    vec row[PARTS];
    EACH_PART(p) row[p] = aligned(y + i * COLUMNS + p * LANES);
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) {
      const float factor = x[(first + r) * DOWN + i * ALONG];
      EACH_PART(p) total[r][p] += factor * row[p];
    }
  }
  _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) EACH_PART(p) {
    aligned(out + (first + r) * COLUMNS + p * LANES) = total[r][p];
  }
}

// PARTS vectors of every row: tall tiles while there are rows, then tiles of 4.
template <int PARTS, int COLUMNS, int DOWN, int ALONG, Shape SHAPE, bool ADDS>
inline void strip(float* out, const float* x, const float* y, int rows, int count) {
  constexpr int TALL = SUMS / PARTS / 4 * 4;
  int r = 0;
  for (; r + TALL <= rows; r += TALL) tile<TALL, PARTS, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out, x, y, r, count);
  for (; r < rows; r += 4) tile<4, PARTS, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out, x, y, r, count);
}

// out [rows, COLUMNS] = x y, or out + x y, where x(r, i) = x[r DOWN + i ALONG] and y is [count, COLUMNS]. Rows are
// rounded up to a multiple of 4. Of a LOWER x (zero for i > r) and an UPPER one (zero for i < r) most zeros are left out.
template <int COLUMNS, int DOWN, int ALONG, Shape SHAPE = WHOLE, bool ADDS = false>
inline void multiply(float* out, const float* x, const float* y, int rows, int count) {
  constexpr int WIDE = SUMS / 4, REST = COLUMNS / LANES % WIDE;
  int c = 0;
  for (; c + WIDE * LANES <= COLUMNS; c += WIDE * LANES)
    strip<WIDE, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out + c, x, y + c, rows, count);
  if (REST) strip<REST ? REST : 1, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out + c, x, y + c, rows, count);
}

// The transpose of a square, by swapping the off-diagonal quarters of ever smaller squares.
template <int D>
inline void transpose_square(vec (&x)[LANES]) {
  if constexpr (D > 0) {
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) {
      if (i & D) continue;
      const vec a = x[i], b = x[i + D];
      x[i] = lower<D>(a, b);
      x[i + D] = upper<D>(a, b);
    }
    transpose_square<D / 2>(x);
  }
}

// to [COLUMNS, ROWS] = from [ROWS, COLUMNS], both multiples of LANES.
template <int ROWS, int COLUMNS>
inline void transpose(const float* from, float* to) {
  for (int r = 0; r < ROWS; r += LANES)
    for (int c = 0; c < COLUMNS; c += LANES) {
      vec x[LANES];
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) x[i] = aligned(from + (r + i) * COLUMNS + c);
      transpose_square<LANES / 2>(x);
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) aligned(to + (c + i) * ROWS + r) = x[i];
    }
}

// Zeros above the diagonal, whatever stood there.
inline void keep_lower(float (&x)[TOKENS][TOKENS], int rows) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < TOKENS; ++j) x[i][j] = j <= i ? x[i][j] : 0;
}

inline void keep_below(float (&x)[TOKENS][TOKENS], int rows) {  // zeros on the diagonal, too
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < TOKENS; ++j) x[i][j] = j < i ? x[i][j] : 0;
}

}  // namespace
''',
    'delta_blocks.h': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Blocks of the delta rules: what Python hands over, the states of a head, and the rows of q, k and v that a block reads.

#pragma once

#include <cmath>

#include "blocks.h"

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *beta, *read, *coupling, *state;
  const uint8_t *skip, *starts;
  double scale, eps;  // eps < 0: q and k are taken as they are; else times 1 / sqrt(x . x + eps)
  int64_t batch, length, heads, key_heads, reverse, threads;
  int64_t parts;  // heads in the gradients of q and k, a multiple of key_heads and a divisor of heads
  int64_t row[3], token[3];  // of q, k and v: numbers from one row of the batch to the next, and from token to token
};

struct Gradients {
  // [B, T, parts, KEY] and [B, T, heads, VALUE], written by the first direction and head of a part, added to by others
  float *q, *k, *v;
  float *decay, *beta, *read, *coupling;  // written; null where the input is
  float* state;                           // in, that of the last state; out, of the first; null where neither counts
};
}

namespace {

constexpr int GROUP = 4;  // tokens of a triangular system that are solved one by one
constexpr int KEYS = rounded(KEY);
static_assert(VALUE % LANES == 0 && VALUE > 0, "VALUE must be whole registers");

// The largest number of vectors, `wanted` at most, that divides a row of values.
constexpr int parts_of(int wanted) { return VALUE / LANES % wanted == 0 ? wanted : parts_of(wanted - 1); }
constexpr int PARTS = parts_of(SUMS / 2 / M ? SUMS / 2 / M : 1);

typedef float Lanes[TOKENS];  // a number for each token
typedef float Pairs[TOKENS][TOKENS];
typedef float Keys[TOKENS][KEYS];
typedef float Values[TOKENS][VALUE];

#define EACH_MEMORY(a) _Pragma("GCC unroll 4") for (int a = 0; a < M; ++a)
#define EACH_PAIR(a, b) EACH_MEMORY(a) EACH_MEMORY(b)
#define EACH_TOKENS(g) _Pragma("GCC unroll 4") for (int g = 0; g < TOKENS; g += LANES)

// The memories of a head, or their gradients. Those of an empty one are zeros that nobody has written.
struct State {
  alignas(64) float of[M][KEYS * VALUE];
  bool empty;

  State() {}  // leaves them unwritten

  void load(const float* from) {
    empty = !from;
    for (int a = 0; from && a < M; ++a) {
      std::memcpy(of[a], from + a * KEY * VALUE, KEY * VALUE * sizeof(float));
      std::memset(of[a] + KEY * VALUE, 0, (KEYS - KEY) * VALUE * sizeof(float));
    }
  }

  void store(float* to) const {
    for (int a = 0; a < M; ++a) {
      if (empty)
        std::memset(to + a * KEY * VALUE, 0, KEY * VALUE * sizeof(float));
      else
        std::memcpy(to + a * KEY * VALUE, of[a], KEY * VALUE * sizeof(float));
    }
  }

  // The memories of `from` mixed: a takes by[a][b] of b.
  void mix(const State& from, const float (&by)[M][M]) {
    for (int i = 0; i < KEYS * VALUE; i += LANES) {
      vec old[M];
      EACH_MEMORY(b) old[b] = aligned(from.of[b] + i);
      EACH_MEMORY(a) {
        vec total = by[a][0] * old[0];
        for (int b = 1; b < M; ++b) total += by[a][b] * old[b];
        aligned(of[a] + i) = total;
      }
    }
  }

  // memory a (+)= x^T y, for x [count, KEYS] and y [count, VALUE]
  void write(int a, const Keys& x, const Values& y, int count, bool adds) {
    adds ? multiply<VALUE, 1, KEYS, WHOLE, true>(of[a], x[0], y[0], KEYS, count)
         : multiply<VALUE, 1, KEYS>(of[a], x[0], y[0], KEYS, count);
  }
};

struct Block {
  int64_t first;  // of the tokens of a row
  int count;
  bool fresh;  // begins from an empty state
};

std::vector<Block> blocks_of(const Tokens& tokens) {
  std::vector<Block> blocks;
  for (int64_t s = 0; s < tokens.count(); ++s) {
    if (tokens.begins[s] || blocks.empty() || blocks.back().count == TOKENS)
      blocks.push_back({s, 0, bool(tokens.begins[s])});
    ++blocks.back().count;
  }
  return blocks;
}

struct Unit {
  alignas(64) Pairs at = {};
  constexpr Unit() {
    for (int i = 0; i < TOKENS; ++i) at[i][i] = 1;
  }
};
constexpr Unit unit;

// PARTS vectors of a row of values.
struct Row {
  vec part[PARTS];

  static Row at(const float* x) {
    Row row;
    EACH_PART(p) row.part[p] = unaligned(x + p * LANES);
    return row;
  }
  void store(float* x) const { EACH_PART(p) unaligned(x + p * LANES) = part[p]; }
  void scale(float a) { EACH_PART(p) part[p] *= a; }
  void add(float a, const Row& x) { EACH_PART(p) part[p] += a * x.part[p]; }
  vec dot(const Row& x) const {  // still to be summed over the lanes
    vec total = part[0] * x.part[0];
    for (int p = 1; p < PARTS; ++p) total += part[p] * x.part[p];
    return total;
  }
};

inline vec dot(const float* x, const float* y) {  // of VALUE numbers, still to be summed over the lanes
  vec total = {};
  for (int c = 0; c < VALUE; c += LANES) total += aligned(x + c) * aligned(y + c);
  return total;
}

// The sums over the lanes of a register for each token.
inline void sum_each(const vec (&x)[TOKENS], Lanes& to) {
  EACH_TOKENS(g) aligned(to + g) = sums_of<LANES>(x + g);
}

// Where the rows of a block lie, with q and k as the rule takes them. `heads / key_heads` heads of values in a row share
// one of keys. Rows of tokens that a short block lacks hold what was there before: no sum reads them.
struct Rows {
  int count;
  int64_t at[TOKENS], key_at[TOKENS];  // in [B, T, heads] and [B, T, parts]
  const float* values[TOKENS];
  bool adds;  // to gradients of q and k: another head or direction has written them
  alignas(64) Keys q, k;
  Lanes q_inverse, k_inverse;  // of the norms

  void load_rows(const Inputs& x, const Tokens& tokens, const Block& block, int64_t head) {
    count = block.count;
    const int64_t key_head = head / (x.heads / x.key_heads), shared = x.heads / x.parts;
    adds = x.reverse || head % shared;
    for (int t = 0; t < count; ++t) {
      const int64_t n = tokens.at[block.first + t], row = n / x.length, token = n - row * x.length;
      at[t] = n * x.heads + head;
      key_at[t] = n * x.parts + head / shared;
      values[t] = x.v + row * x.row[2] + token * x.token[2] + head * VALUE;
      q_inverse[t] = load_key(q[t], x.q + row * x.row[0] + token * x.token[0] + key_head * KEY, x.eps, x.scale);
      k_inverse[t] = load_key(k[t], x.k + row * x.row[1] + token * x.token[1] + key_head * KEY, x.eps, 1);
    }
  }

  // Gradients of the rows as the rule takes them -> of those that were given.
  void hand_in_keys(const Inputs& x, const Gradients& d, Keys& d_q, Keys& d_k) const {
    for (int t = 0; t < count; ++t) {
      hand_in_key(d.q + key_at[t] * KEY, d_q[t], q[t], q_inverse[t], x.eps, x.scale);
      hand_in_key(d.k + key_at[t] * KEY, d_k[t], k[t], k_inverse[t], x.eps, 1);
    }
  }

 private:
  static float load_key(float* to, const float* from, double eps, double scale) {
    vec total = {};
    for (int g = 0; g < KEYS; g += LANES) {
      const vec part = part_of<KEY>(from, g);
      aligned(to + g) = part;
      total += part * part;
    }
    const float inverse = eps < 0 ? 1 : 1 / std::sqrt(sum(total) + float(eps));
    for (int g = 0; g < KEYS; g += LANES) aligned(to + g) *= float(scale) * inverse;
    return inverse;
  }

  // y = x / |x| has the gradient (dy - y (y . dy)) / |x|; `taken` is scale y.
  void hand_in_key(float* to, const float* d, const float* taken, float inverse, double eps, double scale) const {
    vec total = {};
    for (int g = 0; eps >= 0 && g < KEYS; g += LANES) total += aligned(taken + g) * aligned(d + g);
    const float along = sum(total) / float(scale);
    for (int g = 0; g < KEYS; g += LANES) {
      vec part = float(scale) * aligned(d + g);
      if (eps >= 0) part = inverse * (part - along * aligned(taken + g));
      adds ? add_to<KEY>(to, g, part) : write_to<KEY>(to, g, part);
    }
  }
};

template <int SIZE>
inline void hand_in_row(float* to, const float* x, bool adds) {
  for (int c = 0; c < SIZE; c += LANES)
    adds ? add_to<SIZE>(to, c, aligned(x + c)) : write_to<SIZE>(to, c, aligned(x + c));
}

}  // namespace
''',
    'delta_driver.h': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The passes over the blocks of a row, forward and backward, for a `Workspace` and a `Backward` that a kernel defines.

#pragma once

namespace {

// Some heads of a row, block by block, and a state of each.
struct Task {
  const Inputs& x;
  Group group;
  const Tokens tokens;
  const std::vector<Block> blocks;
  std::vector<State>& states;

  Task(const Inputs& x, const Groups& groups, int64_t index, std::vector<State>& held)
      : x(x),
        group(groups, index),
        tokens(group.row, x.length, x.skip, x.starts, x.reverse),
        blocks(blocks_of(tokens)),
        states(held) {
    const int64_t shared = x.heads / x.parts;
    group.begin *= shared, group.end *= shared;
    if (states.size() < size_t(groups.size * shared)) states.resize(groups.size * shared);
  }

  // Groups of parts, each with all the values that it serves: one task adds up the gradients of a key.
  static Groups groups_of(const Inputs& x) {
    return {x.batch, x.parts, x.threads, int64_t(sizeof(State)) * (x.heads / x.parts)};
  }

  State& state(int64_t head) const { return states[head - group.begin]; }
  int64_t segment(size_t i) const { return blocks[i].first / SEGMENT; }

  // The end of the segment that begins with block i.
  size_t end(size_t i) const {
    const int64_t here = segment(i);
    while (i < blocks.size() && segment(i) == here) ++i;
    return i;
  }

  // Where a head's state lies in [B, H, M, KEY, VALUE], and the one that enters a segment in `kept`.
  int64_t place(int64_t head) const { return (group.row * x.heads + head) * M * KEY * VALUE; }
  int64_t kept_place(int64_t head, int64_t segment) const {
    return place(head) * ((x.length - 1) / SEGMENT) + (segment - 1) * M * KEY * VALUE;
  }
};

thread_local Backward work;
thread_local std::vector<State> held, entering;

#define EACH_HEAD(head) for (int64_t head = task.group.begin; head < task.group.end; ++head)

}  // namespace

extern "C" {

// Writes the reads to o, adds them where it reads backwards, and writes, if not null, the last states to final_state
// and those that enter segments to kept [B, H, (T - 1) / SEGMENT, M, KEY, VALUE].
void forward(const Inputs* in, float* o, float* final_state, float* kept) {
  const Inputs x = *in;
  const Groups groups = Task::groups_of(x);
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Workspace& w = work;
    const Task task(x, groups, index, held);
    EACH_HEAD(head) task.state(head).load(x.state ? x.state + task.place(head) : nullptr);
    for (size_t first = 0, end; first < task.blocks.size(); first = end) {
      end = task.end(first);
      EACH_HEAD(head) {
        State& state = task.state(head);
        if (kept && first) state.store(kept + task.kept_place(head, task.segment(first)));
        for (size_t i = first; i < end; ++i) {
          state.empty |= task.blocks[i].fresh;
          w.load(x, task.tokens, task.blocks[i], head);
          w.relate();
          w.look();
          w.solve(state);
          w.output(x, state, o);
          if (final_state || i + 1 < task.blocks.size()) w.advance(state, state);
        }
      }
    }
    if (final_state) EACH_HEAD(head) {
      task.state(head).empty |= task.tokens.ends_empty;
      task.state(head).store(final_state + task.place(head));
    }
  }
}

void backward(const Inputs* in, const float* d_o, const float* kept, const Gradients* out) {
  const Inputs x = *in;
  const Gradients d = *out;
  const Groups groups = Task::groups_of(x);
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Backward& w = work;
    const Task task(x, groups, index, held);
    std::vector<size_t> boundaries = {0};  // of segments, in blocks
    while (boundaries.back() < task.blocks.size()) boundaries.push_back(task.end(boundaries.back()));
    EACH_HEAD(head) {
      task.state(head).load(d.state ? d.state + task.place(head) : nullptr);
      task.state(head).empty |= task.tokens.ends_empty;
    }
    for (size_t s = boundaries.size() - 1; s-- > 0;) {
      const size_t count = boundaries[s + 1] - boundaries[s];
      const Block* const blocks = &task.blocks[boundaries[s]];
      if (entering.size() < count) entering.resize(count);
      EACH_HEAD(head) {
        if (s)
          entering[0].load(kept + task.kept_place(head, task.segment(boundaries[s])));
        else
          entering[0].load(x.state ? x.state + task.place(head) : nullptr);
        for (size_t i = 0; i < count; ++i) {
          entering[i].empty |= blocks[i].fresh;
          if (i + 1 == count) break;
          w.load(x, task.tokens, blocks[i], head);
          w.relate();
          w.solve(entering[i]);
          w.advance(entering[i], entering[i + 1]);
        }
        for (size_t i = count; i-- > 0;) {
          w.load(x, task.tokens, blocks[i], head);
          w.relate();
          w.look();
          w.solve(entering[i]);
          w.retreat(x, d_o, d, entering[i], task.state(head));
        }
      }
    }
    if (d.state) EACH_HEAD(head) task.state(head).store(d.state + task.place(head));
  }
}

}  // extern "C"
''',
    'delta_rule.cpp': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The delta rule with M coupled memories (dual_state.py; one memory is that of delta_rule.py) in blocks of at most 16
// tokens, for one CPU core per head. dual_state.py has the formulas of its chunk form, docs/derivations/lam.md those of
// the backward pass; the letters are theirs.
//
// A block is a few small matrix products and one triangular system. Every document begins a block. The forward pass
// leaves the state that enters every SEGMENT tokens; the backward pass recomputes those between, a segment at a time, in
// the second-level cache. A core reads a segment of all its heads before the next one, for they lie side by side.
//
// Compiled for one KEY, VALUE, M (memories per head), DELTA (0 writes v itself, not the error against the memory), SEGMENT.
// Layouts: q, k [B, T, H, KEY], v, o [B, T, H, VALUE], decay, beta, read [B, T, H, M], coupling [B, T, H, M, M], states
// [B, H, M, KEY, VALUE], skip and starts [B, T] (may be null). A token with starts != 0 begins from an empty state; one
// with skip != 0 is padding and does nothing else. Null decays and reads are 1, a null coupling leaks nothing.

#include "delta_rule.h"

namespace {

// A block, and what its gradients are made of.
struct Backward : Workspace {
  alignas(64) float values_across[VALUE][TOKENS];
  Values d_updates[M], d_errors[M], d_written[M], entered[M];
  float reads[M][KEYS][TOKENS], d_across[KEYS][TOKENS], q_across[KEYS][TOKENS];
  Pairs sights[M], errors_updates[M][M], d_between[M][M], d_scores, d_key_scores;
  Keys d_q, d_k;
  Lanes d_rho[M], d_beta[M], d_since[M][M], d_leaving[M][M], d_step[M][M], d_decay[M], d_read[M], d_coupling[M][M];

  // Gradients of a block: `grad`, that of the state behind it, becomes that of `before`, which enters it.
  void retreat(const Inputs& x, const float* d_o, const Gradients& d, const State& before, State& grad) {
    for (int t = 0; t < count; ++t) std::memcpy(o[t], d_o + at[t] * VALUE, sizeof(o[t]));
    if (!grad.empty) write();
    substitute(x, d, before, grad);
    follow_values(before, grad);
    follow_pairs();
    follow_steps(before, grad);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      EACH_MEMORY(a) {
        d.beta[n * M + a] = d_beta[a][t];
        if (d.decay) d.decay[n * M + a] = d_decay[a][t];
        if (d.read) d.read[n * M + a] = d_read[a][t];
        if (d.coupling) EACH_MEMORY(b) d.coupling[(n * M + a) * M + b] = d_coupling[a][b][t];
      }
    }
    hand_in_keys(x, d, d_q, d_k);
    leave(before, grad);
  }

 private:
  // The system of `solve` from its end: gradients of the updates and of the errors.
  void substitute(const Inputs& x, const Gradients& d, const State& before, const State& grad) {
    EACH_MEMORY(b) multiply<VALUE, 1, TOKENS, UPPER>(d_updates[b][0], weights[b][0], o[0], count, count);
    for (int a = 0; !grad.empty && a < M; ++a)
      multiply<VALUE, KEYS, 1>(d_written[a][0], k[0], grad.of[a], count, KEY);
    for (int t = 0; !grad.empty && t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) EACH_MEMORY(b) {
        vec total = aligned(d_updates[b][t] + c);
        EACH_MEMORY(a) total += leaving[a][b][t] * aligned(d_written[a][t] + c);
        aligned(d_updates[b][t] + c) = total;
      }
    for (int first = (count - 1) / GROUP * GROUP; first >= 0; first -= GROUP) {
      const int end = std::min(first + GROUP, count);
      if (DELTA && end < count) EACH_PAIR(a, b) {
        multiply<VALUE, 1, TOKENS, WHOLE, true>(d_updates[b][first], inner[a][b][end] + first, d_errors[a][end], GROUP,
                                                count - end);
      }
      for (int t = end - 1; t >= first; --t) {
        vec strength[M] = {};
        for (int c = 0; c < VALUE; c += PARTS * LANES) {
          Row total[M], d_v = {};
          EACH_MEMORY(b) total[b] = Row::at(d_updates[b][t] + c);
          for (int i = t + 1; DELTA && i < end; ++i) EACH_MEMORY(a) {
            const Row row = Row::at(d_errors[a][i] + c);
            EACH_MEMORY(b) total[b].add(inner[a][b][i][t], row);
          }
          float* const to = d.v + at[t] * VALUE + c;
          if (x.reverse) d_v = Row::at(to);
          EACH_MEMORY(b) {
            strength[b] += total[b].dot(Row::at(errors[b][t] + c));
            total[b].scale(beta[b][t]);
            total[b].store(d_errors[b][t] + c);
            d_v.add(1, total[b]);
          }
          d_v.store(to);
        }
        EACH_MEMORY(b) d_beta[b][t] = sum(strength[b]);
      }
    }
    for (int t = 0; DELTA && !before.empty && t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) EACH_MEMORY(b) {
        vec total = {};
        EACH_MEMORY(a) total -= since[a][b][t] * aligned(d_errors[a][t] + c);
        aligned(entered[b][t] + c) = total;
      }
  }

  // What queries and keys owe to the states, and sums over values: of reads with P and of writes with what leaves.
  void follow_values(const State& before, const State& grad) {
    std::memset(d_across, 0, sizeof(d_across));
    transpose<TOKENS, VALUE>(o[0], values_across[0]);
    transpose<TOKENS, KEYS>(q[0], q_across[0]);
    EACH_MEMORY(b) {
      if (before.empty) {
        EACH_MEMORY(a) std::memset(d_since[a][b], 0, sizeof(Lanes));
        continue;
      }
      multiply<TOKENS, VALUE, 1>(reads[b][0], before.of[b], values_across[0], KEYS, VALUE);
      EACH_TOKENS(g) {
        vec total = {};
        for (int i = 0; i < KEYS; ++i) {
          aligned(d_across[i] + g) += aligned(seen[b] + g) * aligned(reads[b][i] + g);
          total += aligned(q_across[i] + g) * aligned(reads[b][i] + g);
        }
        EACH_MEMORY(a) aligned(d_since[a][b] + g) = aligned(rho[a] + g) * total;
        EACH_MEMORY(a) {
          const vec part = aligned(since[a][b] + g) * total;
          aligned(d_rho[a] + g) = b ? aligned(d_rho[a] + g) + part : part;
        }
      }
      for (int a = 0; DELTA && a < M; ++a) {
        alignas(64) Lanes met;
        vec sums[TOKENS] = {};
        for (int t = 0; t < count; ++t) sums[t] = dot(d_errors[a][t], found[b][t]);
        sum_each(sums, met);
        EACH_TOKENS(g) aligned(d_since[a][b] + g) -= aligned(met + g);
      }
    }
    if (before.empty) std::memset(d_rho, 0, sizeof(d_rho));
    transpose<KEYS, TOKENS>(d_across[0], d_q[0]);

    std::memset(d_across, 0, sizeof(d_across));
    EACH_MEMORY(a) {
      if (DELTA && !before.empty) {
        transpose<TOKENS, VALUE>(entered[a][0], values_across[0]);
        multiply<TOKENS, VALUE, 1, WHOLE, true>(d_across[0], before.of[a], values_across[0], KEYS, VALUE);
      }
      if (grad.empty) {
        EACH_MEMORY(b) std::memset(d_leaving[a][b], 0, sizeof(Lanes));
        continue;
      }
      transpose<TOKENS, VALUE>(written[a][0], values_across[0]);
      multiply<TOKENS, VALUE, 1, WHOLE, true>(d_across[0], grad.of[a], values_across[0], KEYS, VALUE);
      EACH_MEMORY(b) {
        vec sums[TOKENS] = {};
        for (int t = 0; t < count; ++t) sums[t] = dot(d_written[a][t], updates[b][t]);
        sum_each(sums, d_leaving[a][b]);
      }
    }
    transpose<KEYS, TOKENS>(d_across[0], d_k[0]);
  }

  // What the tokens of a block owe to each other.
  void follow_pairs() {
    EACH_MEMORY(b) {
      transpose<TOKENS, VALUE>(updates[b][0], values_across[0]);
      multiply<TOKENS, VALUE, 1>(sights[b][0], o[0], values_across[0], count, VALUE);
      keep_lower(sights[b], count);
      for (int a = 0; DELTA && a < M; ++a) {
        multiply<TOKENS, VALUE, 1>(errors_updates[a][b][0], d_errors[a][0], values_across[0], count, VALUE);
        keep_below(errors_updates[a][b], count);
      }
    }
    vec d_reads[M][TOKENS] = {};
    for (int t = 0; t < count; ++t) EACH_TOKENS(g) {
      vec to_scores = {}, to_keys = {};
      EACH_PAIR(a, b) {
        const vec n = aligned(between[a][b][t] + g), sight = aligned(sights[b][t] + g);
        const vec score = aligned(scores[t] + g);
        vec to_between = rho[a][t] * score * sight;
        to_scores += rho[a][t] * n * sight;
        d_reads[a][t] += score * n * sight;
        if (DELTA) {
          const vec met = aligned(errors_updates[a][b][t] + g);
          to_between -= aligned(key_scores[t] + g) * met;
          to_keys -= n * met;
        }
        aligned(d_between[a][b][t] + g) = to_between;
      }
      aligned(d_scores[t] + g) = to_scores;
      aligned(d_key_scores[t] + g) = to_keys;
    }
    EACH_MEMORY(a) {
      alignas(64) Lanes total;
      sum_each(d_reads[a], total);
      EACH_TOKENS(g) aligned(d_rho[a] + g) += aligned(total + g);
    }
    multiply<KEYS, TOKENS, 1, LOWER, true>(d_q[0], d_scores[0], k[0], count, count);
    multiply<KEYS, 1, TOKENS, UPPER, true>(d_k[0], d_scores[0], q[0], count, count);
    if (!DELTA) return;
    multiply<KEYS, TOKENS, 1, LOWER, true>(d_k[0], d_key_scores[0], k[0], count, count);
    multiply<KEYS, 1, TOKENS, UPPER, true>(d_k[0], d_key_scores[0], k[0], count, count);
  }

  // Back through the products of small matrices to the gates.
  void follow_steps(const State& before, const State& grad) {
    const int end = count - 1;
    EACH_TOKENS(g) {
      EACH_MEMORY(a) {
        vec total = {};
        EACH_MEMORY(b) total += aligned(coupling[a][b] + g) * aligned(d_rho[b] + g);
        aligned(d_read[a] + g) = total;
        EACH_MEMORY(b) aligned(d_coupling[a][b] + g) = aligned(read[a] + g) * aligned(d_rho[b] + g);
      }
    }
    if (!grad.empty) {  // C_last P_last and C_last N_last
      float d_last[M][M];
      EACH_PAIR(a, b) {
        vec total = {};
        for (int i = 0; !before.empty && i < KEYS * VALUE; i += LANES)
          total += aligned(grad.of[a] + i) * aligned(before.of[b] + i);
        d_last[a][b] = sum(total);
      }
      EACH_PAIR(a, c) {
        vec total = {};
        EACH_MEMORY(b) {
          EACH_TOKENS(g) {
            total += aligned(d_leaving[a][b] + g) * aligned(between[c][b][end] + g);
            aligned(d_between[c][b][end] + g) += coupling[a][c][end] * aligned(d_leaving[a][b] + g);
          }
          if (before.empty) continue;
          d_coupling[a][c][end] += d_last[a][b] * since[c][b][end];
          d_since[c][b][end] += coupling[a][c][end] * d_last[a][b];
        }
        d_coupling[a][c][end] += sum(total);
      }
    }
    vec totals[M][M][TOKENS] = {};
    EACH_TOKENS(g) {
      vec row[M][M] = {};
      for (int t = end; t > 0; --t) {
        EACH_PAIR(a, b) row[a][b] += aligned(d_between[a][b][t] + g);
        vec next[M][M] = {};
        EACH_PAIR(a, c) EACH_MEMORY(b) {
          totals[a][c][t] += row[a][b] * aligned(between[c][b][t - 1] + g);
          next[c][b] += step[a][c][t] * row[a][b];
        }
        EACH_PAIR(a, b) row[a][b] = next[a][b];
      }
    }
    EACH_PAIR(a, c) sum_each(totals[a][c], d_step[a][c]);
    for (int t = end; t >= 0; --t) {
      EACH_MEMORY(a) d_decay[a][t] = t ? 0 : d_since[a][a][0];
      for (int a = 0; t && a < M; ++a) EACH_MEMORY(c) {
        float& total = d_step[a][c][t];
        EACH_MEMORY(b) {
          total += d_since[a][b][t] * since[c][b][t - 1];
          d_since[c][b][t - 1] += step[a][c][t] * d_since[a][b][t];
        }
        d_decay[a][t] += total * coupling[a][c][t - 1];
        d_coupling[a][c][t - 1] += total * decay[a][t];
      }
    }
  }

  void leave(const State& before, State& grad) {
    if (before.empty) {
      grad.empty = true;
      return;
    }
    const bool adds = !grad.empty;
    float turned[M][M];
    EACH_PAIR(a, b) turned[a][b] = last[b][a];
    if (adds) grad.mix(grad, turned);
    EACH_MEMORY(b) {
      for (int t = 0; t < count; ++t)
        for (int c = 0; c < VALUE; c += LANES) aligned(written[b][t] + c) = seen[b][t] * aligned(o[t] + c);
      grad.write(b, q, written[b], count, adds);
      if (DELTA) grad.write(b, k, entered[b], count, true);
    }
    grad.empty = false;
  }
};

}  // namespace

#include "delta_driver.h"
''',
    'delta_rule.h': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// A block of the delta rule with M coupled memories: what delta_rule.cpp reads and writes, with the states.

#pragma once

#include "delta_blocks.h"

namespace {

struct Workspace : Rows {
  alignas(64) Keys scaled;
  float across[KEYS][TOKENS];                                    // of k
  Lanes decay[M], beta[M], read[M], coupling[M][M], step[M][M];  // step: B
  Lanes rho[M], since[M][M], seen[M], leaving[M][M];             // since: P, seen: rho^T P, leaving: C_last N_last,j
  Pairs between[M][M], inner[M][M], weights[M];                  // N, -N (k_i . k_j), rho^T N (q_i . k_j)
  Pairs scores, key_scores;                                      // q_i . k_j for j <= i, k_i . k_j for j < i
  Values found[M], errors[M], updates[M], written[M], o;
  float last[M][M];  // C_last P_last

  void load(const Inputs& x, const Tokens& tokens, const Block& block, int64_t head) {
    load_rows(x, tokens, block, head);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      EACH_MEMORY(a) {
        decay[a][t] = x.decay ? x.decay[n * M + a] : 1;
        beta[a][t] = x.beta[n * M + a];
        read[a][t] = x.read ? x.read[n * M + a] : 1;
        EACH_MEMORY(b) coupling[a][b][t] = x.coupling ? x.coupling[(n * M + a) * M + b] : a == b;
      }
    }
  }

  // B, P, N, what leaves the block, and the scores of keys with N
  void relate() {
    for (int t = 0; t < count; ++t) {
      EACH_PAIR(a, b) step[a][b][t] = t ? decay[a][t] * coupling[a][b][t - 1] : a == b ? decay[a][t] : 0;
      EACH_PAIR(a, b) {
        float total = t ? 0 : step[a][b][t];
        for (int c = 0; t && c < M; ++c) total += step[a][c][t] * since[c][b][t - 1];
        since[a][b][t] = total;
      }
    }
    EACH_TOKENS(g) {
      vec row[M][M] = {};
      for (int t = 0; t < count; ++t) {
        vec next[M][M];
        EACH_PAIR(a, b) {
          next[a][b] = a == b ? aligned(unit.at[t] + g) : vec{};
          EACH_MEMORY(c) next[a][b] += step[a][c][t] * row[c][b];
        }
        EACH_PAIR(a, b) aligned(between[a][b][t] + g) = row[a][b] = next[a][b];
      }
      EACH_PAIR(a, b) {
        vec total = {};
        EACH_MEMORY(c) total += coupling[a][c][count - 1] * row[c][b];
        aligned(leaving[a][b] + g) = total;
      }
    }
    EACH_PAIR(a, b) {
      last[a][b] = 0;
      EACH_MEMORY(c) last[a][b] += coupling[a][c][count - 1] * since[c][b][count - 1];
    }
    transpose<TOKENS, KEYS>(k[0], across[0]);
    if (!DELTA) return;
    multiply<TOKENS, KEYS, 1>(key_scores[0], k[0], across[0], count, KEY);
    keep_below(key_scores, count);
    for (int t = 0; t < count; ++t) EACH_TOKENS(g) EACH_PAIR(a, b) {
      aligned(inner[a][b][t] + g) = -aligned(key_scores[t] + g) * aligned(between[a][b][t] + g);
    }
  }

  // rho, the scores of queries, and what each read sees of each write
  void look() {
    EACH_TOKENS(g) {
      EACH_MEMORY(b) {
        vec total = {};
        EACH_MEMORY(a) total += aligned(coupling[a][b] + g) * aligned(read[a] + g);
        aligned(rho[b] + g) = total;
      }
      EACH_MEMORY(b) {
        vec total = {};
        EACH_MEMORY(a) total += aligned(rho[a] + g) * aligned(since[a][b] + g);
        aligned(seen[b] + g) = total;
      }
    }
    multiply<TOKENS, KEYS, 1>(scores[0], q[0], across[0], count, KEY);
    keep_lower(scores, count);
    for (int t = 0; t < count; ++t) EACH_TOKENS(g) EACH_MEMORY(b) {
      vec total = {};
      EACH_MEMORY(a) total += rho[a][t] * aligned(between[a][b][t] + g);
      aligned(weights[b][t] + g) = aligned(scores[t] + g) * total;
    }
  }

  // errors = v - S^T k behind the decay and the writes before, updates = beta errors; four tokens at a time
  void solve(const State& state) {
    const bool finds = DELTA && !state.empty;
    for (int b = 0; finds && b < M; ++b) multiply<VALUE, KEYS, 1>(found[b][0], k[0], state.of[b], count, KEY);
    for (int t = 0; t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) {
        vec total[M];
        EACH_MEMORY(a) total[a] = unaligned(values[t] + c);
        for (int b = 0; finds && b < M; ++b) EACH_MEMORY(a) total[a] -= since[a][b][t] * aligned(found[b][t] + c);
        EACH_MEMORY(a) aligned(errors[a][t] + c) = total[a];
      }
    for (int first = 0; first < count; first += GROUP) {
      if (DELTA && first) EACH_PAIR(a, b) {
        multiply<VALUE, TOKENS, 1, WHOLE, true>(errors[a][first], inner[a][b][first], updates[b][0], GROUP, first);
      }
      for (int t = first; t < count && t < first + GROUP; ++t)
        for (int c = 0; c < VALUE; c += PARTS * LANES) {
          Row total[M];
          EACH_MEMORY(a) total[a] = Row::at(errors[a][t] + c);
          for (int j = first; DELTA && j < t; ++j) EACH_MEMORY(b) {
            const Row row = Row::at(updates[b][j] + c);
            EACH_MEMORY(a) total[a].add(inner[a][b][t][j], row);
          }
          EACH_MEMORY(a) {
            total[a].store(errors[a][t] + c);
            total[a].scale(beta[a][t]);
            total[a].store(updates[a][t] + c);
          }
        }
    }
  }

  // What a block's writes are worth when it ends.
  void write() {
    for (int t = 0; t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) EACH_MEMORY(a) {
        vec total = {};
        EACH_MEMORY(b) total += leaving[a][b][t] * aligned(updates[b][t] + c);
        aligned(written[a][t] + c) = total;
      }
  }

  // after = the state behind the block that `before` enters; they may be the same
  void advance(const State& before, State& after) {
    const bool adds = !before.empty;
    write();
    if (adds) after.mix(before, last);
    EACH_MEMORY(a) after.write(a, k, written[a], count, adds);
    after.empty = false;
  }

  void output(const Inputs& x, const State& state, float* to) {
    for (int b = 0; b < M; ++b) {
      b ? multiply<VALUE, TOKENS, 1, LOWER, true>(o[0], weights[b][0], updates[b][0], count, count)
        : multiply<VALUE, TOKENS, 1, LOWER>(o[0], weights[b][0], updates[b][0], count, count);
      if (state.empty) continue;
      for (int t = 0; t < count; ++t)
        for (int g = 0; g < KEYS; g += LANES) aligned(scaled[t] + g) = seen[b][t] * aligned(q[t] + g);
      multiply<VALUE, KEYS, 1, WHOLE, true>(o[0], scaled[0], state.of[b], count, KEY);
    }
    for (int t = 0; t < count; ++t) hand_in_row<VALUE>(to + at[t] * VALUE, o[t], x.reverse);
  }
};

}  // namespace
''',
    'diagonal.cpp': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Diagonal recurrences in blocks of at most 16 tokens, for one CPU core per head:
//     S <- diag(a) S + k v^T        o = scale S^T q, under NORMALIZED divided by z . q + eps with z <- diag(a) z + k
//
// With f_i the product of the decays of a block from its second token on, q~_i = scale q_i f_i and k~_j = k_j / f_j,
//     S' = a_1 S        o_i = S'^T q~_i + sum over j <= i of (q~_i . k~_j) v_j        S <- f_n (S' + sum of k~_j v_j^T)
// so that a block is a few small matrix products, whose operands stay in the first caches. Where f would fall below
// SMALLEST a new block begins, and so does every document: nothing overflows, nothing leaks.
//
// The backward pass keeps no states: D, the gradient of S, runs backwards (dk, dv and what dq owes to the block), then
// S forwards (the rest of dq). The gradient of a log decay g = log a follows from these: <D, S> changes at a token by
// q dq - k dk, row by row; its exact value is taken every ANCHOR blocks.
//
// Compiled for one KEY, VALUE (a multiple of 16), DECAY (0 none, 1 a number per head, 2 a number per key row), NORMALIZED,
// TAYLOR (0, or the size of q and k, of which a block makes KEY features: they never exist all at once).
// Layouts: q, k [B, T, H, SIZE], v, o [B, T, H, VALUE], decay [B, T, H] or [B, T, H, KEY], states [B, H, KEY, VALUE], or
// under NORMALIZED [B, H, KEY, VALUE + 1], whose last column is z, skip and starts [B, T] (may be null). A token with
// starts != 0 begins from an empty state; one with skip != 0 is padding and does nothing else.

#include "diagonal.h"

namespace {

// A block. Rows of tokens that a short one lacks hold what was there before: no sum reads them.
struct Workspace {
  alignas(64) float q[TOKENS][KEYS], k[TOKENS][KEYS], k_across[KEYS][TOKENS], v[TOKENS][VALUE];
  alignas(64) float v_across[VALUE][TOKENS], o[TOKENS][VALUE], across[VALUE][KEYS];
  alignas(64) float d_q[TOKENS][KEYS], d_k[TOKENS][KEYS], d_v[TOKENS][VALUE], size[TOKENS];
  alignas(64) float scores[TOKENS][TOKENS], d_scores[TOKENS][TOKENS];
  int64_t at[TOKENS];  // in [B, T, H]
  Factor kept[TOKENS], inverse[TOKENS], enter, leave;  // f_i, 1 / f_i, a_1, f_n
  alignas(64) float features[2][TAYLOR ? Map::SLACK : 1];

  void load(const Inputs& x, const Window& window, const Block& block, int64_t head) {
    for (int t = 0; t < block.count; ++t) {
      const int64_t n = at[t] = window.at(block.first + t, head);
      if (DECAY) {
        kept[t] = window.kept[block.first + t];
        inverse[t].invert(kept[t]);
      }
      const float *from_q = x.q + n * SIZE, *from_k = x.k + n * SIZE;
      if (TAYLOR) {
        Map::map(from_q, features[0]);
        Map::map(from_k, features[1]);
        from_q = features[0];
        from_k = features[1];
      }
      EACH_GROUP(g) {
        const vec a = part_of<KEY>(from_q, g), b = part_of<KEY>(from_k, g);
        aligned(q[t] + g) = float(x.scale) * (DECAY ? kept[t].rows(g) * a : a);
        aligned(k[t] + g) = DECAY ? inverse[t].rows(g) * b : b;
      }
      std::memcpy(v[t], x.v + n * VALUE, sizeof(v[t]));
    }
    if (DECAY) {
      enter.take(x.decay + at[0] * WIDTH);
      leave = kept[block.count - 1];
    }
  }

  // S', read by rows or across
  void enter_block(State& state, bool fresh, bool read_across) const {
    if (fresh) {
      state.empty();
    } else if (DECAY) {
      state.pending.multiply(enter);
      read_across ? state.settle_across() : state.settle();
    }
    state.pending.fill(1);
  }

  // q~_i . k~_j for j <= i
  void score(int count) {
    transpose<TOKENS, KEYS>(k[0], k_across[0]);
    multiply<TOKENS, KEYS, 1>(scores[0], q[0], k_across[0], count, KEY);
    keep_lower(scores, count);
  }

  float read_size(int t, const float* z) const {
    vec total = {};
    for (int j = 0; j < TOKENS; j += LANES) total += aligned(scores[t] + j);
    EACH_GROUP(g) total += aligned(q[t] + g) * aligned(z + g);
    return sum(total);
  }

  // The gradient of a token's q or k, from that of its features.
  template <bool ADDS>
  void give(const float* d, const float* from, float* to) {
    alignas(64) float found[rounded(SIZE)];
    std::memset(features[0], 0, sizeof(features[0]));
    std::memcpy(features[0], d, KEY * sizeof(float));
    Map::gradient(from, features[0], found);
    for (int g = 0; g < SIZE; g += LANES)
      ADDS ? add_to<SIZE>(to, g, aligned(found + g)) : write_to<SIZE>(to, g, aligned(found + g));
  }

  // Gradients of the reads, into o, and under NORMALIZED of the divisors, into size.
  void load_gradient(int count, const float* o_before, const float* d_o, const float* sizes) {
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      vec along = {};
      const float inverse = NORMALIZED ? 1 / sizes[n] : 1;
      for (int c = 0; c < VALUE; c += LANES) {
        const vec d = inverse * unaligned(d_o + n * VALUE + c);
        aligned(o[t] + c) = d;
        if (NORMALIZED) along += d * unaligned(o_before + n * VALUE + c);
      }
      if (NORMALIZED) size[t] = -sum(along);
    }
  }

  // The gradients of a block inside it and by what it writes; `state` is D before, and after it.
  void retreat(const Inputs& x, const Gradients& d, const Block& block, State& state) {
    const int count = block.count;
    if (DECAY) state.pending.multiply(leave);
    state.settle();
    transpose<KEYS, VALUE>(state.at, across[0]);
    transpose<TOKENS, VALUE>(v[0], v_across[0]);
    score(count);
    multiply<TOKENS, VALUE, 1>(d_scores[0], o[0], v_across[0], count, VALUE);
    for (int t = 0; NORMALIZED && t < count; ++t)
      for (int j = 0; j < TOKENS; j += LANES) aligned(d_scores[t] + j) += size[t];
    // No decay stands between a token and itself. In d_scores that share would be in q dq and in k dk, and leave its
    // rounding, perhaps all there is of the decays' gradient, in their difference: it comes in below.
    alignas(64) float own[TOKENS] = {};
    for (int t = 0; t < count; ++t) own[t] = d_scores[t][t];
    keep_below(d_scores, count);
    multiply<VALUE, KEYS, 1>(d_v[0], k[0], state.at, count, KEY);
    multiply<VALUE, 1, TOKENS, UPPER, true>(d_v[0], scores[0], o[0], count, count);
    multiply<KEYS, VALUE, 1>(d_k[0], v[0], across[0], count, VALUE);
    multiply<KEYS, 1, TOKENS, UPPER, true>(d_k[0], d_scores[0], q[0], count, count);
    multiply<KEYS, TOKENS, 1, LOWER>(d_q[0], d_scores[0], k[0], count, count);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      std::memcpy(d.v + n * VALUE, d_v[t], sizeof(d_v[t]));
      vec change = {};
      EACH_GROUP(g) {
        vec to_q = aligned(d_q[t] + g), to_k = aligned(d_k[t] + g);
        if (NORMALIZED) to_k += aligned(state.z + g);
        const vec part = aligned(q[t] + g) * to_q - aligned(k[t] + g) * to_k;
        if (DECAY == 2) write_to<KEY>(d.g + n * KEY, g, part);
        change += part;
        to_q += own[t] * aligned(k[t] + g);
        to_k += own[t] * aligned(q[t] + g);
        if (DECAY) {
          to_q *= kept[t].rows(g);
          to_k *= inverse[t].rows(g);
        }
        write_to<KEY>(TAYLOR ? d_q[t] : d.q + n * KEY, g, float(x.scale) * to_q);
        write_to<KEY>(TAYLOR ? d_k[t] : d.k + n * KEY, g, to_k);
      }
      if (DECAY == 1) d.g[n] = sum(change);
      if (TAYLOR) {
        give<false>(d_q[t], x.q + n * SIZE, d.q + n * SIZE);
        give<false>(d_k[t], x.k + n * SIZE, d.k + n * SIZE);
      }
    }
    multiply<VALUE, 1, KEYS, WHOLE, true>(state.at, q[0], o[0], KEYS, count);
    if (NORMALIZED) state.add_to_z(q, count, size);
    state.pending = enter;
    if (block.fresh) state.empty();
  }

  // What dq owes to the state that the block reads, which lies across.
  void follow(const Inputs& x, const Gradients& d, const Block& block, State& state) {
    const int count = block.count;
    enter_block(state, block.fresh, true);
    multiply<KEYS, VALUE, 1>(d_q[0], o[0], state.at, count, VALUE);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      vec change = {};
      EACH_GROUP(g) {
        vec to_q = aligned(d_q[t] + g);
        if (NORMALIZED) to_q += size[t] * aligned(state.z + g);
        const vec part = aligned(q[t] + g) * to_q;
        if (DECAY == 2) add_to<KEY>(d.g + n * KEY, g, part);
        change += part;
        if (DECAY) to_q *= kept[t].rows(g);
        if (TAYLOR)
          aligned(d_q[t] + g) = float(x.scale) * to_q;
        else
          add_to<KEY>(d.q + n * KEY, g, to_q, float(x.scale));
      }
      if (DECAY == 1) d.g[n] += sum(change);
      if (TAYLOR) give<true>(d_q[t], x.q + n * SIZE, d.q + n * SIZE);
    }
    multiply<KEYS, 1, VALUE, WHOLE, true>(state.at, v[0], k[0], VALUE, count);
    if (NORMALIZED) state.add_to_z(k, count, nullptr);
    state.pending = leave;
  }
};

// Both across: D, and S that is still to be multiplied by what is pending.
struct Leaving : State {
  void keep(State& gradient) {
    gradient.settle();
    transpose<KEYS, VALUE>(gradient.at, at);
    std::memcpy(z, gradient.z, sizeof(z));
  }

  // Sums over the columns of D S, row by row or of all rows.
  void meet(const State& state, double* ends) const {
    for (int g = 0; g < KEYS; g += LANES) {
      vec total = NORMALIZED ? aligned(z + g) * aligned(state.z + g) : vec{};
      for (int c = 0; c < VALUE; ++c) total += aligned(at + c * KEYS + g) * aligned(state.at + c * KEYS + g);
      total *= state.pending.rows(g);
      for (int i = g; i < g + LANES && i < KEY; ++i) ends[i % WIDTH] += total[i - g];
    }
  }
};

// Some heads of a row and their states.
struct Task {
  const Inputs& x;
  const Group group;
  const Tokens tokens;
  std::vector<State>& states;

  Task(const Inputs& x, const Groups& groups, int64_t index, std::vector<State>& held)
      : x(x), group(groups, index), tokens(group.row, x.length, x.skip, x.starts, false), states(held) {
    if (states.size() < size_t(groups.size)) states.resize(groups.size);
  }

  int64_t heads() const { return group.end - group.begin; }
  int64_t windows() const { return (tokens.count() + TOKENS - 1) / TOKENS; }
  State& state(int64_t head) const { return states[head - group.begin]; }
  int64_t place(int64_t head) const { return (group.row * x.heads + head) * KEY * COLUMNS; }  // in [B, H, KEY, COLUMNS]
};

inline double size_of(const double* x) {
  double total = 0;
  for (int64_t i = 0; i < WIDTH; ++i) total += std::fabs(x[i]);
  return total;
}

inline double size_of(const float* x) {
  if constexpr (WIDTH == 1) return std::fabs(*x);
  vec total = {};
  for (int i = 0; i < WIDTH; i += LANES) {
    const vec part = part_of<WIDTH>(x, i);
    total += part < vec{} ? -part : part;
  }
  return sum(total);
}

// d.g holds q dq - k dk of every token, by which <D, S> changes; the gradient of a log decay is <D, S> before its token.
// Between two places where that is known, an anchor (`ends` [anchor][head][WIDTH]) or an edge of a document, it is a
// running sum from either. Each token takes the side with the smaller numbers to add up: behind one with large numbers
// they are taken away again, and leave their rounding.
void decay_gradient(const Task& task, const Gradients& d, const std::vector<double>& ends, int64_t head) {
  std::vector<double> opening(WIDTH), nothing(WIDTH), running(WIDTH);  // opening: <D, S> of a given state
  const int64_t place = task.place(task.group.begin + head);
  for (int64_t i = 0; task.x.state && i < KEY * COLUMNS; ++i)
    opening[i / COLUMNS % WIDTH] += double(d.state[place + i]) * task.x.state[place + i];
  constexpr int64_t SPAN = ANCHOR * TOKENS;
  const Tokens& tokens = task.tokens;
  const auto at = [&](int64_t s) { return d.g + (tokens.at[s] * task.x.heads + task.group.begin + head) * WIDTH; };
  const auto known = [&](int64_t s) { return &ends[(s / SPAN * task.heads() + head) * WIDTH]; };
  double sizes[SPAN + 1];  // sums of the sizes before a token
  for (int64_t first = 0, end; first < tokens.count(); first = end) {
    for (end = first + 1; end < tokens.count() && end % SPAN && !tokens.begins[end];) ++end;
    const bool empty = tokens.begins[first] || (first == 0 && !task.x.state);
    const double* const left = empty ? nothing.data() : first ? known(first - 1) : opening.data();
    const double* const right = end == tokens.count() || end % SPAN == 0 ? known(end - 1) : nothing.data();
    sizes[0] = size_of(left);
    for (int64_t s = first; s < end; ++s) sizes[s - first + 1] = sizes[s - first] + size_of(at(s));
    const double all = sizes[end - first] + size_of(right);
    int64_t middle = first;
    while (middle < end && 2 * sizes[middle - first] <= all) ++middle;
    std::copy_n(left, WIDTH, running.begin());
    for (int64_t s = first; s < middle; ++s) {
      float* const g = at(s);
      for (int64_t i = 0; i < WIDTH; ++i) {
        const double before = running[i];
        running[i] -= g[i];
        g[i] = float(before);
      }
    }
    std::copy_n(right, WIDTH, running.begin());
    for (int64_t s = end - 1; s >= middle; --s) {
      float* const g = at(s);
      for (int64_t i = 0; i < WIDTH; ++i) g[i] = float(running[i] += g[i]);
    }
    if (empty) std::fill_n(at(first), WIDTH, 0.f);  // no state to decay
  }
}

thread_local Workspace work;
thread_local std::vector<State> held;

#define EACH_HEAD(head) for (int64_t head = task.group.begin; head < task.group.end; ++head)

}  // namespace

extern "C" {

// Writes the reads to o and under NORMALIZED what they were divided by to sizes [B, T, H] (neither for padding), and
// the last states to final_state.
void forward(const Inputs* in, float* o, float* final_state, float* sizes) {
  const Inputs x = *in;
  const Groups groups(x.batch, x.heads, x.threads, sizeof(State));
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Workspace& w = work;
    const Task task(x, groups, index, held);
    EACH_HEAD(head) task.state(head).load(x.state ? x.state + task.place(head) : nullptr);
    for (int64_t i = 0; i < task.windows(); ++i) {
      Window window(x, task.tokens, i);
      EACH_HEAD(head) {
        State& state = task.state(head);
        window.divide(head);
        for (int b = 0; b < window.blocks; ++b) {
          const Block& block = window.block[b];
          w.load(x, window, block, head);
          w.enter_block(state, block.fresh, false);
          multiply<VALUE, KEYS, 1>(w.o[0], w.q[0], state.at, block.count, KEY);
          w.score(block.count);
          multiply<VALUE, TOKENS, 1, LOWER, true>(w.o[0], w.scores[0], w.v[0], block.count, block.count);
          for (int t = 0; t < block.count; ++t) {
            const float size = NORMALIZED ? w.read_size(t, state.z) + float(x.eps) : 1;
            if (NORMALIZED && sizes) sizes[w.at[t]] = size;
            for (int c = 0; c < VALUE; c += LANES)
              unaligned(o + w.at[t] * VALUE + c) = NORMALIZED ? aligned(w.o[t] + c) / size : aligned(w.o[t] + c);
          }
          multiply<VALUE, TOKENS, 1, WHOLE, true>(state.at, w.k_across[0], w.v[0], KEYS, block.count);
          if (NORMALIZED) state.add_to_z(w.k, block.count, nullptr);
          state.pending = w.leave;
        }
      }
    }
    EACH_HEAD(head) {
      if (task.tokens.ends_empty) task.state(head).empty();
      task.state(head).store(final_state + task.place(head));
    }
  }
}

void backward(const Inputs* in, const float* o, const float* d_o, const float* sizes, const Gradients* out) {
  const Inputs x = *in;
  const Gradients d = *out;
  const Groups groups(x.batch, x.heads, x.threads, sizeof(State));
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Workspace& w = work;
    const Task task(x, groups, index, held);
    const int64_t windows = task.windows(), anchors = (windows + ANCHOR - 1) / ANCHOR;
    std::vector<Leaving> leaving(DECAY ? anchors * task.heads() : 0);
    std::vector<double> ends(anchors * task.heads() * WIDTH);
    const auto anchored = [&](int64_t i) { return DECAY && (i == windows - 1 || i % ANCHOR == ANCHOR - 1); };
    const auto anchor = [&](int64_t head, int64_t i) { return i / ANCHOR * task.heads() + head - task.group.begin; };

    EACH_HEAD(head) {
      task.state(head).load(d.state + task.place(head));
      if (task.tokens.ends_empty) task.state(head).empty();
    }
    for (int64_t i = windows - 1; i >= 0; --i) {
      Window window(x, task.tokens, i);
      EACH_HEAD(head) {
        if (anchored(i)) leaving[anchor(head, i)].keep(task.state(head));
        window.divide(head);
        for (int b = window.blocks - 1; b >= 0; --b) {
          w.load(x, window, window.block[b], head);
          w.load_gradient(window.block[b].count, o, d_o, sizes);
          w.retreat(x, d, window.block[b], task.state(head));
        }
      }
    }
    EACH_HEAD(head) {
      State& state = task.state(head);
      state.store(d.state + task.place(head));
      state.load(x.state ? x.state + task.place(head) : nullptr);
      std::memcpy(w.across[0], state.at, sizeof(w.across));
      transpose<KEYS, VALUE>(w.across[0], state.at);
    }
    for (int64_t i = 0; i < windows; ++i) {
      Window window(x, task.tokens, i);
      EACH_HEAD(head) {
        window.divide(head);
        for (int b = 0; b < window.blocks; ++b) {
          w.load(x, window, window.block[b], head);
          w.load_gradient(window.block[b].count, o, d_o, sizes);
          w.follow(x, d, window.block[b], task.state(head));
        }
        if (anchored(i)) leaving[anchor(head, i)].meet(task.state(head), &ends[anchor(head, i) * WIDTH]);
      }
    }
    for (int64_t head = 0; DECAY && head < task.heads(); ++head) decay_gradient(task, d, ends, head);
  }
}

}  // extern "C"
''',
    'diagonal.h': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Of diagonal recurrences: what Python hands over, a state and its decay, and where blocks of tokens begin.

#pragma once

#include "taylor.h"

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *state;
  const uint8_t *skip, *starts;
  double scale, eps;
  int64_t batch, length, heads, threads;
};

struct Gradients {
  float *q, *k, *v, *g;  // written
  float* state;          // in, that of the last state; out, of the first
};
}

namespace {

constexpr int KEYS = rounded(KEY), COLUMNS = VALUE + NORMALIZED;  // of a state outside
constexpr int SIZE = TAYLOR ? TAYLOR : KEY;                       // of q and k outside
using Map = Taylor<TAYLOR ? TAYLOR : 1>;
static_assert(!TAYLOR || KEY == Map::FEATURES, "KEY must be the number of features");
constexpr int ANCHOR = 16, WIDTH = DECAY == 2 ? KEY : 1;          // windows; numbers of a log decay
constexpr float SMALLEST = 2e-9f;                                 // exp(-20)
static_assert(VALUE % LANES == 0 && VALUE > 0, "VALUE must be whole registers");

#define EACH_GROUP(g) _Pragma("GCC unroll 4") for (int g = 0; g < KEYS; g += LANES)

// What the rows of a state are multiplied by; 1 for the rows that only fill up a register.
struct Factor {
  static constexpr int SIZE = DECAY == 2 ? KEYS : LANES;
  alignas(64) float at[SIZE];

  void fill(float x) {
    for (int g = 0; g < SIZE; g += LANES) aligned(at + g) = x - vec{};
  }
  void take(const float* x) {
    if (DECAY == 2) {
      for (int g = 0; g < SIZE; g += LANES) aligned(at + g) = part_of<KEY>(x, g, 1);
    } else {
      fill(*x);
    }
  }
  void multiply(const Factor& other) {
    for (int g = 0; g < SIZE; g += LANES) aligned(at + g) *= aligned(other.at + g);
  }
  void invert(const Factor& other) {
    for (int g = 0; g < SIZE; g += LANES) aligned(at + g) = 1 / aligned(other.at + g);
  }
  bool above(float limit) const {
    bool all = true;
    for (int g = 0; g < SIZE; g += LANES) all &= !any(aligned(at + g) < limit - vec{});
    return all;
  }
  float row(int i) const { return at[DECAY == 2 ? i : 0]; }
  vec rows(int i) const { return aligned(at + (DECAY == 2 ? i : 0)); }
};

// The state of a head, or its gradient: [KEYS][VALUE], or across [VALUE][KEYS]; its rows are still to be multiplied by
// `pending`.
struct State {
  alignas(64) float at[KEYS * VALUE], z[KEYS];
  Factor pending;

  void empty() {
    std::memset(at, 0, sizeof(at));
    std::memset(z, 0, sizeof(z));
    pending.fill(1);  // 0 times the NaN of another document is no 0
  }

  void load(const float* from) {
    empty();
    for (int i = 0; from && i < KEY; ++i) {
      std::memcpy(at + i * VALUE, from + i * COLUMNS, VALUE * sizeof(float));
      if (NORMALIZED) z[i] = from[i * COLUMNS + VALUE];
    }
  }

  void store(float* to) {
    settle();
    for (int i = 0; i < KEY; ++i) {
      std::memcpy(to + i * COLUMNS, at + i * VALUE, VALUE * sizeof(float));
      if (NORMALIZED) to[i * COLUMNS + VALUE] = z[i];
    }
  }

  void settle() {
    if (!DECAY) return;
    for (int i = 0; i < KEY; ++i)
      for (int c = 0; c < VALUE; c += LANES) aligned(at + i * VALUE + c) *= pending.row(i);
    settle_z();
  }

  void settle_across() {
    if (!DECAY) return;
    for (int c = 0; c < VALUE; ++c) EACH_GROUP(g) aligned(at + c * KEYS + g) *= pending.rows(g);
    settle_z();
  }

  void add_to_z(const float (&rows)[TOKENS][KEYS], int count, const float* weights) {
    for (int t = 0; t < count; ++t) EACH_GROUP(g) aligned(z + g) += (weights ? weights[t] : 1) * aligned(rows[t] + g);
  }

 private:
  void settle_z() {
    EACH_GROUP(g) aligned(z + g) *= pending.rows(g);
    pending.fill(1);
  }
};

struct Block {
  int first, count;  // of the tokens of a window
  bool fresh;        // begins from an empty state
};

// f_i of the tokens of a window; large keys would not fit on the stack.
thread_local Factor decays[TOKENS];

// 16 tokens of a row, the same for all heads, and the blocks of one head in them.
struct Window {
  const Inputs& x;
  const Tokens& tokens;
  int64_t first;
  int count, blocks = 0;
  Block block[TOKENS];
  Factor* const kept = decays;

  Window(const Inputs& x, const Tokens& tokens, int64_t index)
      : x(x), tokens(tokens), first(index * TOKENS), count(std::min<int64_t>(TOKENS, tokens.count() - first)) {}

  int64_t at(int t, int64_t head) const { return tokens.at[first + t] * x.heads + head; }

  void divide(int64_t head) {
    blocks = 0;
    for (int t = 0; t < count; ++t) {
      bool joins = t && !tokens.begins[first + t];
      if (DECAY && joins) {
        kept[t].take(x.decay + at(t, head) * WIDTH);
        kept[t].multiply(kept[t - 1]);
        joins = kept[t].above(SMALLEST);
      }
      if (joins) {
        ++block[blocks - 1].count;
      } else {
        block[blocks++] = {t, 1, bool(tokens.begins[first + t])};
        kept[t].fill(1);
      }
    }
  }
};

}  // namespace
''',
    'few_rows.cpp': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// x W^T + b for a few rows x, the next tokens of a few sequences: as fast as the weights come from memory. Each core reads
// its weights once, in the order in which they lie, and asks memory for what follows; libraries that read several rows
// of W side by side get half of what a memory gives.
//
// Layouts: x [rows, size], weight [outputs, size], bias [outputs] (may be null), y [rows, outputs].

#include "kernel.h"

namespace {

struct Inputs {
  const float *x, *weight, *bias;
  int64_t rows, size, outputs, threads;
};

constexpr int AHEAD = 1024;            // numbers between what is read and what memory is asked for
constexpr int OUTPUTS = 32, ROWS = 64;  // of y that are made before they are written

struct Block {
  const Inputs& in;
  const int64_t first, begin, end;  // row; outputs
  float y[ROWS][OUTPUTS];

  Block(const Inputs& in, int64_t first, int64_t begin, int64_t end) : in(in), first(first), begin(begin), end(end) {}

  // COUNT rows from `row` on, with as many weights from n on as make a vector of sums.
  template <int COUNT>
  void tile(int64_t row, int64_t n) {
    constexpr int WIDTH = LANES / COUNT, SIDE = WIDTH == 2 ? 2 : 1;  // weights, and how many of them side by side
    constexpr int PARTS = COUNT * SIDE < 4 ? 4 / COUNT : 1;          // at least four sums: each waits for its last addition
    const float* x = in.x + (first + row) * in.size;
    const int64_t width = std::min<int64_t>(WIDTH, end - n), whole = in.size - in.size % (PARTS * LANES);
    vec sums[WIDTH][COUNT] = {};
    for (int i = 0; i + SIDE <= width; i += SIDE) {
      const float* w = in.weight + (n + i) * in.size;
      vec parts[SIDE][COUNT][PARTS] = {};
      for (int64_t c = 0; c < whole; c += PARTS * LANES) EACH_PART(p) {
          const int64_t at = c + p * LANES;
          vec weights[SIDE];
          for (int s = 0; s < SIDE; ++s) {
            __builtin_prefetch(w + s * in.size + at + AHEAD);
            weights[s] = *reinterpret_cast<const loose*>(w + s * in.size + at);
          }
          for (int r = 0; r < COUNT; ++r) {
            const vec values = *reinterpret_cast<const loose*>(x + r * in.size + at);
            for (int s = 0; s < SIDE; ++s) parts[s][r][p] += weights[s] * values;
          }
        }
      for (int s = 0; s < SIDE; ++s)
        for (int r = 0; r < COUNT; ++r) EACH_PART(p) sums[i + s][r] += parts[s][r][p];
    }
    const vec totals = sums_of<LANES>(sums[0]);
    for (int i = 0; i < width; ++i)
      for (int r = 0; r < COUNT; ++r) {
        const int64_t from = i < width - width % SIDE ? whole : 0;  // the last weight of an odd number has no side
        float total = totals[i * COUNT + r] + (in.bias ? in.bias[n + i] : 0);
        for (int64_t c = from; c < in.size; ++c) total += in.weight[(n + i) * in.size + c] * x[r * in.size + c];
        y[row + r][n + i - begin] = total;
      }
  }

  template <int COUNT>
  void make(int64_t row, int64_t rows) {
    for (; row + COUNT <= rows; row += COUNT)
      for (int64_t n = begin; n < end; n += LANES / COUNT) tile<COUNT>(row, n);
    if constexpr (COUNT > 1) make<COUNT / 2>(row, rows);
  }
};

}  // namespace

extern "C" void forward(const Inputs& in, float* y) {
  const int64_t blocks = (in.outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t index = 0; index < blocks; ++index) {
    const int64_t begin = index * OUTPUTS, end = std::min(begin + OUTPUTS, in.outputs);
    for (int64_t first = 0; first < in.rows; first += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, in.rows - first);
      Block block(in, first, begin, end);
      block.make<LANES / 2>(0, rows);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(y + (first + r) * in.outputs + begin, block.y[r], (end - begin) * sizeof(float));
    }
  }
}
''',
    'kernel.h': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// What the C++ kernels share: vectors as wide as the machine's registers, rows of a state, the tokens of a sequence.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Compilers pass vectors wider than a register through memory.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
constexpr int LANES = 4;
#define EACH_LANE(f) f(0), f(1), f(2), f(3)
#ifdef __aarch64__
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef float loose __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, f) __builtin_shufflevector(a, b, EACH_LANE(f))
#else
typedef int32_t lanes __attribute__((vector_size(LANES * sizeof(int32_t))));
#define SHUFFLE(a, b, f) __builtin_shuffle(a, b, (lanes){EACH_LANE(f)})
#endif

// `lower` is a, but lanes whose number has the bit D take the lane of b that is D below. `upper` is b, but the other
// lanes take the lane of a that is D above.
#define FROM_BELOW(j) ((j) & D ? LANES + (j) - D : (j))
#define FROM_ABOVE(j) ((j) & D ? LANES + (j) : (j) + D)
template <int D>
inline vec lower(vec a, vec b) {
  return SHUFFLE(a, b, FROM_BELOW);
}
template <int D>
inline vec upper(vec a, vec b) {
  return SHUFFLE(a, b, FROM_ABOVE);
}

inline float sum(vec x) {
  float total = 0;
  for (int j = 0; j < LANES; ++j) total += x[j];
  return total;
}

// exp(x) to 2e-7 of its value, from 2^-126 to 2^127.
inline vec exponential(vec x) {
  const vec high = 88.f - (vec){}, low = -87.f - (vec){};
  x = x < low ? low : x > high ? high : x;
  const vec shift = 12582912.f - (vec){};  // 1.5 * 2^23: adding it rounds
  const vec n = (x * 1.44269504f + shift) - shift;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = 1.f / 5040 - (vec){};
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) y = y * r + c;
  typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t))));
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return y * (vec)power;
}

// LANES numbers of x from `place` on, zeros after the last of `size`.
inline vec take(const float* x, int64_t place, int64_t size) {
  vec found = {};
  if (place + LANES <= size) return *reinterpret_cast<const loose*>(x + place);
  std::memcpy(&found, x + place, (size - place) * sizeof(float));
  return found;
}

// 0 below -87, where exp ends.
inline vec sigmoid(vec x) {
  const vec y = 1 / (1 + exponential(-x));
  return x < -87.f - (vec){} ? (vec){} : y;
}

// The sums over the lanes of COUNT vectors, each in its own lane.
template <int COUNT>
inline vec sums_of(const vec* x) {
  if constexpr (COUNT == 1) {
    return *x;
  } else {
    constexpr int HALF = COUNT / 2;
    const vec a = sums_of<HALF>(x), b = sums_of<HALF>(x + HALF);
    return lower<HALF>(a, b) + upper<HALF>(a, b);
  }
}

// Key sizes are rounded up to whole vectors; rows beyond the key stay zero.
constexpr int rounded(int size) { return (size + LANES - 1) / LANES * LANES; }

#define EACH_PART(p) _Pragma("GCC unroll 8") for (int p = 0; p < PARTS; ++p)

// x[first + j] = values[j] for the rows that there are.
template <int SIZE>
inline void write_to(float* x, int first, vec values) {
  std::memcpy(x + first, &values, (first + LANES <= SIZE ? LANES : SIZE - first) * sizeof(float));
}

// x[first + j] += scale * values[j] for the rows that there are.
template <int SIZE>
inline void add_to(float* x, int first, vec values, float scale = 1) {
  if (first + LANES <= SIZE) {
    *reinterpret_cast<loose*>(x + first) += scale * values;
  } else {
    for (int i = first; i < SIZE; ++i) x[i] += scale * values[i - first];
  }
}

// The tokens of a batch element that are not padding, in the order in which they are read.
struct Tokens {
  std::vector<int64_t> at;
  std::vector<char> begins;  // from an empty state
  bool ends_empty = false;   // a document began on padding at the end

  Tokens(int64_t row, int64_t length, const uint8_t* skip, const uint8_t* starts, bool reverse) {
    for (int64_t s = 0; s < length; ++s) {
      const int64_t t = row * length + (reverse ? length - 1 - s : s);
      ends_empty |= starts && starts[t];
      if (skip && skip[t]) continue;
      at.push_back(t);
      begins.push_back(ends_empty);
      ends_empty = false;
    }
  }

  int64_t count() const { return at.size(); }
};

// The heads of a batch element in groups, each of which one thread processes together: there is a group for every
// thread, and the states of a group fit into a second-level cache.
struct Groups {
  int64_t heads, size, count, total;  // heads of a group, groups of a row, groups

  Groups(int64_t batch, int64_t heads, int64_t threads, int64_t state_bytes) : heads(heads) {
    const int64_t rows = std::max<int64_t>(1, batch), most = std::max<int64_t>(1, heads);  // of an empty batch, too
    const int64_t wanted = std::min(most, (threads + rows - 1) / rows);
    size = std::min(std::max<int64_t>(1, (1 << 19) / state_bytes), (most + wanted - 1) / wanted);
    count = (heads + size - 1) / size;
    total = batch * count;
  }
};

struct Group {
  int64_t row, begin, end;  // of the heads

  Group(const Groups& groups, int64_t index)
      : row(index / groups.count),
        begin(index % groups.count * groups.size),
        end(std::min(groups.heads, begin + groups.size)) {}
};

}  // namespace
''',
    'lam_gates.cpp': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The gates of LAM with two memories (lam_gates.py): all that is done to their projection, token by token.
// N tokens, D directions, H heads, 7 numbers per head: write strength, 2 read weights, 2 decays, 2 leaks.

#include "kernel.h"

struct Inputs {
  const float *x, *k, *v;                            // [N, D, H, 7], [N, H, K], [N, H, V]
  const float *flux_weight, *decay_bias, *flux_bias;  // [H, K, V], [D, H, 2], [D, H]
  int64_t tokens, directions, heads, key_size, value_size, threads;
  double leak_max;
};

// Of the outputs [D, N, H, 2], the coupling [D, N, H, 2, 2].
struct Gates {
  float *g, *beta, *read, *coupling;
};

namespace {

constexpr int FIELDS = 7, READ = 1, DECAY = 3, LEAK = 5;

// min(x, 0) - log(1 + e), e = exp(-|x|) <= 1, by 2 artanh(e / (2 + e)).
inline vec log_sigmoid(vec x) {
  const vec zero = {}, e = exponential(x < zero ? x : -x), s = e / (2 + e), square = s * s;
  vec y = 2.f / 15 - zero;
  for (const float c : {2.f / 13, 2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3, 2.f}) y = y * square + c;
  return (x < zero ? x : zero) - s * y;
}

// k^T W v, two rows of W at a time.
inline float bilinear(const float* k, const float* weight, const float* v, int64_t keys, int64_t values) {
  vec total = {};
  for (int64_t j = 0; j < values; j += LANES) {
    vec even = {}, odd = {};
    int64_t i = 0;
    for (; i + 1 < keys; i += 2) {
      even += k[i] * take(weight + i * values, j, values);
      odd += k[i + 1] * take(weight + (i + 1) * values, j, values);
    }
    if (i < keys) even += k[i] * take(weight + i * values, j, values);
    total += (even + odd) * take(v, j, values);
  }
  return sum(total);
}

using Row = std::vector<float>;

Row room(int64_t size) { return Row((size + LANES - 1) / LANES * LANES); }

template <typename Function>
inline void each(Row& to, const Row& from, Function f) {
  for (size_t j = 0; j < to.size(); j += LANES)
    *reinterpret_cast<loose*>(&to[j]) = f(*reinterpret_cast<const loose*>(&from[j]));
}

// What both passes know of a token: sigmoids of all 7 D H numbers, log decays and the first memory's share of a write.
struct Token {
  const Inputs& in;
  Row x, open, z, g, flux, psi;

  explicit Token(const Inputs& in)
      : in(in),
        x(room(in.directions * in.heads * FIELDS)),
        open(x.size()),
        z(room(in.directions * in.heads * 2)),
        g(z.size()),
        flux(room(in.directions * in.heads)),
        psi(flux.size()) {}

  void read(int64_t n) {
    const int64_t heads = in.heads, size = in.directions * heads;
    std::memcpy(x.data(), in.x + n * size * FIELDS, size * FIELDS * sizeof(float));
    each(open, x, sigmoid);
    for (int64_t h = 0; h < heads; ++h) {
      const float dot = bilinear(in.k + (n * heads + h) * in.key_size, in.flux_weight + h * in.key_size * in.value_size,
                                 in.v + (n * heads + h) * in.value_size, in.key_size, in.value_size);
      for (int64_t d = 0; d < in.directions; ++d) flux[d * heads + h] = dot + in.flux_bias[d * heads + h];
    }
    for (int64_t i = 0; i < size; ++i)
      for (int m = 0; m < 2; ++m) z[2 * i + m] = in.decay_bias[2 * i + m] + x[i * FIELDS + DECAY + m];
    each(g, z, log_sigmoid);
    each(psi, flux, sigmoid);
  }
};

// The place of a head in the outputs.
inline int64_t place(const Inputs& in, int64_t n, int64_t i) {
  return 2 * ((i / in.heads * in.tokens + n) * in.heads + i % in.heads);
}

}  // namespace

extern "C" {

void forward(const Inputs* inputs, const Gates* gates) {
  const Inputs in = *inputs;
  const Gates to = *gates;
#pragma omp parallel num_threads(in.threads)
  {
    Token token(in);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < in.tokens; ++n) {
      token.read(n);
      for (int64_t i = 0; i < in.directions * in.heads; ++i) {
        const float *const x = &token.x[i * FIELDS], *const open = &token.open[i * FIELDS], psi = token.psi[i];
        const float fast = float(in.leak_max) * open[LEAK], slow = float(in.leak_max) * open[LEAK + 1];
        const float shares[2] = {psi, 1 - psi}, coupling[4] = {1 - fast, fast, slow, 1 - slow};
        const int64_t at = place(in, n, i);
        for (int m = 0; m < 2; ++m) {
          to.g[at + m] = token.g[2 * i + m];
          to.beta[at + m] = open[0] * shares[m];
          to.read[at + m] = x[READ + m];
        }
        std::memcpy(to.coupling + 2 * at, coupling, sizeof coupling);
      }
    }
  }
}

// `flux` [N, D, H] gets the gradients of the sums that the first memory's share is the sigmoid of.
void backward(const Inputs* inputs, const Gates* gradients, float* dx, float* flux) {
  const Inputs in = *inputs;
  const Gates from = *gradients;
  const int64_t size = in.directions * in.heads;
#pragma omp parallel num_threads(in.threads)
  {
    Token token(in);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < in.tokens; ++n) {
      token.read(n);
      float* const d_flux = flux + n * size;
      for (int64_t i = 0; i < size; ++i) {
        const float* const open = &token.open[i * FIELDS];
        const float psi = token.psi[i], strength = open[0];
        const int64_t at = place(in, n, i);
        const float *const d_beta = from.beta + at, *const d_coupling = from.coupling + 2 * at;
        const float leaks[2] = {d_coupling[1] - d_coupling[0], d_coupling[2] - d_coupling[3]};
        float* const to = dx + (n * size + i) * FIELDS;
        to[0] = (d_beta[0] * psi + d_beta[1] * (1 - psi)) * strength * (1 - strength);
        d_flux[i] = (d_beta[0] - d_beta[1]) * strength * psi * (1 - psi);
        for (int m = 0; m < 2; ++m) {
          const float leak = open[LEAK + m];
          to[READ + m] = from.read[at + m];
          to[LEAK + m] = leaks[m] * float(in.leak_max) * leak * (1 - leak);
        }
      }
      // The slope of log(sigmoid(z)) is sigmoid(-z).
      for (float& z : token.z) z = -z;
      each(token.g, token.z, sigmoid);
      for (int64_t i = 0; i < size; ++i)
        for (int m = 0; m < 2; ++m)
          dx[(n * size + i) * FIELDS + DECAY + m] = from.g[place(in, n, i) + m] * token.g[2 * i + m];
    }
  }
}

}  // extern "C"
''',
    'rms_norm.cpp': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// y = weight * x / sqrt(mean(x^2) + eps) along rows, x and y [ROWS, SIZE], weight [SIZE], rstd [ROWS] the inverse root
// (null where nobody asks).

#include <cmath>

#include "kernel.h"

struct Inputs {
  const float *x, *weight;
  int64_t rows, size, threads;
  double eps;
};

namespace {

// Sum over a row of term(c), which is given a whole vector of columns or one column.
template <typename Whole, typename Single>
inline float over(int64_t size, Whole whole, Single single) {
  vec sums[2] = {};
  int64_t c = 0;
  for (; c + 2 * LANES <= size; c += 2 * LANES) {
    sums[0] += whole(c);
    sums[1] += whole(c + LANES);
  }
  if (c + LANES <= size) {
    sums[0] += whole(c);
    c += LANES;
  }
  float total = sum(sums[0] + sums[1]);
  for (; c < size; ++c) total += single(c);
  return total;
}

inline vec at(const float* x) { return *reinterpret_cast<const loose*>(x); }

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y, float* rstd) {
  const Inputs in = *inputs;
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t row = 0; row < in.rows; ++row) {
    const float *x = in.x + row * in.size, *w = in.weight;
    float* __restrict__ to = y + row * in.size;
    const float squares = over(
        in.size, [&](int64_t c) { return at(x + c) * at(x + c); }, [&](int64_t c) { return x[c] * x[c]; });
    const float r = 1 / std::sqrt(squares / in.size + (float)in.eps);
    for (int64_t c = 0; c < in.size; ++c) to[c] = x[c] * r * w[c];
    if (rstd) rstd[row] = r;
  }
}

// Writes dx, adds to d_weight (null where nobody asks).
void backward(const Inputs* inputs, const float* rstd, const float* dy, float* dx, float* d_weight) {
  const Inputs in = *inputs;
#pragma omp parallel num_threads(in.threads)
  {
    std::vector<float> own(d_weight ? in.size : 0);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < in.rows; ++row) {
      const float *x = in.x + row * in.size, *w = in.weight, *from = dy + row * in.size;
      float* __restrict__ to = dx + row * in.size;
      const float r = rstd[row];
      const float along = over(
          in.size, [&](int64_t c) { return at(x + c) * at(w + c) * at(from + c); },
          [&](int64_t c) { return x[c] * w[c] * from[c]; });
      const float back = along * r * r * r / in.size;
      for (int64_t c = 0; c < in.size; ++c) to[c] = r * w[c] * from[c] - back * x[c];
      float* __restrict__ sums = own.data();
      if (d_weight)
        for (int64_t c = 0; c < in.size; ++c) sums[c] += from[c] * x[c] * r;
    }
#pragma omp critical
    for (int64_t c = 0; d_weight && c < in.size; ++c) d_weight[c] += own[c];
  }
}

}  // extern "C"
''',
    'short_conv.cpp': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Depthwise convolution along the real tokens of each document, y [B, T, D], weight and its gradient [D, WIDTH], bias
// [D] (may be null). x is [B, T, D] with `row` numbers from one row of the batch to the next and `token` between tokens.
// Compiled for one WIDTH, for BEFORE earlier tokens in a window, and for SILU (1 ends in a SiLU).
// skip and documents [B, T] may be null; a token with skip != 0 is padding, and its y and dx stay as they are.

#include <memory>

#include "kernel.h"

namespace {

constexpr int64_t BLOCK = 512;  // the most channels that one task takes through all rows

struct Inputs {
  const float *x, *weight, *bias;
  const uint8_t* skip;
  const int64_t* documents;
  int64_t batch, length, channels, threads, row, token;
};

alignas(64) const float ZEROS[BLOCK] = {};

// The tokens of a row that are no padding, each with its document.
struct Row {
  std::vector<int64_t> at, place, document;  // in [B, T] and where it begins in x

  Row(const Inputs& in, int64_t b) {
    for (int64_t s = 0; s < in.length; ++s) {
      const int64_t t = b * in.length + s;
      if (in.skip && in.skip[t]) continue;
      at.push_back(t);
      place.push_back(b * in.row + s * in.token);
      document.push_back(in.documents ? in.documents[t] : 0);
    }
  }

  int64_t count() const { return at.size(); }
  bool together(int64_t i, int64_t j) const { return j >= 0 && j < count() && document[i] == document[j]; }
};

// Where the channels of the tokens in the window of token i begin; zeros where there is no token.
void window(const Inputs& in, const Row& row, int64_t i, int64_t first, const float* (&seen)[WIDTH]) {
  for (int o = 0; o < WIDTH; ++o) {
    const int64_t j = i + o - BEFORE;
    seen[o] = row.together(i, j) ? in.x + row.place[j] + first : ZEROS;
  }
}

// What belongs to each channel of a block, in WIDTH rows.
struct Weights {
  alignas(64) float rows[WIDTH][BLOCK] = {}, bias[BLOCK] = {};

  void load(const Inputs& in, int64_t first, int64_t size) {
    for (int64_t c = 0; c < size; ++c)
      for (int o = 0; o < WIDTH; ++o) rows[o][c] = in.weight[(first + c) * WIDTH + o];
    if (in.bias) std::memcpy(bias, in.bias + first, size * sizeof(float));
  }
};

// What a task works with; for wide windows more than a stack holds.
struct Reading {
  Weights weights;
  const float* seen[WIDTH];
};
struct Learning {
  Weights weights;
  const float* seen[WIDTH];
  Weights slopes;
  alignas(64) float grads[WIDTH][BLOCK] = {};  // of the latest WIDTH sums
  const float* later[WIDTH];
};

// y = first + sum_o weights[o] rows[o]
inline void weigh(const Weights& weights, const float* first, const float* const (&rows)[WIDTH], int64_t size,
                  float* __restrict__ y) {
  for (int64_t c = 0; c < size; ++c) {
    float total = first[c];
    for (int o = 0; o < WIDTH; ++o) total += weights.rows[o][c] * rows[o][c];
    y[c] = total;
  }
}

int64_t block_of(const Inputs& in) {
  const int64_t share = (in.channels + in.threads - 1) / in.threads, size = (share + 63) / 64 * 64;
  return size < BLOCK ? size : BLOCK;
}

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y) {
  const Inputs in = *inputs;
  const int64_t block = block_of(in);
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
  for (int64_t first = 0; first < in.channels; first += block) {
    const int64_t size = in.channels - first < block ? in.channels - first : block;
    const auto work = std::make_unique<Reading>();
    auto& [weights, seen] = *work;
    weights.load(in, first, size);
    alignas(64) float sums[BLOCK] = {};
    for (int64_t b = 0; b < in.batch; ++b) {
      const Row row(in, b);
      for (int64_t i = 0; i < row.count(); ++i) {
        window(in, row, i, first, seen);
        float* to = y + row.at[i] * in.channels + first;
        weigh(weights, weights.bias, seen, size, SILU ? sums : to);
        if (!SILU) continue;
        for (int64_t c = 0; c < size; c += LANES) {
          vec& s = *reinterpret_cast<vec*>(sums + c);
          s *= sigmoid(s);
        }
        std::memcpy(to, sums, size * sizeof(float));
      }
    }
  }
}

// Writes dx [B, T, D], d_weight and, if not null, d_bias. A token's dx is ready when the last window that sees it has its gradient.
void backward(const Inputs* inputs, const float* dy, float* dx, float* d_weight, float* d_bias) {
  const Inputs in = *inputs;
  const int64_t block = block_of(in);
  constexpr int AFTER = WIDTH - 1 - BEFORE;
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
  for (int64_t first = 0; first < in.channels; first += block) {
    const int64_t size = in.channels - first < block ? in.channels - first : block;
    const auto work = std::make_unique<Learning>();
    auto& [weights, seen, slopes, grads, later] = *work;
    weights.load(in, first, size);
    for (int64_t b = 0; b < in.batch; ++b) {
      const Row row(in, b);
      for (int64_t i = 0; i < row.count() + BEFORE; ++i) {
        if (i < row.count()) {
          const float* from = dy + row.at[i] * in.channels + first;
          float* const grad = grads[i % WIDTH];
          window(in, row, i, first, seen);
          if (SILU) {
            weigh(weights, weights.bias, seen, size, grad);
            for (int64_t c = 0; c < size; c += LANES) {
              vec& s = *reinterpret_cast<vec*>(grad + c);
              const vec open = sigmoid(s);
              s = open * (1 + s * (1 - open));
            }
            for (int64_t c = 0; c < size; ++c) grad[c] *= from[c];
          } else {
            std::memcpy(grad, from, size * sizeof(float));
          }
          for (int o = 0; o < WIDTH; ++o) {
            float* __restrict__ to = slopes.rows[o];
            for (int64_t c = 0; c < size; ++c) to[c] += seen[o][c] * grad[c];
          }
          for (int64_t c = 0; d_bias && c < size; ++c) slopes.bias[c] += grad[c];
        }
        const int64_t j = i - BEFORE;
        if (j < 0 || j >= row.count()) continue;
        for (int o = 0; o < WIDTH; ++o) {
          const int64_t n = j + BEFORE - o;  // sees j at its place o
          later[o] = n >= j - AFTER && row.together(j, n) ? grads[n % WIDTH] : ZEROS;
        }
        weigh(weights, ZEROS, later, size, dx + row.at[j] * in.channels + first);
      }
    }
    for (int64_t c = 0; c < size; ++c)
      for (int o = 0; o < WIDTH; ++o) d_weight[(first + c) * WIDTH + o] = slopes.rows[o][c];
    if (d_bias) std::memcpy(d_bias + first, slopes.bias, size * sizeof(float));
  }
}

}  // extern "C"
''',
    'taylor.h': r'''// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The features of SIZE numbers x: 1, x / SIZE^(1/4), and x_i x_j / sqrt(SIZE) for i <= j, those of i = j over sqrt 2.

#pragma once

#include <cmath>

#include "blocks.h"

namespace {

template <int SIZE>
struct Taylor {
  static constexpr int FEATURES = 1 + SIZE + SIZE * (SIZE + 1) / 2, WIDE = rounded(SIZE);
  static constexpr int SLACK = rounded(FEATURES) + LANES;  // rows are written and read in whole vectors, and beyond

  // x, and zeros after it.
  struct Padded {
    alignas(64) float at[WIDE + LANES] = {};
    explicit Padded(const float* x) { std::memcpy(at, x, SIZE * sizeof(float)); }
  };

  static vec first_of_pairs() {
    vec weights = 1 - (vec){};
    weights[0] = float(M_SQRT1_2);
    return weights;
  }

  // Writes SLACK numbers, of which those beyond the features mean nothing.
  static void map(const float* from, float* to) {
    const Padded x(from);
    const float first = 1 / std::sqrt(std::sqrt(float(SIZE))), second = 1 / std::sqrt(float(SIZE));
    *to++ = 1;
    for (int j = 0; j < SIZE; j += LANES) unaligned(to + j) = first * aligned(x.at + j);
    to += SIZE;
    _Pragma("GCC unroll 16") for (int i = 0; i < SIZE; to += SIZE - i++) {
      for (int j = 0; j < SIZE - i; j += LANES) {
        const vec pairs = second * x.at[i] * unaligned(x.at + i + j);
        unaligned(to + j) = j ? pairs : pairs * first_of_pairs();
      }
    }
  }

  // The gradient of x [WIDE], from that of its features, which SLACK numbers hold, zeros after the last.
  static void gradient(const float* from, const float* d, float* out) {
    const Padded x(from);
    const float first = 1 / std::sqrt(std::sqrt(float(SIZE))), second = 1 / std::sqrt(float(SIZE));
    alignas(64) float total[WIDE + LANES] = {};
    ++d;
    for (int j = 0; j < SIZE; j += LANES) aligned(total + j) = first * unaligned(d + j);
    d += SIZE;
    for (int g = 0; g < SIZE; g += LANES) {
      vec own[LANES] = {};
      _Pragma("GCC unroll 16") for (int i = g; i < g + LANES && i < SIZE; d += SIZE - i++) {
        for (int j = 0; j < SIZE - i; j += LANES) {
          const vec pairs = second * (j ? unaligned(d + j) : unaligned(d + j) * first_of_pairs());
          own[i - g] += pairs * unaligned(x.at + i + j);
          unaligned(total + i + j) += x.at[i] * pairs;
        }
      }
      aligned(total + g) += sums_of<LANES>(own);
    }
    std::memcpy(out, total, WIDE * sizeof(float));
  }
};

}  // namespace
''',
}
_INCLUDE = re.compile(r'^#include "(\w+\.h)"', re.MULTILINE)


def kernel_files(name: str) -> list[str]:
    """The file of a kernel and the headers that it includes."""
    found = [f"{name}.cpp"]
    for file in found:  # which grows on the way
        found += [header for header in _INCLUDE.findall(KERNEL_SOURCES[file]) if header not in found]
    return found


def _cpu_flags() -> bytes:
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return b""


@cache
def _processor() -> bytes:
    """What tells processors apart, for a home folder that several machines share."""
    return platform.machine().encode() + _cpu_flags()


@cache
def _hash(name: str) -> bytes:
    """What the libraries of a kernel depend on, along with their sizes: its source, its headers, the processor."""
    sources = "".join(KERNEL_SOURCES[file] for file in kernel_files(name))
    return hashlib.blake2b(sources.encode() + _processor(), digest_size=10).digest()


class HeadKernel(NamedTuple):
    """A kernel compiled for given head sizes.

    Args:
        name: of its source file.
        state_size: numbers in the state of one head.
        sizes: what is defined when it is compiled.
    """

    name: str
    state_size: int
    sizes: tuple[tuple[str, int], ...]


def load_kernel(name: str, **sizes: int) -> ctypes.CDLL | None:
    """The library compiled from `<name>.cpp` with `sizes` defined, with a `forward` and mostly a `backward` function;
    it is compiled if the cache folder does not hold it. None if it cannot be compiled, which is logged once.

    `LALM_CPP=0` in the environment turns compiling off; `LALM_CACHE` names the folder of the compiled libraries.
    """
    return _load(name, tuple(sizes.items()))


def _load(name: str, sizes: tuple[tuple[str, int], ...]) -> ctypes.CDLL | None:
    plan = _plan(name, sizes)
    if plan is not None and not plan.is_tried:
        plan.load()
    return None if plan is None else plan.kernel


@torch.compiler.assume_constant_result
def has_library(name: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    """Whether `load_kernel` gives a library. A graph that is compiled takes the answer of that moment."""
    return _load(name, sizes) is not None


def why_no_kernel(name: str, **sizes: int) -> str | None:
    """Why `load_kernel` gives None, which it is asked first; None if it gives a library."""
    if load_kernel(name, **sizes) is not None:
        return None
    if (plan := _plan(name, tuple(sizes.items()))) is not None:
        return plan.problem
    return "LALM_CPP=0 is set" if os.environ.get("LALM_CPP") == "0" else "its source is not installed"


def preload_kernel(name: str, **sizes: int) -> None:
    """Load a library that is compiled already: models call this when they are made, so that their first forward does
    not wait for the disk."""
    plan = _plan(name, tuple(sizes.items()))
    if plan is not None and not plan.is_tried and os.path.isfile(plan.library):
        plan.load()


def preload_heads(kernel: HeadKernel | None) -> None:
    """`preload_kernel` for the heads of a mixer."""
    if kernel is not None:
        preload_kernel(kernel.name, **dict(kernel.sizes))


@dataclass
class _Plan:
    """A kernel of fixed sizes, and where its library lies."""

    name: str
    compiler: tuple[str, ...]  # words of a command; none for the machine's own
    defines: tuple[str, ...]
    library: str
    is_tried: bool = False
    kernel: ctypes.CDLL | None = None
    problem: str = ""  # why there is no kernel

    def load(self) -> None:
        with _loading.lock:
            if self.is_tried:  # by a thread that this one has waited for
                return
            try:
                self.kernel = _load_cached(self.library) or _build(self)
            except (_NoCompiler, OSError, subprocess.SubprocessError) as error:
                _log_failure(self, error)
            self.is_tried = True  # set last: a thread that reads it takes the kernel as it then is


class _NoCompiler(Exception):
    """There is none, or it has been waited for in vain."""


class _Loading:
    """Who loads: one thread at a time, so that no two wait for a compiler to make the same library."""

    def __init__(self):
        self.has_timed_out = False  # a compiler was not done in time
        self.renew()

    def renew(self) -> None:
        self.lock = threading.Lock()


_loading = _Loading()
if hasattr(os, "register_at_fork"):  # a child has not the thread that may hold the lock
    os.register_at_fork(after_in_child=_loading.renew)


# The first forward of a process waits for this: hence strings for paths, and no look for a compiler.
@cache
def _plan(name: str, sizes: tuple[tuple[str, int], ...]) -> _Plan | None:
    if os.environ.get("LALM_CPP") == "0" or f"{name}.cpp" not in KERNEL_SOURCES:
        logger.info(f"{name}: no C++ kernel (switched off or no source).")
        return None
    compiler = _named_compiler(os.environ.get("CXX"))
    defines = tuple(f"-D{key}={value}" for key, value in sorted(sizes))
    options = " ".join([*compiler, _LEVELS.get(name, "-O3"), *_FLAGS, *defines])
    key = hashlib.blake2b(_hash(name) + options.encode(), digest_size=10)
    return _Plan(name, compiler, defines, os.path.join(_folder(), f"{name}-{key.hexdigest()}.so"))


@cache
def _named_compiler(name: str | None) -> tuple[str, ...]:
    """The command that `CXX` holds, a path or words as for a shell ("ccache g++"). Empty, for the machine's own
    compiler, if it holds nothing or, with a warning, no program of this machine."""
    if not name or not name.strip():
        return ()
    if shutil.which(name):  # a path with spaces
        return (name,)
    try:
        words = tuple(shlex.split(name))
    except ValueError:  # an open quotation
        words = ()
    if words and shutil.which(words[0]):
        return words
    logger.warning(f"CXX={name!r} names no program on this machine: C++ kernels are made by its own compiler instead.")
    return ()


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p | None:
    """The address of a contiguous tensor, for a kernel; the caller keeps the tensor alive."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


_NO_KERNEL = (
    "There is no C++ kernel for these tensors: it needs the CPU, a C++ compiler and float32 or less. Use "
    "implementation='auto'."
)


def require_kernel(kernel: HeadKernel | None, *tensors: torch.Tensor | None) -> ctypes.CDLL:
    """The library of the kernel for these tensors.

    Raises:
        RuntimeError: there is none.
    """
    for x in tensors:
        if x is not None and not x.is_cpu:
            raise RuntimeError(_NO_KERNEL)
    library = None if kernel is None else _load(kernel.name, kernel.sizes)
    if library is None:
        raise RuntimeError(_NO_KERNEL)
    return library


def refuse_float64(*tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError if a tensor is of float64, which no kernel computes in."""
    if compute_dtype(*tensors) == torch.float64:
        raise RuntimeError(_NO_KERNEL)


def boundaries(layout: SequenceLayout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where a row has padding and where documents start, `[B, T]` each, for a kernel."""
    skip, starts = None if layout.mask is None else (~layout.mask).contiguous(), layout.starts()
    return skip, None if starts is None else starts.contiguous()


def _folder() -> str:
    if given := os.environ.get("LALM_CACHE"):
        return os.path.abspath(given)
    kept = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(kept):  # which does not count, says the standard
        kept = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(kept, "lalm")


def _load_cached(path: str) -> ctypes.CDLL | None:
    """The library that is kept there. None if it is not, or not as it was written: running one that was cut off kills
    the process. Nor is one loaded that another user may have put there."""
    if not (os.path.isfile(path) and _is_private(os.path.dirname(path)) and _is_private(path)):
        return None
    try:
        content = _read(path)
        if content[-_CHECKSUM_SIZE:] == _checksum(content[:-_CHECKSUM_SIZE]):
            return _load_library(path)
    except OSError as error:
        logger.info(f"{path} cannot be loaded ({error}).")
    logger.warning(f"{path} is damaged or not for this machine: it is compiled again.")
    return None


def _is_private(path: str) -> bool:
    """Whether only this user, or root, can have written there."""
    if not hasattr(os, "getuid"):  # Windows
        return True
    found = os.stat(path)
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_SIZE).digest()


def _load_library(path: str) -> ctypes.CDLL:
    kernel = ctypes.CDLL(path)
    for entry in ("forward", "backward"):
        if hasattr(kernel, entry):
            getattr(kernel, entry).restype = None
    return kernel


def _build(plan: _Plan) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="lalm-") as scratch:
        made = os.path.join(scratch, os.path.basename(plan.library))
        _compile(plan, made)
        try:
            _store(made, plan.library)
            return _load_library(plan.library)
        except OSError as error:
            folder = os.path.dirname(plan.library)
            logger.warning_once(
                f"C++ kernels cannot be kept in {folder} ({error.strerror or error}), so every process compiles them "
                "again: set LALM_CACHE to a folder that you, and nobody else, can write to."
            )
            return _load_library(made)


def _store(made: str, library: str) -> None:
    """Put a library where later processes look, whole or not at all, even if the machine stops."""
    folder, content = os.path.dirname(library), _read(made)
    if not os.path.isabs(folder):  # no home folder
        raise NotADirectoryError(f"{folder} is no absolute path")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if not _is_private(folder):
        raise PermissionError(f"it belongs to another user, or others may write there; try chmod 700 {folder}")
    scratch = f"{library}.{uuid.uuid4().hex}"
    try:
        with open(scratch, "xb", opener=partial(os.open, mode=0o600)) as file:
            file.write(content + _checksum(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, library)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(scratch)
        raise


def _compile(plan: _Plan, made: str) -> None:
    if _loading.has_timed_out:
        raise _NoCompiler("the compiler was not done in time before")
    own = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = plan.compiler or ((own,) if own else ())
    if not compiler:
        logger.warning_once(
            "There is no C++ compiler: plain torch runs in place of the kernels, slower. Install g++, or set CXX."
        )
        raise _NoCompiler("there is no C++ compiler")
    folder = os.path.dirname(made)
    for file in kernel_files(plan.name):
        with open(os.path.join(folder, file), "w", encoding="utf-8") as source:
            source.write(KERNEL_SOURCES[file])
    end = time.monotonic() + _PATIENCE
    for index, optional in enumerate(_OPTIONAL):
        flags = (_LEVELS.get(plan.name, "-O3"), *_FLAGS, *optional, *plan.defines)
        try:
            _run([*compiler, *flags, os.path.join(folder, f"{plan.name}.cpp"), "-o", made], end)
            break
        except subprocess.CalledProcessError:
            if index == len(_OPTIONAL) - 1:
                raise


def _run(command: list[str], end: float) -> None:
    """Run a command, which with all that it starts is stopped at `end`.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be started, fails, or is not done in time.
    """
    streams: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **streams) as process:
        try:
            _, problem = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except BaseException:  # an interrupt, too
            with contextlib.suppress(OSError, AttributeError):  # Windows has no groups
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=problem)


def _log_failure(plan: _Plan, error: Exception) -> None:
    """Log why there is no kernel; a warning where the machine has a compiler."""
    detail = str(getattr(error, "stderr", None) or error).strip()[-300:]
    if isinstance(error, subprocess.TimeoutExpired):
        _loading.has_timed_out = True
        detail = f"the compiler was not done in {_PATIENCE:g} seconds and is not asked again in this process"
    plan.problem = detail
    given = f" by CXX={shlex.join(plan.compiler)!r}" if plan.compiler else ""
    say = logger.info if isinstance(error, _NoCompiler) else logger.warning
    say(f"{plan.name}: no C++ kernel{given}, plain torch runs instead ({detail}).")


# ---- lalm.modeling.ops.dispatch ----
"""The one place that decides which code runs: every threshold with its reason, and every choice between forms,
libraries and kernels.

A choice depends on the shapes, dtypes and device of a call, on what surrounds it (autograd, torch.compile, torch.func)
and, where a form is only safe for some numbers, on one look at them. It never depends on what has been compiled
before: with an empty and with a full kernel cache the same call runs the same code.
"""


import ctypes
import importlib.util
import inspect
import operator
import os
from collections.abc import Callable, Mapping
from functools import cache, wraps

import torch
from transformers.utils import logging


# Under transformers' own logger, so that its verbosity settings hold.
logger_dispatch = logging.get_logger("transformers.lalm")

# ---- Recurrences ----
# Tokens. For fewer, stepping through them is faster than preparing one chunk.
SHORT = 8
# State size per head, in numbers. Smaller states are not worth a kernel.
SMALLEST_STATE = 512
# Multiply-adds. A call with more of them earns the seconds of compiling a kernel for its size of head ...
EARNS_COMPILING = 1 << 21
# ... and counts as one of at least so many tokens, for those that will follow it.
TOKENS_TO_COME = 256
# Sum of log decays in a chunk. exp(60) leaves a factor of 10^12 below float32's largest number for products and sums;
# beyond it the chunk form takes exponents that are never positive.
MAX_DECAY = 60.0
# Log of a feature. Sums of numbers up to e^40 = 2e17 stay far from float32's largest; larger keys need a running
# scale.
MAX_LOG_FEATURE = 40.0
# Tokens of a bucket. Smaller buckets have more numbers in their sums than in their tokens.
SMALLEST_GRID = 16
# A token whose numbers exceed the mean of its chunk by this factor is large among them (see `chunks.running_sums`).
LARGE_TOKEN = 8.0
# Tokens of a text from which on an encoder's layer runs in segments if nothing keeps its activations, and tokens of a
# segment. Below, q, k and v of the whole text take little memory; segments project every token twice.
LONG_TEXT, SEGMENT_OF_TEXT = 1 << 14, 1 << 10
# Numbers of one set of pairwise matrices of the dual-state rule to work on at once: what a core's cache holds.
PAIRS_AT_ONCE = 1 << 19

# ---- Matrix products on the CPU ----
# Rows. With fewer, a product waits for the weights to come from memory, and our kernel streams them; where MKL is
# slow, so for short sequences.
FEW_ROWS, SHORT_SEQUENCE = 16, 64
# Numbers of a weight. A smaller one is in the cache anyway.
WORTH_STREAMING = 1 << 16
# Multiply-adds. oneDNN generates code for every new shape in 0.2 to 1 ms; smaller products do not earn that back.
EARNS_ONEDNN = 1 << 25
# A weight gradient with so many times more rows than columns is made transposed: oneDNN copies its first factor.
TALL = 4
# Logits of the chunked cross-entropy that exist at once: 64 MiB in float32.
LOGITS_AT_ONCE = 1 << 24
# Activations of an MLP that exist at once if no backward pass keeps them; if one does, their gradients come in pieces
# so many times larger, since every piece adds to the gradients of the weights.
WIDE_AT_ONCE, WIDER_WITH_GRADIENTS = 1 << 20, 4

# ---- Fused elementwise kernels on the CPU ----
# Numbers. For fewer, torch's operations cost no more than recording the kernel for a backward pass ...
WORTH_A_KERNEL = 1 << 16
# ... which nothing does without gradients: there the kernel of the norm pays for a single token, at 0.6 of the time of
# torch's five operations. Narrower models compile nothing for it.
WORTH_A_KERNEL_WITHOUT_GRADIENTS = 1 << 7
# Multiply-adds of a short convolution that are worth its kernel.
WORTH_A_CONV_KERNEL = 1 << 17
# Numbers of LAM's gates that are worth their kernel.
WORTH_A_GATE_KERNEL = 1 << 9
# Numbers that are worth more than one thread; of LAM's gates, each of which takes longer.
WORTH_THREADS, GATES_WORTH_THREADS = 1 << 16, 1 << 14

# The CPU features that compute with a 16-bit type.
_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def choose(
    rule: str,
    implementation: str,
    q: torch.Tensor,
    v: torch.Tensor,
    forms: Mapping[str, Callable],
    kernel: HeadKernel | None = None,
) -> str:
    """The name of the form in which a rule runs.

    Args:
        rule: the name of the op, for the log.
        implementation: "auto" takes "cpp" for heads that are worth `kernel`, else "recurrent" for a few tokens
            (decoding), else "fla" for 16-bit values on a GPU if flash-linear-attention is installed (`lalm[gpu]`) and
            nothing is being compiled, else "chunk". The name of a form takes that form whatever the input.
        q: queries `[B, T, H, K]` as the form gets them.
        v: values `[B, T, H, V]` in the dtype of the model.
        forms: what there is of "recurrent", "chunk", "fla", "triton" and "cpp".
        kernel: the C++ kernel that "cpp" runs on, None if there is none for this call.

    Raises:
        ValueError: "fla" or "triton" for tensors that are not on a GPU, or a form that does not exist for this call.
    """
    runs = kernel is not None and _runs_kernel(kernel, q, must_pay=implementation == "auto")
    name = implementation
    if name == "auto":
        is_short = not has_open_length() and v.shape[1] < SHORT
        name = "cpp" if runs else "recurrent" if is_short else "chunk"
        if name == "chunk" and "fla" in forms and _is_for_fla(v):
            name = "fla"
    if name in ("fla", "triton") and not _reaches_gpu(name, v):
        raise ValueError(
            f"linear_attn_implementation={name!r} runs Triton kernels on a GPU, and the input is on the CPU: move the "
            "model to the GPU or set linear_attn_implementation='auto'."
        )
    if not torch.compiler.is_compiling():
        _announce(rule, name, implementation, v.device.type)
    if name not in forms or (name == "cpp" and not runs):
        reason = f"no {name} kernel for a GPU"
        if name == "cpp":
            reason = (
                "no C++ kernel here, which needs the CPU, a C++ compiler, float32 or less, and heads with a state of "
                f"at least {SMALLEST_STATE} numbers"
            )
        raise ValueError(
            f"linear_attn_implementation={name!r}: {rule} has {reason}; set linear_attn_implementation='auto'."
        )
    return name


def in_form(op: Callable, form: str) -> Callable:
    """`op` with its argument `implementation` fixed: one of the field's pair `recurrent_<rule>` and `chunk_<rule>`."""

    @wraps(op)
    def run(*args, **kwargs):
        return op(*args, implementation=form, **kwargs)

    signature = inspect.signature(op)
    fixed = ("implementation",) if form == "chunk" else ("implementation", "chunk_size")
    kept = [x for x in signature.parameters.values() if x.name not in fixed]
    run.__name__ = run.__qualname__ = f"{form}_{op.__name__}"
    run.__doc__ = f"`{op.__name__}` with `implementation={form!r}`; same arguments and results."
    run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return run


def _runs_kernel(kernel: HeadKernel, q: torch.Tensor, must_pay: bool) -> bool:
    """Whether the C++ kernel runs for heads like those of `q [B, T, H, K]`, in a graph that is compiled too; not in a
    program that is exported, which is to run where there is none."""
    if kernel.state_size < SMALLEST_STATE or not q.is_cpu or q.dtype == torch.float64:
        return False
    if torch.compiler.is_exporting() or is_looked_into():
        return False
    batch, length, heads = q.shape[:3]
    work = batch * max(length, TOKENS_TO_COME) * heads * kernel.state_size
    if must_pay and work < EARNS_COMPILING:
        return False
    sizes = kernel.sizes
    if torch.compiler.is_compiling():  # a graph for open sizes of heads would need a kernel for each
        sizes = tuple((name, operator.index(size)) for name, size in sizes)
    return has_library(kernel.name, sizes)


def _reaches_gpu(name: str, v: torch.Tensor) -> bool:
    """Whether GPU kernels run for `v`: it is not on the CPU, or Triton interprets its kernels there."""
    return v.device.type != "cpu" or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1")


@cache
def has_fla() -> bool:
    """Whether flash-linear-attention and Triton are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def _is_for_fla(v: torch.Tensor) -> bool:
    """Whether to use the kernels of flash-linear-attention for `v`: half precision, on CUDA, not under torch.compile.
    They would round float32 to TF32, which torch does only when asked to, and a compiled graph breaks at them."""
    is_half = v.dtype in (torch.bfloat16, torch.float16)
    return v.device.type == "cuda" and is_half and not torch.compiler.is_compiling() and has_fla()


@cache
def _announce(rule: str, name: str, implementation: str, device: str) -> None:
    logger_dispatch.info(f"{rule}: the {name} form runs on {device} (linear_attn_implementation={implementation!r}).")


def tokens_of_segments(hidden_states: torch.Tensor, layout: SequenceLayout) -> int | None:
    """Tokens of a segment if a layer that reads in both directions is to take `hidden_states [B, T, D]` in segments,
    None for all at once: texts are long, nothing records gradients, and there is neither padding nor a boundary."""
    if torch.is_grad_enabled() or hides_values() or hidden_states.shape[1] < LONG_TEXT:
        return None
    return SEGMENT_OF_TEXT if layout.mask is None and layout.segments is None else None


# ---- Choices that take one look at the numbers ----


@torch.no_grad()
def chunks_of_decays(g: torch.Tensor | None, chunk_size: int) -> tuple[int, bool]:
    """The size of chunks for log decays `g [B, T, H, D]`, and whether exp of their sums can be factored: in chunks as
    asked for, else in quarters of them. While compiling, which allows no look, the bounded form serves every gate."""
    if g is None or g.numel() == 0:
        return chunk_size, True
    if not hides_values():
        for size in (chunk_size, chunk_size // 4):
            if size and _strongest_decay(g, size) <= MAX_DECAY:
                return size, True
    return chunk_size, False


def _strongest_decay(g: torch.Tensor, size: int) -> float:
    missing = -g.shape[1] % size
    windows = torch.nn.functional.pad(g, (0, 0, 0, 0, 0, missing)) if missing else g
    return -windows.unflatten(1, (-1, size)).sum(2, dtype=compute_dtype(g)).min().item()


@torch.no_grad()
def needs_no_scale(log_features: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether sums of exp(log_features) are safe as they are, on top of a state with the log `scale`. While compiling,
    which allows no look, the answer is no."""
    if hides_values():
        return False
    if log_features.numel() == 0:
        return True
    outside = log_features.amax() > MAX_LOG_FEATURE
    return not bool(outside if scale is None else outside | scale.any())


@torch.no_grad()
def must_separate(layout: SequenceLayout, *tensors: torch.Tensor | None) -> bool:
    """Whether documents must not meet in one product, where those of others get the weight 0: NaN and infinity would
    reach them. It looks only where documents are packed and a look is allowed."""
    if layout.segments is None or hides_values():
        return False
    # A sum is finite if all numbers are (or overflows, which costs time only); float32 holds more of 16-bit numbers.
    sums = [x.sum(dtype=None if x.dtype == torch.float64 else torch.float32) for x in tensors if x is not None]
    return not all(bool(total.isfinite()) for total in sums)


def no_token_is_large(sizes: torch.Tensor) -> bool:
    """Whether the sizes `[..., C, 1]` of the tokens of every chunk are known to be of one order. Elsewhere than on a
    CPU a look would cost more than it saves."""
    if sizes.device.type != "cpu" or hides_values():
        return False
    return bool((sizes.amax(-2) <= LARGE_TOKEN * sizes.mean(-2)).all())


def may_hold(condition: torch.Tensor) -> bool:
    """Whether a condition holds for any row, or might, where a look is not allowed or costs more than it saves."""
    return hides_values() or condition.device.type != "cpu" or bool(condition.any())


def chunks_at_once(pairs: int, chunks: int) -> int | None:
    """How many chunks with so many pairs of tokens each the dual-state rule works on at once; None for all."""
    if has_open_length() or chunks == 1 or pairs * chunks <= PAIRS_AT_ONCE or not pairs:
        return None
    return max(1, PAIRS_AT_ONCE // pairs)


# ---- Matrix products ----


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor computes with numbers of `dtype`; True where nothing is known of it."""
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if found.get("architecture") != "x86_64" or dtype not in _INSTRUCTIONS:
        return True
    return any(found.get(name) for name in _INSTRUCTIONS[dtype])


def product_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to multiply `x [..., D]` with a matrix if the caller asks for `dtype`.

    An x86 processor without instructions for bfloat16 or float16 unpacks each number for every product it enters: a
    product is then 4 (bfloat16) to 10 times (float16) slower than one of both factors cast to float32, which also
    rounds less. A few rows wait for the weights, which casting only delays.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < FEW_ROWS * x.shape[-1]:
        return dtype
    return dtype if has_instructions(dtype) else torch.float32


@cache
def mkl_is_slow() -> bool:
    """Whether MKL leaves this processor's widest registers idle and oneDNN is at hand, as far as is known."""
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()
    idle = found.get("avx512_f") and "AMD" in found.get("cpu_name", "") and torch.backends.mkl.is_available()
    return bool(idle and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def product_library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> ctypes.CDLL | str | None:
    """By what to multiply `x [..., D]` and `weight [N, D]`: "onednn", our kernel for few rows, or None for what torch
    takes. Decoding asks this for every matrix."""
    if torch.compiler.is_compiling():
        return None
    numbers, size = x.numel(), x.shape[-1]
    if numbers >= FEW_ROWS * size and numbers * weight.shape[0] >= EARNS_ONEDNN and mkl_is_slow():
        switched_off = not torch._C._get_mkldnn_enabled()  # by torch.backends.mkldnn.flags
        return None if switched_off or is_looked_into() or not _are_plain(x, weight, bias) else "onednn"
    if weight.numel() < WORTH_STREAMING or numbers >= (SHORT_SEQUENCE if mkl_is_slow() else FEW_ROWS) * size:
        return None
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias)):
        return None
    fits = weight.ndim == 2 and size == weight.shape[1] and weight.is_contiguous()
    return load_kernel("few_rows") if fits and not is_looked_into() and _are_plain(x, weight, bias) else None


def _are_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the product is one of float32 numbers in this machine's memory, and nothing else: subclasses of Tensor
    (quantised or distributed weights) have products of their own, and so has autocast."""
    for y in (x, weight) if bias is None else (x, weight, bias):
        if type(y) not in _PLAIN or y.dtype != torch.float32 or not y.is_cpu:
            return False
    return not torch.is_autocast_enabled("cpu")


def pieces_of_mlp(x: torch.Tensor, width: int) -> int | None:
    """Rows of `x` that an MLP of `width` takes at once, None for all: on a CPU its wide activations then stay in the
    cache and take no memory that grows with the sequence."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    size = max(1, WIDE_AT_ONCE // width) * (WIDER_WITH_GRADIENTS if torch.is_grad_enabled() else 1)
    return size if x.numel() > size * x.shape[-1] else None


def rows_of_logits(vocab_size: int) -> int:
    """Tokens whose logits the chunked cross-entropy makes at once."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


# ---- Fused elementwise kernels ----


def _elementwise(name: str, *tensors: torch.Tensor | None, **sizes: int) -> ctypes.CDLL | None:
    """The kernel `name`, if it can compute with these tensors, which are of no graph that is compiled."""
    if is_looked_into():
        return None
    for x in tensors:  # decoding calls this some 30 times a token: no generator
        if x is not None and not (x.is_cpu and x.dtype != torch.float64):
            return None
    return load_kernel(name, **sizes)


def rms_norm_kernel(x: torch.Tensor, weight: torch.Tensor) -> ctypes.CDLL | None:
    """The kernel for the RMS norm of `x`, None for plain torch."""
    if torch.compiler.is_compiling():
        return None
    fewest = WORTH_A_KERNEL if torch.is_grad_enabled() else WORTH_A_KERNEL_WITHOUT_GRADIENTS
    return None if x.numel() < fewest else _elementwise("rms_norm", x, weight)


def activation_kernel(
    x: torch.Tensor, factor: torch.Tensor | None, number: int, generates_code: bool
) -> ctypes.CDLL | None:
    """The kernel for activation `number` of x, times `factor` if there is one; None for plain torch. `generates_code`:
    torch generates code for each new shape, which takes longer than a few numbers do."""
    if torch.compiler.is_compiling():
        return None
    is_large = x.numel() >= WORTH_A_KERNEL
    pays = factor is not None if is_large else generates_code and not torch.is_grad_enabled()
    if not pays or (factor is not None and factor.shape != x.shape):
        return None
    return _elementwise("activation", x, factor, ACT=number, GATED=int(factor is not None))


def short_conv_kernel(parts, weight: torch.Tensor, bias: torch.Tensor | None, **sizes: int) -> ctypes.CDLL | None:
    """The kernel for the short convolution of `parts [B, T, D_i]` by `weight [D, W]` and `bias`; None, plain torch."""
    if torch.compiler.is_compiling():
        return None
    work = parts[0].shape[0] * parts[0].shape[1] * weight.numel()
    return None if work < WORTH_A_CONV_KERNEL else _elementwise("short_conv", weight, bias, *parts, **sizes)


def runs_lam_gates(x: torch.Tensor, *tensors: torch.Tensor) -> bool:
    """Whether the kernel for LAM's gates from their projection `x` runs, in a graph that is compiled too."""
    if torch.compiler.is_exporting() or is_looked_into() or x.numel() < WORTH_A_GATE_KERNEL:
        return False
    on_cpu = all(y.is_cpu for y in (x, *tensors))
    return on_cpu and compute_dtype(x, *tensors) == torch.float32 and has_library("lam_gates", ())


def threads(numbers: int, worth: int = WORTH_THREADS) -> int:
    """How many threads a kernel over so many numbers uses."""
    return torch.get_num_threads() if numbers >= worth else 1


# ---- lalm.modeling.ops.kernels.kernel_op ----
"""How a C++ kernel becomes an op: run at once, recorded by autograd, or an op of torch in a compiled graph.

A kernel is compiled for the sizes of its heads, so its op is registered from Python, once for all sizes, and finds the
library when it runs. Outside of `torch.compile`, where going through torch's dispatcher would cost 5 us a call, the
kernel is called directly.
"""


import ctypes
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args, get_type_hints

import torch


_C_TYPES = {"double": ctypes.c_double, "int64_t": ctypes.c_int64}
_DECLARED = re.compile(r"(?:const )?(\w+)(.*)", re.DOTALL)


@cache
def structure(kernel: str, name: str) -> type[ctypes.Structure]:
    """The struct `name` of the kernel's C++ source, whose declaration there is the only one."""
    source = "\n".join(KERNEL_SOURCES[file] for file in kernel_files(kernel))
    found = re.search(rf"^struct {name} \{{(.*?)\}};", source, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{kernel}.cpp declares no struct {name}"
    fields: list[tuple[str, Any]] = []
    for declaration in re.sub(r"//.*", "", found[1]).split(";")[:-1]:
        declared = _DECLARED.fullmatch(declaration.strip())
        assert declared is not None, declaration
        for variable in declared[2].split(","):
            kind: Any = ctypes.c_void_p if "*" in variable else _C_TYPES[declared[1]]
            field, _, size = variable.strip(" *]\n").partition("[")
            fields.append((field, kind * int(size) if size else kind))
    # Without a dictionary, an instance takes no field that is not declared.
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})


def pack(kernel: str, name: str, **fields: Any) -> ctypes.Structure:
    """That struct with these fields, which must be all; pointers are addresses (see `address`)."""
    made = structure(kernel, name)
    if len(fields) != len(made._fields_):
        missing = {field for field, *_ in made._fields_} - fields.keys()
        raise TypeError(f"{kernel}.cpp, {name}: there is no value for {sorted(missing)}")
    return made(**fields)


def address(x: torch.Tensor | None) -> int | None:
    """Where the numbers of a contiguous tensor lie, for a kernel; the caller keeps the tensor alive."""
    return None if x is None else x.data_ptr()


def fresh(like: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Memory for what a kernel writes; it leaves out padded tokens."""
    return (torch.empty_like if skip is None else torch.zeros_like)(like, memory_format=torch.contiguous_format)


def _open_library(number: int = 0) -> torch.library.Library:
    """A namespace of this copy of the code: those saved with checkpoints may run in the same process."""
    try:
        return torch.library.Library(f"lalm_{number}" if number else "lalm", "DEF")
    except RuntimeError:  # another copy has it
        return _open_library(number + 1)


_library = _open_library()


class KernelOp:
    """A function of tensors that a C++ kernel computes. A rule derives a class, and makes one instance of it.

    Attributes of the class:
        name: of the op.
        Tensors: what it computes with, a NamedTuple; masks, which have no gradient, come last.
        Options: a NamedTuple of numbers.
        masks: how many these are.
        outputs: how many tensors it gives.
        extras: how many more it makes for the backward pass.
        read_again: how many of the outputs, the first ones, the backward pass may read.
    """

    name: str
    Tensors: Any
    Options: Any
    outputs: int
    masks = extras = read_again = 0

    def __init__(self) -> None:
        kinds = get_type_hints(self.Tensors)
        self.fields = len(kinds)
        self.function = _recorded(self)
        self.registered, self.registered_backward = _register(self, kinds)

    def kernel(self, x: Any, options: Any) -> HeadKernel | None:
        """The kernel for these tensors."""
        raise NotImplementedError

    def allocate(self, x: Any, options: Any, keeps: bool) -> tuple[torch.Tensor | None, ...]:
        """Memory for the outputs and extras, of which None are made without `keeps`. It looks at no number."""
        raise NotImplementedError

    def forward(self, library: ctypes.CDLL, x: Any, options: Any, made: Sequence[torch.Tensor | None]) -> None:
        """Run the kernel into what `allocate` has made."""
        raise NotImplementedError

    def backward(self, library: ctypes.CDLL, x: Any, options: Any, saved: Any, gradients: Any) -> tuple:
        """The gradients of the tensors from those of the outputs, of which some may be None."""
        raise NotImplementedError

    def plain(self, x: Any, options: Any) -> tuple[torch.Tensor | None, ...]:
        """The outputs in operations that autograd knows."""
        raise NotImplementedError

    def plain_of_saved(self, ctx: Any, *saved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """`plain` of what a context of autograd holds."""
        return self.plain(self.Tensors(*saved[: self.fields]), ctx.options)

    def saved(self, made: Sequence[torch.Tensor | None], options: Any) -> tuple[torch.Tensor | None, ...]:
        """What the backward pass gets of all that is made."""
        return (*made[: self.read_again], *made[self.outputs :])

    def dense(self, x: Any) -> Any:
        """The tensors as the kernel can read them."""
        return self.Tensors(*(None if y is None else y.contiguous() for y in x))

    def __call__(self, x: Any, options: Any) -> tuple[Any, ...]:
        """The outputs for tensors that are `dense`. While compiling, a tensor without numbers stands for None.

        Raises:
            RuntimeError: there is no kernel for these tensors.
        """
        keeps = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in x)
        if not torch.compiler.is_compiling():
            library = require_kernel(self.kernel(x, options), *x)
            if keeps:
                return self.function.apply(library, options, *x)
            made = self.allocate(x, options, False)  # with few tokens, recording takes longer than the kernel
            self.forward(library, x, options, made)
            return made[: self.outputs]
        made = self.registered(*x, *options, keeps)
        return (made,) if isinstance(made, torch.Tensor) else made[: self.outputs]


def _recorded(op: KernelOp) -> type[torch.autograd.Function]:
    """The autograd function of an op; its constants are the kernel's library and the options."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, library, options, *tensors):
            x = op.Tensors(*tensors)
            made = op.allocate(x, options, any(ctx.needs_input_grad))
            op.forward(library, x, options, made)
            ctx.library, ctx.options = library, options
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *op.saved(made, options))
            return made[: op.outputs]

        @staticmethod
        @differentiable_by(op.plain_of_saved, constants=2)
        def backward(ctx, *gradients):
            saved = ctx.saved_tensors
            x, rest = op.Tensors(*saved[: op.fields]), saved[op.fields :]
            return None, None, *op.backward(ctx.library, x, ctx.options, rest, gradients)

    Recorded.__name__ = Recorded.__qualname__ = f"{op.name}_kernel"
    return Recorded


def _register(op: KernelOp, kinds: dict[str, Any]) -> tuple[Any, Any]:
    """The op of torch, and that of its backward pass, with fake implementations and, for the first, its gradient."""
    options, tensors = get_type_hints(op.Options), _parameters(kinds)
    numbers, count = _parameters(options), op.fields - op.masks
    saved = op.read_again + op.extras
    given = "".join(f"Tensor? d_{index}, " for index in range(op.outputs))
    given += "".join(f"Tensor? saved_{index}, " for index in range(saved))
    qualified = [f"{_library.ns}::{op.name}", f"{_library.ns}::{op.name}_backward"]
    tag = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{op.name}({tensors}, {numbers}, bool keeps) -> {_results(op.outputs + op.extras)}", tags=tag)
    _library.define(f"{op.name}_backward({given}{tensors}, {numbers}) -> {_results(count)}", tags=tag)

    def split(arguments: Sequence[Any]) -> tuple[Any, Any]:
        x, rest = arguments[: op.fields], arguments[op.fields : op.fields + len(options)]
        return op.dense(op.Tensors(*x)), op.Options(*rest)

    def run(*arguments: Any) -> Any:
        x, chosen = split(arguments)
        made = op.allocate(x, chosen, arguments[-1])
        op.forward(require_kernel(op.kernel(x, chosen), *x), x, chosen, made)
        return _without_none(made, x[0])

    def fake(*arguments: Any) -> Any:
        x, chosen = split(arguments)
        return _without_none(op.allocate(x, chosen, arguments[-1]), x[0])

    def run_back(*arguments: Any) -> Any:
        gradients, kept = arguments[: op.outputs], arguments[op.outputs : op.outputs + saved]
        x, chosen = split(arguments[op.outputs + saved :])
        library = require_kernel(op.kernel(x, chosen), *x)
        found = op.backward(library, x, chosen, kept, gradients)[:count]
        return _without_none([None if y is None else y.contiguous() for y in found], x[0])

    def fake_back(*arguments: Any) -> Any:
        x, _ = split(arguments[op.outputs + saved :])
        found = [None if y is None else torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:count]]
        return _without_none(found, x[0])

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        made = output if isinstance(output, tuple) else (output,)
        ctx.options, ctx.keeps = op.Options(*inputs[op.fields : -1]), inputs[-1]
        ctx.set_materialize_grads(False)
        absent = (y for y in made[: op.outputs] if _stands_for_none(y))
        ctx.mark_non_differentiable(*absent, *made[op.outputs :])
        ctx.save_for_backward(*inputs[: op.fields], *op.saved(made, ctx.options))

    def backward(ctx: Any, *gradients: Any) -> tuple:
        x, kept = ctx.saved_tensors[: op.fields], ctx.saved_tensors[op.fields :]
        gradients = gradients[: op.outputs]
        if torch.is_grad_enabled() or not ctx.keeps:  # to be differentiated again, or nothing was kept for the kernel
            found = plain_gradients(op.plain_of_saved, ctx, ctx.needs_input_grad[: op.fields], gradients)
        else:
            made = op.registered_backward(*gradients, *kept, *x, *ctx.options)
            made = made if isinstance(made, (tuple, list)) else (made,)
            found = tuple(dx if y is not None else None for y, dx in zip(x, made, strict=False)) + (None,) * op.masks
        return (*found, *(None,) * (len(options) + 1))

    for name, implementation, without in ((qualified[0], run, fake), (qualified[1], run_back, fake_back)):
        _library.impl(name.partition("::")[2], implementation, "CPU")
        torch.library.register_fake(name, without, lib=_library)
    torch.library.register_autograd(qualified[0], backward, setup_context=setup, lib=_library)
    space = getattr(torch.ops, _library.ns)
    return getattr(space, op.name).default, getattr(space, f"{op.name}_backward").default


def _parameters(kinds: dict[str, Any]) -> str:
    """The parameters of a schema."""
    words = {torch.Tensor: "Tensor", float: "float", bool: "bool", int: "int"}
    found = []
    for name, kind in kinds.items():
        base = next((x for x in get_args(kind) if x is not type(None)), kind)
        found.append(f"{words[base]}{'' if base is kind else '?'} {name}")
    return ", ".join(found)


def _results(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _stands_for_none(x: torch.Tensor) -> bool:
    return x.ndim == 1 and x.shape[0] == 0


def _without_none(made: Sequence[torch.Tensor | None], like: torch.Tensor) -> Any:
    """What a registered op gives: a tensor each, without numbers for None."""
    found = tuple(like.new_empty(0) if x is None else x for x in made)
    return found[0] if len(found) == 1 else found


# ---- lalm.modeling.ops.dense.elementwise ----
"""RMSNorm and (gated) activations: fused C++ kernels on the CPU, each one pass over memory; plain torch elsewhere."""


import ctypes
from collections.abc import Callable

import torch
from torch.nn import functional as F



def _plain_rms_norm(ctx, x, weight, *_) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, ctx.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, eps, x, weight):
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1]) if any(ctx.needs_input_grad) else None
        kernel.forward(_RMSNorm.inputs(x, weight, eps), pointer(y), pointer(rstd))
        ctx.kernel, ctx.eps = kernel, eps
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @differentiable_by(_plain_rms_norm, constants=2)
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[3] else None
        inputs = _RMSNorm.inputs(x, weight, ctx.eps)
        ctx.kernel.backward(inputs, pointer(rstd), pointer(dy), pointer(dx), pointer(d_weight))
        return None, None, dx, d_weight

    @staticmethod
    def inputs(x, weight, eps):
        numbers, size = x.numel(), x.shape[-1]
        sizes = {"rows": numbers // size, "size": size, "threads": threads(numbers), "eps": eps}
        return ctypes.byref(pack("rms_norm", "Inputs", x=x.data_ptr(), weight=weight.data_ptr(), **sizes))


def _plain_activation(ctx, x, factor) -> torch.Tensor:
    return ctx.function(x) if factor is None else ctx.function(x) * factor


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, function, x, factor):
        y = torch.empty_like(x)
        kernel.forward(_Activation.inputs(x, factor), pointer(y))
        ctx.kernel, ctx.function = kernel, function
        ctx.save_for_backward(x, factor)
        return y

    @staticmethod
    @differentiable_by(_plain_activation, constants=2)
    def backward(ctx, dy):
        x, factor = ctx.saved_tensors
        dx, d_factor, dy = torch.empty_like(x), None if factor is None else torch.empty_like(x), dy.contiguous()
        ctx.kernel.backward(_Activation.inputs(x, factor), pointer(dy), pointer(dx), pointer(d_factor))
        return None, None, dx, d_factor

    @staticmethod
    def inputs(x, factor):
        sizes = {"count": x.numel(), "threads": threads(x.numel())}
        return ctypes.byref(pack("activation", "Inputs", x=x.data_ptr(), factor=address(factor), **sizes))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` along the last axis (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x: `[..., D]`.
        weight: `[D]`.

    Returns:
        `[..., D]` in the dtype of x, also under autocast; the mean is taken in float32, or in float64 if an input is.
    """
    kernel = rms_norm_kernel(x, weight)
    if kernel is None:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return apply_function(_RMSNorm, kernel, eps, x.float().contiguous(), weight.float().contiguous()).to(x.dtype)


# The number of an activation in the kernel, and what it replaces.
_ACTIVATIONS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "sigmoid": (0, torch.sigmoid),
    "silu": (1, F.silu),
    "swish": (1, F.silu),
    "gelu": (2, F.gelu),
}


def has_kernel(activation: str) -> bool:
    """Whether `activate` knows the function of this name."""
    return activation in _ACTIVATIONS


def open_activation(activation: str, gated: bool) -> None:
    """Load the kernel that `activate` will look for, if it is compiled."""
    preload_kernel("activation", ACT=_ACTIVATIONS[activation][0], GATED=int(gated))


def activate(activation: str, x: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """`act(x)`, or `act(x) * factor` for a factor of the same shape (gated linear units, Shazeer, arXiv 2002.05202).

    Args:
        activation: "sigmoid", "silu" (or "swish"), or "gelu" (Hendrycks and Gimpel, arXiv 1606.08415, with erf).
    """
    number, function = _ACTIVATIONS[activation]
    kernel = activation_kernel(x, factor, number, generates_code=activation == "gelu")
    if kernel is None:
        return function(x) if factor is None else function(x) * factor
    dtype = x.dtype if factor is None else torch.result_type(x, factor)
    factor = None if factor is None else factor.float().contiguous()
    return apply_function(_Activation, kernel, function, x.float().contiguous(), factor).to(dtype)


# ---- lalm.modeling.ops.dense.matrix_product ----
"""`x W^T + b` on a CPU by the fastest of torch's two libraries, or by a kernel of our own for few rows.

torch multiplies float32 matrices by MKL, which leaves half of a processor that is not Intel's idle: it does not use
its AVX-512. oneDNN, which torch brings for other dtypes, does (on a Zen 5 at twice the speed). Decoding (few rows) is
bound by memory: a kernel that streams the weights takes half of MKL's time.
"""


import ctypes
from typing import Any

import torch
from torch.nn import functional as F



class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = linear(dy, weight.t())
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(dy, x)
        if ctx.needs_input_grad[2]:
            db = dy.sum(0)
        return dx, dw, db


def weight_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`dy^T x [N, D]`: the gradient of the weight from the inputs `x [M, D]` and that of the outputs, `dy [M, N]`."""
    if dy.shape[1] >= TALL * x.shape[1]:
        return linear(x.t(), dy.t()).t()
    return linear(dy.t(), x.t())


def preload_linear() -> None:
    """Look up what `linear` will ask for: which library is fast, and the kernel for few rows, if it is compiled."""
    mkl_is_slow()
    preload_kernel("few_rows")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x [..., D]`, `weight [N, D]`, `bias [N]` -> `x weight^T + bias [..., N]`, as `torch.nn.functional.linear`."""
    library = product_library(x, weight, bias)
    if library == "onednn":
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        return apply_function(_OneDnnLinear, _dense(rows), _dense(weight), bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias) if library is None else _few_rows(library, x, weight, bias)


def _few_rows(kernel: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` by the kernel that streams the weights; it has no backward pass."""
    (outputs, size), x = weight.shape, x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    places = {"x": x.data_ptr(), "weight": weight.data_ptr(), "bias": address(bias)}
    sizes = {"rows": x.numel() // size, "size": size, "outputs": outputs, "threads": threads(weight.numel())}
    kernel.forward(ctypes.byref(pack("few_rows", "Inputs", **places, **sizes)), pointer(y))
    return y


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The matrix x, or a copy of it where it is neither contiguous nor the transpose of what is."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


# ---- lalm.modeling.ops.dense.short_conv ----
"""The short convolution: in plain torch, and for whole sequences by a C++ kernel, in one pass over the tokens, with
padding anywhere."""


import ctypes
from collections.abc import Sequence

import torch
from torch.nn import functional as F



def plain_short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    before: int,
    activation: bool,
    layout: SequenceLayout,
    state: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve `x [B, T, D]` after `state [B, before, D]`, or after nothing; the other arguments are those of
    `cpp_short_conv`. Returns `[B, T, D]`, 0 on padding, and the next state of a causal convolution."""
    length, width = x.shape[1], weight.shape[1]
    after = width - 1 - before
    x = layout.pads_first(layout.zero_padding(x))
    window = F.pad(x, (0, 0, before, after)) if state is None else layout.slide_over_padding(state.to(x.dtype), x)
    segments = layout.segments_pads_first()
    if segments is not None:
        around = [segments[:, :1].expand(-1, before), segments, segments[:, -1:].expand(-1, after)]
        segments, own = torch.cat(around, 1), segments
    y = window[:, before : before + length] * weight[:, before]
    for offset in range(width):
        if offset == before:
            continue
        neighbour = window[:, offset : offset + length]
        if segments is not None:
            neighbour = neighbour.masked_fill((own != segments[:, offset : offset + length])[..., None], 0)
        y = torch.addcmul(y, neighbour, weight[:, offset])
    y = y if bias is None else y + bias
    state = window[:, length:]
    if segments is not None:
        state = state.masked_fill((segments[:, length:] != segments[:, -1:])[..., None], 0)
    return layout.zero_padding(layout.restore(F.silu(y) if activation else y)), state


def _plain(ctx, weight, bias, skip, documents, *parts) -> tuple[torch.Tensor, ...]:
    mask = None if skip is None else ~skip
    order = None if mask is None else stable_order(mask)
    where = SequenceLayout(mask, documents, order)
    y, _ = plain_short_conv(torch.cat(parts, dim=-1), weight, ctx.before, ctx.activation, where, bias=bias)
    return y.split([x.shape[-1] for x in parts], dim=-1)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, before, activation, weight, bias, skip, documents, *parts):
        ctx.kernel, ctx.before, ctx.activation = kernel, before, activation
        ctx.save_for_backward(weight, bias, skip, documents, *parts)
        outputs = tuple(fresh(x, skip) for x in parts)
        for y, (inputs, _) in zip(outputs, _ShortConv.inputs(weight, bias, skip, documents, parts), strict=True):
            kernel.forward(inputs, pointer(y))
        return outputs

    @staticmethod
    @differentiable_by(_plain, constants=3)
    def backward(ctx, *gradients):
        weight, bias, skip, documents, *parts = ctx.saved_tensors
        found = [fresh(x, skip) for x in parts]
        d_weight, d_bias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        inputs = _ShortConv.inputs(weight, bias, skip, documents, parts)
        for dx, dy, (part, first) in zip(found, gradients, inputs, strict=True):
            dy, own = dy.contiguous(), None if d_bias is None else d_bias[first:]  # under names, which keep them alive
            ctx.kernel.backward(part, pointer(dy), pointer(dx), pointer(d_weight[first:]), pointer(own))
        return None, None, None, d_weight, d_bias, None, None, *found

    @staticmethod
    def inputs(weight, bias, skip, documents, parts):
        """The arguments of the kernel for each part, and its first channel."""
        first, common = 0, {"skip": address(skip), "documents": address(documents), "threads": torch.get_num_threads()}
        for x in parts:
            places = {"weight": address(weight[first:]), "bias": None if bias is None else address(bias[first:])}
            batch, length, channels = x.shape
            sizes = {"batch": batch, "length": length, "channels": channels, "row": x.stride(0), "token": x.stride(1)}
            yield ctypes.byref(pack("short_conv", "Inputs", x=x.data_ptr(), **places, **sizes, **common)), first
            first += channels


def _by_channels(x: torch.Tensor) -> torch.Tensor:
    """`x [B, T, D]` in float32 with the channels of a token together; a slice of wider tokens is taken as it is."""
    x = x.float()
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _sizes(width: int, before: int, activation: bool) -> dict[str, int]:
    return {"WIDTH": width, "BEFORE": before, "SILU": int(activation)}


def open_short_conv(width: int, before: int, activation: bool) -> None:
    """Load the kernel that `cpp_short_conv` will look for, if it is compiled."""
    preload_kernel("short_conv", **_sizes(width, before, activation))


def cpp_short_conv(
    parts: Sequence[torch.Tensor],
    weight: torch.Tensor,
    before: int,
    activation: bool,
    layout: SequenceLayout,
    bias: torch.Tensor | None = None,
) -> list[torch.Tensor] | None:
    """Convolve `parts` `[B, T, D_i]`, together all D channels, with `weight [D, W]`, over `before` earlier real tokens
    of a document and later ones, and add `bias [D]`. Parts may be slices of wider tokens.

    Returns:
        As many `[B, T, D_i]`, unspecified on padding, after a SiLU if `activation`; None where no kernel runs.
    """
    kernel = short_conv_kernel(parts, weight, bias, **_sizes(weight.shape[1], before, activation))
    if kernel is None:
        return None
    skip = None if layout.mask is None else (~layout.mask).contiguous()
    documents = layout.document_ids()
    with without_autocast(weight.device):
        given = [_by_channels(x) for x in parts]
        weights = (weight.float().contiguous(), None if bias is None else bias.float().contiguous())
        outputs = apply_function(_ShortConv, kernel, before, activation, *weights, skip, documents, *given)
        return [y.to(x.dtype) for x, y in zip(parts, outputs, strict=True)]


# ---- lalm.modeling.tensor_parallel ----
"""Tensor parallelism by the machinery of transformers (`from_pretrained(tp_plan="auto")`), for its plan in the
configuration: every process holds some heads of each mixer and a part of each MLP.

What transformers has no style for is whole in every process and works for the process's own heads: the short
convolution (its channels are those of q, k and v side by side), LAM's gates, and GLA's low-rank gate.
"""


from typing import Any

import torch
from torch import nn


def own_part(x: torch.Tensor, shard: tuple[int, int] | None, dim: int) -> torch.Tensor:
    """The part of `x` along an axis of heads that belongs to process `shard = (rank, size)`; all of it for None."""
    if shard is None:
        return x
    rank, size = shard
    return x.chunk(size, dim)[rank].contiguous()


def check_tensor_parallel(config: Any, size: int) -> None:
    """Raise ValueError with the reason why `size` processes cannot share the layers of a configuration."""
    if not config.base_model_tp_plan:
        raise ValueError(
            f"{config.model_type} has no tensor parallel plan: its layers mix heads of two kinds, or channels that "
            "belong to no head. Shard its weights (FSDP) or the batch (DDP) instead."
        )
    names = ["num_attention_heads", "intermediate_size"]
    names += ["num_key_value_heads"] if {"full_attention", "sliding_attention"} & set(config.layer_types) else []
    for name in names:
        if getattr(config, name) % size:
            raise ValueError(
                f"{name} = {getattr(config, name)} cannot be shared evenly by {size} processes (tp_size): choose a "
                "divisor of it."
            )


def register_styles() -> None:
    """Tell transformers the styles of ours that `LalmConfig.base_model_tp_plan` names."""
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce, TensorParallelLayer

    class OwnPart(ReplicatedWithGradAllReduce):
        """Weights are whole, and the module is told which part of the heads is its own."""

        def install_forward(self, module: Any, mesh: Any) -> nn.Module:
            module.shard = (mesh.get_local_rank(), mesh.size())
            return super().install_forward(module, mesh)

    class OwnHeads(OwnPart):
        """The same for a module that reads the hidden states, with all modules inside."""

        def __init__(self, slices_output: bool):
            self.slices_output = slices_output

        def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
            for part in module.modules():
                super().install_forward(part, mesh)
            return TensorParallelLayer.install_forward(self, module, mesh)

        def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
            x = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
            return (x.to_local(grad_placements=[Partial()]), *args[1:]), kwargs  # gradients are those of own heads

        def transform_output_post_forward(self, module, output, mesh):
            return own_part(output, module.shard, -1) if self.slices_output else output

    styles: dict[str, Any] = {
        "lalm_own_part": OwnPart(),
        "lalm_own_heads": OwnHeads(False),
        "lalm_own_outputs": OwnHeads(True),
    }
    for name, style in styles.items():
        ALL_PARALLEL_STYLES.register(name, style)


# ---- lalm.modeling.layers ----
"""Layers that several variants share. B batch, T time, D channels, W convolution width, H heads, K head size."""


from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_lam import LalmConfig


def make_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """An nn.Linear that multiplies by `product`. Its class is torch's own, which is what quantisers and adapters look
    for; whatever they put in its place is called as it is."""
    return speed_up(nn.Linear(in_features, out_features, bias=bias))


def speed_up(layer: nn.Linear) -> nn.Linear:
    """Give a stock layer the forward of `make_linear`, on the instance, where accelerate puts its hooks too."""
    preload_linear()
    layer.forward = partial(_forward, layer)  # type: ignore[method-assign]  # a partial is copied and pickled with it
    return layer


def _forward(layer: nn.Linear, x: torch.Tensor, apply: Callable | None = None) -> Any:
    return (apply or product)(x, layer.weight, layer.bias)


def takes_apply(layer: nn.Module) -> bool:
    """Whether `layer(x, apply=f)` gives `f(x, weight, bias)`, inside the layer's own call, where offloaded or sharded
    weights are in place. Not where a tool has replaced the layer, or hooks wait for its plain output."""
    forward = getattr(layer, "_old_forward", layer.forward)  # where accelerate keeps what its hooks surround
    ours = isinstance(forward, partial) and forward.func is _forward
    return ours and (not layer._forward_hooks or any(base.__name__ == "FSDPModule" for base in type(layer).__mro__))


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x [..., D]`, `weight [N, D]` -> `x weight^T + bias [..., N]` by the fastest product (dense/matrix_product.py).
    On CPUs without instructions for the 16-bit type asked for, it computes in float32 (ops/dispatch.py)."""
    autocast = torch.is_autocast_enabled("cpu")
    if not x.is_cpu or (x.dtype in (torch.float32, torch.float64) and not autocast):
        return linear(x, weight, bias)
    asked, kinds = x.dtype, {x.dtype, weight.dtype}
    if autocast and torch.float64 not in kinds:  # which autocast leaves alone
        asked = torch.get_autocast_dtype("cpu")
    elif len(kinds) > 1:
        return nn.functional.linear(x, weight, bias)  # let torch raise its own dtype error
    dtype = product_dtype(x, asked)
    if dtype == asked:
        return nn.functional.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(asked)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, computed in float32 or wider also under autocast; the output has the dtype of the input."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        preload_kernel("rms_norm")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, cast(float, self.eps))


class Dropout(nn.Dropout):
    """torch's Dropout, without an operation where nothing is dropped."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.training and self.p else x


class Activation(nn.Module):
    """`act(x)`, or gated `act(x) * factor`, of the activation that transformers calls `name`."""

    def __init__(self, name: str, gated: bool = False):
        super().__init__()
        self.name, self.function = name, None
        if has_kernel(name):
            open_activation(name, gated)
        else:
            self.function = ACT2FN[name]

    def forward(self, x: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
        if self.function is None:
            return activate(self.name, x, factor)
        return self.function(x) if factor is None else self.function(x) * factor

    def extra_repr(self) -> str:
        return self.name


NORMS = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}


class MLP(nn.Module):
    """`down(act(up x))`, or gated (SwiGLU, Shazeer, arXiv 2002.05202): `down(act(gate x) * up x)`."""

    bias: ClassVar[bool] = False

    def __init__(self, config: LalmConfig):
        super().__init__()
        width, bias = config.intermediate_size, self.bias or config.mlp_bias
        assert width is not None  # the configuration derives it
        self.width, gated = width, config.mlp_type == "gated"
        self.gate_proj = make_linear(config.hidden_size, width, bias=bias) if gated else None
        self.up_proj = make_linear(config.hidden_size, width, bias=bias)
        self.down_proj = make_linear(width, config.hidden_size, bias=bias)
        self.act_fn = Activation(config.hidden_act, gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D] -> [B, T, D]`, in pieces where `pieces_of_mlp` says so."""
        size = pieces_of_mlp(x, self.width)
        if size is None:
            return self._piece(x)
        rows = x.flatten(0, -2)
        if torch.is_grad_enabled():
            return torch.cat([self._piece(piece) for piece in rows.split(size)]).view_as(x)
        y = None
        for start in range(0, len(rows), size):
            piece = self._piece(rows[start : start + size])
            y = piece.new_empty(rows.shape) if y is None else y
            y[start : start + size] = piece
        return cast(torch.Tensor, y).view_as(x)

    def _piece(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x), up))


class ShortConvolution(nn.Module):
    """Depthwise convolution over the real tokens of each document, followed by SiLU unless `activation` is off.

    Causal, or centred: over W // 2 earlier and (W - 1) // 2 later tokens. Neither padding nor a neighbouring document
    is ever inside a window. The state of a causal one is the last W - 1 real inputs.
    """

    shard: tuple[int, int] | None = None  # rank and number of the processes that share the heads of its inputs

    def __init__(self, channels: int, width: int, causal: bool = True, activation: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.activation = activation
        self.after = 0 if causal else (width - 1) // 2
        open_short_conv(width, width - 1 - self.after, activation)

    def forward(
        self,
        parts: Sequence[torch.Tensor],
        state: torch.Tensor | None,
        layout: SequenceLayout,
        keeps_state: bool = True,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """Convolve `parts` `[B, T, D_i]`, together all D channels, each into the same shape.

        `state [B, W - 1, D]` is what came before, None for a fresh start. Returns the outputs and, with `keeps_state`,
        the new state.
        """
        width = self.weight.shape[1]
        before, sizes = width - 1 - self.after, [part.shape[-1] for part in parts]
        weight: torch.Tensor = self.weight
        if self.shard is not None:
            whole = weight.split([size * self.shard[1] for size in sizes])
            weight = torch.cat([own_part(part, self.shard, 0) for part in whole])
        if state is None:
            outputs = cpp_short_conv(parts, weight, before, self.activation, layout)
            if outputs is not None:
                return outputs, layout.last_inputs(parts, before) if keeps_state else None
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
        y, state = plain_short_conv(x, weight, before, self.activation, layout, state)
        return y.split(sizes, dim=-1), state


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """Divide `x [B, T, H, K]` by its length over K; computed in float32 or wider, and left so."""
    x = x.to(compute_dtype(x))
    size = x.shape[-1]
    # x / sqrt(|x|^2 + 1e-6) by the kernel that divides by the root of the mean square.
    return rms_norm(x, x.new_full((size,), size**-0.5), 1e-6 / size)


def rotary_tables(position_ids: torch.Tensor, size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[B, T, 1, size]`, float32, of rotary embeddings (Su et al., arXiv 2104.09864), halves layout."""
    angles = _angles(position_ids, size, theta)
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def _angles(position_ids: torch.Tensor, size: int, theta: float) -> torch.Tensor:
    """`[B, T, size / 2]` float32: the positions times theta^(-2 i / size)."""
    if position_ids.device.type == "cpu":  # elsewhere the copy of a list would wait for the device
        frequencies = torch.tensor(
            [theta ** -(i / size) for i in range(0, size, 2)], dtype=torch.float32, device="cpu"
        )
    else:
        frequencies = theta ** -(torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size)
    return position_ids[..., None].float() * frequencies


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the channels of `x [B, T, H, K]` by their positions."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def sinusoidal_positions(position_ids: torch.Tensor, size: int, theta: float) -> torch.Tensor:
    """`[B, T, size]` float32: the fixed table of Vaswani et al. (arXiv 1706.03762, 3.5), sines before cosines."""
    angles = _angles(position_ids, size, theta)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PositionEmbedding(nn.Module):
    """Learned or sinusoidal positions, added to the token embeddings."""

    def __init__(self, config: LalmConfig):
        super().__init__()
        self.config = config
        if config.position_embedding_type == "learned":
            self.table = nn.Embedding(config.max_position_embeddings, config.embedding_size)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions `[B, T]` -> `[B, T, D]`."""
        if self.config.position_embedding_type == "sinusoidal":
            return sinusoidal_positions(position_ids, self.config.embedding_size, self.config.rope_theta)
        return look_up(self.table, position_ids, "position", "max_position_embeddings")


def look_up(table: nn.Embedding, ids: torch.Tensor, what: str, field: str) -> torch.Tensor:
    """`table(ids)`; on the CPU an id outside the table raises a ValueError that names `field`."""
    if torch.compiler.is_compiling():
        return table(ids)
    try:
        return table(ids)
    except IndexError as error:
        raise ValueError(
            f"{what} ids run from {int(ids.min())} to {int(ids.max())}; {field} = {table.num_embeddings} allows 0 to "
            f"{table.num_embeddings - 1}."
        ) from error


# ---- lalm.modeling.cache ----
"""The cache of one linear-attention layer, known to the stock DynamicCache and StaticCache as "lalm_linear_attention".

The stock linear layer does not count tokens and treats a layer without a convolution as new, so a model
made of linear layers only could neither continue nor generate. This one does both. Its size does not depend on
the number of tokens.

A state cannot be cut as keys and values can. A cache that is to be rolled back (`activate_past_recording`, by assisted
generation) therefore notes what every forward found, and how to make the states after a part of its tokens.
"""


from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING


_KINDS = ("conv_states", "recurrent_states")
# Tokens that can still be taken back after a `crop`: a draft model with another tokenizer goes back further than it
# went on since.
_KEPT = 16


class Step(NamedTuple):
    """What one part of a layer did in one forward over `tokens` tokens: the states it found, by kind and number, and
    how to make them after the first n tokens."""

    tokens: int
    found: dict[tuple[str, int], torch.Tensor | None]
    after: Callable[[int], Sequence[torch.Tensor | None]]


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):
    """Recurrent states `[B, H, K, V]` float32, convolution states `[B, W - 1, D]` and the number of tokens seen.

    A layer keeps up to four of either kind, by `state_idx`; most use one. All are replaced in place, so that their
    addresses hold for compiled and graph-captured decoding; while gradients are recorded they are replaced by new
    tensors, so that a loss may reach back through a cache.
    """

    # accelerate refuses to shard the tokens of models that have a layer with "linear_attention" in its name.
    _layer_type = "lalm_linear_attention"
    cumulative_length: torch.Tensor  # type: ignore[assignment]  # the base class counts in an int
    device: torch.device | None  # type: ignore[assignment]
    dtype: torch.dtype | None  # type: ignore[assignment]
    supports_early_init = False
    # None rather than False: up to 5.21 transformers sizes the masks of a hybrid by the first layer that says False.
    is_sliding = None
    is_croppable = True

    def __init__(self, number_of_states: int = 4, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        # By kind: in the first forward a layer writes one kind before it reads the other.
        self.is_written = {kind: dict.fromkeys(range(number_of_states), False) for kind in _KINDS}
        # A tensor: compiled decoding would treat an int as a constant and compile anew at every step.
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        # By the first state that a part of the layer writes.
        self.history: dict[tuple[str, int], list[Step]] = {}

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        num_tokens: int = 0,
        given_away: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Store the window after the current tokens. A layer without a recurrent state counts its tokens here.
        `given_away`: the caller has made the tensor for the cache and does not touch it again."""
        self.is_conv_states_initialized[state_idx] = True
        return self._update("conv_states", conv_states, state_idx, num_tokens, given_away)

    def update_recurrent_state(
        self,
        recurrent_states: torch.Tensor,
        state_idx: int = 0,
        num_tokens: int = 0,
        given_away: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Store the state after `num_tokens` further tokens; `given_away` as for `update_conv_state`."""
        self.is_recurrent_states_initialized[state_idx] = True
        return self._update("recurrent_states", recurrent_states, state_idx, num_tokens, given_away)

    def _update(self, kind: str, value: torch.Tensor, index: int, num_tokens: int, given_away: bool) -> torch.Tensor:
        if self.device is None:
            self.dtype, self.device = value.dtype, value.device
        if self.cumulative_length.device != value.device:
            self.cumulative_length = self.cumulative_length.to(value.device)
        if not any(self.has_previous_state.values()) and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_written[kind][index] = True
        if not self.has_previous_state[index]:
            self._note_previous_state()
        if num_tokens:
            self.cumulative_length.add_(num_tokens)
        return self._replace(getattr(self, kind), index, value, given_away)

    def previous(self, kind: str, index: int, of_slice: Callable | None = None) -> torch.Tensor | None:
        """`conv_states` or `recurrent_states` number `index`, None where it has seen no token."""
        return getattr(self, kind)[index] if self.is_written[kind][index] else None

    def _replace(
        self, states: dict[int, torch.Tensor | None], index: int, value: torch.Tensor, given_away: bool
    ) -> torch.Tensor:
        current = states[index]
        is_new = current is None or current.shape != value.shape or self.record_past
        if current is None or is_new or value.requires_grad or current.requires_grad:
            eager = not hides_values()
            # A part of something larger would keep all of it.
            is_whole = eager and value.untyped_storage().nbytes() == value.numel() * value.element_size()
            keeps = value.requires_grad or (given_away and is_whole)
            current = states[index] = value if keeps else value.clone()
            if eager:
                torch._dynamo.mark_static_address(current)
        elif hides_values() or value.data_ptr() != current.data_ptr():  # else it was written where it stands
            current.copy_(value)
        return current

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError(
            "A linear-attention layer keeps no keys and values: the cache is of another model, or somebody puts a "
            "prefix of keys and values into it."
        )

    def record(self, tokens: int, names: Sequence[tuple[str, int]], after: Callable) -> None:
        """See `record`, below."""
        found = {(kind, i): getattr(self, kind)[i] if self.is_written[kind][i] else None for kind, i in names}
        self.history.setdefault(names[0], []).append(Step(tokens, found, after))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, exactly.

        Raises:
            ValueError: a positive number.
            RuntimeError: so many tokens have not been recorded since `activate_past_recording`.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {int(tokens_to_remove)}.")
        recorded = min((sum(step.tokens for step in steps) for steps in self.history.values()), default=0)
        if count > recorded:
            raise RuntimeError(
                f"Cannot take back {count} tokens of a recurrent state, of which {recorded} are recorded: call "
                "activate_past_recording() on the cache before the forward."
            )
        for steps in self.history.values():
            self._take_back(steps, count)
            while sum(step.tokens for step in steps[1:]) >= _KEPT:
                steps.pop(0)
        if count:
            self.cumulative_length.sub_(count)
            self._note_previous_state()

    def _note_previous_state(self) -> None:
        # All at once: Cache.has_previous_state asks whether all states have been written, used or not.
        found = any(any(written.values()) for written in self.is_written.values())
        self.has_previous_state = dict.fromkeys(self.has_previous_state, found)

    def _take_back(self, steps: list[Step], count: int) -> None:
        while count > 0:
            tokens, found, after = steps.pop()
            kept = max(tokens - count, 0)
            values = after(kept) if kept else list(found.values())
            for (kind, index), value in zip(found, values, strict=True):
                self.is_written[kind][index] = value is not None
                if value is not None:
                    self._replace(getattr(self, kind), index, value, given_away=True)
            if kept:
                steps.append(Step(kept, found, after))
            count -= tokens

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length.zero_()
        self.history.clear()
        for written in self.is_written.values():
            written.update(dict.fromkeys(written, False))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda x: x[indices])

    def _map_batch(self, function) -> None:
        self.history.clear()  # of other rows
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)


def previous_state(
    cache: Cache | None, layer_idx: int, kind: str, state_idx: int = 0, of_slice: Callable | None = None
) -> torch.Tensor | None:
    """`conv_states` or `recurrent_states` of a layer, None if it has seen no token. (Cache.get_recurrent_state and
    get_conv_state came with transformers 5.21.)

    `of_slice()` tells what the current tokens do to that state, without knowing it: their last inputs, or the map of
    affine_maps.py. sequence_parallel.py joins the slices of several processes by it.
    """
    if cache is None:
        return None
    layer: Any = cache.layers[layer_idx]
    return layer.previous(kind, state_idx, of_slice)


def may_overwrite(cache: Cache | None, layer_idx: int) -> bool:
    """Whether a layer's states may be written where they stand in `cache`: nobody goes back to what they were."""
    layer: Any = None if cache is None else cache.layers[layer_idx]
    return layer is not None and not layer.record_past


def record(
    cache: Cache | None,
    layer_idx: int,
    names: Sequence[tuple[str, int]],
    inputs: Sequence[torch.Tensor],
    layout: SequenceLayout,
    redo: Callable[[Sequence[torch.Tensor], SequenceLayout], Sequence[torch.Tensor | None]],
) -> None:
    """Before a part of a layer updates the states `names` (kind and number): if `cache` may be rolled back, let it
    keep their values, and `redo(inputs, layout)`, which makes those after the first tokens of `inputs [B, T, ...]`."""
    layer: Any = None if cache is None else cache.layers[layer_idx]
    if layer is not None and layer.record_past:
        layer.record(inputs[0].shape[1], names, lambda n: redo([x[:, :n] for x in inputs], layout.first(n)))


def recurrent_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """The part of `attention_mask [B, S + T]` that covers the current T tokens, None where none of them is padding.

    The stock create_recurrent_attention_mask takes a piece of one token for a generated one, which is never padding; a
    prompt read token by token has such pieces too.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    current = attention_mask[:, -inputs_embeds.shape[1] :]
    if not torch.compiler.is_compiling() and bool((current != 0).all()):
        return None
    return current.contiguous()  # its strides stay the same from step to step, and compiled code with them


# CacheLayerMixin registers `_layer_type` for DynamicCache only.
STATIC_LAYER_TYPE_MAPPING[RecurrentLayer._layer_type] = RecurrentLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[RecurrentLayer._layer_type] = recurrent_mask


# ---- lalm.modeling.model_inputs ----
"""From what callers pass to a model (masks, positions, packing in three forms) to one layout, once per forward.

Packed documents are recognised in every form the ecosystem uses: `seq_idx`, `cu_seq_lens_q`, or `position_ids` that
start again. Padding may stand left, right or inside, together with packing, and in every piece of a cached sequence.
"""


from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)



def adopt_cache(cache: Cache, config: PreTrainedConfig, layer_types: list[str], device: torch.device) -> None:
    """Give the layers of `config`, of these types, to a cache made without a configuration; refuse one made for
    another model. A cache that is to wait in the memory of the CPU stays as it is where the model runs there too, or
    keeps nothing to move.

    Raises:
        ValueError: the cache has other layers than the model.
    """
    if isinstance(cache, DynamicCache) and not cache.layers:
        cache.layers.extend(DynamicCache(config=config).layers)
    for i, layer in enumerate(cast(Any, cache.layers)):
        # The stock caches know one class per type of layer: that of the checkpoint whose code was loaded last.
        foreign = getattr(layer, "_layer_type", None) == RecurrentLayer._layer_type
        if foreign and not isinstance(layer, RecurrentLayer) and not any(layer.has_previous_state.values()):
            cache.layers[i] = RecurrentLayer()
    kinds = [isinstance(layer, RecurrentLayer) for layer in cache.layers]
    if kinds != [kind == RecurrentLayer._layer_type for kind in layer_types]:
        raise ValueError(
            "past_key_values was made for another model: make it by DynamicCache(config=model.config) or "
            "StaticCache(config=model.config, max_cache_len=...)."
        )
    if cache.offloading:  # the stock cache would ask for a CUDA stream, and for a layer that it moves
        kept = {RecurrentLayer._layer_type} | ({"sliding_attention"} if cache.only_non_sliding else set())
        cache.offloading = device.type != "cpu" and not kept.issuperset(layer_types)


def refuse_sharded_tokens() -> None:
    """Refuse to run inside torch's context_parallel: it gives each process a part of the tokens, and replaces torch's
    softmax attention. Nothing hands on a state, or the tokens that a convolution or a window needs.

    Raises:
        ValueError: torch's attention has been replaced so.
    """
    if torch.compiler.is_compiling():
        return
    origin = getattr(nn.functional.scaled_dot_product_attention, "__module__", None) or ""
    if origin.startswith("torch.distributed.tensor.experimental"):
        raise ValueError(
            "context_parallel shards the tokens of a sequence over processes, and no layer but full softmax attention "
            "passes on what it has read: call lalm.modeling.sequence_parallel.sequence_parallel instead, or shard the "
            "batch (DDP) or the weights (FSDP)."
        )


def is_fresh(cache: Cache | None) -> bool:
    """Whether nothing has been written to `cache`. Asks Python flags only, so that it can be compiled."""
    if cache is None:
        return True
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            return not any(layer.has_previous_state.values())
    return not any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def current_mask(attention_mask: torch.Tensor | dict | None, batch: int, length: int, seen) -> torch.Tensor | None:
    """The bool `[B, T]` part of `attention_mask` that covers the current tokens, None when it is all ones.

    Args:
        attention_mask: `[B, seen + T]`, or the dict by layer type that generate() makes for compiled decoding.

    Raises:
        ValueError: a shape that does not fit.
    """
    if isinstance(attention_mask, dict):
        mask = attention_mask.get(RecurrentLayer._layer_type)
        return None if mask is None else mask[:, -length:].bool()
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens] with 1 for real tokens, got shape {tuple(attention_mask.shape)}: "
            "linear attention cannot mask pairs of tokens."
        )
    if not hides_values():
        expected = (batch, int(seen) + length)
        if tuple(attention_mask.shape) != expected:
            past = f" ({int(seen)} cached and {length} new tokens)" if int(seen) else ""
            raise ValueError(f"attention_mask must be {expected}{past}, got {tuple(attention_mask.shape)}.")
        if bool((attention_mask[:, -length:] != 0).all()):
            return None
    return attention_mask[:, -length:] != 0


def build_layout(
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    shape: tuple[int, int],
    fresh: bool,
    reorder: bool = True,
) -> SequenceLayout:
    """The layout of tokens `shape = [B, T]`. Position ids tell documents apart only in a `fresh` forward, as in stock
    transformers; the explicit forms always do. With `reorder` off, padding after a row's last token may stay there.

    Raises:
        ValueError: position_ids, seq_idx or cu_seqlens of a shape that does not fit.
    """
    if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(f"position_ids must be [batch, tokens] = {shape}, got {tuple(position_ids.shape)}.")
    segments = None
    if seq_idx is not None:
        if tuple(seq_idx.shape) != shape:
            raise ValueError(f"seq_idx must be [batch, tokens] = {shape}, got {tuple(seq_idx.shape)}.")
        segments = _documents(seq_idx, mask, step=0)
    elif cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, *shape, name="cu_seq_lens_q")
        segments = _documents(segments_of(cu_seqlens, shape[1]), mask, step=0)
    elif position_ids is not None and fresh and (has_open_length() or shape[1] > 1):
        segments = _documents(position_ids.expand(shape), mask, step=1)
    if segments is not None and not hides_values() and not bool(segments.any()):
        segments = None
    order = None
    if mask is not None and (hides_values() or _must_move(mask, reorder)):
        order = stable_order(mask)
    return SequenceLayout(mask, segments, order)


def _must_move(mask: torch.Tensor, reorder: bool) -> bool:
    """Whether padding stands after real tokens or, without `reorder`, between them."""
    if reorder:
        return bool((mask[:, 1:] < mask[:, :-1]).any())
    runs = mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(1)
    return bool((runs > 1).any())


def _documents(marks: torch.Tensor, mask: torch.Tensor | None, step: int) -> torch.Tensor:
    """Number the documents of each row: a real token whose mark is not `step` more than that of the real token before
    it starts one. Padding belongs to what precedes it."""
    if mask is None:
        return (torch.diff(marks, dim=1, prepend=marks[:, :1] - step) != step).cumsum(1)
    index = torch.arange(marks.shape[1], device=marks.device)
    latest = torch.where(mask, index, -1).cummax(1).values
    previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    starts = mask & (previous >= 0) & (marks != marks.gather(1, previous.clamp(min=0)) + step)
    return starts.cumsum(1)


def positions(
    layout: SequenceLayout, attention_mask: torch.Tensor | dict | None, seen, like: torch.Tensor
) -> torch.Tensor:
    """Position of every token `[B, T]` in its document, padding not counted, going on after `seen` cached tokens."""
    batch, length = like.shape[:2]
    if layout.mask is None:
        before = torch.arange(length, device=like.device).expand(batch, -1)
    else:
        before = layout.mask.long().cumsum(1) - layout.mask.long()
    offset = seen
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[1] > length:
        offset = (attention_mask[:, :-length] != 0).sum(1, keepdim=True)
    starts = layout.starts()
    if layout.segments is None or starts is None:
        return before if isinstance(offset, int) and offset == 0 else before + offset
    begin = torch.where(starts, before, 0).cummax(1).values
    return before - begin + torch.where(layout.segments == layout.segments[:, :1], offset, 0)


def attends_in_blocks(config: PreTrainedConfig, length: int, cache: Cache | None) -> bool:
    """Whether sliding layers run `sliding_attention`, linear in T, rather than the stock interface with a mask
    `[T, T]`: where whole sequences come at once. A block meets the keys of two windows (three, if both sides count):
    up to about three windows the stock attention is as fast or faster."""
    return (
        not torch.compiler.is_compiling()
        and config._attn_implementation == "sdpa"
        and length > 3 * config.sliding_window
        and is_fresh(cache)
    )


def softmax_masks(
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    cache: Cache | None,
    layout: SequenceLayout,
) -> dict[str, torch.Tensor | None]:
    """The mask of each kind of softmax layer in `config.layer_types`, made by transformers for the attention backend.

    A sliding layer keeps rows whose padding, in the cache too, has been moved to the front, so that its window counts
    real tokens; the mask returned for it is in that order. There is none, which tells the layer, if it
    `attends_in_blocks`, as it does in a slice of a sequence that several processes share.
    """
    kinds = set(config.layer_types) - {RecurrentLayer._layer_type}
    if isinstance(attention_mask, dict):
        return {kind: attention_mask[kind] for kind in kinds}
    if not kinds:
        return {}
    is_slice = any(hasattr(layer, "extend") for layer in ([] if cache is None else cache.layers))
    if "sliding_attention" in kinds and (is_slice or attends_in_blocks(config, hidden_states.shape[1], cache)):
        kinds.remove("sliding_attention")
    if attention_mask is not None and layout.segments is not None and "flash" in (config._attn_implementation or ""):
        raise ValueError(
            "Flash attention cannot combine padding with packed documents: drop attention_mask, or load the model "
            "with attn_implementation='sdpa'."
        )
    masks: dict[str, Any] = {}
    for kind in kinds:
        make = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
        mask, segments = attention_mask, layout.segments
        if kind == "sliding_attention" and mask is not None:
            mask, segments = _window_padding(config, mask, cache), layout.segments_pads_first()
        also = None
        if segments is not None:
            also = _same_document(segments, 0 if cache is None else cache.get_seq_length())
        elif is_transformed():
            also = _anywhere  # with a function to combine, transformers does not look at the mask
        masks[kind] = make(
            config=config,
            inputs_embeds=hidden_states,
            attention_mask=mask,
            past_key_values=cache,
            and_mask_function=also,
        )
    return masks


def masks_ahead(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    **kwargs,
) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
    """The dict of masks by layer type that generate() makes before a compiled step, as `softmax_masks` makes them."""
    given: dict[str, Any] = {"config": config, "inputs_embeds": inputs_embeds, "past_key_values": past_key_values}
    masks = create_masks_for_generate(attention_mask=attention_mask, **given, **kwargs)
    if "sliding_attention" in config.layer_types and attention_mask is not None and attention_mask.ndim == 2:
        padding = _window_padding(config, attention_mask, past_key_values)
        masks["sliding_attention"] = create_sliding_window_causal_mask(attention_mask=padding, **given)
    return masks


def _window_padding(config: PreTrainedConfig, mask: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """`mask [B, S + T]` of the tokens in the order in which a sliding layer keeps them: each row's padding first."""
    if cache is not None and not hides_values():
        _refuse_gap_in_static_window(
            cache.layers[config.layer_types.index("sliding_attention")], cache.get_seq_length(), mask
        )
    return (mask != 0).long().sort(dim=1).values


def _refuse_gap_in_static_window(cached, seen, mask: torch.Tensor) -> None:
    """A growing window can move cached tokens over padding that follows them, one at fixed addresses cannot."""
    if not isinstance(cached, StaticLayer) or int(seen) == 0:
        return
    gap = (mask == 0) & ((mask != 0).cumsum(1) > 0)
    if bool(gap[:, int(seen) :].any()):
        raise ValueError(
            "attention_mask has padding after real tokens that are already in a StaticCache, and this model has "
            "sliding_attention_layers: use DynamicCache(config=model.config), or pad on the left."
        )


def _anywhere(batch, head, query, key):
    return query >= 0


def _same_document(segments: torch.Tensor, seen):
    """Mask function over absolute positions; everything cached belongs to the row's first document."""
    last = segments.shape[1] - 1

    def same(batch, head, query, key):
        query_at, key_at = (query - seen).clamp(min=0, max=last), (key - seen).clamp(min=0, max=last)
        return segments[batch, query_at] == segments[batch, key_at]

    return same


# ---- lalm.modeling.linearize ----
"""A linear student of a softmax encoder: its weights where they fit, output projections fitted in closed form."""


from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_lam import LamConfig

# What both configurations have under one name and must agree on.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
)
# Positions whose mean stands for all of them where the student has none: the usual length of a sentence.
_TYPICAL_LENGTH = 32


def student_config(teacher: PreTrainedModel, **changes) -> LamConfig:
    """LAM's configuration in the shape of a BERT-like `teacher`; `changes` are further fields.

    Raises:
        ValueError: the teacher is not of BERT's shape.
    """
    _bert_parts(teacher)
    theirs = teacher.config
    fields = {name: getattr(theirs, name) for name in (*_SHARED, "pad_token_id")}
    fields["norm_eps"] = theirs.layer_norm_eps
    if changes.get("position_embedding_type") == "learned":
        fields["max_position_embeddings"] = theirs.max_position_embeddings
    return LamConfig(**(fields | changes))


@torch.no_grad()
def copy_weights(student: Any, teacher: PreTrainedModel) -> None:
    """Give a LamModel the weights of `teacher`: embeddings, norms and MLPs are its own, q, k, v and o its attention's.

    Without learned positions the mean of the teacher's first ones goes into the word embeddings. The short convolution
    starts as the identity, the output gate even. `fit_output_projections` should follow: what the teacher's o expects
    are averages, which a delta rule does not give.

    Raises:
        ValueError: the teacher is not of BERT's shape, or the student does not fit it; the message names the field.
    """
    embeddings, layers = _bert_parts(teacher)
    config = student.config
    for name in _SHARED:
        ours, theirs = getattr(config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"{name} = {ours!r} of the student must be the teacher's, {theirs!r}.")
    needed = {"expand_k": 1, "expand_v": 1, "norm_type": "layernorm", "mlp_type": "mlp"}
    needed |= {"full_attention_layers": [], "sliding_attention_layers": []}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"A student of a softmax encoder needs {name}={value!r}, got {getattr(config, name)!r}.")
    if config.position_embedding_type == "sinusoidal":
        raise ValueError("position_embedding_type of a student must be 'none', 'rope' or 'learned', not 'sinusoidal'.")
    words = embeddings.word_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    positions = embeddings.position_embeddings.weight
    if student.embed_positions is None:
        words = words + positions[:_TYPICAL_LENGTH].mean(0)
    else:
        table = student.embed_positions.table.weight
        if table.shape[0] > positions.shape[0]:
            raise ValueError(
                f"max_position_embeddings = {table.shape[0]} is more than the teacher's {positions.shape[0]}."
            )
        table.copy_(positions[: table.shape[0]])
    student.embed_tokens.weight.copy_(words)
    _copy(student.embed_norm, embeddings.LayerNorm)
    for ours, theirs in zip(student.layers, layers, strict=True):
        attention, mixer = theirs.attention, ours.mixer
        for name in ("query", "key", "value"):
            _copy(getattr(mixer, f"{name[0]}_proj"), getattr(attention.self, name))
        _copy(mixer.o_proj, attention.output.dense)
        _copy(ours.mixer_norm, attention.output.LayerNorm)
        _copy(ours.mlp.up_proj, theirs.intermediate.dense)
        _copy(ours.mlp.down_proj, theirs.output.dense)
        _copy(ours.mlp_norm, theirs.output.LayerNorm)
        if mixer.conv is not None:
            mixer.conv.weight.zero_()
            mixer.conv.weight[:, mixer.conv.weight.shape[1] - 1 - mixer.conv.after] = 1
        if mixer.g_proj is not None:
            mixer.g_proj.weight.zero_()
            mixer.g_proj.bias.zero_()


@torch.no_grad()
def fit_output_projections(
    student: Any, teacher: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], ridge: float = 1e-3
) -> list[float]:
    """Fit every o projection of a LamModel, given the teacher's inputs of its layer, to the teacher's attention.

    Ridge regression in closed form, with a bias: min |F W + b - A|^2 + ridge * mean(diag(F^T F)) |W|^2 over all real
    tokens, F what enters the student's o projection and A what leaves the teacher's.

    Args:
        batches: tokenized texts: `input_ids` and `attention_mask [B, T]`; a few hundred texts are enough.

    Returns:
        the relative error |F W + b - A| / |A - mean A| of each layer, on the same texts.

    Raises:
        ValueError: there is no text.
    """
    teacher.eval()
    student.eval()
    blocks: list[Any] = list(student.layers)
    size = blocks[0].mixer.o_proj.in_features
    sums: list[torch.Tensor | None] = [None] * len(blocks)
    for batch in batches:
        mask = batch["attention_mask"].bool()
        inputs, targets = attention_of(teacher, batch)
        for index, (layer, x, target) in enumerate(zip(blocks, inputs, targets, strict=True)):
            features = mixer_features(layer.mixer, x, mask)[mask].double()
            ones = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
            both = torch.cat([ones, target[mask].double()], dim=1)
            gram = both.T @ both
            before = sums[index]
            sums[index] = gram if before is None else before + gram
    errors = []
    if sums[0] is None:
        raise ValueError("There is no text to fit the output projections on.")
    for layer, gram in zip(blocks, cast(list[torch.Tensor], sums), strict=True):
        count = gram[size, size]
        left, right = gram[: size + 1, : size + 1], gram[: size + 1, size + 1 :]
        penalty = left.diagonal()[:size].mean() * ridge * torch.eye(size + 1, dtype=gram.dtype, device=gram.device)
        penalty[size, size] = 0
        weight = torch.linalg.solve(left + penalty, right)
        layer.mixer.o_proj.weight.copy_(weight[:size].T)
        layer.mixer.o_proj.bias.copy_(weight[size])
        squares = gram[size + 1 :, size + 1 :].diagonal().sum()
        left_over = squares - 2 * (weight * right).sum() + (weight * (left @ weight)).sum()
        spread = squares - right[size].square().sum() / count
        errors.append(float((left_over.clamp(min=0) / spread).sqrt()))
    return errors


def attention_of(
    teacher: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and outputs of each attention of a BERT-like teacher (before the residual), `[B, T, D]` per layer."""
    _, layers = _bert_parts(teacher)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_watch(layer.attention.self, lambda args, _: inputs.append(args[0])))
            stack.enter_context(_watch(layer.attention.output.dense, lambda _, output: outputs.append(output)))
        teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return inputs, outputs


def mixer_features(mixer: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What enters the o projection of a student's mixer for its input `x [B, T, D]` and bool mask `[B, T]`."""
    found: list[torch.Tensor] = []
    layout = build_layout(mask, None, None, None, (x.shape[0], x.shape[1]), fresh=True, reorder=False)
    with _watch(mixer.o_proj, lambda args, _: found.append(args[0])):
        mixer(x, layout=layout, rotary={})
    return found[0]


@contextmanager
def _watch(module: nn.Module, see: Callable):
    handle = module.register_forward_hook(lambda _, args, output: see(args, output))
    try:
        yield
    finally:
        handle.remove()


def _bert_parts(teacher: PreTrainedModel) -> tuple[Any, Any]:
    """Embeddings and layers of a BERT-like model, with or without a head."""
    base: Any = getattr(teacher, teacher.base_model_prefix, teacher)
    try:
        embeddings, layers = base.embeddings, base.encoder.layer
        for layer in layers:
            _ = layer.attention.self.query, layer.attention.output.LayerNorm, layer.intermediate.dense
        _ = embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings
    except AttributeError as error:
        raise ValueError(
            f"{type(teacher).__name__} is not of BERT's shape ({error}): from_softmax_encoder takes BertModel and "
            "models that name their parts as it does."
        ) from None
    if base.config.model_type != "bert":
        raise ValueError(f"from_softmax_encoder takes a teacher of model_type 'bert', got {base.config.model_type!r}.")
    return embeddings, layers


@torch.no_grad()
def _copy(to: Any, source: Any) -> None:
    to.weight.copy_(source.weight)
    to.bias.copy_(source.bias)


__all__ = ["attention_of", "copy_weights", "fit_output_projections", "mixer_features", "student_config"]


# ---- lalm.modeling.affine_maps ----
"""What a piece of a sequence makes of the state S that enters it: A S + B, for every rule that is linear in its state.

Pieces that different processes hold are joined by these maps (sequence_parallel.py): the map of two pieces is
(A_2 A_1, A_2 B_1 + B_2), so that a scan over P pieces takes log2(P) steps (Blelloch, CMU-CS-90-190).
"""


from collections.abc import Callable

import torch
from torch.nn import functional as F


Map = tuple[torch.Tensor, torch.Tensor]


def diagonal_map(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, layout: SequenceLayout) -> Map:
    """The map of S <- exp(g_t) S + k_t v_t^T: A `[B, H, D, 1]`, one factor per key channel (D = K) or per head
    (D = 1), and B `[B, H, K, V]`.

    Args:
        k, v: `[B, T, H, K]` and `[B, T, H, V]`.
        g: log decay `[B, T, H]` or `[B, T, H, K]`; None for none.
        layout: padding and documents; where a document begins, A is 0.
    """
    dtype = compute_dtype(k, v, g)
    with without_autocast(k.device):
        k, v, g = layout.freeze(k.to(dtype), v.to(dtype), None if g is None else g.to(dtype))
        documents, kept = layout.document_ids(), k.new_ones(len(k), 1, 1, 1)
        if documents is not None:
            k = k.masked_fill((documents != documents[:, -1:])[..., None, None], 0)
            kept = (documents[:, -1] == 0).to(dtype).view_as(kept)
        if g is not None:
            g = g if g.ndim == 4 else g[..., None]
            later = g.flip(1).cumsum(1).flip(1)  # from every token to the last
            k = k * F.pad(later[:, 1:], (0, 0, 0, 0, 0, 1)).exp()
            kept = kept * later[:, 0, ..., None].exp()
        return kept, torch.einsum("bthk,bthv->bhkv", k, v)


def delta_map(rule: Callable, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, memories: int = 0) -> Map:
    """The map of a delta rule: A `[B, H, R, R]` on the R rows of all memories, and B of the shape of the state.

    One call of the rule makes both: further columns of the values, which are 0, begin from the identity.

    Args:
        rule: `rule(q, k, v, state, output_final_state, layout) -> (o, state)`.
        k, v: `[B, T, H, K]` and `[B, T, H, V]`.
        layout: padding and documents; where a document begins, A is 0.
        memories: M of a state `[B, H, M, K, V]`; 0 for a state `[B, H, K, V]`.
    """
    batch, _, heads, keys = k.shape
    rows, values = keys * max(memories, 1), v.shape[-1]
    identity = F.pad(torch.eye(rows, dtype=compute_dtype(k, v), device=k.device), (values, 0))
    state = identity.expand(batch, heads, -1, -1)
    after = rule(k, k, F.pad(v, (0, rows)), state.unflatten(2, (memories, keys)) if memories else state, True, layout)
    added, factor = after[1].split([values, rows], dim=-1)
    return factor.flatten(2, -2), added


def apply_factor(factor: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A S, of a state or of another factor."""
    if factor.shape[-1] == 1:
        return factor * state
    return (factor @ state.flatten(2, -2)).view_as(state)


# ---- lalm.modeling.ops.diagonal.taylor ----
"""The feature map of Based in plain torch; the C++ kernel of diagonal recurrences makes the same features itself."""


import torch


def num_taylor_features(size: int) -> int:
    """Number of Taylor features for head size `size`."""
    return 1 + size + size * (size + 1) // 2


def taylor_features(x: torch.Tensor) -> torch.Tensor:
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K) (Based, Arora et al., arXiv 2402.18668, section 4.1).

    Of the K^2 second-order products the K (K + 1) / 2 distinct ones are kept, those off the diagonal times sqrt 2:
    `[..., K]` -> `[..., 1 + K + K (K + 1) / 2]`.
    """
    size = x.shape[-1]
    row, column = torch.triu_indices(size, size, device=x.device)
    weight = torch.where(row == column, x.new_tensor(0.5).sqrt(), x.new_tensor(1.0)) / size**0.5
    # By slices, which take a third of the time of an index and its backward pass.
    pairs = torch.cat([x[..., i : i + 1] * x[..., i:] for i in range(size)], dim=-1)
    return torch.cat([torch.ones_like(x[..., :1]), x / size**0.25, pairs * weight], dim=-1)


# ---- lalm.modeling.feature_maps ----
"""Feature maps of linear attention: phi(q) . phi(k) stands in for softmax's exp(q . k).

All take and return `[B, T, H, *]`, compute in float32 (float64 for float64) and never return less, so that the small
values of a float32 feature survive a bfloat16 model.
"""


import math

import torch
from torch import nn
from transformers import initialization as init



def elu_features(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236, eq. 7), written so that exp(x) is not lost next to 1."""
    return x.clamp(max=0).exp() + x.relu()


def dpfp_features(x: torch.Tensor, nu: int) -> torch.Tensor:
    """Deterministic parameter-free projection (Schlag et al., arXiv 2102.11174, eq. 37): `2 nu K` products."""
    x = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([x * x.roll(shift, dims=-1) for shift in range(1, nu + 1)], dim=-1)


class FavorFeatures(nn.Module):
    """Positive random features of the softmax kernel (Performers, Choromanski et al., arXiv 2009.14794, lemma 1).

    The directions are random, orthogonal in blocks, fixed, and stored with the weights.
    """

    directions: torch.Tensor

    def __init__(self, size: int, num_features: int):
        super().__init__()
        self.register_buffer("directions", torch.empty(num_features, size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        count, size = self.directions.shape
        q, r = torch.linalg.qr(torch.randn(-(-count // size), size, size))
        # LAPACK fixes the signs of q; only with those of r undone is q uniform over the rotations.
        rotations = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        lengths = torch.randn(count, size).norm(dim=-1, keepdim=True)
        init.copy_(self.directions, (rotations.flatten(0, 1)[:count] * lengths).to(self.directions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / x.shape[-1] ** 0.25
        exponent = x @ self.directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.directions.shape[0])


class HedgehogFeatures(nn.Module):
    """Learned map: softmax of W x next to softmax of -W x (Zhang et al., arXiv 2402.04347); W starts as identity."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.copy_(self.weight, torch.eye(self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.weight.to(x.dtype).T
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


class ElementwiseProductFeatures(nn.Module):
    """The product of two learned affine maps, (W1 x + b1) * (W2 x + b2): features of both signs."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * size, size))
        self.bias = nn.Parameter(torch.empty(2 * size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).chunk(2, dim=-1)
        return first * second


class FeatureMap(nn.Module):
    """The map called `name`, from heads of key size `size` to `num_features` (given for "favor" alone)."""

    def __init__(self, name: str, size: int, num_features: int | None = None, dpfp_nu: int = 3):
        super().__init__()
        self.name, self.dpfp_nu = name, dpfp_nu
        self.num_features = {
            "favor": num_features or size,
            "hedgehog": 2 * size,
            "dpfp": 2 * dpfp_nu * size,
            "taylor": num_taylor_features(size),
        }.get(name, size)
        if name == "favor":
            self.map: nn.Module = FavorFeatures(size, self.num_features)
        elif name == "hedgehog":
            self.map = HedgehogFeatures(size)
        elif name == "elementwise_product":
            self.map = ElementwiseProductFeatures(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(compute_dtype(x))
        with without_autocast(x.device):
            if self.name in ("favor", "hedgehog", "elementwise_product"):
                return self.map(x)
            if self.name == "dpfp":
                return dpfp_features(x, self.dpfp_nu)
            return _FIXED[self.name](x)


_FIXED = {
    "elu": elu_features,
    "relu": torch.relu,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "taylor": taylor_features,
    "identity": lambda x: x,
}


# ---- lalm.modeling.ops.chunks ----
"""Cutting a sequence into chunks, with the masks that keep documents apart in them.

Shape suffixes: B batch, T time, H heads, N chunks, C tokens of a chunk.
"""


from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F



def to_chunks(x: torch.Tensor, chunk_size: int, dtype: torch.dtype) -> torch.Tensor:
    """`[B, T, H, *] -> [B, H, N, C, *]`, the tail filled with zeros, which neither write nor decay."""
    x = fill_up(x, chunk_size).unflatten(1, (-1, chunk_size))
    return x.permute(0, 3, 1, 2, 4).to(dtype).contiguous()


def fill_up(x: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """`[B, T, H, *]` with zeros after the last token, up to a whole number of chunks."""
    missing = missing_tokens(x.shape[1], chunk_size)
    # Eagerly, padding with nothing is a copy; a compiled graph must not depend on the remainder.
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if torch.compiler.is_compiling() or missing else x


def missing_tokens(length: int, chunk_size: int) -> int:
    """How many tokens make whole chunks of `length` tokens."""
    if has_open_length():  # whose chunks must never be a single one, which torch.export would take for a special case
        return (length // chunk_size + 2) * chunk_size - length
    return -length % chunk_size


def from_chunks(x: torch.Tensor, length: int) -> torch.Tensor:
    """Undo `to_chunks`: the first `length` tokens `[B, T, H, *]`."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


class Boundaries(NamedTuple):
    """Masks that keep documents apart; all are products of 0 and 1 over `[B, 1, N, ...]`."""

    pair_BNCC: torch.Tensor  # query and key share a document
    reads_BNC1: torch.Tensor  # the query's document began before this chunk
    writes_BNC1: torch.Tensor  # the key's document goes on after this chunk
    passes_BN1: torch.Tensor  # one document spans the whole chunk


def chunk_boundaries(segments: torch.Tensor | None, chunk_size: int, dtype: torch.dtype) -> Boundaries | None:
    """The masks of documents `segments [B, T]` cut into chunks; None for one document a row."""
    if segments is None:
        return None
    pad = missing_tokens(segments.shape[1], chunk_size)
    segments = torch.cat([segments, segments[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (-1, chunk_size))[:, None]
    last = segments[..., -1:]
    entering = torch.cat([segments[:, :, :1, :1], last[:, :, :-1]], dim=2)
    # A document is contiguous, so equal ids of the first and the last token mean that all between are equal too.
    return Boundaries(
        (segments[..., :, None] == segments[..., None, :]).to(dtype),
        (segments == entering)[..., None].to(dtype),
        (segments == last)[..., None].to(dtype),
        (entering == last).to(dtype),
    )


def solve_unit_lower(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`(I + A)^-1 right` for the part A of `system [..., C, C]` below its diagonal, and `right [..., C, X]`."""
    if has_open_length():  # ONNX has no triangular solver
        return _inverse_unit_lower(system) @ right
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _inverse_unit_lower(system: torch.Tensor) -> torch.Tensor:
    """`(I + A)^-1`, from inverses of blocks on the diagonal that double in size, as exact as substitution. (The
    product (I - A) (I + A^2) ... would lose small differences of large powers.)"""
    count, size = system.shape[-1], 1
    rows = 1 << (count - 1).bit_length()
    system = F.pad(system, (0, rows - count, 0, rows - count))
    inverse = torch.ones_like(system[..., :1]).unsqueeze(-1)  # [..., n, size, size]
    while size < rows:
        below = lower_blocks(system, size)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        inverse, size = join_lower(first, -(second @ below @ first), second), 2 * size
    return inverse[..., 0, :count, :count]


def lower_blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks `[..., n, size, size]` that stand in `matrix [..., C, C]`, C = 2 n size, below the diagonal: rows of
    the second half of a window of `2 size`, columns of its first half."""
    count = matrix.shape[-1] // (2 * size)
    windows = matrix.unflatten(-1, (count, 2 * size)).unflatten(-3, (count, 2 * size))
    own = torch.eye(count, dtype=matrix.dtype, device=matrix.device)[:, None, :, None]
    return (windows[..., size:, :, :size] * own).sum(-2)  # few operations, where many slices make a large graph


def join_lower(first: torch.Tensor, below: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Lower triangular blocks `[..., size, size]` of neighbouring stretches and what stands below the first, as
    one."""
    upper = torch.cat([first, torch.zeros_like(first)], dim=-1)
    return torch.cat([upper, torch.cat([below, second], dim=-1)], dim=-2)


def suffix_sums(x: torch.Tensor) -> torch.Tensor:
    """`[..., C, D]`: the sum over this and all later tokens of the chunk."""
    return x.flip(-2).cumsum(-2).flip(-2)


def running_sums(changes: torch.Tensor, entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
    """The sum before each token of a chunk `[..., C, D]`, where a token takes `changes` away: it is known as
    the chunk begins and ends, `[..., D]`. Each token takes the side with the smaller numbers to
    add up, for behind one with large numbers they are taken away again, and leave their rounding."""
    sizes = torch.linalg.vector_norm(changes, 1, dim=-1, keepdim=True)
    found = suffix_sums(changes).add_(leaving[..., None, :])
    found[..., 0, :] = entering
    if no_token_is_large(sizes):  # the usual case
        return found
    sizes = sizes.cumsum(-2)
    fewer = 2 * sizes[..., :-1, :] < sizes[..., -1:, :] + _size(leaving) - _size(entering)
    before = torch.sub(entering[..., None, :], changes.cumsum(-2)[..., :-1, :])
    found[..., 1:, :] = torch.where(fewer, before, found[..., 1:, :])
    return found


def _size(x: torch.Tensor) -> torch.Tensor:
    return x.abs().sum(-1)[..., None, None]


def scan(
    step: Callable, xs: Sequence[torch.Tensor], state: torch.Tensor, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """S <- step(S, x_n, ...) over the chunks of all x `[B, H, N, ...]`; returns S before each step `[B, H, N, ...]`
    and after the last."""
    if has_open_length():
        return scan_exported(step, xs, state)
    before = state.new_empty(*xs[0].shape[:3], *state.shape[2:])
    order = range(xs[0].shape[2])
    for n in reversed(order) if reverse else order:
        before[:, :, n] = state
        state = step(state, *(x[:, :, n] for x in xs))
    return before, state


def scan_exported(
    step: Callable, xs: Sequence[torch.Tensor], state: torch.Tensor, dim: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scan` along the axis `dim` as one operation, whose loop has no length until it runs."""
    return _loop(lambda state, xs: (step(state, *xs), state.clone()), xs, state, dim)


def by_tokens(
    step: Callable, xs: Sequence[torch.Tensor | None], state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """S, o_t <- step(S, x_t, ...) over the tokens of all x `[B, T, ...]`, of which some may be None; returns
    o `[B, T, ...]` and the last S. A program that is exported has one loop for every length."""
    if has_open_length():
        given = [x for x in xs if x is not None]

        def step_of_given(state, tokens):
            tokens = iter(tokens)
            return step(state, *(None if x is None else next(tokens) for x in xs))

        return _loop(step_of_given, given, state, 1)
    outputs = []
    length = next(x.shape[1] for x in xs if x is not None)
    for t in range(length):
        state, o = step(state, *(None if x is None else x[:, t] for x in xs))
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def _loop(
    step: Callable, xs: Sequence[torch.Tensor], state: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from torch._higher_order_ops.scan import scan as loop  # it has no public name, and no other loop is exported

    state, found = loop(step, state.contiguous(), [x.movedim(dim, 0).contiguous() for x in xs])
    return found.movedim(0, dim), state


# ---- lalm.modeling.ops.diagonal.diagonal_recurrence ----
"""The recurrence behind classic linear attention, retention and GLA, evaluated step by step and in chunks.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t                (GLA, arXiv 2312.06635, eq. 3)

Shape suffixes: B batch, T time, H heads, K key size, V value size, N chunks, C tokens of a chunk, D = K (a gate per
channel) or 1 (a gate per head). Everything is computed in float32, in float64 for float64 inputs.

Chunk form. With G the running sum of g inside a chunk, E its last row, and any reference R per chunk and channel,
    q~_i = q_i exp(G_i - R),   k~_j = k_j exp(R - G_j)
    o_i  = sum_{j <= i} (q~_i . k~_j) v_j + (exp(R) S_in)^T q~_i
    S_out = exp(E) S_in + exp(E - R) sum_j k~_j v_j^T
R = E / 2 keeps every exponent within half the decay of one chunk, so a chunk costs what ungated attention costs. Where
that could overflow (`dispatch.MAX_DECAY`) the scores come from exponents that are never positive: see
`_bounded_levels`. The backward pass keeps the inputs only and recomputes the chunk states.
"""


from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F



def recurrent_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Definition, by tokens: q, k `[B, T, H, K]`, v `[B, T, H, V]`, g `[B, T, H, D]` -> o, S `[B, H, K, V]`."""
    layout = layout or SequenceLayout()
    dtype = compute_dtype(q, k, v, g)
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    q, k, v, g = layout.freeze(q, k, v, None if g is None else g.to(dtype))
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])

    def step(state_BHKV, q_BHK, k_BHK, v_BHV, g_BHD, starts_B):
        if starts_B is not None:
            state_BHKV = state_BHKV.masked_fill(starts_B[:, None, None, None], 0)
        if g_BHD is not None:
            state_BHKV = state_BHKV * g_BHD[..., None].exp()
        state_BHKV = state_BHKV + k_BHK[..., None] * v_BHV[:, :, None, :]
        return state_BHKV, (q_BHK[:, :, None, :] @ state_BHKV).squeeze(-2)

    o, state = by_tokens(step, (q, k, v, g, layout.starts()), state.to(dtype))
    return layout.zero_padding(o), state


def chunk_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` in matrix products over chunks, with a backward pass that recomputes."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}.")
    layout = layout or SequenceLayout()
    if is_transformed():
        return recurrent_diagonal(q, k, v, g, scale, state, layout)
    q, k, v, g = layout.freeze(q, k, v, g)
    if must_separate(layout, q, k, v, g):

        def alone(q, k, v, g, state, layout):
            return chunk_diagonal(q, k, v, g, scale, state, layout, chunk_size)

        return document_by_document(alone, (q, k, v, g), state, layout)
    if not has_open_length():
        chunk_size = min(chunk_size, 1 << (q.shape[1] - 1).bit_length())
    chunk_size, factored = chunks_of_decays(g, chunk_size)
    o, state = _ChunkDiagonal.apply(scale, chunk_size, factored, q, k, v, g, state, layout.document_ids())
    return layout.zero_padding(o), state


def normalized(core: Callable, eps: float) -> Callable:
    """A core whose outputs are divided by z . q + eps, where z, one more column of the state, sums the keys."""

    def read(q, k, v, g, scale, state, layout):
        o, state = core(q, k, F.pad(v, (0, 1), value=1.0), g, scale, state, layout)
        if is_transformed():
            return o[..., :-1] / (o[..., -1:] + eps), state
        return _Quotient.apply(o, eps)[0], state

    return read


class _Quotient(torch.autograd.Function):
    """`sums [..., V + 1]` -> all but the last by the last plus eps `[..., V]`; two passes over memory each way.
    What it divides by is an output too: what is kept of outputs can be differentiated again."""

    @staticmethod
    def forward(ctx, sums, eps):
        size = sums[..., -1:] + eps
        o = sums[..., :-1] / size
        ctx.save_for_backward(o, size)
        ctx.set_materialize_grads(False)
        return o, size

    @staticmethod
    def backward(ctx, do, d_size):
        o, size = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        along = (do[..., None, :] @ o[..., None]).squeeze(-1)
        d_sums = torch.cat([do, -along], dim=-1) / size
        return d_sums if d_size is None else d_sums + F.pad(d_size, (o.shape[-1], 0)), None


def _scale_rows(factor: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """Multiply the key rows of `[B, H, N, K, V]` by `[B, H, N, D]`."""
    return state if factor is None else state * factor[..., None]


def _scan(
    updates: torch.Tensor, decay: torch.Tensor | None, state: torch.Tensor | None, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """S <- decay_n S + updates_n over the chunks; returns S before each step `[B, H, N, K, V]` and after the last."""
    state = torch.zeros_like(updates[:, :, 0]) if state is None else state.to(updates.dtype)
    if decay is None:
        return scan(lambda state, update: update + state, [updates], state, reverse)
    return scan(lambda state, update, kept: update + state * kept[..., None], [updates, decay], state, reverse)


def _bounded_levels(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> Iterator[tuple]:
    """Split the lower triangle into square blocks, [half, half] for half = C/2, ..., 1, each with exponents <= 0.

    In a block every query lies in the second and every key in the first half of a window of 2 half tokens. With R = G
    at the first query, G_i - R and R - G_j are plain sums of log decays: never positive, however strong the decay, and
    summed directly, since a difference of large G would lose the small decays between them.
    Yields half and, per window, the queries and keys `[..., half, K]` and their factors.
    """
    half = q.shape[-2] // 2
    while half:
        q_windows, k_windows, windows = (x.unflatten(-2, (-1, 2 * half)) for x in (q, k, g))
        k_factor = suffix_sums(windows[..., 1 : half + 1, :]).exp()
        q_factor = F.pad(windows[..., half + 1 :, :].cumsum(-2), (0, 0, 1, 0)).exp()
        yield half, q_windows[..., half:, :], k_windows[..., :half, :], q_factor, k_factor
        half //= 2


def _level_blocks(scores: torch.Tensor, half: int) -> torch.Tensor:
    """View of the blocks `[..., C / (2 half), half, half]` of `_bounded_levels` inside `scores [..., C, C]`."""
    windows = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return windows.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :].movedim(-1, -3)


def _bounded_scores(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    if has_open_length():
        return _bounded_scores_exported(q, k, g)
    scores = torch.diag_embed((q * k).sum(-1))
    for half, q_block, k_block, q_factor, k_factor in _bounded_levels(q, k, g):
        _level_blocks(scores, half).copy_((q_block * q_factor) @ (k_block * k_factor).transpose(-1, -2))
    return scores


def _bounded_scores_exported(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The same by joining blocks: ONNX does not write into views."""
    scores = (q * k).sum(-1)[..., None, None]
    for _, q_block, k_block, q_factor, k_factor in reversed(list(_bounded_levels(q, k, g))):
        below = (q_block * q_factor) @ (k_block * k_factor).transpose(-1, -2)
        scores = join_lower(scores[..., 0::2, :, :], below, scores[..., 1::2, :, :])
    return scores[..., 0, :, :]


def _bounded_scores_backward(
    d_scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    diagonal = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk = diagonal * k, diagonal * q
    for half, q_block, k_block, q_factor, k_factor in _bounded_levels(q, k, g):
        block = _level_blocks(d_scores, half)
        dq_view = dq.unflatten(-2, (-1, 2, half)).select(-3, 1)
        dk_view = dk.unflatten(-2, (-1, 2, half)).select(-3, 0)
        dq_view += (block @ (k_block * k_factor)) * q_factor
        dk_view += (block.transpose(-1, -2) @ (q_block * q_factor)) * k_factor
    return dq, dk


class _Chunks:
    """What forward and backward both need, computed from the inputs `[B, H, N, C, *]` by either."""

    def __init__(self, q, k, g, segments, factored):
        self.q, self.k, self.boundaries = q, k, chunk_boundaries(segments, q.shape[-2], q.dtype)
        self.q_factor = self.k_factor = self.edge = self.decay = self.bounded = None
        if g is not None:
            self._set_factors(g, factored)
        self.q_scaled = q if self.q_factor is None else q * self.q_factor
        self.k_scaled = k if self.k_factor is None else k * self.k_factor
        if self.boundaries is None:
            self.q_reads, self.k_writes = self.q_scaled, self.k_scaled
        else:
            self.q_reads = self.q_scaled * self.boundaries.reads_BNC1
            self.k_writes = self.k_scaled * self.boundaries.writes_BNC1
            passes = self.boundaries.passes_BN1
            self.decay = passes.expand(-1, q.shape[1], -1, -1) if self.decay is None else self.decay * passes

    def _set_factors(self, g: torch.Tensor, factored: bool) -> None:
        total = g.cumsum(-2)
        end = total[..., -1, :]
        self.decay = end.exp()
        if factored:
            self.q_factor = (total - end[..., None, :] / 2).exp()
            self.k_factor = self.q_factor.reciprocal()
            self.edge = (end / 2).exp()
        else:
            self.q_factor = total.exp()
            self.k_factor = suffix_sums(F.pad(g[..., 1:, :], (0, 0, 0, 1))).exp()
            self.bounded = g

    def states(self, v: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before each chunk and after the last. (torch.export(strict=True) loses what a constructor keeps of
        a loop without a length.)"""
        return _scan(_scale_rows(self.edge, self.k_writes.transpose(-1, -2) @ v), self.decay, state)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        # tril_ selects, so whatever stands above the diagonal cannot reach a result even if it is not finite.
        scores = scores.tril_()
        return scores if self.boundaries is None else scores.mul_(self.boundaries.pair_BNCC)

    def scores(self) -> torch.Tensor:
        if self.bounded is None:
            return self.mask(self.q_scaled @ self.k_scaled.transpose(-1, -2))
        return self.mask(_bounded_scores(self.q, self.k, self.bounded))

    def scores_backward(self, d_scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of q and k through the scores."""
        if self.bounded is not None:
            return _bounded_scores_backward(d_scores, self.q, self.k, self.bounded)
        dq, dk = d_scores @ self.k_scaled, d_scores.transpose(-1, -2) @ self.q_scaled
        if self.q_factor is None or self.k_factor is None:
            return dq, dk
        return dq.mul_(self.q_factor), dk.mul_(self.k_factor)

    def state_backward(self, d_reads: torch.Tensor, d_writes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of q and k through what they read from and write to the state, in place."""
        if self.q_factor is not None and self.k_factor is not None:
            d_reads, d_writes = d_reads.mul_(self.q_factor), d_writes.mul_(self.k_factor)
        if self.boundaries is not None:
            d_reads, d_writes = d_reads.mul_(self.boundaries.reads_BNC1), d_writes.mul_(self.boundaries.writes_BNC1)
        return d_reads, d_writes


def _prepare(q, k, v, g, scale, segments, chunk_size, factored) -> tuple[Any, _Chunks]:
    """v in chunks, and what the others give."""
    dtype = compute_dtype(q, k, v, g)
    q_c, k_c, v_c, g_c = (None if x is None else to_chunks(x, chunk_size, dtype) for x in (q, k, v, g))
    if scale != 1:
        q_c = q_c * scale
    return v_c, _Chunks(q_c, k_c, g_c, segments, factored)


def _plain_diagonal_recurrence(ctx, q, k, v, g, state, segments) -> tuple[torch.Tensor, torch.Tensor]:
    return recurrent_diagonal(q, k, v, g, ctx.scale, state, SequenceLayout(segments=segments))


class _ChunkDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, chunk_size, factored, q, k, v, g, state, segments):
        ctx.save_for_backward(q, k, v, g, state, segments)
        ctx.scale, ctx.plan = scale, (chunk_size, factored)
        v_c, chunks = _prepare(q, k, v, g, scale, segments, chunk_size, factored)
        states, final = chunks.states(v_c, state)
        o = chunks.scores() @ v_c
        o += chunks.q_reads @ _scale_rows(chunks.edge, states)
        return from_chunks(o, q.shape[1]), final

    @staticmethod
    @differentiable_by(_plain_diagonal_recurrence, constants=3)
    def backward(ctx, do, d_final):
        q, k, v, g, state, segments = ctx.saved_tensors
        v_c, chunks = _prepare(q, k, v, g, ctx.scale, segments, *ctx.plan)
        states, final = chunks.states(v_c, state)
        do = to_chunks(do, ctx.plan[0], v_c.dtype)
        d_updates = _scale_rows(chunks.edge, chunks.q_reads.transpose(-1, -2) @ do)
        d_leaving, d_state = _scan(d_updates, chunks.decay, d_final, reverse=True)
        d_leaving_scaled = _scale_rows(chunks.edge, d_leaving)
        dv = chunks.scores().transpose(-1, -2) @ do
        dv += chunks.k_writes @ d_leaving_scaled
        d_reads = do @ _scale_rows(chunks.edge, states).transpose(-1, -2)
        d_reads, d_writes = chunks.state_backward(d_reads, v_c @ d_leaving_scaled.transpose(-1, -2))
        d_scores, d_own, dg = chunks.mask(do @ v_c.transpose(-1, -2)), None, None
        if g is not None and ctx.needs_input_grad[6]:
            # No gate acts between a token and itself. Its share would be in q dq and in k dk, and leave its
            # rounding, perhaps all there is of dg, in their difference: it comes in last.
            d_own = d_scores.diagonal(dim1=-2, dim2=-1).clone()[..., None]
            d_scores.diagonal(dim1=-2, dim2=-1).zero_()
        dq, dk = chunks.scores_backward(d_scores)
        dq += d_reads
        dk += d_writes
        if d_own is not None:
            ends = _at_boundaries(states, final, d_state, d_leaving, d_final)
            dg = _gate_gradient((chunks.q * dq).sub_(chunks.k * dk), ends, g)
            dq.addcmul_(d_own, chunks.k)
            dk.addcmul_(d_own, chunks.q)
        if ctx.scale != 1:
            dq *= ctx.scale
        length = q.shape[1]
        dq, dk, dv = (from_chunks(x, length).to(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))
        return None, None, None, dq, dk, dv, dg, None if state is None else d_state.to(state.dtype), None


def _at_boundaries(states, final, d_state, d_leaving, d_final) -> torch.Tensor:
    """<dL/dS, S> before every chunk and after the last, key by key: `[B, H, N + 1, K]`."""
    first, last = (states[:, :, :1] * d_state[:, :, None]), (final * d_final)[:, :, None]
    between = states[:, :, 1:] * d_leaving[:, :, :-1]
    return torch.cat([x.sum(-1) for x in (first, between, last)], dim=2)


def _gate_gradient(changes, boundaries, g) -> torch.Tensor:
    """dL/dg, which is <dL/dS, S> before a token; the token takes q dq - k dk away."""
    if g.shape[-1] == 1:
        changes, boundaries = changes.sum(-1, keepdim=True), boundaries.sum(-1, keepdim=True)
    sums = running_sums(changes, boundaries[:, :, :-1], boundaries[:, :, 1:])
    return from_chunks(sums, g.shape[1]).to(g.dtype)


# ---- lalm.modeling.ops.diagonal.diagonal_cpp ----
"""Diagonal recurrences by a C++ kernel, in blocks of tokens that stay in the caches of a core.

`cpp_diagonal` is the float32 form of `recurrent_diagonal` on a CPU. Its time and memory grow linearly; for the
backward pass it keeps the inputs and, of normalised sums, the outputs and what they were divided by.
"""


import ctypes
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F



class DiagonalTensors(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    state: torch.Tensor | None
    skip: torch.Tensor | None
    starts: torch.Tensor | None


class DiagonalOptions(NamedTuple):
    scale: float
    eps: float | None
    taylor: bool


class _Diagonal(KernelOp):
    """The kernels of diagonal.cpp."""

    name, Tensors, Options = "diagonal", DiagonalTensors, DiagonalOptions
    masks, outputs, extras, read_again = 2, 2, 1, 1

    def kernel(self, x: DiagonalTensors, options: DiagonalOptions) -> HeadKernel:
        gate_size = 0 if x.g is None else x.g.shape[-1]
        return diagonal_kernel(x.q.shape[-1], x.v.shape[-1], gate_size, options.eps is not None, options.taylor)

    def allocate(self, x: DiagonalTensors, options: DiagonalOptions, keeps: bool) -> tuple[torch.Tensor | None, ...]:
        q, v, is_normalized = x.q, x.v, options.eps is not None
        o = torch.empty_like(v) if x.skip is None else torch.zeros_like(v)
        keys = num_taylor_features(q.shape[-1]) if options.taylor else q.shape[-1]
        final = v.new_empty(q.shape[0], q.shape[2], keys, v.shape[3] + is_normalized)
        return o, final, torch.empty_like(v[..., 0]) if is_normalized and keeps else None

    def forward(self, library, x: DiagonalTensors, options: DiagonalOptions, made) -> None:
        decay = None if x.g is None else x.g.exp()
        library.forward(ctypes.byref(_inputs(x, decay, options)), *(pointer(y) for y in made))

    def saved(self, made, options: DiagonalOptions) -> tuple[torch.Tensor | None, ...]:
        return None if options.eps is None else made[0], made[2]

    def backward(self, library, x: DiagonalTensors, options: DiagonalOptions, saved, gradients) -> tuple:
        (o, sizes), (do, d_final) = saved, gradients
        decay = None if x.g is None else x.g.exp()
        found = [None if y is None else fresh(y, x.skip) for y in x[:4]]
        do = torch.zeros_like(x.v) if do is None else do.contiguous()
        if d_final is None:
            d_state = torch.zeros_like(cast(torch.Tensor, self.allocate(x, options, False)[1]))
        else:
            d_state = d_final.clone(memory_format=torch.contiguous_format)
        names = zip("qkvg", found, strict=True)
        made = pack("diagonal", "Gradients", state=address(d_state), **{name: address(y) for name, y in names})
        inputs = _inputs(x, decay, options)
        library.backward(ctypes.byref(inputs), pointer(o), pointer(do), pointer(sizes), ctypes.byref(made))
        return *found, None if x.state is None else d_state, None, None

    def plain(self, x: DiagonalTensors, options: DiagonalOptions) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, state, skip, starts = x
        if skip is not None:
            q, k, v = (y.masked_fill(skip[..., None, None], 0) for y in (q, k, v))
        if options.taylor:
            q, k = taylor_features(q), taylor_features(k)
        layout = SequenceLayout(None if skip is None else ~skip, None if starts is None else starts.cumsum(1))
        core = recurrent_diagonal if options.eps is None else normalized(recurrent_diagonal, options.eps)
        return core(q, k, v, g, options.scale, state, layout)


def _inputs(x: DiagonalTensors, decay: torch.Tensor | None, options: DiagonalOptions) -> ctypes.Structure:
    """The kernel's arguments; valid while the tensors live."""
    batch, length, heads = x.q.shape[:3]
    return pack(
        "diagonal",
        "Inputs",
        q=x.q.data_ptr(),
        k=x.k.data_ptr(),
        v=x.v.data_ptr(),
        decay=address(decay),
        state=address(x.state),
        skip=address(x.skip),
        starts=address(x.starts),
        scale=options.scale,
        eps=options.eps or 0.0,
        batch=batch,
        length=length,
        heads=heads,
        threads=torch.get_num_threads(),
    )


_diagonal = _Diagonal()


@cache
def diagonal_kernel(
    key_size: int, value_size: int, gate_size: int, normalized: bool = False, taylor: bool = False
) -> HeadKernel:
    """The kernel for heads of these sizes.

    Args:
        key_size, value_size: K and V.
        gate_size: size of the log decay per token and head: 0, 1 or the number of rows of the state.
        normalized: for sums that are divided by z . q + eps.
        taylor: for the features that `taylor_features` makes of q and k.
    """
    keys = num_taylor_features(key_size) if taylor else key_size
    sizes = {"KEY": keys, "TAYLOR": key_size if taylor else 0}
    sizes |= {"VALUE": value_size + -value_size % LANES, "NORMALIZED": int(normalized), "DECAY": min(gate_size, 2)}
    return HeadKernel("diagonal", keys * value_size, tuple(sizes.items()))


def _with_columns(state: torch.Tensor, missing: int, value_size: int) -> torch.Tensor:
    """`state` with so many columns of zeros after the first `value_size`, before that of a normaliser."""
    values, normalizer = state[..., :value_size], state[..., value_size:]
    return torch.cat([F.pad(values, (0, missing)), normalizer], -1)


def cpp_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
    eps: float | None = None,
    taylor: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` in C++; same arguments.

    With `eps` the outputs are divided by z . q + eps, where z sums the keys as S does k v^T; states are then
    `[B, H, K, V + 1]`, z their last column. With `taylor` it is that of `taylor_features(q)` and `taylor_features(k)`.
    """
    value_size, layout = v.shape[-1], layout or SequenceLayout()
    refuse_float64(q, k, v, g, state)
    if missing := -value_size % LANES:  # columns of zeros that make whole registers
        v = F.pad(v, (0, missing))
        state = None if state is None else _with_columns(state, missing, value_size)
    tensors: Any = (None if x is None else x.float().contiguous() for x in (q, k, v, g, state))
    x = DiagonalTensors._make((*tensors, *boundaries(layout)))
    o, final = _diagonal(x, DiagonalOptions(scale, eps, taylor))
    if missing:
        o, final = o[..., :value_size], torch.cat([final[..., :value_size], final[..., value_size + missing :]], -1)
    return o, final


# ---- lalm.modeling.ops.fla_kernels ----
"""The GPU kernels of flash-linear-attention, as cores like `recurrent_diagonal` and `recurrent_delta`."""


from collections.abc import Callable

import torch


_NEEDS_FLA = "linear_attn_implementation='fla' needs flash-linear-attention with Triton: pip install 'lalm[gpu]'."


def fla_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` by the kernels of flash-linear-attention; same arguments."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError(_NEEDS_FLA) from error
    layout = layout or SequenceLayout()
    q, k, v, g = layout.freeze(q, k, v, g)
    if g is None:
        return _run_fla(chunk_simple_gla, (q, k, v), {}, scale, state, layout)
    if g.shape[-1] == 1:
        return _run_fla(chunk_simple_gla, (q, k, v), {"g": g.squeeze(-1).float()}, scale, state, layout)
    return _run_fla(chunk_gla, (q, k, v), {"g": g.float()}, scale, state, layout)


def fla_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_delta` by the kernels of flash-linear-attention; same arguments."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise ImportError(_NEEDS_FLA) from error
    q, k, v, g, beta = layout.freeze(q, k, v, g, beta)
    gates = {"beta": beta.to(v.dtype)}
    if g is None:
        return _run_fla(chunk_delta_rule, (q, k, v), gates, scale, state, layout)
    return _run_fla(chunk_gated_delta_rule, (q, k, v), gates | {"g": g.float()}, scale, state, layout)


def _run_fla(
    kernel: Callable,
    qkv: tuple[torch.Tensor, ...],
    gates: dict[str, torch.Tensor],
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel on a batch `[B, T, ...]` whose rows may hold several documents."""
    batch, length = qkv[0].shape[:2]
    qkv = tuple(x.to(qkv[2].dtype) for x in qkv)
    documents = layout.document_ids()
    cu_seqlens = last = None
    if documents is not None:
        # The kernels know documents as pieces of one long row: lay the rows end to end and cut at every boundary.
        cuts = torch.ones(batch, length, dtype=torch.bool, device=documents.device)
        cuts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        boundaries = cuts.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([boundaries, boundaries.new_tensor([batch * length])]).to(torch.int32)
        first = torch.searchsorted(boundaries, torch.arange(batch, device=boundaries.device) * length)
        last = torch.cat([first[1:], first.new_tensor([len(boundaries)])]) - 1
        qkv = tuple(x.flatten(0, 1)[None] for x in qkv)
        gates = {name: x.flatten(0, 1)[None] for name, x in gates.items()}
        if state is not None:
            state = state.new_zeros(len(boundaries), *state.shape[1:]).index_copy(0, first, state)
    common = {"scale": scale, "initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    o, final = kernel(*qkv, **gates, **common)
    if last is not None:
        o, final = o.view(batch, length, *o.shape[2:]), final[last]
    return layout.zero_padding(o), final


# ---- lalm.modeling.ops.rules ----
"""What every rule does around its recurrence: checks, packed documents, precision, both directions of reading.

A core is the recurrence of a rule in one form: `core(q, k, v, *gates, scale, state, layout) -> (o, state)`. It
computes in float32 (float64 for float64 inputs), ignores what stands on padding, and returns 0 there.

Read forward and backward over each document, the weight of token j for token i is q_i . diag(exp(sum of the g between
them)) k_j on either side: gates after j for an earlier one (G_i - G_j), gates before j for a later one. A token's own
weight counts once.
"""


from collections.abc import Callable
from typing import NamedTuple

import torch



class Call(NamedTuple):
    """The arguments that every op takes after its tensors; `gla` documents them."""

    scale: float | None
    initial_state: torch.Tensor | None
    output_final_state: bool
    cu_seqlens: torch.Tensor | None
    layout: SequenceLayout | None
    causal: bool


def run_rule(
    core: Callable,
    tensors: tuple,
    call: Call,
    state_shape: tuple[int, ...],
    both_directions: Callable,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op of a rule.

    Args:
        core: see above.
        tensors: q, k `[B, T, H, K]`, v `[B, T, H, V]` and the gates, whose shapes the op has checked.
        state_shape: of the state of one batch element.
        both_directions: what makes of the core one that reads both ways, for `causal=False`.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    q, v = tensors[0], tensors[2]
    check_layout(call.layout, q)
    if call.cu_seqlens is not None:
        if call.layout is not None:
            raise ValueError("Pass cu_seqlens or layout, not both: a layout's segments already hold the boundaries.")

        def one_batch(*tensors, initial_state=None, output_final_state=False, layout=None):
            own = Call(call.scale, initial_state, output_final_state, None, layout, call.causal)
            return run_rule(core, tensors, own, state_shape, both_directions)

        return per_document(one_batch, tensors, call.cu_seqlens, call.initial_state, call.output_final_state)
    if not call.causal:
        refuse_states(call.initial_state, call.output_final_state)
        core = both_directions(core)
    check_state(call.initial_state, (q.shape[0], *state_shape))
    with without_autocast(q.device):
        o, state = core(*tensors, call.scale, call.initial_state, call.layout or SequenceLayout())
        return o.to(v.dtype), state if call.output_final_state else None


def check_gate(name: str, x: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless the gate has its shape, that of q or less."""
    if x.shape != shape:
        axes = ", ".join("BTHK"[: len(shape)])
        raise ValueError(f"{name} must be {meaning}, [{axes}] = {tuple(shape)}, got {tuple(x.shape)}.")


def both_ways(x: torch.Tensor | None) -> torch.Tensor | None:
    """`[B, T, ...] -> [2 B, T, ...]`: the rows as they are, then reversed in time."""
    return None if x is None else torch.cat([x, x.flip(1)])


def layout_both_ways(layout: SequenceLayout | None) -> SequenceLayout:
    """The layout of rows doubled by `both_ways`. Reversed documents lie together as before."""
    layout = layout or SequenceLayout()
    return SequenceLayout(both_ways(layout.mask), both_ways(layout.segments))


def bidirectional_diagonal(core: Callable) -> Callable:
    """The core of a diagonal rule -> the core that reads both ways, without a state to begin from."""

    def read(q, k, v, g, scale, state, layout):
        dtype = compute_dtype(q, k, v, g)
        q, k, v, g = layout.freeze(q, k, v, g)
        if g is None and layout.segments is None:  # every token reads the same sum
            state = torch.einsum("bthk,bthv->bhkv", k.to(dtype), v.to(dtype))
            return layout.zero_padding(torch.einsum("bthk,bhkv->bthv", q.to(dtype) * scale, state)), state
        batch = q.shape[0]
        doubled = [both_ways(x) for x in (q, k, v, g)]
        o, state = core(*doubled, scale, None, layout_both_ways(layout))
        own = (q.to(dtype) * k.to(dtype)).sum(-1, keepdim=True) * scale
        return layout.zero_padding(o[:batch] + o[batch:].flip(1) - own * v.to(dtype)), state

    return read


def bidirectional_delta(core: Callable) -> Callable:
    """The core of a delta rule -> the sum of what a token reads from its left and from its right; each side has its
    own write included."""

    def read(q, k, v, g, beta, scale, state, layout):
        batch = q.shape[0]
        doubled = [both_ways(x) for x in (q, k, v, g, beta)]
        o, state = core(*doubled, scale, None, layout_both_ways(layout))
        return o[:batch] + o[batch:].flip(1), state

    return read


def refuse_states(initial_state: torch.Tensor | None, output_final_state: bool) -> None:
    """Raise ValueError if a state is given or asked for, which has no meaning when both sides are read."""
    if initial_state is not None or output_final_state:
        raise ValueError("causal=False reads both sides and has no state: drop initial_state and output_final_state.")


# ---- lalm.modeling.ops.diagonal.linear_attention ----
"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236), with an optional decay per head and token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T     z_t = exp(g_t) z_{t-1} + k_t
    o_t = S_t^T q_t / (z_t . q_t + eps)    (eq. 16-20; without the denominator when normalize=False)

The caller applies the feature map to q and k. The normaliser z is one more column of the state, updated by a value
that is always 1; the C++ kernel computes it without that column.
"""


from collections.abc import Callable
from functools import partial

import torch



def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    normalize: bool = True,
    eps: float = 1e-6,
    taylor: bool = False,
    implementation: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Linear attention.

    Args:
        q, k: `[B, T, H, K]`, feature map applied, not negative if `normalize`.
        v: `[B, T, H, V]`.
        g: log decay `[B, T, H]`, at most 0, natural log; None for none.
        scale: factor on q; None for `K ** -0.5`. Under `normalize` it matters only relative to `eps`.
        initial_state: `[N, H, K, V]`, with `normalize` `[N, H, K, V + 1]` whose last column is z; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, boundaries of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document boundaries of a batch; its rows have one state each (N = B).
        causal: False reads both sides of every document, without states (`ops/rules.py`).
        normalize: divide by `z . q + eps`.
        taylor: q and k are `[B, T, H, D]` without a feature map, and `taylor_features` (Based) is applied here; the
            C++ kernel makes the features block by block. K, of states and `scale`, is the number of features.
        implementation: "recurrent", "chunk", "cpp", "fla" or "auto", as for `gla`.
        chunk_size: tokens of a chunk, a power of two.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None. States and sums are float32, or float64 if
        an input is.

    Raises:
        ValueError: a shape does not fit, or the implementation does not exist for this input.
    """
    check_shapes(q, k, v)
    if g is not None:
        check_gate("g", g, q.shape[:3], "one log decay per token and head")
        g = g[..., None]
    forms: dict[str, Callable] = {
        "recurrent": recurrent_diagonal,
        "chunk": partial(chunk_diagonal, chunk_size=chunk_size),
        "fla": fla_diagonal,
        "cpp": cpp_diagonal,
    }
    kernel = diagonal_kernel(q.shape[-1], v.shape[-1], 0 if g is None else 1, normalize, taylor)
    form = choose("linear_attention", implementation, q, v, forms, kernel)
    fused = form == "cpp" and causal
    if taylor and not fused:
        q, k, taylor = taylor_features(q), taylor_features(k), False
    core = partial(cpp_diagonal, taylor=taylor) if fused else forms[form]
    if normalize:
        core = partial(core, eps=eps) if fused else normalized(core, eps)

    def both_directions(_: Callable) -> Callable:
        core = bidirectional_diagonal(forms[form])
        return normalized(core, eps) if normalize else core

    state_shape = (q.shape[2], dict(kernel.sizes)["KEY"], v.shape[-1] + normalize)
    scale = state_shape[1] ** -0.5 if scale is None else scale
    call = Call(scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    return run_rule(core, (q, k, v, g), call, state_shape, both_directions)


recurrent_linear_attention = in_form(linear_attention, "recurrent")
chunk_linear_attention = in_form(linear_attention, "chunk")


# ---- lalm.modeling.ops.local_global.local_attention ----
"""Softmax attention inside windows (Roy et al., arXiv 2003.05997, section 3.1, as in lucidrains' local-attention).

Tokens of a document lie in windows of w. With W(i) = floor(i / w), token i attends token j of its document if
    causal:         W(j) is W(i) - 1 or W(i), and j <= i            (w to 2 w - 1 tokens back, not a sliding window)
    bidirectional:  W(j) is W(i) - 1, W(i) or W(i) + 1
The cost is linear in T: blocks of w queries meet blocks of 2 w or 3 w keys. Where documents, padding or a past move
the boundaries of the windows, blocks of w queries meet every key that could matter, 3 w or 5 w, and a mask picks.

`sliding_attention` has windows that slide with the token; there too blocks of w queries meet 2 w or 3 w keys.
"""


from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F


# Label of what is no token: no neighbour of any window, which are numbered from 0.
_NONE = -4


class LocalState(NamedTuple):
    """What causal local attention remembers: the last tokens of the document, back to the start of the window before
    the one that the next token falls into. A token keeps its place, so that the next one is written, and nothing
    moved."""

    keys: torch.Tensor  # [B, H, 2 w, K], token i in slot i mod 2 w; 0 where nothing is remembered
    values: torch.Tensor  # [B, H, 2 w, V], likewise
    seen: torch.Tensor  # tokens of the document so far, [B]; from 4 w on, 2 w are taken off


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_size: int,
    initial_state: LocalState | None = None,
    output_final_state: bool = False,
    *,
    scale: float | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    layout: SequenceLayout | None = None,
    overwrite_state: bool = False,
) -> tuple[torch.Tensor, LocalState | None]:
    """Local attention over all tokens at once, or over a piece after a state.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`; G divides H, and each head serves H / G neighbouring heads of q.
        window_size: w, in real tokens from the start of each document; T need not be a multiple.
        initial_state: what the tokens before left; None for nothing.
        output_final_state: also return the state after the last token, whose size does not depend on T.
        scale: factor on q . k; None for `K ** -0.5`.
        causal: False attends both sides, without states.
        dropout: probability, on the attention weights.
        layout: padding and document boundaries of a batch.
        overwrite_state: a single token may be written into the tensors of `initial_state`, which the final state then
            shares. Nobody else may need them; where gradients are recorded they stay as they are.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state (keys and values in the dtype of k) or None.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
    """
    layout = layout or SequenceLayout()
    _check(q, k, v, window_size, initial_state, output_final_state, causal, layout)
    plain = layout.mask is None and layout.segments is None
    if plain and initial_state is None and not has_open_length() and q.shape[1] <= window_size:
        return _one_window(q, k, v, window_size, output_final_state, scale, causal, dropout)
    if plain and initial_state is not None and q.shape[1] == 1:
        overwrites = overwrite_state and _is_free(k, v, initial_state)
        step = _aligned_token if overwrites and _is_aligned(initial_state) else partial(_one_token, overwrites)
        o, state = step(q, k, v, window_size, initial_state, scale, dropout)
        return o, state if output_final_state else None
    q, k, v = layout.freeze(q, k, v)
    if must_separate(layout, q, k, v):

        def alone(q, k, v, state, layout):
            options = {"scale": scale, "causal": causal, "dropout": dropout, "layout": layout}
            return local_attention(q, k, v, window_size, state, output_final_state, **options)

        return document_by_document(alone, (q, k, v), initial_state, layout)
    documents, positions, totals = document_positions(layout, q, None if initial_state is None else initial_state.seen)
    # Equal or neighbouring labels: equal or neighbouring windows of one document.
    labels = positions // window_size + documents * (q.shape[1] // window_size + 6)
    if layout.mask is not None:
        labels = labels.masked_fill(~layout.mask, _NONE)
    q, k, v, labels = (layout.pads_first(x) for x in (q, k, v, labels))
    key_labels = labels
    if initial_state is not None:
        past = _past(initial_state, k.dtype, window_size)
        now = k, v, labels.expand(q.shape[0], -1)
        k, v, key_labels = (layout.slide_over_padding(*pair) for pair in zip(past, now, strict=True))
    aligned = plain and initial_state is None
    blocks = _blocks(q, k, v, labels, key_labels, window_size, aligned, causal)
    o = layout.zero_padding(layout.restore(_attend(blocks, q.shape[1], scale, dropout)))
    return o, _final_state(k, v, totals, window_size) if output_final_state else None


def _past(state: LocalState, dtype: torch.dtype, window_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[B, 2 w, H, *]` of a state in the order of their tokens, and their labels."""
    k, v = (_rolled(x.to(dtype), state.seen).transpose(1, 2) for x in (state.keys, state.values))
    return k, v, _labels_of_past(state.seen, window_size)


def _one_window(q, k, v, window_size, output_final_state, scale, causal, dropout):
    """Whole sequences that fit into the first window: every query sees all before it, or all."""
    length = q.shape[1]
    o = _attend(_Blocks(q[:, None], k[:, None], v[:, None], None, causal), length, scale, dropout)
    if not output_final_state:
        return o, None
    slots = (0, 0, 0, 2 * window_size - length)
    keys, values = (F.pad(x.to(k.dtype).transpose(1, 2), slots) for x in (k, v))
    return o, LocalState(keys, values, k.new_full(k.shape[:1], length, dtype=compute_dtype(k)))


def _is_free(k: torch.Tensor, v: torch.Tensor, state: LocalState) -> bool:
    """Whether a state may be written to: it has the dtype of what is written, and nobody asks for gradients."""
    is_recorded = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    fits = state.keys.dtype == state.values.dtype == k.dtype == v.dtype
    return fits and not (hides_values() or is_recorded or any(x.requires_grad for x in state))


def _is_aligned(state: LocalState) -> bool:
    """Whether all rows have seen as many tokens."""
    count = state.seen
    return count.device.type == "cpu" and (len(count) == 1 or bool((count == count[0]).all()))


def _aligned_token(q, k, v, window_size, state, scale, dropout):
    """`_one_token` of rows that have seen as many tokens, written into their state: one slot for all."""
    keys, values, count = state
    size, seen = 2 * window_size, int(count[0])
    slot, shape = seen % size, (q.shape[0], k.shape[2], -1, q.shape[-1])
    keys[:, :, slot], values[:, :, slot] = k[:, 0], v[:, 0]
    if slot < window_size <= seen:  # the window before stands behind
        slots = torch.arange(size, device=q.device)
        near, mask = size, ((slots <= slot) | (slots >= window_size))[None]
    else:
        near, mask = slot + 1, None
    options = {"attn_mask": mask, "dropout_p": dropout, "scale": scale}
    o = F.scaled_dot_product_attention(q.reshape(shape), keys[:, :, :near], values[:, :, :near], **options)
    seen += 1
    if seen % window_size == 0:  # as in `_one_token`
        start = seen // window_size % 2 * window_size
        for x in (keys, values):
            x[:, :, start : start + window_size] = 0
    bounded = seen if seen < size else size + seen % size
    return o.flatten(1, 2)[:, None], LocalState(keys, values, torch.full_like(count, bounded))


def _one_token(overwrites, q, k, v, window_size, state, scale, dropout):
    """The next token of every row sees all that the state remembers, and itself."""
    size, groups, count = 2 * window_size, k.shape[2], state.seen.long()
    slot = count % size
    places, write = slot[:, None, None, None], torch.Tensor.scatter_ if overwrites else torch.scatter
    keys, values = (
        write(past.to(k.dtype), 2, places.expand(-1, groups, -1, x.shape[-1]), x.to(k.dtype).transpose(1, 2))
        for past, x in ((state.keys, k), (state.values, v))
    )
    slots = torch.arange(size, device=q.device)
    age = (slot[:, None] - slots) % size
    visible = age <= _remembered(count, window_size)[:, None]
    # The heads of q that share one of k are the rows of one product.
    q = q.reshape(q.shape[0], groups, -1, q.shape[-1])
    options = {"attn_mask": visible[:, None, None], "dropout_p": dropout, "scale": scale}
    o = F.scaled_dot_product_attention(q, keys, values, **options).flatten(1, 2)[:, None]
    count = count + 1
    # With a window full, the one before it is of no further use: its half is the next to be filled.
    ends = count % window_size == 0
    if may_hold(ends):
        forgotten = ends[:, None] & (slots // window_size == (count // window_size % 2)[:, None])
        forget = torch.Tensor.masked_fill_ if overwrites else torch.masked_fill
        keys, values = (forget(x, forgotten[:, None, :, None], 0) for x in (keys, values))
    return o, LocalState(keys, values, _bounded(count, window_size).to(compute_dtype(k)))


def sliding_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_size: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    layout: SequenceLayout | None = None,
) -> torch.Tensor:
    """Softmax attention over a sliding window, all tokens at once. Token i attends token j of its document if
        causal:         i - w < j <= i
        bidirectional:  i - w <= j <= i + w
    counted in real tokens. These are the masks that transformers makes for `sliding_window` = w, and the result is
    that of `F.scaled_dot_product_attention` under the whole mask `[T, T]`.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`; G divides H, and each head serves H / G neighbouring heads of q.
        window_size: w, in tokens; T need not be a multiple.
        scale: factor on q . k; None for `K ** -0.5`.
        causal: False attends both sides.
        dropout: probability, on the attention weights.
        layout: padding and document boundaries of a batch.

    Returns:
        o `[B, T, H, V]` in the dtype of v.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
    """
    layout = layout or SequenceLayout()
    _check(q, k, v, window_size, None, False, causal, layout)
    q, k, v = layout.freeze(q, k, v)
    if must_separate(layout, q, k, v):

        def alone(q, k, v, _, layout):
            options = {"scale": scale, "causal": causal, "dropout": dropout, "layout": layout}
            return sliding_attention(q, k, v, window_size, **options), None

        return document_by_document(alone, (q, k, v), None, layout)[0]
    documents, length = layout.document_ids(), q.shape[1]
    labels = q.new_zeros((1, length), dtype=torch.int64) if documents is None else documents
    if layout.mask is not None:
        labels = labels.masked_fill(~layout.mask, _NONE)
    q, k, v, labels = (layout.pads_first(x) for x in (q, k, v, labels))
    size = _block_size(window_size, length)
    reach = size if has_open_length() or length > size else 0
    ahead = 0 if causal else reach
    q, k, v, q_labels, k_labels = _cut(q, k, v, labels, labels, size, reach, ahead)
    # Key c of a block stands c - reach tokens after the first query.
    nearest, farthest = (0, window_size - 1) if causal else (window_size, window_size)
    visible = q_labels[..., :, None] == k_labels[..., None, :]
    visible = visible.tril(reach + nearest).triu(reach - farthest)
    o = _attend(_Blocks(q, k, v, visible, False), length, scale, dropout)
    return layout.zero_padding(layout.restore(o))


def check_grouped(q, k, v, window_size: int, layout: SequenceLayout) -> None:
    """Raise ValueError unless the heads of k and v serve those of q, and there is a window."""
    if q.ndim != 4 or k.ndim != 4 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q must be [B, T, H, K] and k [B, T, G, K] with a number of heads G that divides H, got q "
            f"{tuple(q.shape)} and k {tuple(k.shape)}."
        )
    check_shapes(q[:, :, : k.shape[2]], k, v, layout)
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}.")


def _check(q, k, v, window_size, state, output_final_state, causal, layout):
    check_grouped(q, k, v, window_size, layout)
    if not causal and (state is not None or output_final_state):
        raise ValueError("causal=False reads both sides and has no state: drop initial_state and output_final_state.")
    size, rows = 2 * window_size, k.shape[0]
    expected = [(rows, x.shape[2], size, x.shape[3]) for x in (k, v)] + [(rows,)]
    found = [tuple(x.shape) for x in state or ()]
    if state is not None and found != expected:
        raise ValueError(f"initial_state must hold keys, values and a count of shapes {expected}, got {found}.")


def _remembered(count: torch.Tensor, window_size: int) -> torch.Tensor:
    """How many tokens the next one sees: those of its window, and of the one before."""
    return torch.where(count >= window_size, window_size + count % window_size, count)


def _bounded(count: torch.Tensor, window_size: int) -> torch.Tensor:
    """As small a number that says the same, exact in float32."""
    size = 2 * window_size
    return torch.where(count < size, count, size + count % size)


def _rolled(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """`[B, H, 2 w, *]`, each row rolled to the front by its `count [B]`: from slots to the order of time, the latest
    last. By minus the count, from that order to slots."""
    order = (torch.arange(x.shape[2], device=x.device) + count.long()[:, None]) % x.shape[2]
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _labels_of_past(count: torch.Tensor, window_size: int) -> torch.Tensor:
    """`[B, 2 w]`, in the order of time: the windows of what is remembered, counted as the row's next token does."""
    size, count = 2 * window_size, count.long()[:, None]
    positions = count + torch.arange(-size, 0, device=count.device)
    known = positions >= count - _remembered(count, window_size)
    return torch.where(known, positions // window_size, _NONE)


def _final_state(k, v, totals: torch.Tensor, window_size: int) -> LocalState:
    size, count = 2 * window_size, _bounded(totals, window_size).expand(k.shape[0])
    old = torch.arange(size, device=k.device) < size - _remembered(count, window_size)[:, None]
    keys, values = (F.pad(x[:, -size:], (0, 0, 0, 0, max(size - x.shape[1], 0), 0)).to(k.dtype) for x in (k, v))
    keys, values = (
        _rolled(x.masked_fill(old[..., None, None], 0).transpose(1, 2), -count).contiguous() for x in (keys, values)
    )
    return LocalState(keys, values, count.to(compute_dtype(k)))


def _block_size(window_size: int, length: int) -> int:
    return window_size if has_open_length() else min(window_size, length)


class _Blocks(NamedTuple):
    q: torch.Tensor  # [B, N, S, H, K]: N blocks of S queries
    k: torch.Tensor  # [B, N, C, G, K]: all keys that a block could see
    v: torch.Tensor  # [B, N, C, G, V]
    visible: torch.Tensor | None  # bool [B or 1, N, S, C]; None for all
    is_causal: bool  # where `visible` is None


def _blocks(q, k, v, q_labels, k_labels, window_size: int, aligned: bool, causal: bool) -> _Blocks:
    """Cut into blocks of a window. Blocks that are windows look one window back (and ahead), others two; the keys of
    a past, 2 w of them, stand in front already."""
    past, size = k.shape[1] - q.shape[1], _block_size(window_size, q.shape[1])
    reach = (1 if aligned else 2) * size if has_open_length() or q.shape[1] > size else 0
    back, ahead = max(past, reach), 0 if causal else reach
    q, k, v, q_labels, k_labels = _cut(q, k, v, q_labels, k_labels, size, back - past, ahead)
    visible = (q_labels[..., :, None] - k_labels[..., None, :]).abs() <= 1
    return _Blocks(q, k, v, visible.tril(back) if causal else visible, False)


def _cut(q, k, v, q_labels, k_labels, size: int, front: int, ahead: int):
    """Blocks of `size` queries, and for each the keys around it, of which `front` are missing before the first and
    `ahead` after the last. What fills up has the label of no token."""
    tail = missing_tokens(q.shape[1], size)
    number = (q.shape[1] + tail) // size
    q, q_labels = _pad(q, 0, tail), _pad(q_labels, 0, tail, _NONE)
    k, v = _pad(k, front, tail + ahead), _pad(v, front, tail + ahead)
    k_labels = _pad(k_labels, front, tail + ahead, _NONE)
    q, q_labels = (x.unflatten(1, (number, size)) for x in (q, q_labels))
    k, v, k_labels = (_spans(x, number, size) for x in (k, v, k_labels))
    return q, k, v, q_labels, k_labels


def _pad(x: torch.Tensor, front: int, end: int, value: int = 0) -> torch.Tensor:
    """Lengthen the time axis of `[B, T, ...]`."""
    return F.pad(x, (*[0, 0] * (x.ndim - 2), front, end), value=value) if has_open_length() or front or end else x


def _spans(x: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """`[B, T, ...] -> [B, N, C, ...]`: block n has what starts at n S and leaves N - 1 - n blocks behind it."""
    if not has_open_length() and number == 1:
        return x[:, None]
    cut = x.unflatten(1, (-1, size))
    return torch.cat([cut[:, i : i + number] for i in range(cut.shape[1] - number + 1)], dim=2)


def _attend(blocks: _Blocks, length: int, scale: float | None, dropout: float) -> torch.Tensor:
    """o `[B, T, H, V]`. A query of padding sees padding, so that no row of weights is empty."""
    batch, number, _, heads, _ = blocks.q.shape
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in blocks[:3])
    k, v = (x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    mask = None
    if blocks.visible is not None:
        mask = blocks.visible.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=blocks.is_causal, scale=scale
    )
    return o.transpose(1, 2).unflatten(0, (batch, number)).flatten(1, 2)[:, :length]


# ---- lalm.modeling.ops.dense.cross_entropy ----
"""Cross-entropy of a linear head, in pieces: logits `[N, V]` of a long batch never exist at once.

    loss = sum_n (logsumexp_v(W h_n + b) - (W h_n + b)[target_n])      dL/dlogits = softmax - onehot

The pieces' gradients are taken as the pieces are made, so the head costs the three products that it costs anyway.
"""


import torch
from torch.nn import functional as F



def _plain_cross_entropy(ctx, hidden, weight, bias, targets, *_) -> torch.Tensor:
    dtype = ctx.dtype
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return F.cross_entropy(logits.to(compute_dtype(logits)), targets, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, hidden, weight, bias, targets):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        needs = ctx.needs_input_grad[1:]
        matrix = weight.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        d_bias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=bias.device)
        size = rows_of_logits(weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows, target = hidden[start : start + size].to(dtype), targets[start : start + size, None]
            logits = linear(rows, matrix, None if bias is None else bias.to(dtype)).to(wide)
            top = logits.logsumexp(-1, keepdim=True)
            loss += (top - logits.gather(-1, target)).sum()
            if not any(needs):
                continue
            d_logits = logits.sub_(top).exp_().scatter_add_(-1, target, -torch.ones_like(top))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                d_hidden[start : start + size] = linear(d_logits, matrix.t())
            if d_weight is not None:
                d_weight += weight_gradient(d_logits, rows)
        ctx.save_for_backward(hidden, weight, bias, targets, d_hidden, d_weight, d_bias)
        ctx.dtype, ctx.dtypes = dtype, (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @differentiable_by(_plain_cross_entropy, constants=1)
    def backward(ctx, d_loss):
        d_hidden, d_weight, d_bias = ctx.saved_tensors[4:]
        return (
            None,
            None if d_hidden is None else (d_hidden * d_loss).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_loss).to(ctx.dtypes[0]),
            None if d_bias is None else (d_bias * d_loss).to(ctx.dtypes[1]),
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T + bias`.

    Args:
        hidden: `[N, D]`.
        weight, bias: of the head, `[V, D]` and `[V]` or None.
        targets: int64 `[N]`; `ignore_index` does not count.
        num_items_in_batch: divide by this instead of the number of targets that count.

    Returns:
        a scalar in float32, in float64 for float64 inputs. Products run in the type of autocast, if that is on, else
        in that of `hidden`.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if is_transformed():  # where the number of targets that count must not be known
        logits = F.linear(hidden, weight, bias)
        loss = F.cross_entropy(logits.to(compute_dtype(logits)), targets, ignore_index=ignore_index, reduction="sum")
        items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / items
    counted = targets != ignore_index
    hidden, targets = hidden[counted], targets[counted]
    dtype = product_dtype(hidden, dtype)
    with torch.autocast(kind, enabled=False):
        loss = _LinearCrossEntropy.apply(dtype, hidden, weight, bias, targets)
    items = targets.numel() if num_items_in_batch is None else num_items_in_batch
    return loss / (items.to(loss.device) if isinstance(items, torch.Tensor) else items)


def causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """`ForCausalLMLoss` of transformers with `hidden_states [B, T, D]` and the head in place of the logits."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    return linear_cross_entropy(hidden_states.flatten(0, -2), weight, bias, targets, num_items_in_batch, ignore_index)


# ---- lalm.modeling.ops.delta.dual_recurrence ----
"""The definition of the dual-state delta rule, by tokens; what it computes stands in dual_state.py.

Shape suffixes: B batch, T time, H heads, M memories, K key size, V value size.
"""


from typing import NamedTuple

import torch



class DualInputs(NamedTuple):
    """What the rule takes of every token; both directions of reading have gates of their own, `[2, B, T, ...]`."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, H, V]
    g: torch.Tensor  # [B, T, H, M]
    beta: torch.Tensor  # [B, T, H, M]
    read: torch.Tensor  # [B, T, H, M]
    leak: torch.Tensor  # C - I, [B, T, H, M, M]


def recurrent_dual(
    x: DualInputs, scale: float, state: torch.Tensor | None, layout: SequenceLayout, use_delta_rule: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """o `[B, T, H, V]` and Z `[B, H, M, K, V]`."""
    q, k, v, g, beta, read, leak = x
    dtype = compute_dtype(*x)
    coupling = leak.to(dtype) + torch.eye(g.shape[-1], dtype=dtype, device=q.device)
    gates = (g.to(dtype).exp(), beta.to(dtype), read.to(dtype), coupling)
    state = None if state is None else state.to(dtype)
    return run_dual(q.to(dtype) * scale, k.to(dtype), v.to(dtype), *gates, state, layout.starts(), use_delta_rule)


def run_dual(
    q, k, v, decay, beta, read, coupling, state, starts_BT, use_delta_rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` of tensors of one type, after the scale, with exp(g) and C in the place of g and `leak`."""
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], beta.shape[-1], q.shape[3], v.shape[3])

    def step(state_BHMKV, q_BHK, k_BHK, v_BHV, decay_BHM, beta_BHM, read_BHM, coupling_BHMM, starts_B):
        k_BH1K = k_BHK[:, :, None, :]
        if starts_B is not None:
            state_BHMKV = state_BHMKV.masked_fill(starts_B[:, None, None, None, None], 0)
        state_BHMKV = state_BHMKV * decay_BHM[..., None, None]
        error_BHMV = v_BHV[:, :, None]
        if use_delta_rule:
            error_BHMV = error_BHMV - (k_BH1K[..., None, :] @ state_BHMKV).squeeze(-2)
        state_BHMKV = state_BHMKV + k_BH1K[..., None] * (beta_BHM[..., None] * error_BHMV)[..., None, :]
        state_BHMKV = (coupling_BHMM @ state_BHMKV.flatten(-2)).view_as(state_BHMKV)
        weights_BHMK = read_BHM[..., None] * q_BHK[:, :, None]
        return state_BHMKV, (weights_BHMK.flatten(2)[:, :, None] @ state_BHMKV.flatten(2, 3)).squeeze(-2)

    return by_tokens(step, (q, k, v, decay, beta, read, coupling, starts_BT), state)


# ---- lalm.modeling.ops.delta.delta_rule_cpp ----
"""The delta rule, with one memory per head, or several that leak into each other, by a C++ kernel for the CPU.

`cpp_delta` and `cpp_dual` are the float32 forms of `recurrent_delta` and `recurrent_dual`, in blocks of tokens that
stay in the caches of a core. Time and memory grow linearly; for the backward pass they keep the inputs and a state
every `SEGMENT` tokens.
"""


import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F


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


# ---- lalm.modeling.ops.delta.dual_chunks ----
"""The chunk form of the dual-state delta rule (dual_state.py).

Chunk form. Let B_i = diag(exp(g_i)) C_{i-1} (C_{-1} = I as the chunk begins), N_ij = B_i ... B_{j+1}, N_ii = I and
P_i = B_i ... B_0. The memories before the leak are S_i = P_i Z_in + sum_{j<=i} N_ij u_j (x) k_j, hence
    u_i + beta_i sum_{j<i} (k_i . k_j) N_ij u_j = beta_i (v_i - P_i Z_in^T k_i)      one triangular system of M C rows
    o_i = rho_i^T S_i^T q_i with rho_i = C_i^T r_i                                   Z_out = C_last S_last
so, as for the delta rule, o = inside + reads Z_in and Z_out = passes Z_in + writes. The N_ij are products of small
matrices, built by doubling; nothing is divided, so that any decay is safe. A new document is B_i = 0.

Shape suffixes: B batch, T time, H heads, M memories, K key size, V value size, N chunks, C tokens of a chunk. Rows and
columns of size `C M` run over tokens and, inside a token, over memories.
"""


from functools import reduce

import torch



def chunk_dual(
    x: DualInputs,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
    use_delta_rule: bool = True,
    chunk_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` in matrix products over chunks, with a backward pass that recomputes."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if is_transformed():
        return recurrent_dual(x, scale, state, layout, use_delta_rule)
    if must_separate(layout, *x):

        def alone(*tensors):
            *own, state, layout = tensors
            return chunk_dual(DualInputs(*own), scale, state, layout, use_delta_rule, chunk_size)

        return document_by_document(alone, x, state, layout)
    (batch, length, heads), memories = x.q.shape[:3], x.g.shape[-1]
    chunk_size = chunk_size if has_open_length() else min(chunk_size, -(-length // 8) * 8)
    dtype = compute_dtype(*x)
    inputs = [to_chunks(y, chunk_size, dtype) for y in (*x[:-1], x.leak.flatten(-2))]
    inputs[0] = inputs[0] * scale
    starts = layout.starts()
    if starts is not None:
        starts = to_chunks(starts[..., None, None], chunk_size, torch.bool)
    if state is not None:
        state = state.to(dtype).flatten(2, 3)
    size = chunks_at_once(batch * heads * (chunk_size * memories) ** 2, inputs[0].shape[2])
    if size is None:
        o, state = _advance(use_delta_rule, starts, state, *inputs)
    else:
        o, state = _Slabs.apply(size, use_delta_rule, starts, state, *inputs)
    return from_chunks(o, length), state.unflatten(2, (memories, -1))


def _by_slabs(size, delta, starts, state, *inputs) -> tuple[torch.Tensor, torch.Tensor, list]:
    """`_advance` over slabs of `size` chunks; also returns the states that enter them."""
    entering, outputs = [], []
    for n in range(0, inputs[0].shape[2], size):
        entering.append(state)
        o, state = _advance(delta, _cut_dual_chunks(starts, n, size), state, *(_cut_dual_chunks(x, n, size) for x in inputs))
        outputs.append(o)
    return torch.cat(outputs, dim=2), state, entering


def _plain_dual_chunks(ctx, starts, state, *rest) -> tuple[torch.Tensor, torch.Tensor]:
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
    @differentiable_by(_plain_dual_chunks, constants=2)
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
                    _cut_dual_chunks(x, n, ctx.size).detach().requires_grad_(needed is not None)
                    for x, needed in zip(inputs, found, strict=True)
                ]
                state = entering[index]
                state = None if state is None else state.detach().requires_grad_()
                o, final = _advance(ctx.delta, _cut_dual_chunks(starts, n, ctx.size), state, *pieces)
                wanted = [x for x in (*pieces, state) if x is not None and x.requires_grad]
            ends = [(y, dy) for y, dy in ((o, _cut_dual_chunks(do, n, ctx.size)), (final, d_state)) if y.requires_grad]
            outputs, cotangents = zip(*ends, strict=True)
            gradients = iter(torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True))
            for x in found:
                if x is not None:
                    _cut_dual_chunks(x, n, ctx.size).copy_(next(gradients))
            d_state = None if state is None else next(gradients)
        return None, None, None, d_state, *found


def _cut_dual_chunks(x: torch.Tensor | None, start: int, size: int):
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
    solved = solve_unit_lower(system, right) if delta else right
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


# ---- lalm.modeling.ops.delta.dual_state ----
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


from collections.abc import Callable
from functools import partial

import torch



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
    from .dual_state_triton import triton_dual

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
        layout, cu_seqlens = _documents_dual_state(cu_seqlens, q), None
    call = Call(keys**-0.5 if scale is None else scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    shape = (q.shape[2], memories, keys, values)
    return run_rule(core, (q, k, v, g, beta, read, coupling), call, shape, lambda _: both_directions)


def _documents_dual_state(cu_seqlens: torch.Tensor, q: torch.Tensor) -> SequenceLayout:
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


# ---- lalm.modeling.ops.delta.lam_gates ----
"""The gates of LAM's memories: in plain torch, and for two memories by a C++ kernel, in one pass over what their
projection gives."""


import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


# The projections per head that the kernel supports, and where the decays are among them.
COMPLETE = {"beta": 1, "read": 2, "decay": 2, "leak": 2}
_DECAY = slice(3, 5)


class LamGateTensors(NamedTuple):
    """The tensors that `cpp_lam_gates` takes."""

    x: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    flux_weight: torch.Tensor
    decay_bias: torch.Tensor
    flux_bias: torch.Tensor


class LamGateOptions(NamedTuple):
    leak_max: float


def plain_lam_gates(
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    flux_weight: torch.Tensor | None,
    decay_bias: torch.Tensor,
    flux_bias: torch.Tensor | None,
    leak_max: float,
    sizes: Mapping[str, int] = COMPLETE,
) -> tuple[torch.Tensor | None, ...]:
    """As `cpp_lam_gates`, of M memories and of those gates that `sizes` gives numbers: without flux every memory takes
    all of a write, without decays `decay_bias` decides alone, without read weights they are 1, without leak there is
    no coupling."""
    x = x.to(compute_dtype(x)).unflatten(-1, (*decay_bias.shape[:2], -1)).movedim(2, 0)
    parts = dict(zip(sizes, x.split(list(sizes.values()), dim=-1), strict=True))
    decay = decay_bias[:, None, None].to(x.dtype).expand(*x.shape[:-1], -1)
    g = F.logsigmoid(decay + parts["decay"] if sizes["decay"] else decay)
    beta = parts["beta"].sigmoid()
    if flux_weight is not None and flux_bias is not None:
        written = torch.einsum("bthk,hkv->bthv", k.to(x.dtype), flux_weight.to(x.dtype))
        psi = ((written * v).sum(-1) + flux_bias[:, None, None].to(x.dtype)).sigmoid()[..., None]
        beta = beta * torch.cat([psi, 1 - psi], dim=-1)
    beta = beta.expand_as(g)
    read = parts["read"] if sizes["read"] else torch.ones_like(g)
    coupling = None
    if sizes["leak"]:
        fast, slow = (parts["leak"].sigmoid() * leak_max).unbind(-1)
        coupling = torch.stack([1 - fast, fast, slow, 1 - slow], dim=-1).unflatten(-1, (2, 2))
    return g, beta, read, coupling


class _LamGates(KernelOp):
    """The kernels of lam_gates.cpp."""

    name, Tensors, Options = "lam_gates", LamGateTensors, LamGateOptions
    outputs = 4

    def kernel(self, x: LamGateTensors, options: LamGateOptions) -> HeadKernel:
        return HeadKernel("lam_gates", 0, ())

    def allocate(self, x: LamGateTensors, options: LamGateOptions, keeps: bool) -> tuple[torch.Tensor, ...]:
        directions, heads = x.flux_bias.shape
        g, beta, read = (x.x.new_empty(directions, *x.v.shape[:2], heads, 2) for _ in range(3))
        return g, beta, read, x.x.new_empty(*g.shape, 2)

    def forward(self, library, x: LamGateTensors, options: LamGateOptions, made) -> None:
        library.forward(ctypes.byref(_inputs_lam_gates(x, options)), ctypes.byref(_gates(made)))

    def backward(self, library, x: LamGateTensors, options: LamGateOptions, saved, gradients) -> tuple:
        shapes = self.allocate(x, options, False) if any(dy is None for dy in gradients) else gradients
        given = [
            torch.zeros_like(y) if dy is None else dy.contiguous() for y, dy in zip(shapes, gradients, strict=True)
        ]
        dx, d_flux = torch.empty_like(x.x), x.x.new_empty(*x.x.shape[:2], *x.flux_bias.shape)
        inputs, gates = _inputs_lam_gates(x, options), _gates(given)
        library.backward(ctypes.byref(inputs), ctypes.byref(gates), pointer(dx), pointer(d_flux))
        d_decay = dx.unflatten(-1, (*x.flux_bias.shape, -1))[..., _DECAY]  # the bias is added to what is projected
        # Of k^T W v, head by head.
        slopes, keys, values = (y.flatten(0, 1).transpose(0, 1) for y in (d_flux.sum(2)[..., None], x.k, x.v))
        dk, dv = (slopes * values) @ x.flux_weight.transpose(1, 2), slopes * (keys @ x.flux_weight)
        d_weight = (slopes * keys).transpose(1, 2) @ values
        dk, dv = (y.transpose(0, 1).reshape(like.shape) for y, like in ((dk, x.k), (dv, x.v)))
        return dx, dk, dv, d_weight, d_decay.sum((0, 1)), d_flux.sum((0, 1))

    def plain(self, x: LamGateTensors, options: LamGateOptions) -> tuple[torch.Tensor | None, ...]:
        return plain_lam_gates(*x, options.leak_max)


def _inputs_lam_gates(x: LamGateTensors, options: LamGateOptions) -> ctypes.Structure:
    directions, heads = x.flux_bias.shape
    return pack(
        "lam_gates",
        "Inputs",
        **{name: y.data_ptr() for name, y in zip(x._fields, x, strict=True)},
        tokens=x.x.shape[0] * x.x.shape[1],
        directions=directions,
        heads=heads,
        key_size=x.k.shape[-1],
        value_size=x.v.shape[-1],
        threads=threads(x.x.numel(), GATES_WORTH_THREADS),
        leak_max=options.leak_max,
    )


def _gates(tensors: Sequence[torch.Tensor]) -> ctypes.Structure:
    g, beta, read, coupling = (y.data_ptr() for y in tensors)
    return pack("lam_gates", "Gates", g=g, beta=beta, read=read, coupling=coupling)


_lam_gates = _LamGates()


def cpp_lam_gates(
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    flux_weight: torch.Tensor,
    decay_bias: torch.Tensor,
    flux_bias: torch.Tensor,
    leak_max: float,
) -> tuple[torch.Tensor, ...] | None:
    """The gates of two memories, D directions and H heads.

    Args:
        x: what is projected, `[B, T, D H 7]`; per head the write strength, two read weights, two decays and two leaks.
        k, v: unit keys and values, `[B, T, H, K]` and `[B, T, H, V]`.
        flux_weight: `[H, K, V]`; k^T W v + flux_bias is what the first memory's share of a write is the sigmoid of.
        decay_bias, flux_bias: `[D, H, 2]` and `[D, H]`.
        leak_max: what a leak is at most.

    Returns:
        g, beta and read `[D, B, T, H, 2]` and the coupling `[D, B, T, H, 2, 2]`, float32; None where no kernel runs.
    """
    tensors = (x, k, v, flux_weight, decay_bias, flux_bias)
    if not runs_lam_gates(*tensors):
        return None
    with without_autocast(x.device):
        return _lam_gates(LamGateTensors(*(y.float().contiguous() for y in tensors)), LamGateOptions(leak_max))
