# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`lalm.inspect`: what the gates of a model do on a text, and how much of its states is in use."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lalm.modeling.mixers import Mixer
from lalm.modeling.modeling_base import LalmModel

# A decay above the first keeps half of what it finds for more than 692 tokens; below the second, for less than a sixth
# of one. A write strength below the second hardly writes.
OPEN, CLOSED = 0.999, 0.01
# A gate counts as saturated if this share of its values is open, or closed.
SATURATED = 0.99


@dataclass(frozen=True)
class HeadReport:
    """One head of one layer; for states with several memories, one memory of it. None: the layer has no such thing.

    Args:
        layer, head: counted from 0.
        memory: of the head, counted from 0; None if it has one.
        direction: 0, or 1 for the pass over the reversed sequence of an encoder with gates of its own.
        half_life: median over tokens and channels of log(1/2) / (log decay), in tokens; infinity without decay.
        half_life_10, half_life_90: the 10 % and the 90 % quantile.
        open, closed: shares of the decays above 0.999 and below 0.01, between 0 and 1.
        write: mean write strength.
        state_norm: Frobenius norm of the state after the last token, root mean square over the batch.
        state_rank: effective rank of the state, exp of the entropy of its normalised singular values (Roy and
            Vetterli, 2007), mean over the batch; at most the smaller of its two sizes.
    """

    layer: int
    head: int
    memory: int | None = None
    direction: int = 0
    half_life: float | None = None
    half_life_10: float | None = None
    half_life_90: float | None = None
    open: float | None = None
    closed: float | None = None
    write: float | None = None
    state_norm: float | None = None
    state_rank: float | None = None

    @property
    def name(self) -> str:
        parts = [f"layer {self.layer}", f"head {self.head}"]
        parts += [f"memory {self.memory}"] if self.memory is not None else []
        return ", ".join(parts + (["backward"] if self.direction else []))


