# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a process that holds one slice of a sequence learns of the slices before it, with gradients.

All processes of the group do the same steps in the same order, also in the backward pass. All know the layout of the
whole batch, so that only tensors travel. Shapes: B batch, T tokens of the whole sequence, P processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from lalm.modeling.affine_maps import Map, apply_factor
from lalm.modeling.ops.sequence_layout import SequenceLayout, stable_order

_TAG = 1 << 20  # beyond those of states that are handed on


class Slices:
    """The slices of a batch, one per process of the group, the first in rank 0.

    Args:
        group: the processes that share the sequence; None for all.
        layout: padding and documents of the whole batch.
        input_ids: the whole batch `[B, T]`, of which shape and device count.
    """

    def __init__(self, group: dist.ProcessGroup | None, layout: SequenceLayout, input_ids: torch.Tensor):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        length = input_ids.shape[1]
        self.bounds = [length * rank // self.size for rank in range(self.size + 1)]
        real, documents = layout.mask, layout.document_ids()
        real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real.expand_as(input_ids)
        documents = torch.zeros_like(input_ids) if documents is None else documents.expand_as(input_ids)
        self.real, self.documents = real, documents
        start = self.bounds[self.rank]
        self.continues = documents[:, start] == documents[:, max(start - 1, 0)] if start else real.new_zeros(len(real))
        self.filled: dict[int, torch.Tensor] = {}

    def first_documents(self, state: torch.Tensor) -> torch.Tensor:
        """The state `[B, ...]` that was handed on, 0 where this slice begins with a new document."""
        return torch.where(self.continues.view(-1, *[1] * (state.ndim - 1)), state, torch.zeros_like(state))

    def entering_state(self, own: Map, received: dict[Any, torch.Tensor]) -> torch.Tensor:
        """The recurrent state before this slice, by an exclusive scan (Hillis and Steele, 1986): before step d = 1, 2,
        4, ... a process knows the map of the d - 1 slices before its own, and sends that map joined with its own.

        Args:
            own: the map of this slice (affine_maps.py).
            received: keeps what came, for activation checkpointing.
        """
        factor, added = own
        factor = self.first_documents(factor) if self.rank else factor
        before: Map | None = None
        step = 1
        while step < self.size:
            sent = [added if before is None else apply_factor(factor, before[1]) + added]
            if 2 * step < self.size:  # after the last step nobody needs a factor
                sent.append(factor if before is None else apply_factor(factor, before[0]))
            packed = torch.cat([part.flatten(1) for part in sent], dim=1)
            arrived = self.shift(packed, step, ("state", step), received)
            pieces = arrived.split([part[0].numel() for part in sent], dim=1)
            state, *factors = (piece.view_as(part) for piece, part in zip(pieces, sent, strict=True))
            if before is None:
                before = (factors[0] if factors else factor, state)
            else:
                kept = apply_factor(before[0], factors[0]) if factors else before[0]
                before = (kept, apply_factor(before[0], state) + before[1])
            step *= 2
        return self.first_documents(torch.zeros_like(added) if before is None else before[1])

    def last_inputs(self, own: torch.Tensor, received: dict[Any, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The last real tokens before this slice, of the document that goes on into it.

        Args:
            own: those of this slice, `[B, N, D]`, as `SequenceLayout.last_inputs` makes them.
            received: keeps what came, for activation checkpointing.

        Returns:
            `[B, N, D]`, the latest last and 0 where there are fewer, and the number of them `[B]`.
        """
        count = own.shape[1]
        valid = self._valid(count)
        reach = len(valid)
        parts = [self.shift(own, distance, ("inputs", distance), received) for distance in range(reach, 0, -1)]
        if not parts:
            return torch.zeros_like(own), self.real.new_zeros(len(own), dtype=torch.int64)
        filled = valid[:, self.rank].flip(0)  # [reach, B], the farthest slice first
        slots = torch.arange(count, device=own.device) >= count - filled.T[:, :, None]
        kept = slots.flatten(1)
        order = stable_order(kept)[:, -count:]
        last = torch.cat(parts, dim=1).gather(1, order[..., None].expand(-1, -1, own.shape[2]))
        return last.masked_fill(~kept.gather(1, order)[..., None], 0), filled.sum(0).clamp(max=count)

    def _valid(self, count: int) -> torch.Tensor:
        """`[R, P, B]`: how many of the last `count` tokens the slice at distance 1 ... R has for each slice; R is as
        far as any slice of the batch needs, mostly 1."""
        if count in self.filled:
            return self.filled[count]
        first, last, real = [], [], []
        for start, stop in zip(self.bounds, self.bounds[1:], strict=False):
            documents, mask = self.documents[:, start:stop], self.real[:, start:stop]
            newest = torch.where(mask, documents, -1).amax(1)
            first.append(documents[:, 0])
            last.append(newest)
            real.append((mask & (documents == newest[:, None])).sum(1).clamp(max=count))
        firsts, lasts, reals = (torch.stack(parts) for parts in (first, last, real))  # [P, B]
        found: list[torch.Tensor] = []
        total = torch.zeros_like(reals)
        for distance in range(1, self.size):
            here = torch.zeros_like(reals)
            here[distance:] = torch.where(lasts[:-distance] == firsts[distance:], reals[:-distance], 0)
            found.append(torch.where(total < count, here, 0))
            total = total + found[-1]
        needed = [i + 1 for i, here in enumerate(found) if bool(here.any())]
        self.filled[count] = torch.stack(found[: max(needed)]) if needed else reals[:0, None].expand(0, *reals.shape)
        return self.filled[count]

    def shift(self, tensor: torch.Tensor, distance: int, key: Any, received: dict[Any, torch.Tensor]) -> torch.Tensor:
        """The tensor of the process `distance` slices before; 0 where there is none. Its gradient goes back."""
        return _Shift.apply(tensor, self, distance, key, received)

    def exchange(self, tensor: torch.Tensor, distance: int) -> torch.Tensor:
        """Send to the process `distance` slices on and receive from the one before; both may be missing."""
        sent, arrived, calls = tensor.detach().contiguous(), torch.zeros_like(tensor).contiguous(), []
        for call, rank, what in (
            (dist.isend, self.rank + distance, sent),
            (dist.irecv, self.rank - distance, arrived),
        ):
            if 0 <= rank < self.size:
                peer = rank if self.group is None else dist.get_global_rank(self.group, rank)
                calls.append(dist.P2POp(call, what, peer, self.group, tag=_TAG))
        for work in dist.batch_isend_irecv(calls) if calls else ():
            work.wait()
        return arrived


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, slices: Slices, distance: int, key: Any, received: dict
    ) -> torch.Tensor:
        ctx.slices, ctx.distance = slices, distance
        if key not in received:
            received[key] = slices.exchange(tensor, distance)
        return received[key].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        return ctx.slices.exchange(gradient, -ctx.distance), None, None, None, None
