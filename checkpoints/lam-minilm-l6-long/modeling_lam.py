# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
# Generated when a model is saved, from the package lalm, which is where to change it.


# ---- lalm.modeling.mixers ----
"""What mixes tokens: the bases of every linear mixer."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import Cache

from .configuration_lam import LalmConfig
from .linear_attention_ops import Map, delta_map, diagonal_map
from .linear_attention_ops import RecurrentLayer, previous_state, record
from .linear_attention_ops import FeatureMap
from .linear_attention_ops import RMSNorm, ShortConvolution, make_linear, rotate, unit_length
from .linear_attention_ops import preload_heads
from .linear_attention_ops import activate
from .linear_attention_ops import diagonal_kernel
from .linear_attention_ops import linear_attention
from .linear_attention_ops import taylor_features
from .linear_attention_ops import compute_dtype
from .linear_attention_ops import SequenceLayout

Tables = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Mixer(nn.Module):
    """Base of the linear mixers: projections, positions and cache; a subclass adds `attend`, its op and output.

    Shapes: B batch, T tokens, H heads, K and V key and value size per head, D = hidden_size.
    """

    layer_type: ClassVar[str] = RecurrentLayer._layer_type
    rotates: ClassVar[bool] = True  # whether rotary positions turn its q and k
    silu_without_conv: ClassVar[bool] = False  # whether q, k and v get the convolution's SiLU where there is none
    conv_activation: ClassVar[bool] = True  # whether the convolution ends in a SiLU
    unit_length_qk: ClassVar[bool] = False  # whether q and k are divided by their length, in float32 or wider
    is_windowed: ClassVar[bool] = False  # whether windows other than the convolution's begin at the first token
    projection_bias: ClassVar[bool] = False  # whether q, k, v and o have a bias
    output_gate: str = "silu"  # what opens the output gate
    shard: tuple[int, int] | None = None  # rank and number of the processes that share its heads
    o_norm: RMSNorm | None
    g_proj: nn.Module | None

    def __init__(self, config: LalmConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        self.key_dim, self.value_dim = config.linear_key_dim, config.linear_value_dim
        key_size, value_size = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        bias = self.projection_bias or config.attention_bias
        self.q_proj = make_linear(config.hidden_size, key_size, bias=bias)
        self.k_proj = make_linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = make_linear(config.hidden_size, value_size, bias=bias)
        self.o_proj = make_linear(value_size, config.hidden_size, bias=bias)
        self.conv, self.o_norm, self.g_proj = None, None, None
        if config.use_short_conv:
            channels = 2 * key_size + value_size
            self.conv = ShortConvolution(channels, config.conv_size, config.is_causal, self.conv_activation)
        self.q_norm = RMSNorm(self.key_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.key_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        rotary: Tables,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`[B, T, D] -> [B, T, D]`, reading and replacing this layer's state in `past_key_values`."""
        cache: Any = past_key_values
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        conv, attend = self.conv, cast(Callable, self.attend)
        if conv is not None:
            size = conv.weight.shape[1] - 1
            window = previous_state(
                cache,
                self.layer_idx,
                "conv_states",
                of_slice=lambda parts=(q, k, v): layout.last_inputs(parts, size),
            )
            record(
                cache,
                self.layer_idx,
                [("conv_states", 0)],
                (q, k, v),
                layout,
                lambda parts, layout: [conv(parts, window, layout)[1]],
            )
            (q, k, v), state = conv((q, k, v), window, layout, keeps_state=cache is not None)
            if cache is not None:
                cache.update_conv_state(state, self.layer_idx, given_away=True)
        elif self.silu_without_conv:
            q, k, v = (nn.functional.silu(x) for x in (q, k, v))
        q, k, v = self.split_heads(q, k, v, rotary)
        memory = previous_state(
            cache,
            self.layer_idx,
            "recurrent_states",
            of_slice=lambda k=k, v=v: self.slice_map(hidden_states, k, v, layout),
        )
        record(
            cache,
            self.layer_idx,
            [("recurrent_states", 0)],
            (hidden_states, q, k, v),
            layout,
            lambda inputs, layout: [attend(*inputs, memory, True, layout)[1]],
        )
        o, state = attend(hidden_states, q, k, v, memory, cache is not None, layout)
        if cache is not None:
            tokens = hidden_states.shape[1]
            cache.update_recurrent_state(state, self.layer_idx, num_tokens=tokens, given_away=True)
        del q, k, v  # nothing below needs them, and long sequences make them large
        return self.o_proj(self.gate_output(o, hidden_states).flatten(-2)), None

    def split_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Tables
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projections `[B, T, H * *]` -> q, k and v `[B, T, H, *]` as the rule takes them: normed, rotated, unit."""
        sizes = self.key_dim, self.key_dim, self.value_dim  # the heads are fewer under tensor parallelism
        q, k, v = (x.unflatten(-1, (-1, size)) for x, size in zip((q, k, v), sizes, strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary and self.rotates:
            q, k = rotate(q, rotary[self.key_dim]), rotate(k, rotary[self.key_dim])
        if self.unit_length_qk:
            q = unit_length(q)
            k = unit_length(k)
        return q, k, v

    def attend(
        self,
        hidden_states: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: torch.Tensor | None,
        output_final_state: bool,
        layout: SequenceLayout,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q, k `[B, T, H, K]`, v `[B, T, H, V]` -> what the op gives `[B, T, H, V]`, and the state."""
        raise NotImplementedError

    def gates_of(self, hidden_states: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
        """The gates of all tokens, as the op takes them: log decays "g" and write strengths "beta", `[B, T, H]`, or
        `[B, T, H, *]` with one per channel or memory. Empty for a mixer without gates."""
        return {}

    def slice_map(self, hidden_states: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout) -> Map:
        """What these tokens make of any state S before them, A S + B: see affine_maps.py."""
        gates = self.gates_of(hidden_states, k, v)
        if "beta" not in gates:
            return diagonal_map(k, v, gates.get("g"), layout)
        memories = gates["beta"].shape[-1] if gates["beta"].ndim == 4 else 0
        return delta_map(partial(cast(Any, self).apply_rule, gates), k, v, layout, memories)

    def make_output_gate(self, gated: bool) -> None:
        """Add what `gate_output` applies: a norm per head and, if `gated`, the projection of the swish gate."""
        hidden_size, value_size = self.config.hidden_size, self.num_heads * self.value_dim
        self.g_proj = make_linear(hidden_size, value_size, bias=False) if gated else None
        self.o_norm = RMSNorm(self.value_dim, eps=self.config.norm_eps)

    def gate_output(self, o: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`norm(o) * act(x W)`, each if the model has it: heads `o [B, T, H, V]`, the mixer's input x `[B, T, D]`."""
        o = o if self.o_norm is None else self.o_norm(o)
        return o if self.g_proj is None else activate(self.output_gate, self.g_proj(hidden_states).view_as(o), o)


class FeatureMixer(Mixer):
    """phi(q), phi(k), v -> linear attention -> output.

    Args:
        q_map, k_map: phi of queries and of keys; None for that of queries.
        normalize, eps: whether an output is divided by the sum of its weights, and what is added to the sum.
    """

    def __init__(
        self,
        config: LalmConfig,
        layer_idx: int,
        q_map: FeatureMap,
        k_map: FeatureMap | None = None,
        normalize: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__(config, layer_idx)
        self.q_map, self.k_map, self.normalize, self.eps = q_map, k_map, normalize, eps
        self.is_taylor = q_map.name == "taylor"  # the op makes the features itself
        size = self.key_dim if self.is_taylor else q_map.num_features
        preload_heads(diagonal_kernel(size, self.value_dim, 0, normalize, self.is_taylor))

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        if not self.is_taylor:
            q, k = self.q_map(q), (self.k_map or self.q_map)(k)
        return linear_attention(
            q,
            k,
            v,
            # The papers have no scale. Without a normaliser the field's 1 / sqrt(K) keeps the output's size in check.
            scale=1.0 if self.normalize else None,
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal,
            normalize=self.normalize,
            eps=self.eps,
            taylor=self.is_taylor,
            implementation=self.config.linear_attn_implementation,
        )

    def slice_map(self, hidden_states, k, v, layout):
        features = taylor_features(k.to(compute_dtype(k))) if self.is_taylor else (self.k_map or self.q_map)(k)
        return diagonal_map(features, nn.functional.pad(v, (0, 1), value=1.0) if self.normalize else v, None, layout)


# ---- lalm.modeling.saving ----
"""Saves and pushes of a model: all files or none, and no old weights left where loading would prefer them."""

import contextlib
import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError

# Group 1 is the variant: weights of several (`save_pretrained(variant="fp16")`) may lie side by side.
_WEIGHTS = re.compile(
    r"model(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.(\w+))?\.json"
)
# What a save that was killed, or is going on, leaves in a folder.
UNFINISHED = ".saving"
TASKS = {"CausalLM": "text-generation", "MaskedLM": "fill-mask", "Classification": "text-classification"}
CARD = """
# {name}

A `{model_type}` model of {parameters:,} parameters ({kind}), a linear-attention model of
[lalm](https://pypi.org/project/lalm). {origin}

```python
from transformers import {auto}

model = {auto}.from_pretrained("{repo_id}", trust_remote_code=True)
```

The code in this repository is under the Apache License 2.0, the weights under the licence named above.
No figures were measured for these weights when they were pushed.
"""


@contextlib.contextmanager
def staged_save(save_directory: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder whose files move into `save_directory` once the block has ended without an error.

    The folder lies inside `save_directory`, so a move is one rename and needs no space: a full disk shows itself
    while the old files are untouched. Weights of an older save under names that the new one does not use are
    removed, or from_pretrained could prefer them.

    Raises:
        OSError: if anything cannot be written; what `save_directory` held before is then still whole.
    """
    folder = Path(save_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{UNFINISHED}-", dir=folder) as name:
            yield Path(name)
            move_files(Path(name), folder)
    except (OSError, SafetensorError) as error:
        reason = error.__cause__ or error  # of a save inside this one
        message = (
            f"Could not save to {folder}: {getattr(reason, 'strerror', None) or reason}. What was there before is "
            "untouched. Free some space or choose another folder, then save again."
        )
        code = getattr(error, "errno", None)
        raise (OSError(code, message) if code else OSError(message)) from error


def move_files(source: Path, target: Path) -> None:
    """Move every entry of `source` into `target`, over what is there, weights last; then `stale_weights` go."""
    entries = sorted(source.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
    for entry in entries:
        place = target / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
    for name in stale_weights([entry.name for entry in entries], os.listdir(target)):
        (target / name).unlink()


def stale_weights(saved: Iterable[str], present: Iterable[str]) -> list[str]:
    """The names among `present` of weights, or of an index, that a save of the files `saved` has replaced: loading
    would prefer an old `model.safetensors` to new shards."""
    names = set(saved)
    found = {name: match for name in [*names, *present] if (match := _WEIGHTS.fullmatch(name))}
    variants = {match[1] or match[2] for name, match in found.items() if name in names}
    return sorted(name for name, match in found.items() if name not in names and (match[1] or match[2]) in variants)


def commit_folder(
    folder: str | os.PathLike, repo_id: str, *, message: str, names: Iterable[str] | None = None,
    ignore: Iterable[str] = (), path_in_repo: str = "", token: str | bool | None = None, revision: str | None = None,
    **options: Any,
) -> CommitInfo:  # fmt: skip
    """Upload a folder to the Hub in one commit, which also deletes `stale_weights`: a push that fails or is
    interrupted leaves the repository as it was.

    Args:
        names: the entries of the folder to take; default: all.
        ignore: patterns of entries to leave out, besides checkpoints and unfinished saves.
        options: of `HfApi.create_commit`.

    Raises:
        HfHubHTTPError, OSError: as huggingface_hub.
    """
    api, root, prefix = HfApi(token=token), Path(folder), path_in_repo and f"{path_in_repo}/"
    hidden = (f"{UNFINISHED}*", "checkpoint-*", "_*", ".cache", *ignore)
    chosen = [name for name in sorted(names or os.listdir(root)) if not any(map(partial(fnmatch, name), hidden))]
    files = [path for name in chosen for path in [root / name, *(root / name).rglob("*")] if path.is_file()]
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = [
        name[len(prefix) :] for name in api.list_repo_files(repo_id, revision=revision) if name.startswith(prefix)
    ]
    added = [CommitOperationAdd(prefix + path.relative_to(root).as_posix(), path) for path in files]
    deleted = [CommitOperationDelete(prefix + name) for name in stale_weights(chosen, there)]
    return api.create_commit(repo_id, [*added, *deleted], commit_message=message, revision=revision, **options)


def open_repository(repo_id: str, private: bool | None, token: str | bool | None) -> str:
    """Make the repository if there is none, and return its full name."""
    return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def push_model(
    model: Any, folder: str | os.PathLike, repo_id: str, names: Iterable[str], *, tags: Iterable[str] | None = None,
    token: str | bool | None = None, **options: Any,
) -> CommitInfo:  # fmt: skip
    """Push the files `names` of a folder into which `model` has been saved, with a card if the repository has none.

    Raises:
        HfHubHTTPError, OSError: as huggingface_hub; the repository is then as it was.
    """
    names = {*names} - {"README.md"}
    if not HfApi(token=token).file_exists(repo_id, "README.md"):
        write_card(model, Path(folder), repo_id, tags or (), token)
        names.add("README.md")
    return commit_folder(folder, repo_id, names=names, token=token, **options)


def write_card(model: Any, folder: Path, repo_id: str, tags: Iterable[str], token: str | bool | None) -> None:
    """Write README.md for weights saved in `folder`: the card of the folder that they were loaded from if they are
    still the same, else a short one with the licence, languages and data sets of that card."""
    start = str(model.config.name_or_path or "")
    card = _card_of(start, token)
    saved, loaded = folder / "model.safetensors", Path(start) / "model.safetensors"
    is_same = start and saved.is_file() and loaded.is_file() and filecmp.cmp(saved, loaded, shallow=False)
    if card is None or not is_same:
        kind = type(model).__name__
        known = card.data.to_dict() if card else {}
        data = ModelCardData(
            license=known.get("license", "apache-2.0"),
            language=known.get("language"),
            datasets=known.get("datasets"),
            base_model=known.get("base_model") if Path(start).exists() else start if card else None,
            library_name="transformers",
            pipeline_tag=next((task for end, task in TASKS.items() if kind.endswith(end)), "feature-extraction"),
            tags=["lalm", model.config.model_type, "linear-attention"],
            ignore_metadata_errors=True,
        )
        origin = f"It was loaded from `{Path(start).name if Path(start).exists() else start}`." if start else ""
        auto = next(
            (name for name, place in (model.config.auto_map or {}).items() if place.endswith(f".{kind}")), "AutoModel"
        )
        text = CARD.format(
            name=repo_id.rpartition("/")[2], model_type=model.config.model_type, parameters=model.num_parameters(),
            kind=kind, origin=origin, auto=auto, repo_id=repo_id,
        )  # fmt: skip
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True)
    told: Any = card.data
    told.tags = list(dict.fromkeys([*(told.get("tags") or []), *tags]))
    card.save(folder / "README.md")


def _card_of(name: str, token: str | bool | None) -> ModelCard | None:
    """The card of a folder, or of a repository; None if there is none to be had."""
    try:
        path = Path(name) / "README.md"
        if not name or (Path(name).exists() and not path.is_file()):
            return None
        return ModelCard.load(path if path.is_file() else name, token=token, ignore_metadata_errors=True)  # type: ignore[arg-type]
    except Exception:  # of the client, of its HTTP library, of YAML: a push does not fail for want of an old card
        return None


def lossless(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The weights in a smaller type, or None if any of them would change."""
    smaller = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()}
    same = all(torch.equal(value.to(state_dict[name].dtype), state_dict[name]) for name, value in smaller.items())
    return smaller if same else None


# ---- lalm.modeling.softmax_attention ----
"""The softmax attention of hybrid models, full or over a sliding window."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_lam import LalmConfig
from .linear_attention_ops import RMSNorm, make_linear, rotate
from .linear_attention_ops import must_separate
from .linear_attention_ops import sliding_attention
from .linear_attention_ops import SequenceLayout


def _is_fresh(cache: Cache | None, layer_idx: int) -> bool:
    return cache is None or int(cache.get_seq_length(layer_idx)) == 0


class SoftmaxAttention(nn.Module):
    """Softmax attention, full or over a sliding window, for hybrid models; runs on the stock attention interface, or
    in blocks where model_inputs.attends_in_blocks says so."""

    def __init__(self, config: LalmConfig, layer_idx: int, layer_type: str):
        super().__init__()
        self.config, self.layer_idx, self.layer_type = config, layer_idx, layer_type
        assert config.head_dim is not None  # the configuration derives it
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, config.is_causal
        key_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // key_heads
        self.sliding_window = config.sliding_window if layer_type == "sliding_attention" else None
        size, key_size = config.num_attention_heads * self.head_dim, key_heads * self.head_dim
        self.q_proj = make_linear(config.hidden_size, size, bias=config.attention_bias)
        self.k_proj = make_linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = make_linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = make_linear(size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        rotary: Tables,
        masks: dict[str, torch.Tensor | None],
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, T, D] -> [B, T, D]` and the attention weights `[B, H, T, S]` where the backend gives them."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary:
            q, k = rotate(q, rotary[self.head_dim]), rotate(k, rotary[self.head_dim])
        dropout = self.config.attention_dropout if self.training else 0.0
        in_blocks = self.sliding_window is not None and self.layer_type not in masks
        if in_blocks or (must_separate(layout, q, k, v) and _is_fresh(past_key_values, self.layer_idx)):
            o = self._attend_in_blocks(q, k, v, dropout, layout, past_key_values)
            return self.o_proj(o.flatten(-2)), None
        if self.sliding_window is not None:
            q, k, v = layout.pads_first(q), layout.pads_first(k), layout.pads_first(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            if self.sliding_window is not None and layout.mask is not None:
                k, v = self._slide_cache(past_key_values.layers[self.layer_idx], k, v, layout)
            k, v = past_key_values.update(k, v, self.layer_idx)
        if hidden_states.shape[0] == 0:  # an empty batch, which the stock interface cannot reshape
            return self.o_proj(q.transpose(1, 2).flatten(-2)), None
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        o, weights = attend(
            self,
            q,
            k,
            v,
            masks[self.layer_type],
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if self.sliding_window is not None:
            # A padded token has an empty window, for which each attention backend returns something else.
            o = layout.zero_padding(layout.restore(o))
        return self.o_proj(o.flatten(-2)), weights

    def _attend_in_blocks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout: float,
        layout: SequenceLayout,
        cache: Cache | None,
    ) -> torch.Tensor:
        """o `[B, T, H, K]`, of sequences of which nothing is cached yet; q, k, v in the caller's order of tokens."""
        length = q.shape[1]
        if cache is not None and hasattr(cache.layers[self.layer_idx], "extend"):  # a slice, of sequence_parallel.py
            layer: Any = cache.layers[self.layer_idx]
            q, k, v, layout = layer.extend(q, k, v, layout, self.sliding_window)
        elif cache is not None:
            past = (k, v) if self.sliding_window is None else (layout.pads_first(k), layout.pads_first(v))
            cache.update(past[0].transpose(1, 2), past[1].transpose(1, 2), self.layer_idx)
        window = self.sliding_window or q.shape[1]
        o = sliding_attention(
            q, k, v, window, scale=self.scaling, causal=self.is_causal, dropout=dropout, layout=layout
        )
        return o[:, -length:]

    @staticmethod
    def _slide_cache(
        cached: Any, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move the keys and values `[B, H, S, K]` that a growing cache holds up to the real tokens of this piece, so
        that its padding does not push real tokens out of the window. Returns k and v in their new place."""
        if not isinstance(cached, DynamicLayer) or not cached.is_initialized:
            return k, v
        moved = []
        for name, current in (("keys", k), ("values", v)):
            past = getattr(cached, name).transpose(1, 2)
            joined = layout.slide_over_padding(past, current.transpose(1, 2)).transpose(1, 2)
            setattr(cached, name, joined[:, :, : past.shape[1]])
            moved.append(joined[:, :, past.shape[1] :])
        return moved[0], moved[1]


# ---- lalm.modeling.modeling_base ----
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

from .configuration_lam import LalmConfig
from .linear_attention_ops import MLP, NORMS, Dropout, PositionEmbedding, ShortConvolution, look_up, rotary_tables, speed_up
from .linear_attention_ops import adopt_cache, build_layout, current_mask, is_fresh, positions, refuse_sharded_tokens, softmax_masks
from .linear_attention_ops import check_tensor_parallel, register_styles

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


# ---- lalm.modeling.modeling_heads ----
"""The heads of every variant, written once; a variant names the backbone."""

from functools import partial
from typing import ClassVar, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import can_return_tuple, logging

from .configuration_lam import LalmConfig
from .linear_attention_ops import make_linear, product, takes_apply
from .linear_attention_ops import masks_ahead
from .linear_attention_ops import causal_lm_loss

# Under transformers' own logger, so that its verbosity settings hold.
logger = logging.get_logger("transformers.lalm")


class _Head(LalmPreTrainedModel):
    """A model for a task: its class stands among those that transformers knows by name. The Trainer shifts the labels
    of a smoothed loss for such only, model cards name their task, and the Auto classes' own registry is not asked."""

    model_class: ClassVar[type[LalmModel]]
    names: ClassVar[dict[str, str]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "model_class"):
            return
        kind = cast(type[LalmConfig], cls.config_class).model_type
        # A second class of one type (a user's subclass) stands under its own name: it is values that are looked up.
        is_taken = cls.names.get(kind, cls.__name__) != cls.__name__
        cls.names[cls.__name__ if is_taken else kind] = cls.__name__


class LalmForCausalLM(_Head, GenerationMixin):
    """Language model: backbone and `lm_head`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    lm_head_bias: ClassVar[bool] = False

    def __init__(self, config: LalmConfig):
        if not config.is_causal:
            raise ValueError(
                "A causal language model needs is_causal=True; AutoModelForMaskedLM takes is_causal=False."
            )
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = make_linear(config.embedding_size, config.vocab_size, bias=self.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `LalmModel.forward`; `labels [B, T]` (-100 is ignored) are shifted by one and give the mean
        cross-entropy in nats, over `num_items_in_batch` tokens if that is passed. `logits_to_keep` limits the logits
        to that many last positions, or to the positions of an index tensor. The loss still covers all positions; it is
        computed in chunks, so that training with `logits_to_keep=1` never holds all logits `[B, T, V]`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, kept, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits_and_loss(
        self, hidden_states: torch.Tensor, kept: slice | torch.Tensor, labels: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the positions `kept`, and the loss of all, in one call of the head: offloaded or sharded weights
        are there only while it runs."""
        if labels is None:
            return self.lm_head(hidden_states[:, kept]), None
        wants_all = isinstance(kept, slice) and kept == slice(0, None)
        if not wants_all and self.loss_function is ForCausalLMLoss and takes_apply(self.lm_head):
            both = partial(_kept_logits_and_loss, kept=kept, labels=labels, **kwargs)
            return self.lm_head(hidden_states, apply=both)
        logits = self.lm_head(hidden_states)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return logits[:, kept], loss

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: torch.Tensor | None, past_key_values: Cache | None, **kwargs
    ) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """What generate() makes of a mask `[B, S + T]` beforehand: nothing where it does not compile, since whoever
        puts tokens in front (PEFT's prompt tuning) has to find the mask of all tokens."""
        if isinstance(past_key_values, DynamicCache):
            return attention_mask
        if kwargs["inputs_embeds"].device.type != "cpu":
            logger.warning_once(
                "generate() compiles the model for a static cache, which takes minutes at the first call: pass "
                "disable_compile=True if few tokens are wanted."
            )
        return masks_ahead(attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As the stock one, of models without a recurrent layer.

        Raises:
            ValueError: a layer is recurrent.
        """
        if Mixer.layer_type in self.config.layer_types:
            raise ValueError(
                "Continuous batching (generate_batch) pages keys and values, and a recurrent state has none: use "
                "generate() with a padded batch, or python -m lalm.serve."
            )
        return super().init_continuous_batching(*args, **kwargs)


def _kept_logits_and_loss(hidden_states, weight, bias, kept, labels, **kwargs):
    """The loss in pieces: logits of all positions never exist at once."""
    loss = causal_lm_loss(hidden_states, weight, bias, labels, **kwargs)
    return product(hidden_states[:, kept], weight, bias), loss


class LalmForMaskedLM(_Head):
    """Masked language model: a backbone that reads both sides, and `lm_head`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    names = MODEL_FOR_MASKED_LM_MAPPING_NAMES
    lm_head_bias: ClassVar[bool] = False

    def __init__(self, config: LalmConfig):
        if config.is_causal:
            raise ValueError("A masked language model reads both sides: set is_causal=False in the configuration.")
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = make_linear(config.embedding_size, config.vocab_size, bias=self.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """As `LalmModel.forward`; `labels [B, T]` (-100 is ignored) stand at the tokens they name, unshifted."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LalmForSequenceClassification(_Head):
    """One label (or regression target) a sequence, read at the last real token; of an encoder, at the mean of all."""

    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    def __init__(self, config: LalmConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.model = self.model_class(config)
        self.score = make_linear(config.embedding_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """As `LalmModel.forward`. The last real token is the last with `attention_mask` 1; without a mask the last
        that is not `config.pad_token_id`; with neither, a batch of one counts as unpadded. The loss is the mean over
        the labels; with `num_items_in_batch` their sum over that many.

        Raises:
            ValueError: a batch without `attention_mask` and without `pad_token_id`, where padding cannot be told.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        real = self._real_tokens(hidden_states, input_ids, attention_mask)
        if self.config.is_causal:
            last = (real * torch.arange(real.shape[1], device=real.device)).argmax(-1)
            pooled = hidden_states[torch.arange(real.shape[0], device=real.device), last]
        else:
            weight = real[..., None].to(hidden_states.dtype)
            pooled = (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        pooled_logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self._loss(pooled_logits, labels, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        """The loss of `config.problem_type`, which the stock function finds out and sets if it is None."""
        if labels.is_floating_point():  # torch 2.11 has no gradient of a mean square of two dtypes
            wider = torch.promote_types(logits.dtype, labels.dtype)
            logits, labels = logits.to(wider), labels.to(wider)
        arguments = {"logits": logits, "labels": labels, "pooled_logits": logits, "config": self.config, **kwargs}
        is_single = self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1
        is_single = is_single and labels.dtype in (torch.long, torch.int)
        if num_items_in_batch is None:
            return self.loss_function(**arguments)
        if is_single or self.loss_function is not ForSequenceClassificationLoss:
            return self.loss_function(**arguments, num_items_in_batch=num_items_in_batch)
        # the stock losses of the other problems are means over one batch, whatever the count, and the Trainer divides
        # by the number of accumulated batches only where it has not passed a count
        items = torch.as_tensor(num_items_in_batch, device=logits.device)
        return self.loss_function(**arguments) * labels.numel() / items

    def _real_tokens(self, hidden_states, input_ids, attention_mask) -> torch.Tensor:
        """bool `[B, T]`, False on padding."""
        batch, length = hidden_states.shape[:2]
        if attention_mask is not None:
            return attention_mask[:, -length:] != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        if batch > 1:
            raise ValueError(
                "Cannot tell padding in this batch: pass attention_mask, or input_ids with config.pad_token_id set."
            )
        return torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)


class LalmForTokenClassification(_Head):
    """One label per token."""

    names = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

    def __init__(self, config: LalmConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.model = self.model_class(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = make_linear(config.embedding_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """As `LalmModel.forward`; `labels [B, T]`, -100 is ignored."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all___modeling_heads = [
    "LalmForCausalLM",
    "LalmForMaskedLM",
    "LalmForSequenceClassification",
    "LalmForTokenClassification",
]


# ---- lalm.modeling.modeling_lam ----
"""LAM: a post-norm encoder whose tokens are mixed by two memories per head, fast and slow (dual-state delta rule).

Code symbol -> LAM's seed text: psi -> resonance flux; coupling -> cross-timescale leak; decay -> adaptive decay. Other
than the seed: psi and the decays are per token, not per chunk or batch; the short convolution sees real tokens of
its own document only and has no SiLU; the leak cannot make the memories grow (the bound is in dual_state.py).
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init

from .configuration_lam import LamConfig
from .linear_attention_ops import MLP, NORMS, RMSNorm, make_linear
from .linear_attention_ops import copy_weights, student_config
from .linear_attention_ops import preload_heads, preload_kernel
from .linear_attention_ops import delta_kernel
from .linear_attention_ops import dual_state_delta
from .linear_attention_ops import COMPLETE, cpp_lam_gates, plain_lam_gates
from .linear_attention_ops import tokens_of_segments
from .linear_attention_ops import SequenceLayout
from .linear_attention_ops import own_part

# Share of the other memory that a fresh leak takes in, and the most that any takes.
_LEAK_INIT, _LEAK_MAX = 0.01, 0.5


class LamGates(nn.Module):
    """The gates of every token: log decays, write strengths, read weights and coupling, for each direction of reading.

    One projection makes them all. Axes of what it gives: directions, B, T, H, and memories.
    """

    shard: tuple[int, int] | None = None  # rank and number of the processes that share the heads

    def __init__(self, config: LamConfig):
        super().__init__()
        self.config = config
        self.directions, self.heads = 1 if config.is_causal else 2, config.num_attention_heads
        memories = config.num_memories
        self.sizes = {
            "beta": 1,
            "read": memories if memories > 1 else 0,
            "decay": memories * config.use_adaptive_decay,
        }
        self.sizes |= {"leak": memories * config.use_leak}
        self.proj = make_linear(config.hidden_size, self.directions * self.heads * sum(self.sizes.values()))
        self.decay_bias = nn.Parameter(torch.empty(self.directions, self.heads, memories))
        self.flux_weight, self.flux_bias = None, None
        if config.use_flux:
            self.flux_weight = nn.Parameter(torch.empty(self.heads, config.linear_key_dim, config.linear_value_dim))
            self.flux_bias = nn.Parameter(torch.empty(self.directions, self.heads))
        self.is_complete = config.use_flux and self.sizes == COMPLETE
        if self.is_complete:
            preload_kernel("lam_gates")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays as configured, write strengths one half, even flux, read weights 1, a leak of one in a hundred."""
        decays = torch.tensor(self.config.decay_init)
        init.copy_(self.decay_bias, (decays / (1 - decays)).log().expand_as(self.decay_bias))
        init.normal_(self.proj.weight, std=self.config.initializer_range)
        bias = {"beta": 0.0, "read": 1.0, "decay": 0.0, "leak": math.log(_LEAK_INIT / (_LEAK_MAX - _LEAK_INIT))}
        start = torch.cat([torch.full((size,), bias[name]) for name, size in self.sizes.items()])
        init.copy_(self.proj.bias, start.repeat(self.directions * self.heads))
        if self.flux_weight is not None and self.flux_bias is not None:
            init.normal_(self.flux_weight, std=self.config.initializer_range)
            init.zeros_(self.flux_bias)

    def forward(self, hidden_states: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Mixer input `[B, T, D]`, unit keys and values `[B, T, H, *]` -> g, beta, read and coupling of the op."""
        x = self.proj(hidden_states)
        decay_bias: torch.Tensor = self.decay_bias
        flux_weight: torch.Tensor | None = self.flux_weight
        flux_bias: torch.Tensor | None = self.flux_bias
        if self.shard is not None:
            x = own_part(x.unflatten(-1, (self.directions, self.heads, -1)), self.shard, -2).flatten(-3)
            decay_bias = own_part(decay_bias, self.shard, 1)
            if flux_weight is not None and flux_bias is not None:
                flux_weight, flux_bias = own_part(flux_weight, self.shard, 0), own_part(flux_bias, self.shard, 1)
        inputs: Any = (x, k, v, flux_weight, decay_bias, flux_bias, _LEAK_MAX)
        gates: tuple[torch.Tensor | None, ...] | None = cpp_lam_gates(*inputs) if self.is_complete else None
        if gates is None:
            inputs += (self.sizes,)
            gates = plain_lam_gates(*inputs)
        if self.config.is_causal:
            gates = tuple(None if gate is None else gate[0] for gate in gates)
        return dict(zip(("g", "beta", "read", "coupling"), gates, strict=True))


class LamMixer(Mixer):
    """q, k, v and the gates -> dual-state delta rule, in both directions -> norm per head, gate -> output."""

    projection_bias, conv_activation, unit_length_qk = True, False, True
    output_gate = "sigmoid"

    def __init__(self, config: LamConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gates = LamGates(config)
        value_size = self.num_heads * self.value_dim
        self.o_norm = RMSNorm(self.value_dim, eps=1e-6) if config.use_output_norm else None
        self.g_proj = make_linear(config.hidden_size, value_size) if config.use_output_gate else None
        preload_heads(delta_kernel(self.key_dim, self.value_dim, config.num_memories, config.use_delta_rule))

    def gates_of(self, hidden_states, k, v):
        return self.gates(hidden_states, k, v)

    def attend(self, hidden_states, q, k, v, state, output_final_state, layout):
        return self.apply_rule(self.gates_of(hidden_states, k, v), q, k, v, state, output_final_state, layout)

    def apply_rule(self, gates, q, k, v, state, output_final_state, layout, causal=None):
        return dual_state_delta(
            q,
            k,
            v,
            **gates,
            scale=1.0,
            initial_state=state,
            output_final_state=output_final_state,
            layout=layout,
            causal=self.config.is_causal if causal is None else causal,
            use_delta_rule=self.config.use_delta_rule,
            implementation=self.config.linear_attn_implementation,
        )

    def read_segment(
        self,
        hidden_states: torch.Tensor,
        start: int,
        stop: int,
        rotary: Tables,
        state: torch.Tensor | None,
        backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tokens from `start` to `stop` of a text read in one direction, `[B, stop - start, H, V]`, and the
        state after them; `state` is that of the segment before, or behind if the text is read `backward`."""
        reach = 0 if self.conv is None else self.conv.weight.shape[1] - 1
        first = max(0, start - reach)
        around = hidden_states[:, first : stop + reach]
        parts: Sequence[torch.Tensor] = (self.q_proj(around), self.k_proj(around), self.v_proj(around))
        if self.conv is not None:
            parts, _ = self.conv(parts, None, SequenceLayout(), keeps_state=False)
        q, k, v = (part[:, start - first : stop - first] for part in parts)
        tables = {size: (cos[:, start:stop], sin[:, start:stop]) for size, (cos, sin) in rotary.items()}
        q, k, v = self.split_heads(q, k, v, tables)
        gates = self.gates_of(hidden_states[:, start:stop], k, v)
        gates = {name: None if gate is None else gate[int(backward)] for name, gate in gates.items()}
        if backward:
            q, k, v = q.flip(1), k.flip(1), v.flip(1)
            gates = {name: None if gate is None else gate.flip(1) for name, gate in gates.items()}
        o, state = self.apply_rule(gates, q, k, v, state, True, SequenceLayout(), causal=True)
        return o.flip(1) if backward else o, state


class LamMLP(MLP):
    bias = True


class LamBlock(Block):
    """Post-norm residual block, as BERT's: `norm(x + mixer x)`, then `norm(x + mlp x)`."""

    mlp_class = LamMLP

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        is_encoder = isinstance(self.mixer, LamMixer) and not self.mixer.config.is_causal
        size = tokens_of_segments(hidden_states, kwargs["layout"]) if is_encoder else None
        if size is not None:
            return self._in_segments(hidden_states, kwargs["rotary"], size)
        mixed, _ = self.mixer(hidden_states, **kwargs)
        return self._add(hidden_states, mixed)

    def _add(self, hidden_states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mixer_norm(hidden_states + self.dropout(mixed))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))

    def _in_segments(self, hidden_states: torch.Tensor, rotary: Tables, size: int) -> torch.Tensor:
        """The block without gradients in segments of `size` tokens: it reads the text forwards, then backwards, and
        holds its input and its output, but never q, k and v of the whole text."""
        mixer, length = cast(LamMixer, self.mixer), hidden_states.shape[1]
        bounds = [(start, min(start + size, length)) for start in range(0, length, size)]
        result = torch.empty_like(hidden_states)
        # What is read forwards waits where the output of the same tokens will stand, if it has as many numbers.
        fits = mixer.o_proj.in_features == hidden_states.shape[2]
        read = result if fits else result.new_empty(*result.shape[:2], mixer.o_proj.in_features)
        state: torch.Tensor | None = None
        for start, stop in bounds:
            o, state = mixer.read_segment(hidden_states, start, stop, rotary, state, backward=False)
            read[:, start:stop] = o.flatten(2)
        state = None
        for start, stop in reversed(bounds):
            o, state = mixer.read_segment(hidden_states, start, stop, rotary, state, backward=True)
            o += read[:, start:stop].view_as(o)
            own = hidden_states[:, start:stop]
            result[:, start:stop] = self._add(own, mixer.o_proj(mixer.gate_output(o, own).flatten(2)))
        return result


class LamModel(LalmModel):
    """LAM's encoder, `[B, T] -> [B, T, D]`; the embedding of a sentence is the mean over its real tokens."""

    config: LamConfig
    mixer_class = LamMixer
    block_class = LamBlock

    def __init__(self, config: LamConfig):
        super().__init__(config)
        self.norm = nn.Identity()  # every block ends in its own norm
        self.embed_norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def add_positions(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_norm(super().add_positions(hidden_states, position_ids))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LamGates):
            module.reset_parameters()

    @classmethod
    def from_softmax_encoder(cls, teacher: PreTrainedModel, config: LamConfig | None = None) -> "LamModel":
        """A student with the weights of a BERT-like encoder, in its dtype. Without learned positions the mean of the
        teacher's goes into the word embeddings; `fit_output_projections` should follow (linearize.py).

        Raises:
            ValueError: the teacher is not of BERT's shape, or `config` does not fit it.
        """
        student = cls(config or student_config(teacher))
        nn.Module.to(student, teacher.dtype)
        copy_weights(student, teacher)
        return student


class LamForCausalLM(LalmForCausalLM, GenerationMixin):
    config: LamConfig
    model_class = LamModel


class LamForMaskedLM(LalmForMaskedLM):
    config: LamConfig
    model_class = LamModel


class LamForSequenceClassification(LalmForSequenceClassification):
    config: LamConfig
    model_class = LamModel


class LamForTokenClassification(LalmForTokenClassification):
    config: LamConfig
    model_class = LamModel


__all___modeling_lam = [
    "LamForCausalLM",
    "LamForMaskedLM",
    "LamForSequenceClassification",
    "LamForTokenClassification",
    "LamModel",
]