class Inspection:
    """The result of `inspect`: a table as text, `rows` as data, `warnings()` and `plot(path)`."""

    def __init__(self, rows: list[HeadReport]):
        self.rows = rows

    def __str__(self) -> str:
        columns = [field.name for field in fields(HeadReport)]
        columns = [name for name in columns if any(getattr(row, name) not in (None, 0) for row in self.rows)]
        columns = [*dict.fromkeys(["layer", "head", *columns])]
        cells = [[_shown(getattr(row, name)) for name in columns] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *cells])

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary per row."""
        return [asdict(row) for row in self.rows]

    def warnings(self) -> list[str]:
        """Saturated gates: a decay that always keeps or always forgets everything, or a head that never writes."""
        found = []
        for row in self.rows:
            if (row.closed or 0) > SATURATED:
                found.append(f"{row.name} remembers nothing: {row.closed:.0%} of its decays are below {CLOSED}")
            if (row.open or 0) > SATURATED:
                found.append(f"{row.name} forgets nothing: {row.open:.0%} of its decays are above {OPEN}")
            if row.write is not None and row.write < CLOSED:
                found.append(f"{row.name} writes nothing: its mean write strength is {row.write:.2g}")
        return found

    def scalars(self) -> dict[str, float]:
        """Means per layer, for a training log: gates_3/half_life, gates_3/open, gates_3/closed, gates_3/write,
        gates_3/state_norm, gates_3/state_rank. Half-lives are averaged as their logarithms."""
        found = {}
        for layer in sorted({row.layer for row in self.rows}):
            rows = [row for row in self.rows if row.layer == layer]
            for name in ("half_life", "open", "closed", "write", "state_norm", "state_rank"):
                values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
                values = [min(value, 1e9) for value in values]  # logs hold no infinity
                if values:
                    logs = name == "half_life"
                    mean = sum(math.log(max(x, 1e-9)) if logs else x for x in values) / len(values)
                    found[f"gates_{layer}/{name}"] = math.exp(mean) if logs else mean
        return found

    def plot(self, path: str | Path) -> None:
        """Draw half-lives and effective ranks by layer and head as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        titles = {"half_life": "half-life (tokens, median)", "state_rank": "effective rank of the state"}
        kinds = [kind for kind in titles.items() if any(getattr(row, kind[0]) is not None for row in self.rows)]
        figure = Figure(figsize=(1 + 4.5 * max(1, len(kinds)), 4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (name, title) in zip(figure.subplots(1, max(1, len(kinds)), squeeze=False)[0], kinds, strict=False):
            markers: dict[tuple, tuple[list[int], list[float]]] = {}
            for row in self.rows:
                value = getattr(row, name)
                if value is not None and math.isfinite(value):
                    layers, values = markers.setdefault((row.memory, row.direction), ([], []))
                    layers.append(row.layer)
                    values.append(value)
            for (memory, direction), (layers, values) in sorted(markers.items(), key=str):
                label = ("backward " if direction else "") + ("heads" if memory is None else f"memory {memory}")
                axes.scatter(layers, values, s=18, label=label)
            axes.set(xlabel="layer", ylabel=title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if name == "half_life":
                axes.set_yscale("log")
            if len(markers) > 1:
                axes.legend()
        figure.savefig(path, dpi=150)


def _shown(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"


@torch.no_grad()
def inspect(
    model: nn.Module, text: str | list[str] | torch.Tensor, tokenizer: Any = None, **inputs: Any
) -> Inspection:
    """What the gates of a model do on a text, and how much of its states is in use, per layer and head.

    The model runs once, in evaluation mode, over at most as many tokens as it has positions for.

    Args:
        model: one of lalm's, with any head, also inside PEFT or DDP.
        text: a text or several, or token ids `[B, T]`.
        tokenizer: for a text; it pads a batch of several.
        inputs: further inputs of the model, such as `attention_mask`.

    Returns:
        An `Inspection`, which prints as a table and has `rows`, `warnings()`, `scalars()` and `plot(path)`.

    Raises:
        ValueError: the model is none of lalm's, or a text comes without a tokenizer.
    """
    backbones = [module for module in model.modules() if isinstance(module, LalmModel)]
    if len(backbones) != 1:
        raise ValueError(f"inspect takes a model of lalm; {type(model).__name__} has {len(backbones)} in it.")
    (backbone,) = backbones
    if not isinstance(text, torch.Tensor):
        if tokenizer is None:
            raise ValueError("inspect needs a tokenizer for a text: pass tokenizer=, or token ids.")
        texts = [text] if isinstance(text, str) else list(text)
        encoded = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
        inputs = {"attention_mask": encoded["attention_mask"]} | inputs
        text = cast(torch.Tensor, encoded["input_ids"])
    device = cast(torch.Tensor, backbone.get_input_embeddings().weight).device
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    mask = inputs.get("attention_mask")
    real = torch.ones(text.shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with _recorded(backbone) as gates:
            out = backbone(input_ids=text.to(device), use_cache=backbone.config.is_causal, **inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    rows: list[HeadReport] = []
    for layer in range(backbone.config.num_hidden_layers):
        rows += _heads(layer, gates.get(layer, {}), real, _state(getattr(out, "past_key_values", None), layer))
    return Inspection(rows)


@contextlib.contextmanager
def _recorded(backbone: LalmModel) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """The gates of every linear layer that runs inside, by the number of the layer."""
    found: dict[int, dict[str, torch.Tensor]] = {}

    def record(mixer: Mixer):
        def attend(hidden_states, q, k, v, *rest):
            gates = mixer.gates_of(hidden_states, k, v)
            found[mixer.layer_idx] = {name: gate for name, gate in gates.items() if gate is not None}
            return type(mixer).attend(mixer, hidden_states, q, k, v, *rest)

        return attend

    mixers = [module for module in backbone.modules() if isinstance(module, Mixer)]
    for mixer in mixers:
        mixer.attend = record(mixer)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        for mixer in mixers:
            del mixer.attend


def _state(cache: Any, layer: int) -> torch.Tensor | None:
    """`[B, H, M, K, V]` of a layer, M memories per head."""
    state = getattr(cache.layers[layer], "recurrent_states", {}).get(0) if cache is not None else None
    if state is None or state.ndim < 4:  # no state, or the softmax layer of a hybrid
        return None
    return state if state.ndim == 5 else state[:, :, None]


def _axes(gate: torch.Tensor, has_memories: bool) -> torch.Tensor:
    """A gate as the op takes it -> `[directions, B, T, H, memories, channels]`."""
    if gate.ndim == 3:
        gate = gate[..., None]
    gate = gate[..., None] if has_memories else gate[..., None, :]
    return gate if gate.ndim == 6 else gate[None]


def _heads(
    layer: int, gates: dict[str, torch.Tensor], real: torch.Tensor, state: torch.Tensor | None
) -> list[HeadReport]:
    known = {name: _axes(gates[name], "read" in gates) for name in ("g", "beta") if name in gates}
    if known:
        directions, _, _, heads, memories, _ = next(iter(known.values())).shape
    elif state is not None:
        directions, heads, memories = 1, state.shape[1], state.shape[2]
    else:
        return []
    rows = []
    for direction, head, memory in itertools.product(range(directions), range(heads), range(memories)):
        values = {name: gate[direction, :, :, head, memory][real].float() for name, gate in known.items()}
        figures = _decay(values["g"]) if "g" in values else {}
        if "beta" in values:
            figures["write"] = float(values["beta"].mean())
        if state is not None:
            figures |= _occupied(state[:, min(head, state.shape[1] - 1), memory])
        rows.append(HeadReport(layer, head, memory if memories > 1 else None, direction, **figures))
    return rows


def _decay(g: torch.Tensor) -> dict[str, float]:
    """Log decays of all tokens and channels -> half-lives and shares."""
    half_lives = (math.log(2) / -g).flatten().sort().values  # infinity where nothing decays
    tenth, median, ninth = (float(half_lives[round(q * (len(half_lives) - 1))]) for q in (0.1, 0.5, 0.9))
    decay = g.exp()
    shares = {"open": float((decay > OPEN).float().mean()), "closed": float((decay < CLOSED).float().mean())}
    return {"half_life": median, "half_life_10": tenth, "half_life_90": ninth} | shares


def _occupied(state: torch.Tensor) -> dict[str, float]:
    """`[B, K, V]` -> norm and effective rank."""
    values = torch.linalg.svdvals(state.double())
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    norm = values.square().sum(-1).mean().sqrt()
    return {"state_norm": float(norm), "state_rank": float(entropy.exp().mean())}
