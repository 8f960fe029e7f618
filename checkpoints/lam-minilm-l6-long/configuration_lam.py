# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
# Generated when a model is saved, from the package lalm, which is where to change it.


# ---- lalm.configuration.peft_defaults ----
"""What PEFT has to know of our model types: the modules that an adapter takes where its user names none."""

import sys
from typing import NoReturn

# The norms that every configuration has: the last one of some models is an identity.
_NORMS = ["mixer_norm", "mlp_norm"]
# Projections with other names than Llama's: those of gated convolutions.
_OWN_PROJECTIONS = {"lalm_based": ["in_proj"]}


def tell_peft(model_type: str) -> None:
    """Enter `model_type` into PEFT's tables of defaults, if PEFT is loaded; what a user has entered stays. Our
    projections have the names of Llama's, and get its defaults."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            own = _OWN_PROJECTIONS.get(model_type, []) if "v_proj" in table["llama"] else []
            table.setdefault(model_type, _NORMS if "LNTUNING" in name else table["llama"] + own)
    constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.setdefault(model_type, _refuse_prefix)


def _refuse_prefix(past_key_values) -> NoReturn:
    raise ValueError(
        "Prefix tuning and cartridges put trained keys and values before the text, and linear attention keeps none: "
        "use PromptTuningConfig or PromptEncoderConfig, which train tokens before the text, or LoraConfig."
    )


# ---- lalm.configuration.configuration_base ----
"""The configuration fields that every variant shares."""

import difflib
import math
import os
from dataclasses import field
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging


# Under transformers' own logger, so that its verbosity settings hold.
logger = logging.get_logger("transformers.lalm")

# What PreTrainedConfig takes besides its dataclass fields, and what other libraries keep in config.json.
_STOCK_KEYS = {
    "model_type", "num_labels", "torch_dtype", "name_or_path", "output_attentions", "attn_implementation",
    "experts_implementation", "auto_map", "custom_pipelines", "quantization_config", "per_layer_config",
    "tie_last_hidden_states",
}  # fmt: skip

# The max_position_embeddings of a model without a position table. generate(),
# sentence-transformers and evaluation tools compare lengths with it: -1 or None, which one knows, stops another.
NO_LIMIT = 2**31 - 1
# Far beyond any model that was trained: with a zero too many, lists of layers alone would fill the memory.
MOST_LAYERS = 10_000
# The same for factors of `hidden_size`.
LARGEST_FACTOR = 1e6

# Tensor parallelism, by names in a mixer; a model leaves out those that it does not have. A weight that all heads
# share is whole in every process, and its gradient is a sum over them. Styles lalm_* are those of tensor_parallel.py.
_SHARED = "replicated_with_grad_allreduce"
_MIXER_TP_PLAN = {
    "q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "g_proj": "colwise", "o_proj": "rowwise",
    "a_proj": "colwise", "b_proj": "colwise", "gk_proj": "lalm_own_outputs", "gates": "lalm_own_heads",
    "gate_bias": "local_params", "gate_bias.A_log": "colwise", "gate_bias.dt_bias": "colwise",
    "q_norm": _SHARED, "k_norm": _SHARED, "o_norm": _SHARED, "q_map.map": _SHARED, "k_map.map": _SHARED,
    "conv": "lalm_own_part",
}  # fmt: skip


@strict
class LalmConfig(PreTrainedConfig):
    """Base of every lalm configuration; a variant adds the fields of its mixer.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks (mixer + MLP).
        num_attention_heads: heads of the linear mixers and of the softmax layers.
        num_key_value_heads: key and value heads of the softmax layers; None for `num_attention_heads`.
        head_dim: size of a softmax head; None for `hidden_size // num_attention_heads`. `hidden_size` need not be the
            sum of the heads.
        attention_bias: biases on q, k, v and the output projection of every mixer.
        mlp_bias: biases in the MLP.
        expand_k: total key size of a linear mixer, over `hidden_size`.
        expand_v: total value size of a linear mixer, over `hidden_size`.
        hidden_act: activation of the MLP, a name of `transformers.activations.ACT2FN`.
        mlp_type: "gated" (`down(act(gate x) * up x)`) or "mlp" (`down(act(up x))`).
        intermediate_size: MLP width; None derives it: `hidden_ratio * hidden_size`, for a gated MLP two thirds of that
            rounded up to a multiple of 256.
        hidden_ratio: see `intermediate_size`.
        norm_type: "rmsnorm" or "layernorm".
        norm_eps: added to the variance in every norm.
        position_embedding_type: "none", "learned" or "sinusoidal" (added to the embeddings), or "rope" (rotates q and
            k of every mixer, before any feature map).
        max_position_embeddings: size of the learned position table, -1 for 2048. The other types have no limit, for
            which -1 stands too; it becomes `NO_LIMIT`.
        rope_theta: base of the rotary and sinusoidal wavelengths.
        use_short_conv: depthwise causal convolution and SiLU on the q, k and v of the linear mixers.
        conv_size: its width in tokens.
        qk_norm: RMSNorm on q and k of every head.
        is_causal: False makes an encoder, whose tokens see both sides (masked language models, sentence encoders);
            not every variant has one.
        full_attention_layers: indices of the layers that are full softmax attention instead of linear.
        sliding_attention_layers: indices of the layers that are softmax attention over a sliding window.
        sliding_window: tokens that such a layer sees, including the current one.
        dropout: probability, on the embeddings and on what each mixer and MLP adds.
        attention_dropout: probability, on the weights of the softmax layers.
        initializer_range: standard deviation of the initial weights.
        linear_attn_implementation: "auto", "chunk", "recurrent", "fla" (Triton kernels of flash-linear-attention),
            "triton" (our own for LAM) or "cpp" (a C++ kernel for the CPU, compiled when first used; only some
            variants have one).
        use_cache: return the state for further decoding.
        stored_dtype: "float16" or "bfloat16" stores the weights in that type as long as they are numbers of that type,
            for a checkpoint that is small on disk and loaded in `dtype`; None stores them as they are.

    Raises:
        ValueError: an unknown field, or fields that cannot work together; the message names the field and the fix.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {
        **{f"layers.*.mixer.{name}": style for name, style in _MIXER_TP_PLAN.items()},
        "layers.*.mixer": "lalm_own_part",  # which of the heads are its own: retention decays by the number of a head
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    supports_bidirectional: ClassVar[bool] = False
    implementations: ClassVar[tuple[str, ...]] = ("auto", "chunk", "recurrent", "fla", "cpp")
    tables: ClassVar[tuple[str, ...]] = ("learned",)  # position_embedding_types that have a table
    table_size: ClassVar[int] = 2048  # max_position_embeddings of such a type, unless given

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    expand_k: float | int = 1.0
    expand_v: float | int = 1.0
    hidden_act: str = "silu"
    mlp_type: Literal["gated", "mlp"] = "gated"
    intermediate_size: int | None = None
    hidden_ratio: float | int = 4
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    position_embedding_type: Literal["none", "learned", "sinusoidal", "rope"] = "none"
    max_position_embeddings: int = -1
    rope_theta: float | int = 10000.0
    use_short_conv: bool = False
    conv_size: int = 4
    qk_norm: bool = False
    is_causal: bool = True
    full_attention_layers: list[int] = field(default_factory=list)
    sliding_attention_layers: list[int] = field(default_factory=list)
    sliding_window: int | None = None
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    linear_attn_implementation: Literal["auto", "chunk", "recurrent", "fla", "triton", "cpp"] = "auto"
    use_cache: bool = True
    stored_dtype: Literal["float16", "bfloat16"] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __setattr__(self, key, value):
        """As the base class, and refuses NaN and infinity, so that no field is ever derived from them.

        Raises:
            ValueError: the field is named.
        """
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{key} must be finite, got {value}.")
        if key == "num_hidden_layers" and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"{key} must be at most {MOST_LAYERS}, got {value}.")
        super().__setattr__(key, value)

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
        if self.max_position_embeddings in (-1, NO_LIMIT):
            has_table = self.position_embedding_type in self.tables
            self.max_position_embeddings = self.table_size if has_table else NO_LIMIT
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = max(self.hidden_size // max(self.num_attention_heads, 1), 1)
        if self.intermediate_size is None:
            width = int(min(self.hidden_ratio, LARGEST_FACTOR) * self.hidden_size)
            self.intermediate_size = width if self.mlp_type == "mlp" else -(-int(2 * width / 3) // 256) * 256
        super().__post_init__(**kwargs)
        # They run again after this method, where `strict` wraps what they raise in an error that is no ValueError.
        self._run_validators()

    def _run_validators(self) -> None:
        for validator in type(self).__class_validators__:  # type: ignore[attr-defined]
            validator(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As the base class; fields of a stored configuration that we do not know are kept, with a warning.

        Raises:
            ValueError: the configuration is of another model type, or a keyword's value does not fit its field.
        """
        stored = config_dict.get("model_type", cls.model_type)
        if stored != cls.model_type:
            raise ValueError(
                f"This checkpoint is of model_type {stored!r}, not {cls.model_type!r} ({cls.__name__}): load it with "
                "AutoConfig and the Auto model classes."
            )
        unknown = {key: value for key, value in config_dict.items() if not cls._is_known(key)}
        if unknown:
            logger.warning_once(f"{cls.__name__} does not use {sorted(unknown)} of the stored configuration.")
        loaded = super().from_dict({k: v for k, v in config_dict.items() if k not in unknown}, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for key, value in unknown.items():
            setattr(config, key, value)
        config._run_validators()  # the base class sets the keywords after those of the stored fields have run
        return loaded

    @classmethod
    def _is_known(cls, key: str) -> bool:
        generation = GenerationConfig._get_default_generation_params()
        return key in cls.__dataclass_fields__ or key in _STOCK_KEYS or key in generation or key.startswith("_")

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        for key in kwargs:
            if key == "layer_types":
                raise ValueError(
                    "layer_types is derived; name the softmax layers in full_attention_layers and "
                    "sliding_attention_layers, for example full_attention_layers=[3, 7]."
                )
            if not self._is_known(key):
                close = difflib.get_close_matches(key, self.__dataclass_fields__, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{type(self).__name__} has no field {key!r}.{hint}")

    def to_dict(self) -> dict[str, Any]:
        """As the base class. PEFT calls it before it looks up the defaults of a model type, so they are told here:
        `import lalm` need not import PEFT, nor come after it."""
        tell_peft(self.model_type)
        return super().to_dict()

    @property
    def layer_types(self) -> list[str]:
        """Per layer "lalm_linear_attention", "full_attention" or "sliding_attention". Not stored: transformers does
        not resume from a checkpoint whose configuration holds a layer type that it does not know."""
        softmax = dict.fromkeys(self.full_attention_layers, "full_attention")
        softmax |= dict.fromkeys(self.sliding_attention_layers, "sliding_attention")
        return [softmax.get(index, "lalm_linear_attention") for index in range(self.num_hidden_layers)]

    @property
    def embedding_size(self) -> int:
        """Width of the embeddings, of the final norm and of what the heads read."""
        return self.hidden_size

    @property
    def linear_key_dim(self) -> int:
        """Key size of one linear head."""
        return self.linear_size(self.expand_k)

    @property
    def linear_value_dim(self) -> int:
        """Value size of one linear head."""
        return self.linear_size(self.expand_v)

    def linear_size(self, factor: float | int) -> int:
        """Size of one linear head if all have `factor` times the width."""
        return int(self.hidden_size * factor) // self.num_attention_heads

    def validate_layer_type(self) -> None:
        """Replaces the stock check, which knows no recurrent layer of ours; see `validate_softmax_layers`."""

    def validate_factors(self) -> None:
        for name in ("expand_k", "expand_v", "hidden_ratio"):
            if not 0 < getattr(self, name) <= LARGEST_FACTOR:
                raise ValueError(f"{name} must be positive and at most {LARGEST_FACTOR:g}, got {getattr(self, name)}.")

    def validate_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "conv_size", "num_key_value_heads", "head_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be None or at least 1, got {self.sliding_window}.")
        for name, factor in self._factors().items():
            size = self.hidden_size * factor
            if size < 1 or size != int(size) or size % self.num_attention_heads:
                heads = self.num_attention_heads
                raise ValueError(f"hidden_size{name} = {size:g} must be a multiple of num_attention_heads = {heads}.")
        if self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}."
            )

    def _factors(self) -> dict[str, float | int]:
        """By which the width is multiplied before it is cut into heads; softmax heads may have a size of their own."""
        softmax = bool(self.full_attention_layers or self.sliding_attention_layers)
        follows = softmax and self.head_dim == self.hidden_size // self.num_attention_heads
        return {" * expand_k": self.expand_k, " * expand_v": self.expand_v} | ({"": 1} if follows else {})

    def validate_values(self) -> None:
        for name in ("pad_token_id", "bos_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} = {token} must be None or a token id below vocab_size = {self.vocab_size}.")
        for name in ("norm_eps", "rope_theta", "initializer_range"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")

    def validate_softmax_layers(self) -> None:
        fields = ("full_attention_layers", "sliding_attention_layers")
        for name in fields:
            wrong = [index for index in getattr(self, name) if not 0 <= index < self.num_hidden_layers]
            if wrong:
                raise ValueError(f"{name} holds {wrong}; layers are numbered 0 to {self.num_hidden_layers - 1}.")
        both = sorted(set(self.full_attention_layers) & set(self.sliding_attention_layers))
        if both:
            raise ValueError(f"Layers {both} stand in full_attention_layers and sliding_attention_layers; choose one.")
        if self.sliding_attention_layers and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(
                "sliding_attention_layers needs sliding_window, in tokens; set for example sliding_window=64."
            )

    def validate_direction(self) -> None:
        if not self.is_causal and not self.supports_bidirectional:
            raise ValueError(f"{self.model_type} has no bidirectional form: leave is_causal=True.")

    def validate_implementation(self) -> None:
        if (name := self.linear_attn_implementation) not in self.implementations:
            raise ValueError(
                f"linear_attn_implementation={name!r}: {self.model_type} has no {name} kernels; choose one of "
                f"{', '.join(self.implementations)}."
            )

    def validate_positions(self) -> None:
        if self.max_position_embeddings < 1:
            raise ValueError(
                "max_position_embeddings, the size of the table of learned positions, must be at least 1, got "
                f"{self.max_position_embeddings}."
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"Sinusoidal positions need an even hidden_size, got {self.hidden_size}.")
        if self.position_embedding_type == "rope":
            softmax = bool(self.full_attention_layers or self.sliding_attention_layers)
            for name, size in (("linear key", self.linear_key_dim), ("softmax", self.head_dim if softmax else 2)):
                if size and size % 2:
                    raise ValueError(f"position_embedding_type='rope' needs an even {name} head size, got {size}.")

    def validate_activation(self) -> None:
        from transformers.activations import ACT2FN

        if self.hidden_act not in ACT2FN:
            close = difflib.get_close_matches(self.hidden_act, list(ACT2FN), n=3)
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is unknown to transformers; near it: {close or 'nothing'}."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """As the base class, and writes the model's code next to the weights, so that it loads without lalm."""
        try:
            from lalm.hub import export_code
        except ImportError:  # running as remote code: transformers copies the files it was loaded from
            pass
        else:
            export_code(self, save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


# ---- lalm.configuration.configuration_lam ----
"""Configuration of LAM, the hierarchical dual-state delta-rule encoder."""

from dataclasses import field
from typing import Literal

from huggingface_hub.dataclasses import strict



@strict
class LamConfig(LalmConfig):
    """LAM in the shape of MiniLM-L6 (6 layers of width 384, 12 heads, post-norm): a sentence encoder of 24M weights.

    It reads both sides unless `is_causal=True`, and has no length limit unless positions are learned. Every part of
    the design has a switch, so that its worth can be measured.

    Args:
        num_memories: memories per head: 2 (fast and slow), or 1 (a gated delta rule).
        decay_init: how much each memory keeps from token to token before training, fast one first; in (0, 1).
        use_adaptive_decay: decays that depend on the token; False leaves one learned constant per head and memory.
        use_flux: share the write out between the memories by the resonance flux psi = sigmoid(k^T M v + b); False
            writes to both in full.
        use_leak: let the memories take from each other, by a share that depends on the token and is at most a half.
        use_delta_rule: write the error v - S^T k; False writes v itself (plain linear attention).
        use_output_norm: RMSNorm on the output of every head.
        use_output_gate: multiply the output by `sigmoid(x W)`.
    """

    model_type = "lalm_lam"
    supports_bidirectional = True
    implementations = ("auto", "chunk", "recurrent", "triton", "cpp")
    table_size = 512

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    mlp_type: Literal["gated", "mlp"] = "mlp"
    norm_type: Literal["rmsnorm", "layernorm"] = "layernorm"
    norm_eps: float = 1e-12
    use_short_conv: bool = True
    is_causal: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    num_memories: int = 2
    decay_init: list[float] = field(default_factory=lambda: [0.5, 0.999])
    use_adaptive_decay: bool = True
    use_flux: bool = True
    use_leak: bool = True
    use_delta_rule: bool = True
    use_output_norm: bool = True
    use_output_gate: bool = True

    def validate_memories(self) -> None:
        if self.num_memories not in (1, 2):
            raise ValueError(f"num_memories must be 1 or 2, got {self.num_memories}.")
        if len(self.decay_init) != self.num_memories or not all(0 < decay < 1 for decay in self.decay_init):
            raise ValueError(
                f"decay_init must hold num_memories = {self.num_memories} numbers between 0 and 1, got "
                f"{self.decay_init}."
            )
        if self.num_memories == 1 and (self.use_flux or self.use_leak):
            raise ValueError("One memory has no flux and no leak: set use_flux=False and use_leak=False.")
