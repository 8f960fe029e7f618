# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the local-global transformer, after lucidrains' linear-attention-transformer 0.19.1 and 0.2.1."""

from dataclasses import field
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LalmConfig, logger

# Fields of the base without a meaning here, the value that they must keep, and what to use instead.
_UNUSED: dict[str, tuple[Any, str]] = {
    "expand_k": (1, "set head_dim"),
    "expand_v": (1, "set head_dim"),
    "use_short_conv": (False, "shift_tokens mixes neighbouring tokens here"),
    "conv_size": (4, "shift_tokens mixes neighbouring tokens here"),
    "attention_bias": (False, "the output projection alone has a bias"),
    "mlp_bias": (False, 'semantics="0.19" has biases in the MLP'),
    "qk_norm": (False, "q is normalised by its softmax"),
    "mlp_type": ("mlp", "set ff_glu=True for a gated MLP"),
    "full_attention_layers": ([], "a head is softmax attention by num_local_heads"),
    "sliding_attention_layers": ([], "set num_local_heads and local_attn_window_size"),
}

# What the constructor of linear-attention-transformer 0.19.1 calls a field, and what it does not have here.
UPSTREAM_NAMES = {
    "num_tokens": "vocab_size",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
    "heads": "num_attention_heads",
    "dim_head": "head_dim",
    "causal": "is_causal",
    "emb_dim": "embedding_size",
    "attn_layer_dropout": "dropout",
    "attn_dropout": "attention_dropout",
    "n_local_attn_heads": "num_local_heads",
    "use_axial_pos_emb": 'position_embedding_type="axial" (the default) or "learned"',
    "use_rotary_emb": 'position_embedding_type="rope"',
    "return_embeddings": "the class LocalGlobalModel",
    "attend_axially": "not available (lalm.modeling.fixed_length_attention.FoldAxially is a module)",
    "linformer_settings": "not available (lalm.modeling.fixed_length_attention has LinformerAttention)",
    "context_linformer_settings": "not available (lalm.modeling.fixed_length_attention has LinformerAttention)",
}


