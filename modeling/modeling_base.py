# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The backbone of every variant, written once; a variant gives its mixer (docs/adding_a_variant.md)."""

import os
import re
import tempfile
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.layers import (
    MLP,
    NORMS,
    Dropout,
    PositionEmbedding,
    ShortConvolution,
    look_up,
    rotary_tables,
    speed_up,
)
from lalm.modeling.mixers import Mixer, Tables
from lalm.modeling.model_inputs import (
    adopt_cache,
    build_layout,
    current_mask,
    is_fresh,
    positions,
    refuse_sharded_tokens,
    softmax_masks,
)
from lalm.modeling.saving import lossless, open_repository, push_model, staged_save
from lalm.modeling.softmax_attention import SoftmaxAttention
from lalm.modeling.tensor_parallel import check_tensor_parallel, register_styles

_HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")


class _Checkpointed:
    """Activation checkpointing that is on only while gradients are recorded. Without them it would save nothing, and
    the stock layer then drops the cache: generate() in train mode would forget every token but the last."""

    _is_checkpointed = False

    @property
    def gradient_checkpointing(self) -> bool:
        return self._is_checkpointed and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._is_checkpointed = value


class Block(_Checkpointed, GradientCheckpointingLayer):
    """Pre-norm residual block: `x + mixer(norm x)`, then `x + mlp(norm x)`."""

    mlp_class: ClassVar[type[nn.Module]] = MLP

    def __init__(self, config: LalmConfig, mixer: nn.Module):
        super().__init__()
        norm = NORMS[config.norm_type]
        self.mixer_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = self.mlp_class(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class LalmPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model class: initialisation, capabilities, recordable outputs."""

    config: LalmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": Block, "attentions": OutputRecorder(SoftmaxAttention, index=1)}
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShortConvolution):
            # The bound torch gives a convolution of this width, whose every output sees `width` inputs.
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As the base class, which makes a new head; it gets the fast product of the old one."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        head = self.get_output_embeddings()
        if type(head) is nn.Linear and "forward" not in vars(head):
            speed_up(head)
        return embeddings

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs):
        """As torch's, but weights that are tied and therefore stored once are not missing at their second place."""
        state_dict = copy(state_dict)
        for target, source in self.all_tied_weights_keys.items():
            if target not in state_dict and source in state_dict:
                state_dict[target] = state_dict[source]  # type: ignore[index]
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As the base class, for `from_pretrained(tp_plan="auto")`.

        Raises:
            ValueError: the layers cannot be shared by so many processes; the message names the field.
        """
        if distributed_config is not None and distributed_config.tp_size > 1:
            check_tensor_parallel(model.config, distributed_config.tp_size)
            register_styles()
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As the base class, but all files or none: a failed save or push leaves what was in `save_directory`, and in
        the repository, whole. Weights of an earlier save with other shards go. With `config.stored_dtype` the weights
        are stored in that type if this changes none of them.

        Raises:
            OSError: something cannot be written; the message names the folder and the reason.
        """
        names = ("is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant", "token")
        given = dict(zip(names, args, strict=False)) | kwargs
        is_writer = given.get("is_main_process", True)
        if not is_writer or given.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, **given)
            return
        push = given.pop("push_to_hub", False)
        hub = {name: given.pop(name) for name in _HUB_OPTIONS if name in given} if push else {}
        if push:
            name = hub.pop("repo_id", Path(save_directory).name)
            repo_id = open_repository(name, hub.pop("private", None), given.get("token"))
        if self.config.stored_dtype and not getattr(self, "hf_quantizer", None):
            weights = given.get("state_dict") or self.state_dict()
            given["state_dict"] = lossless(weights, getattr(torch, self.config.stored_dtype)) or weights
        with staged_save(save_directory) as staging:
            super().save_pretrained(staging, **given)
            saved = os.listdir(staging)
        if push:
            message = hub.pop("commit_message", None) or "Upload model"
            push_model(self, save_directory, repo_id, saved, token=given.get("token"), message=message, **hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str = "50GB",
        tags: str | list[str] | None = None,
        **options,
    ) -> str:
        """As the base class, in one commit, which also removes weights that the new ones replace; with a model card if
        the repository has none. `options` are commit_description, revision and create_pr."""
        repo_id = open_repository(repo_id, private, token)
        tags = [*(self.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            options |= {"tags": tags, "token": token, "message": commit_message or "Upload model"}
            return push_model(self, folder, repo_id, os.listdir(folder), **options)


class LalmModel(_Checkpointed, LalmPreTrainedModel):
    """Embeddings, blocks and final norm. A variant names its configuration and its mixer."""

    mixer_class: ClassVar[type[Mixer]]
    block_class: ClassVar[type[nn.Module]] = Block

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Its own block only: accelerate looks for every class named here. Heads take theirs from the backbone.
        cls._no_split_modules = [cls.block_class.__name__]

    def __init__(self, config: LalmConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        added = config.position_embedding_type in ("learned", "sinusoidal")
        self.embed_positions = PositionEmbedding(config) if added else None
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(
            self.block_class(config, self.make_mixer(config, i)) for i in range(config.num_hidden_layers)
        )
        self.norm = NORMS[config.norm_type](config.embedding_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def init_parallel_plans(self) -> None:
        """As the base class, without the rules for modules that this configuration does not have."""
        super().init_parallel_plans()
        names = {re.sub(r"\.\d+\b", ".*", name) for name, _ in [*self.named_modules(), *self.named_parameters()]}
        self._tp_plan = {name: style for name, style in (self._tp_plan or {}).items() if name in names}

    @classmethod
    def make_mixer(cls, config: LalmConfig, layer_idx: int) -> nn.Module:
        """The mixer of one layer, as `config.layer_types` says."""
        layer_type = config.layer_types[layer_idx]
        if layer_type == Mixer.layer_type:
            return cls.mixer_class(config, layer_idx)
        return SoftmaxAttention(config, layer_idx, layer_type)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the stack over `input_ids [B, T]` (or `inputs_embeds [B, T, D]`).

        Args:
            attention_mask: `[B, S + T]` with S tokens in the cache, 1 for real tokens; padding may stand anywhere.
            position_ids: `[B, T]`. In a first forward, positions that start again begin a new packed document.
            past_key_values: a DynamicCache or StaticCache made from this model's configuration; with `use_cache`
                (the configuration's default) a forward makes one, except while it trains. Fill it with one document
                per row: positions, and the softmax layers of a hybrid, go on from all tokens that were cached.
            seq_idx: `[B, T]`, packed documents by number.
            cu_seq_lens_q: `[N + 1]`, boundaries of the packed documents of one row (B = 1).

        Raises:
            ValueError: an input does not fit; the message names it. Also inside torch's context_parallel.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if input_ids is None:
            hidden_states: torch.Tensor = cast(torch.Tensor, inputs_embeds)
        else:
            hidden_states = look_up(self.embed_tokens, input_ids, "token", "vocab_size")
        if hidden_states.shape[1] == 0:
            raise ValueError("input_ids (or inputs_embeds) hold no token (T = 0): pass at least one.")
        is_causal, layer_types = self.config.is_causal, self.config.layer_types
        kinds = set(layer_types)
        if kinds != {"full_attention"}:
            refuse_sharded_tokens()
        fresh, seen = True, 0
        if past_key_values is not None:
            if not is_causal:
                raise ValueError("past_key_values needs is_causal=True: an encoder reads the whole sequence at once.")
            adopt_cache(past_key_values, self.config, layer_types, hidden_states.device)
            fresh, seen = is_fresh(past_key_values), past_key_values.get_seq_length()
        elif use_cache and is_causal and not (self.training and torch.is_grad_enabled()):
            # Nobody reads it in training, and what torch.utils.checkpoint runs again would read what it wrote itself.
            past_key_values = DynamicCache(config=self.config)
        batch, length = hidden_states.shape[:2]
        mask = current_mask(attention_mask, batch, length, seen)
        reorder = is_causal or self.mixer_class.is_windowed or "sliding_attention" in kinds
        layout = build_layout(mask, position_ids, seq_idx, cu_seq_lens_q, (batch, length), fresh, reorder)
        hidden_states = layout.zero_padding(hidden_states)  # whatever stands there, NaN too, is met by no layer
        kind, has_softmax = self.config.position_embedding_type, kinds != {Mixer.layer_type}
        if position_ids is None and (kind != "none" or has_softmax):
            position_ids = cast(torch.LongTensor, positions(layout, attention_mask, seen, hidden_states))
        hidden_states = self.dropout(self.add_positions(hidden_states, cast(torch.Tensor, position_ids)))
        masks = {}
        if has_softmax:
            masks = softmax_masks(self.config, hidden_states, attention_mask, past_key_values, layout)
        hidden_states = self.run_layers(
            hidden_states,
            layout=layout,
            rotary=self._rotary_tables(kinds, cast(torch.Tensor, position_ids)) if kind == "rope" else {},
            masks=masks,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=self.readout(hidden_states), past_key_values=past_key_values)

    def add_positions(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What enters the first block, from embeddings `[B, T, D]` and positions `[B, T]`."""
        if self.embed_positions is None:
            return hidden_states
        return hidden_states + self.embed_positions(position_ids).to(hidden_states.dtype)

    def run_layers(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """`[B, T, D] -> [B, T, D]` through all blocks, each of which gets `kwargs`."""
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while generate() drafts by an early exit
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states

    def readout(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the heads read, from what leaves the last block."""
        return self.norm(hidden_states)

    def _rotary_tables(self, kinds: set[str], position_ids: torch.Tensor) -> Tables:
        """cos and sin by head size, for layers of these kinds."""
        sizes = {self.config.linear_key_dim} if Mixer.layer_type in kinds and self.mixer_class.rotates else set()
        if kinds - {Mixer.layer_type}:
            sizes.add(cast(int, self.config.head_dim))
        return {size: rotary_tables(position_ids, size, self.config.rope_theta) for size in sizes}


__all__ = ["Block", "LalmModel", "LalmPreTrainedModel"]
