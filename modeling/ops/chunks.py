# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Cutting a sequence into chunks, with the masks that keep documents apart in them.

Shape suffixes: B batch, T time, H heads, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import has_open_length
from lalm.modeling.ops.dispatch import no_token_is_large


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
