# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The local-global transformer, after lucidrains' linear-attention-transformer (its versions 0.19.1 and 0.2.1).

Code symbol -> upstream: mixer -> SelfAttention; mlp -> FeedForward; shift_tokens -> PreShiftTokens; AxialPositions ->
AxialPositionalEmbedding; embedding_in and embedding_out -> ProjectInOut; context_mixer -> SelfAttention of a context;
ProductKeyMemory -> PKM.
Unlike upstream, ff_glu and ff_dropout apply to every MLP, and the token shift never moves padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin
from transformers import initialization as init

from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.cache import previous_state, record
from lalm.modeling.layers import NORMS, Activation, Dropout, make_linear, sinusoidal_positions
from lalm.modeling.local_global_mixer import CrossMixer, LocalGlobalMixer
from lalm.modeling.modeling_base import Block, LalmModel
from lalm.modeling.modeling_heads import (
    LalmForCausalLM,
    LalmForMaskedLM,
    LalmForSequenceClassification,
    LalmForTokenClassification,
)
from lalm.modeling.ops.autograd import has_open_length, hides_values
from lalm.modeling.ops.sequence_layout import SequenceLayout
from lalm.modeling.product_key_memory import ProductKeyMemory
from lalm.modeling.reversible import run_reversible

# Numbers of the convolution states that hold a shifted token. The mixer has 0 and 1.
_MIXER_SHIFT, _MLP_SHIFT = 2, 3


