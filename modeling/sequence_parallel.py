# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Sequence parallelism: every process of a group runs the whole model over its own slice of the tokens.

What a layer remembers of earlier slices (recurrent state, last inputs of a convolution, keys and values of a window)
comes from the processes that hold them, in place of a cache, and its gradient goes back in the backward pass. What
travels does not grow with the number of tokens. Where a state depends linearly on the one before, it comes by a scan
over the processes in log2(P) steps (sequence_scan.py), and no process waits for another's layer. Other states (of
local-global models and of heads with `window_size`) are handed on: process p can run layer l as soon as process p - 1
has, and with L layers a pass takes (L + P - 1) / L of the time of one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from transformers import DynamicCache
from transformers.utils import ModelOutput

from lalm.modeling.cache import RecurrentLayer
from lalm.modeling.model_inputs import build_layout, current_mask, positions
from lalm.modeling.ops.sequence_layout import SequenceLayout, stable_order
from lalm.modeling.sequence_scan import Slices

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_KINDS = {"conv_states": 0, "recurrent_states": 1}
_HEADER = 10  # whether a gradient comes back, the dtype, the number of axes, and up to seven sizes


class _Neighbours:
    """The processes with the slices before and after: sends that do not wait, receives that do."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.anchor = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        self.ends: list[torch.Tensor] = []  # zeros that tie every message to the loss, so that its gradient is sent
        self.sent: list[tuple[Any, torch.Tensor]] = []

    def _peer(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def send(self, tensor: torch.Tensor, rank: int, tag: int) -> None:
        tensor = tensor.detach().contiguous()
        self.sent.append((dist.isend(tensor, self._peer(rank), group=self.group, tag=tag), tensor))

    def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> torch.Tensor:
        dist.recv(tensor, self._peer(rank), group=self.group, tag=tag)
        return tensor

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        while self.sent:
            self.sent.pop()[0].wait()

    def hand_on(self, state: torch.Tensor, tag: int) -> None:
        """Give a state to the process with the next slice."""
        if self.rank == self.size - 1:
            return
        if self.anchor.requires_grad and not torch.is_grad_enabled():
            raise ValueError("Reentrant activation checkpointing hides gradients: use use_reentrant=False.")
        returns = torch.is_grad_enabled() and state.requires_grad
        header = [int(returns), _DTYPES.index(state.dtype), state.ndim, *state.shape]
        header += [0] * (_HEADER - len(header))
        self.send(torch.tensor(header, dtype=torch.int64, device=self.device), self.rank + 1, 2 * tag)
        if returns:
            self.ends.append(_HandOn.apply(state, self, tag))
        else:
            self.send(state, self.rank + 1, 2 * tag + 1)

    def take_over(self, tag: int) -> torch.Tensor:
        """The state that the process with the slice before hands on."""
        header = torch.empty(_HEADER, dtype=torch.int64, device=self.device)
        returns, dtype, ndim, *sizes = self.receive(header, self.rank - 1, 2 * tag).tolist()
        state = torch.empty(sizes[:ndim], dtype=_DTYPES[dtype], device=self.device)
        if not returns:
            return self.receive(state, self.rank - 1, 2 * tag + 1)
        state, end = _TakeOver.apply(self.anchor, state, self, tag)
        self.ends.append(end)
        return state


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, neighbours: _Neighbours, tag: int) -> torch.Tensor:
        ctx.neighbours, ctx.tag, ctx.like = neighbours, tag, torch.empty_like(state, device="meta")
        neighbours.send(state, neighbours.rank + 1, 2 * tag + 1)
        return state.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _):
        gradient = torch.empty(ctx.like.shape, dtype=ctx.like.dtype, device=ctx.neighbours.device)
        return ctx.neighbours.receive(gradient, ctx.neighbours.rank + 1, 2 * ctx.tag + 1), None, None


class _TakeOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, state: torch.Tensor, neighbours: _Neighbours, tag: int):
        ctx.neighbours, ctx.tag = neighbours, tag
        ctx.mark_dirty(state)
        return neighbours.receive(state, neighbours.rank - 1, 2 * tag + 1), anchor.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _):
        neighbours = ctx.neighbours
        if not neighbours.sent:
            Variable._execution_engine.queue_callback(neighbours.finish)
        neighbours.send(gradient, neighbours.rank - 1, 2 * ctx.tag + 1)
        return None, None, None, None


class _SliceLayer(RecurrentLayer):
    """The cache of one layer whose past lies in earlier processes, and whose states go to later ones."""

    _layer_type = None  # type: ignore[assignment]  # else the stock caches would take this class for RecurrentLayer

    def __init__(self, slices: Slices, neighbours: _Neighbours, layer_idx: int):
        super().__init__()
        self.slices, self.neighbours, self.layer_idx = slices, neighbours, layer_idx
        # What activation checkpointing runs again in the backward pass must neither receive nor send a second time.
        self.received: dict[Any, torch.Tensor] = {}
        self.handed_on: set[int] = set()
        self.has_previous_state[0] = True  # not a first forward: positions that start again mean nothing by themselves

    def _tag(self, kind: str, index: int) -> int:
        return (self.layer_idx * len(_KINDS) + _KINDS[kind]) * len(self.has_previous_state) + index

    def previous(self, kind: str, index: int, of_slice: Callable | None = None) -> torch.Tensor | None:
        tag = self._tag(kind, index)
        if of_slice is not None:
            self.handed_on.add(tag)
            if kind == "conv_states":
                return self.slices.last_inputs(of_slice(), self.received)[0]
            return self.slices.entering_state(of_slice(), self.received)
        if self.neighbours.rank == 0:
            return None
        if (found := self.received.get(tag)) is not None:
            state = found.detach().requires_grad_(found.requires_grad)
        else:
            state = self.received[tag] = self.neighbours.take_over(tag)
        return self.slices.first_documents(state)

    def _update(self, kind: str, value: torch.Tensor, index: int, num_tokens: int, given_away: bool) -> torch.Tensor:
        tag = self._tag(kind, index)
        if tag not in self.handed_on:
            self.handed_on.add(tag)
            self.neighbours.hand_on(value, tag)
        return value


class _SliceWindow:
    """The cache of a layer with a sliding window: the last tokens before the slice go in front of it."""

    is_initialized = True

    def __init__(self, slices: Slices):
        self.slices = slices
        self.received: dict[Any, torch.Tensor] = {}

    def get_seq_length(self) -> int:
        return 0

    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, window: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SequenceLayout]:
        """`[B, T, *, K]` each -> `[B, window - 1 + T, *, K]` each and their layout; queries in front are 0."""
        count, heads = window - 1, k.shape[2]
        own = torch.cat([k, v], dim=2).flatten(2)
        before, filled = self.slices.last_inputs(layout.last_inputs([own], count), self.received)
        slots = torch.arange(count, device=q.device) >= count - filled[:, None]
        real = torch.ones_like(own[..., 0], dtype=torch.bool) if layout.mask is None else layout.mask
        mask, segments = torch.cat([slots, real], dim=1), layout.document_ids()
        if segments is not None:
            segments = torch.cat([segments[:, :1].expand(-1, count), segments], dim=1)
        layout = SequenceLayout(mask, segments, stable_order(mask))
        k, v = torch.cat([before, own], dim=1).unflatten(2, (2 * heads, -1)).split(heads, dim=2)
        return nn.functional.pad(q, (0, 0, 0, 0, count, 0)), k, v, layout


def sequence_parallel(
    model: nn.Module,
    input_ids: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> ModelOutput:
    """Run a causal model over this process's slice of the tokens: `T // P` of them, the first slice in rank 0.

    Every process of the group passes the same whole batch and calls backward() if one does. The mean of the losses of
    all processes is the loss of the whole batch, and so is the mean of their gradients its gradient: what DDP and FSDP
    over the same group make of them. Sum over tokens, not mean over slices: unequal numbers of labels are right.

    Args:
        model: a causal model of lalm whose layers are recurrent or have a sliding window, or what DDP makes of one.
        input_ids: `[B, T]`, T at least the number of processes.
        group: the processes that share the sequence; None for all.
        attention_mask, position_ids, seq_idx: `[B, T]`, as `LalmModel.forward` takes them: padding anywhere, packed
            documents in either form.
        labels: `[B, T]`, unshifted; the label of a slice's last token is the first token of the next slice.
        num_items_in_batch: divide the loss by this instead of the number of labels that count.
        kwargs: for the model.

    Returns:
        the model's output for the tokens of this slice.

    Raises:
        ValueError: a full_attention layer, a model that reads both sides, transformers' own activation checkpointing
            (torch's wrappers work), or too few tokens.
    """
    config: Any = getattr(model, "module", model).config
    _check(model, config, input_ids, dist.get_world_size(group))
    batch, length = input_ids.shape
    mask = current_mask(attention_mask, batch, length, 0)
    layout = build_layout(mask, position_ids, seq_idx, None, (batch, length), fresh=True)
    neighbours, slices = _Neighbours(group, input_ids.device), Slices(group, layout, input_ids)
    start, stop = slices.bounds[slices.rank : slices.rank + 2]
    if (documents := layout.document_ids()) is not None:
        kwargs["seq_idx"] = documents[:, start:stop]
    position_ids = positions(layout, None, 0, input_ids) if position_ids is None else position_ids
    kwargs |= {} if mask is None else {"attention_mask": mask[:, start:stop]}
    if labels is not None:
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        items = (shifted != -100).sum() if num_items_in_batch is None else num_items_in_batch
        kwargs |= {"labels": labels[:, start:stop], "shift_labels": shifted[:, start:stop].contiguous()}
        kwargs["num_items_in_batch"] = torch.as_tensor(items, device=input_ids.device) / slices.size
    cache: Any = DynamicCache(config=config)
    cache.layers = [
        _SliceWindow(slices) if kind == "sliding_attention" else _SliceLayer(slices, neighbours, i)
        for i, kind in enumerate(config.layer_types)
    ]
    output = model(
        input_ids=input_ids[:, start:stop],
        position_ids=position_ids.expand(batch, -1)[:, start:stop],
        past_key_values=cache,
        **kwargs,
    )
    neighbours.finish()
    name = next(name for name in ("loss", "logits", "last_hidden_state") if output.get(name) is not None)
    if neighbours.ends:
        output[name] = output[name] + torch.stack(neighbours.ends).sum().to(output[name].dtype)
    output["past_key_values"] = None
    return output


def _check(model: nn.Module, config: Any, input_ids: torch.Tensor, size: int) -> None:
    if not config.is_causal:
        raise ValueError("Sequence parallelism needs is_causal=True: an encoder reads the whole sequence at once.")
    if "full_attention" in config.layer_types:
        raise ValueError(
            "Sequence parallelism hands on states of a fixed size, and full_attention layers read all keys: use a "
            "model without full_attention_layers, or shard the batch (DDP) or the weights (FSDP) instead."
        )
    if input_ids.shape[1] < size:
        raise ValueError(f"{input_ids.shape[1]} tokens cannot be shared by {size} processes: each needs one.")
    layers = (module for module in model.modules() if hasattr(module, "gradient_checkpointing"))
    if model.training and any(layer.gradient_checkpointing for layer in layers):
        raise ValueError(
            "gradient_checkpointing_enable() drops what layers hand on: call gradient_checkpointing_disable() and "
            "wrap the blocks by torch's apply_activation_checkpointing, as FSDP's fsdp_activation_checkpointing does."
        )


__all__ = ["sequence_parallel"]
