# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Layers that several variants share. B batch, T time, D channels, W convolution width, H heads, K head size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers.activations import ACT2FN

from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.ops.cpp_kernels import preload_kernel
from lalm.modeling.ops.dense.elementwise import activate, has_kernel, open_activation, rms_norm
from lalm.modeling.ops.dense.matrix_product import linear, preload_linear
from lalm.modeling.ops.dense.short_conv import cpp_short_conv, open_short_conv, plain_short_conv
from lalm.modeling.ops.dispatch import pieces_of_mlp, product_dtype
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout
from lalm.modeling.tensor_parallel import own_part


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