@strict
class LocalGlobalConfig(LalmConfig):
    """In every layer some heads are softmax attention inside windows, the rest linear attention over everything.

    Args:
        head_dim: head size; None for `hidden_size // num_attention_heads`. `hidden_size` need not be their sum.
        num_local_heads: local heads, of `num_attention_heads`: one number, or a list with one per layer.
        local_attn_window_size: window of the local heads in tokens, 128 if None; a token sees its own and the previous
            window (both sides' neighbours under `is_causal=False`). Also the row length of the axial position table.
            `local_attn_window` is taken for the same.
        blindspot_size: tokens of a bucket of the causal global heads. 1 sees every token up to its own; with more, a
            token sees only the buckets before its own.
        one_kv_head: one key and value head that all local heads share, and one for all global heads.
        reversible: residual streams from which the inputs of every layer are recomputed in the backward pass, so that
            memory does not grow with depth (Gomez et al., arXiv 1707.04585). Another function than without.
        ff_chunks: pieces of the time axis that the MLP works on one after the other, to the same result.
        ff_glu: gate the MLP, `w2(act(a) * b)`.
        ff_dropout: probability, inside the MLP. `dropout` acts on the embeddings and on what attention adds,
            `attention_dropout` on the weights of the local heads.
        embedding_size: width of the embeddings, the final norm and the head; None for `hidden_size`.
        shift_tokens: half of the features that enter a sublayer come from the previous token; under
            `is_causal=False` a third from the previous and a third from the next.
        receives_context: cross-attention in every layer; the model then needs `encoder_hidden_states`.
        position_embedding_type: "axial" is the sum of two learned tables, by window and by place in the window; "rope"
            adds sinusoids to the embeddings besides rotating q and k; others as in `LalmConfig`.
        max_position_embeddings: positions that "axial" and "learned" have, -1 for 2048.
        hidden_act: None for "gelu", "leaky_relu" (slope 0.01) under semantics "v0.2.1".
        pkm_layers: layers, from 0, whose MLP is a product-key memory (Lample et al., arXiv 1907.05242).
        pkm_num_keys: sub-keys K of each half of such a memory, which has K * K values.
        semantics: "0.19" normalises causal linear attention by one sum per token and takes exp features; "v0.2.1"
            normalises each feature, takes elu + 1, and has neither biases in the MLP nor a final norm.

    Raises:
        ValueError: fields that cannot work together, or a field of `LalmConfig` that has no meaning here.
    """

    model_type = "lalm_local_global"
    base_model_tp_plan = None  # a layer has heads of two kinds, of unequal number
    supports_bidirectional = True
    implementations = ("auto", "chunk", "recurrent")
    tables = ("axial", "learned")

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    head_dim: int | None = None
    num_local_heads: int | list[int] = 0
    local_attn_window_size: int | None = None
    embedding_size: int | None = None  # type: ignore[assignment]
    blindspot_size: int = 1
    one_kv_head: bool = False
    reversible: bool = False
    ff_chunks: int = 1
    ff_glu: bool = False
    ff_dropout: float | int = 0.0
    shift_tokens: bool = False
    receives_context: bool = False
    pkm_layers: list[int] = field(default_factory=list)
    pkm_num_keys: int = 128
    semantics: Literal["0.19", "v0.2.1"] = "0.19"
    hidden_act: str | None = None  # type: ignore[assignment]
    mlp_type: Literal["gated", "mlp"] = "mlp"
    norm_type: Literal["rmsnorm", "layernorm"] = "layernorm"
    position_embedding_type: Literal["axial", "none", "learned", "sinusoidal", "rope"] = "axial"  # type: ignore[assignment]

    def __post_init__(self, **kwargs):
        # Here and not in a validator: tools set it afterwards on every configuration that has the attribute.
        if self.sliding_window is not None:
            raise ValueError(
                f"{self.model_type} has no sliding_window, got {self.sliding_window}: set local_attn_window_size."
            )
        alias = kwargs.pop("local_attn_window", None)
        if alias is not None and self.local_attn_window_size not in (None, alias):
            raise ValueError(
                f"local_attn_window = {alias} and local_attn_window_size = {self.local_attn_window_size} are two "
                "names of one field: give one."
            )
        if self.local_attn_window_size is None:
            self.local_attn_window_size = 128 if alias is None else alias
        if self.head_dim is None:
            self.head_dim = max(self.hidden_size // max(self.num_attention_heads, 1), 1)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.hidden_act is None:
            self.hidden_act = "gelu" if self.semantics == "0.19" else "leaky_relu"
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As the base class; a stored `sliding_window` has no effect, and is taken for one that a tool has set."""
        if type(config_dict.get("sliding_window")) is int:
            logger.warning_once(f"{cls.__name__} does not use the stored sliding_window, but local_attn_window_size.")
            config_dict = config_dict | {"sliding_window": None}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _is_known(cls, key: str) -> bool:
        return key == "local_attn_window" or super()._is_known(key)

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        for key in kwargs:
            if key in UPSTREAM_NAMES and not self._is_known(key):
                raise ValueError(
                    f"{type(self).__name__} has no field {key!r}: linear-attention-transformer's {key} is "
                    f"{UPSTREAM_NAMES[key]} here."
                )
        super()._refuse_unknown(kwargs)

    def local_heads(self, layer_idx: int) -> int:
        """Local heads of one layer."""
        return self.num_local_heads if isinstance(self.num_local_heads, int) else self.num_local_heads[layer_idx]

    @property
    def linear_key_dim(self) -> int:
        """Key size per head, local or global."""
        return cast(int, self.head_dim)

    @property
    def linear_value_dim(self) -> int:
        """Value size per head, local or global."""
        return cast(int, self.head_dim)

    def validate_sizes(self) -> None:
        """Heads need not divide the width, which the projections change."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings", "head_dim", "embedding_size", "local_attn_window_size",
                     "blindspot_size", "ff_chunks", "pkm_num_keys"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def validate_unused_fields(self) -> None:
        unused = _UNUSED | {"num_key_value_heads": (self.num_attention_heads, "set one_kv_head=True for one head")}
        for name, (kept, instead) in unused.items():
            if getattr(self, name) != kept:
                raise ValueError(f"{self.model_type} has no {name}, got {getattr(self, name)!r}: {instead}.")

    def validate_local_heads(self) -> None:
        given, layers, heads = self.num_local_heads, self.num_hidden_layers, self.num_attention_heads
        if isinstance(given, list) and len(given) != layers:
            raise ValueError(
                f"num_local_heads lists {len(given)} layers, num_hidden_layers is {layers}: give one number per layer."
            )
        wrong = [count for count in (given if isinstance(given, list) else [given]) if not 0 <= count <= heads]
        if wrong:
            raise ValueError(
                f"num_local_heads must be 0 to num_attention_heads = {heads} in every layer, got {wrong[0]}."
            )

    def validate_memories(self) -> None:
        wrong = [layer for layer in self.pkm_layers if not 0 <= layer < self.num_hidden_layers]
        if wrong or len(set(self.pkm_layers)) != len(self.pkm_layers):
            raise ValueError(
                f"pkm_layers must name different layers from 0 to {self.num_hidden_layers - 1}, got {self.pkm_layers}."
            )

    def validate_blindspot(self) -> None:
        if self.blindspot_size > 1 and not self.is_causal:
            raise ValueError(
                f"blindspot_size = {self.blindspot_size} belongs to causal attention: set blindspot_size=1 with "
                "is_causal=False."
            )

    def validate_dropout(self) -> None:
        if not 0 <= self.ff_dropout < 1:
            raise ValueError(f"ff_dropout must be at least 0 and below 1, got {self.ff_dropout}.")

    def validate_positions(self) -> None:
        if self.position_embedding_type in ("sinusoidal", "rope") and cast(int, self.embedding_size) % 2:
            raise ValueError(f"Sinusoidal positions need an even embedding_size, got {self.embedding_size}.")
        if self.position_embedding_type == "rope" and cast(int, self.head_dim) % 2:
            raise ValueError(f"position_embedding_type='rope' needs an even head_dim, got {self.head_dim}.")