class LocalGlobalMLP(nn.Module):
    """`down(act(up x))`, or gated `down(act(a) * b)` with `(a, b) = up x`; `ff_chunks` pieces of time one by one."""

    def __init__(self, config: LocalGlobalConfig):
        super().__init__()
        width, bias = cast(int, config.intermediate_size), config.semantics == "0.19"
        self.gated, self.chunks = config.ff_glu, config.ff_chunks
        self.up_proj = make_linear(config.hidden_size, 2 * width if self.gated else width, bias=bias)
        self.act_fn = Activation(cast(str, config.hidden_act), self.gated)
        self.dropout = Dropout(config.ff_dropout)
        self.down_proj = make_linear(width, config.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D] -> [B, T, D]`."""
        if self.chunks == 1 or has_open_length() or x.shape[1] == 1:
            return self._piece(x)
        pieces = x.chunk(self.chunks, dim=1)
        if torch.is_grad_enabled() and not hides_values():
            # Pieces alone would save nothing in training, where autograd keeps the wide activations of each.
            return torch.cat([checkpoint(self._piece, piece, use_reentrant=False) for piece in pieces], dim=1)
        return torch.cat([self._piece(piece) for piece in pieces], dim=1)

    def _piece(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up_proj(x)
        if self.gated:
            x, factor = x.chunk(2, dim=-1)
            return self.down_proj(self.dropout(self.act_fn(x, factor)))
        return self.down_proj(self.dropout(self.act_fn(x)))


def shift_tokens(
    x: torch.Tensor, state: torch.Tensor | None, layout: SequenceLayout, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the first half of the features from the real token before, 0 where a document begins.

    Not causal: the first third from the token before, the third from the token after; features that do not divide
    stay. `x [B, T, D]`, state `[B, 1, D]` (the last real token before x) or None -> the same shapes.
    """
    length, size = x.shape[1], x.shape[2] // (2 if causal else 3)
    x = layout.pads_first(x if layout.mask is None else x.masked_fill(~layout.mask[..., None], 0))
    window = nn.functional.pad(x, (0, 0, 1, 0)) if state is None else layout.slide_over_padding(state.to(x.dtype), x)
    before, after = window[:, :length, :size], None
    if not causal:
        after = nn.functional.pad(x[:, 1:, 2 * size : 3 * size], (0, 0, 0, 1))
    segments = layout.segments_pads_first()
    if segments is not None:
        begins = segments.diff(dim=1, prepend=segments[:, :1])[..., None] != 0
        before = before.masked_fill(begins, 0)
        if after is not None:
            after = after.masked_fill(begins.roll(-1, dims=1), 0)
    kept = x[..., size:] if after is None else torch.cat([x[..., size : 2 * size], after, x[..., 3 * size :]], dim=-1)
    return layout.restore(torch.cat([before, kept], dim=-1)), window[:, length:]


class LocalGlobalBlock(Block):
    """Pre-norm sublayers: mixer, MLP and, where a context is received, cross-attention and another MLP.

    Residual, or reversible: then two streams `[B, T, D]` go in and out behind their mean.
    """

    mlp_class = LocalGlobalMLP

    def __init__(self, config: LocalGlobalConfig, mixer: nn.Module):
        super().__init__(config, mixer)
        self.config = config
        if mixer.layer_idx in config.pkm_layers:
            self.mlp = ProductKeyMemory(config)
        self.context_mixer: CrossMixer | None = None
        if config.receives_context:
            norm = NORMS[config.norm_type]
            self.context_mixer_norm = norm(config.hidden_size, eps=config.norm_eps)
            self.context_mixer = CrossMixer(config)
            self.context_mlp_norm = norm(config.hidden_size, eps=config.norm_eps)
            self.context_mlp = LocalGlobalMLP(config)

    def forward(self, hidden_states: torch.Tensor, *streams: torch.Tensor, **kwargs):
        """`[B, T, D] -> [B, T, D]`; of a reversible model `(mean, x1, x2) -> (mean, y1, y2)`."""
        pairs = self.sublayers(**kwargs)
        if self.config.reversible:
            x1, x2 = streams
            for f, g in pairs:
                x1 = x1 + f(x2)
                x2 = x2 + g(x1)
            return (x1 + x2) / 2, x1, x2
        for f, g in pairs:
            hidden_states = hidden_states + f(hidden_states)
            hidden_states = hidden_states + g(hidden_states)
        return hidden_states

    def sublayers(self, **kwargs) -> list[tuple[Callable, Callable]]:
        """Pairs (attention, MLP), each a function of hidden states `[B, T, D]` to what it adds to them."""
        pairs: list[tuple[Callable, Callable]] = [(partial(self._mix, **kwargs), partial(self._transform, **kwargs))]
        if self.context_mixer is not None:
            pairs.append((partial(self._mix_context, **kwargs), lambda x: self.context_mlp(self.context_mlp_norm(x))))
        return pairs

    def _mix(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        mixed, _ = self.mixer(self._shift(self.mixer_norm(x), _MIXER_SHIFT, **kwargs), **kwargs)
        return self.dropout(mixed)

    def _transform(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.mlp(self._shift(self.mlp_norm(x), _MLP_SHIFT, **kwargs))

    def _mix_context(
        self,
        x: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        context_mixer = cast(CrossMixer, self.context_mixer)
        return self.dropout(context_mixer(self.context_mixer_norm(x), encoder_hidden_states, encoder_attention_mask))

    def _shift(
        self,
        x: torch.Tensor,
        number: int,
        layout: SequenceLayout,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if not self.config.shift_tokens:
            return x
        cache, index = past_key_values, cast(int, self.mixer.layer_idx)
        last = previous_state(cache, index, "conv_states", number)
        record(
            cache,
            index,
            [("conv_states", number)],
            (x,),
            layout,
            lambda inputs, layout: [shift_tokens(inputs[0], last, layout, causal=True)[1]],
        )
        x, state = shift_tokens(x, last, layout, self.config.is_causal)
        if cache is not None:
            cache.update_conv_state(state, index, state_idx=number)
        return x


class AxialPositions(nn.Module):
    """The sum of two learned tables, `windows[i // w] + places[i % w]` at position i."""

    def __init__(self, config: LocalGlobalConfig):
        super().__init__()
        self.size, self.limit = cast(int, config.local_attn_window_size), config.max_position_embeddings
        self.windows = nn.Embedding(-(-self.limit // self.size), cast(int, config.embedding_size))
        self.places = nn.Embedding(self.size, cast(int, config.embedding_size))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions `[B, T]` -> `[B, T, E]`.

        Raises:
            ValueError: a position that the tables lack (told on the CPU only).
        """
        told = position_ids.device.type == "cpu" and not hides_values()
        # The tables end with a whole window, which the last may not be.
        if told and self.limit % self.size and position_ids.numel():
            self._check(position_ids)
        try:
            return self.windows(position_ids // self.size) + self.places(position_ids % self.size)
        except IndexError:
            self._check(position_ids)
            raise

    def _check(self, position_ids: torch.Tensor) -> None:
        first, last = int(position_ids.min()), int(position_ids.max())
        if not 0 <= first <= last < self.limit:
            raise ValueError(
                f"position ids run from {first} to {last}; max_position_embeddings = {self.limit} allows 0 to "
                f"{self.limit - 1}."
            ) from None


def _is_hooked(module: nn.Module) -> bool:
    """Whether something wants to see the calls of `module`: hooks, or another forward in its place (accelerate)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class LocalGlobalModel(LalmModel):
    """Embeddings, blocks and final norm. `forward` also takes `encoder_hidden_states [B, S, D]` and
    `encoder_attention_mask [B, S]`, which `config.receives_context` asks for.

    Training a reversible model keeps no activations of its layers, and makes no cache of its own. Where hooks hang on
    whole layers (offloading, FSDP), these are called as modules and keep their activations.
    """

    config: LocalGlobalConfig
    mixer_class = LocalGlobalMixer  # type: ignore[assignment]
    block_class = LocalGlobalBlock

    def __init__(self, config: LocalGlobalConfig):
        super().__init__(config)
        if config.position_embedding_type == "axial":
            self.embed_positions = AxialPositions(config)  # type: ignore[assignment]
        inner, outer = config.hidden_size, cast(int, config.embedding_size)
        self.embedding_in = make_linear(outer, inner) if outer != inner else nn.Identity()
        self.embedding_out = make_linear(inner, outer) if outer != inner else nn.Identity()
        if config.semantics == "v0.2.1":
            self.norm = nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProductKeyMemory):
            init.normal_(module.keys, 0.0, module.keys.shape[-1] ** -0.5)
            init.normal_(module.values, 0.0, module.values.shape[-1] ** -0.5)
        # By name: the base class initialises before they are made.
        if isinstance(module, nn.Linear) and any(
            module is self._modules.get(name) for name in ("embedding_in", "embedding_out")
        ):
            # Keeps the scale of the embeddings, which would else fall below the epsilon of the first norm.
            init.normal_(module.weight, 0.0, module.in_features**-0.5)

    def add_positions(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, E] -> [B, T, D]`."""
        if self.config.position_embedding_type == "rope":
            table = sinusoidal_positions(position_ids, hidden_states.shape[-1], self.config.rope_theta)
            hidden_states = hidden_states + table.to(hidden_states.dtype)
        return self.embedding_in(super().add_positions(hidden_states, position_ids))

    def run_layers(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        self._check_context(kwargs)
        if not self.config.reversible:
            return super().run_layers(hidden_states, **kwargs)
        if self._recomputes(kwargs):
            return run_reversible(hidden_states, self.layers, kwargs, self.training)
        streams = [hidden_states, hidden_states]
        for layer in self.layers:
            hidden_states, *streams = layer(hidden_states, *streams, **kwargs)
        return hidden_states

    def _check_context(self, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("encoder_hidden_states") is not None
        if self.config.receives_context and not given:
            raise ValueError("receives_context=True needs encoder_hidden_states [batch, tokens, hidden_size].")
        if given and not self.config.receives_context:
            raise ValueError("encoder_hidden_states needs receives_context=True in the configuration.")

    def _recomputes(self, kwargs: dict[str, Any]) -> bool:
        """Whether the backward pass is to rebuild the streams; a cache, recorded layers and checkpoints cannot."""
        layers: Any = self.layers
        return (
            torch.is_grad_enabled()
            and not hides_values()
            and kwargs.get("past_key_values") is None
            and not kwargs.get("output_hidden_states", self.config.output_hidden_states)
            and not (self.training and any(layer.gradient_checkpointing for layer in layers))
            and not any(_is_hooked(layer) for layer in layers)
        )

    def readout(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, D] -> [B, T, E]`."""
        return super().readout(self.embedding_out(hidden_states))


class LocalGlobalForCausalLM(LalmForCausalLM, GenerationMixin):
    config: LocalGlobalConfig
    model_class = LocalGlobalModel
    lm_head_bias = True

    def prepare_inputs_for_generation(
        self,
        *args,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """As the stock one. generate() refuses what is not named here; this passes the context on."""
        stock: Any = super()
        inputs = stock.prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        if encoder_hidden_states is None:
            return inputs
        return inputs | {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }


class LocalGlobalForMaskedLM(LalmForMaskedLM):
    config: LocalGlobalConfig
    model_class = LocalGlobalModel
    lm_head_bias = True


class LocalGlobalForSequenceClassification(LalmForSequenceClassification):
    config: LocalGlobalConfig
    model_class = LocalGlobalModel


class LocalGlobalForTokenClassification(LalmForTokenClassification):
    config: LocalGlobalConfig
    model_class = LocalGlobalModel


__all__ = [
    "LocalGlobalForCausalLM",
    "LocalGlobalForMaskedLM",
    "LocalGlobalForSequenceClassification",
    "LocalGlobalForTokenClassification",
    "LocalGlobalModel",
]
