# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The model families of transformers whose functions are replaced, and the seam of each: names and signatures that a
modeling file must have for that."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from lalm.transformers_models import functions, layouts, products

_Functions = dict[str, tuple[Callable, tuple[str, ...]]]
_CONV: _Functions = {
    "causal_conv1d_fn": (
        functions.causal_conv1d_fn,
        ("hidden_states", "weight", "bias", "activation", "kwargs"),
    ),
    "causal_conv1d_update": (
        functions.causal_conv1d_update,
        ("hidden_states", "conv_state", "weight", "bias", "activation"),
    ),
}
_STATES = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "kwargs")
_DELTA: _Functions = _CONV | {
    "torch_chunk_gated_delta_rule": (
        functions.gated_delta_rule,
        ("query", "key", "value", "g", "beta", "chunk_size", *_STATES),
    ),
    "torch_recurrent_gated_delta_rule": (
        functions.gated_delta_rule,
        ("query", "key", "value", "g", "beta", *_STATES),
    ),
}
_KDA: _Functions = _CONV | {
    "chunk_kimi_delta_attention": (
        functions.kda,
        ("query", "key", "value", "g", "beta", "chunk_size", *_STATES),
    ),
    "recurrent_kimi_delta_attention": (
        functions.kda,
        ("query", "key", "value", "g", "beta", *_STATES),
    ),
}
_TIME_STEP = ("hidden_states", "dt", "A", "B", "C")
_MAMBA: _Functions = _CONV | {
    "mamba2_chunk_scan": (
        functions.mamba2_chunk_scan,
        (*_TIME_STEP, "chunk_size", "D", "dt_bias", "initial_states", "dt_softplus", "dt_limit", "return_final_states",
         "kwargs"),
    ),
    "mamba2_selective_state_update": (
        functions.mamba2_selective_state_update,
        ("state", *_TIME_STEP, "D", "dt_bias", "dt_softplus", "z", "kwargs"),
    ),
}  # fmt: skip
_MIXER = ("hidden_states", "cache_params", "attention_mask", "kwargs")
_MODEL = ("input_ids", "inputs_embeds", "attention_mask", "use_cache", "kwargs")


class UnknownSeam(ValueError):
    """The installed transformers does not have the functions of a family as they are known here."""


@dataclass(frozen=True)
class Seam:
    """One attribute to replace.

    Args:
        owner: the module or class that has it.
        name: of the attribute.
        make: the original -> its replacement.
    """

    owner: Any
    name: str
    make: Callable[[Callable], Callable]

    @property
    def label(self) -> str:
        of = self.owner.__name__ if isinstance(self.owner, ModuleType) else self.owner.__qualname__
        return f"{of.removeprefix('transformers.models.')}.{self.name}"


@dataclass(frozen=True)
class Family:
    """Models of transformers that share one modeling file.

    Args:
        model_type: the folder of the file, and what `config.model_type` is or begins with.
        mixer: the class of the layers with a recurrence.
        layers: the classes of the layers that the model is a stack of.
        model: the class of the text model, which prepares masks and positions.
        functions: by the name in the file, the replacement and the parameters that the original must have.
        head: the class of a language-model head that does not hand down where documents begin.
        masks_documents: whether attention layers keep documents apart by their positions.
    """

    model_type: str
    mixer: str
    layers: tuple[str, ...]
    model: str
    functions: _Functions
    head: str | None = None
    masks_documents: bool = True

    @property
    def module_name(self) -> str:
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"

    def seams(self) -> list[Seam]:
        """Everything to replace.

        Raises:
            UnknownSeam: the modeling file is missing or has changed.
        """
        try:
            module = importlib.import_module(self.module_name)
        except ImportError as error:
            raise UnknownSeam(f"{self.model_type}: {self.module_name} cannot be imported ({error}).") from error
        found = []
        for name, (replacement, parameters) in self.functions.items():
            self._check(getattr(module, name, None), name, parameters)
            found.append(Seam(module, name, functions.with_fallback(replacement)))
        mixer, model = (getattr(module, name, None) for name in (self.mixer, self.model))
        self._check(getattr(mixer, "forward", None), f"{self.mixer}.forward", _MIXER, exactly=False)
        self._check(getattr(model, "forward", None), f"{self.model}.forward", _MODEL, exactly=False)
        found.append(Seam(mixer, "forward", layouts.mixer_forward))
        found.append(Seam(model, "forward", partial(layouts.model_forward, masks_documents=self.masks_documents)))
        for name in self.layers:
            layer = getattr(module, name, None)
            self._check(getattr(layer, "forward", None), f"{name}.forward", ("hidden_states",), exactly=False)
            found.append(Seam(layer, "forward", products.layer_forward))
        if self.head is not None:
            head = getattr(module, self.head, None)
            self._check(getattr(head, "forward", None), f"{self.head}.forward", ("kwargs",), exactly=False)
            found.append(Seam(head, "forward", layouts.head_forward))
        return found

    def _check(self, function: Callable | None, name: str, expected: tuple[str, ...], exactly: bool = True) -> None:
        if function is None:
            raise UnknownSeam(f"{self.model_type}: {self.module_name} has no {name}.")
        found = tuple(inspect.signature(function).parameters)
        if found != expected if exactly else not set(expected) <= set(found):
            raise UnknownSeam(
                f"{self.model_type}: {name} takes ({', '.join(found)}), known is ({', '.join(expected)})."
            )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen3_next", "Qwen3NextGatedDeltaNet", ("Qwen3NextDecoderLayer",), "Qwen3NextModel", _DELTA),
        Family("qwen3_5", "Qwen3_5GatedDeltaNet", ("Qwen3_5DecoderLayer",), "Qwen3_5TextModel", _DELTA),
        Family("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", ("Qwen3_5MoeDecoderLayer",), "Qwen3_5MoeTextModel", _DELTA),
        Family(
            "olmo_hybrid",
            "OlmoHybridGatedDeltaNet",
            ("OlmoHybridAttentionDecoderLayer", "OlmoHybridLinearAttentionDecoderLayer"),
            "OlmoHybridModel",
            _DELTA,
        ),
        Family("kimi_linear", "KimiLinearDeltaAttention", ("KimiLinearDecoderLayer",), "KimiLinearModel", _KDA),
        Family("mamba2", "Mamba2Mixer", ("Mamba2Block",), "Mamba2Model", _MAMBA, head="Mamba2ForCausalLM"),
        Family("bamba", "BambaMixer", ("BambaDecoderLayer",), "BambaModel", _MAMBA),
        Family("falcon_h1", "FalconH1Mixer", ("FalconH1DecoderLayer",), "FalconH1Model", _MAMBA),
        Family("nemotron_h", "NemotronHMamba2Mixer", ("NemotronHBlock",), "NemotronHModel", _MAMBA),
        Family("zamba2", "Zamba2MambaMixer", ("Zamba2MambaDecoderLayer", "Zamba2HybridLayer"), "Zamba2Model", _MAMBA),
        Family(
            "granitemoehybrid",
            "GraniteMoeHybridMambaLayer",
            ("GraniteMoeHybridDecoderLayer",),
            "GraniteMoeHybridModel",
            _MAMBA,
            masks_documents=False,
        ),
    )
}
