# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The model families of transformers whose functions are replaced, and the seam of each: names and signatures that a
modeling file must have for that."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lalm.transformers_models import functions, layouts

_CONV = {
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
_DELTA = _CONV | {
    "torch_chunk_gated_delta_rule": (
        functions.gated_delta_rule,
        ("query", "key", "value", "g", "beta", "chunk_size", *_STATES),
    ),
    "torch_recurrent_gated_delta_rule": (
        functions.gated_delta_rule,
        ("query", "key", "value", "g", "beta", *_STATES),
    ),
}
_MIXER = ("hidden_states", "cache_params", "attention_mask", "kwargs")
_MODEL = ("attention_mask", "position_ids", "past_key_values", "use_cache", "kwargs")


class UnknownSeam(ValueError):
    """The installed transformers has not the functions of a family under the names and with the arguments known here."""


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
        model: the class of the text model, which prepares masks and positions.
        functions: by the name in the file, the replacement and the parameters that the original must have.
    """

    model_type: str
    mixer: str
    model: str
    functions: dict[str, tuple[Callable, tuple[str, ...]]]

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
        found.append(Seam(model, "forward", layouts.model_forward))
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
        Family("qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextModel", _DELTA),
        Family("qwen3_5", "Qwen3_5GatedDeltaNet", "Qwen3_5TextModel", _DELTA),
        Family("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", "Qwen3_5MoeTextModel", _DELTA),
        Family("olmo_hybrid", "OlmoHybridGatedDeltaNet", "OlmoHybridModel", _DELTA),
    )
}
