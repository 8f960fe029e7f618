# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Models as ONNX graphs, for onnxruntime on machines without PyTorch.

python -m lalm export-onnx checkpoints/lam-minilm-l6 --int8

An encoder becomes one graph from `input_ids` and `attention_mask [B, T]` to `last_hidden_state` or `logits`. A causal
language model becomes one step: `input_ids [B, T]`, the number of tokens `seen` before and the states `past.*` give
`logits [B, T, V]` and the states `present.*`. States of zeros (keys and values of no token) begin a sequence. All rows
of a step have T real tokens. Batch and length are dynamic.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from lalm.configuration.configuration_base import LalmConfig
from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.errors import UserError, extra_needed, one_line, refusal
from lalm.modeling.cache import RecurrentLayer
from lalm.modeling.modeling_base import LalmPreTrainedModel
from lalm.network import go_offline_without_network

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_KINDS = ("conv_states", "recurrent_states")
_EXTRA = "export-onnx needs onnx, onnxruntime and onnxscript: pip install lalm[onnx]"


class _Encoder(nn.Module):
    """ids and mask `[B, T]` -> the first output of the model."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


class _Keys(DynamicLayer):
    """Keys and values `[B, H, S, K]` of a softmax layer: all, or of a sliding window the last `kept`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, kept: int | None):
        super().__init__()
        self.keys, self.values, self.seen, self.kept, self.is_initialized = keys, values, seen, kept, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states, value_states, *args, **kwargs):
        assert self.keys is not None  # given to the constructor
        assert self.values is not None
        keys, values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        start = 0 if self.kept is None else key_states.shape[2]
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        return keys, values

    def get_seq_length(self):
        return self.seen


class _Step(nn.Module):
    """ids `[B, T]`, the number of tokens seen and the states -> logits and the states."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.config = model, model.config
        with torch.no_grad():
            cache = model(torch.zeros(2, 2, dtype=torch.int64), use_cache=True).past_key_values
        self.names, self.example = [], []  # type: tuple[list, list]
        for index, layer in enumerate(cache.layers):
            for place, state in self._states(layer):
                self.names.append((index, *place))
                if place[0] == "keys" or place[0] == "values":
                    size = self._window(index) or 3
                    state = state.new_zeros(2, state.shape[1], size, state.shape[3])
                self.example.append(torch.zeros_like(state))

    def _window(self, index: int) -> int | None:
        is_sliding = self.config.layer_types[index] == "sliding_attention"
        return self.config.sliding_window - 1 if is_sliding else None

    def grows(self, name: tuple) -> dict[int, Any]:
        """The axis of the state that grows with the tokens."""
        index, kind, _ = name
        is_open = kind in ("keys", "values") and self._window(index) is None
        return {2: torch.export.Dim.DYNAMIC} if is_open else {}

    @staticmethod
    def _states(layer: Any) -> list[tuple[tuple[str, int], Any]]:
        if not isinstance(layer, RecurrentLayer):
            return [(("keys", 0), layer.keys), (("values", 0), layer.values)]
        return [((kind, i), layer.previous(kind, i)) for kind in _KINDS for i in range(4)
                if layer.is_written[kind].get(i)]  # fmt: skip

    def forward(self, input_ids: torch.Tensor, seen: torch.Tensor, states: list[torch.Tensor]):
        cache = DynamicCache(config=self.config)
        given = dict(zip(self.names, states, strict=True))
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, RecurrentLayer):
                layer.cumulative_length, layer.dtype, layer.device = seen.clone(), torch.float32, seen.device
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
                for (at, kind, number), state in given.items():
                    if at == index:
                        getattr(layer, kind)[number] = state.clone()
                        layer.is_written[kind][number] = True
            else:
                past = given[index, "keys", 0], given[index, "values", 0]
                cache.layers[index] = _Keys(*past, seen, self._window(index))
        masks = self._masks(input_ids.shape[1], seen, given)
        logits = self.model(input_ids=input_ids, attention_mask=masks, past_key_values=cache, use_cache=True).logits
        return logits, *(state for layer in cache.layers for _, state in self._states(layer))

    def _masks(self, length: int, seen: torch.Tensor, given: dict) -> dict[str, torch.Tensor | None]:
        """For each kind of layer, which keys `[1, 1, T, S + T]` a token reads."""
        masks: dict[str, torch.Tensor | None] = {RecurrentLayer._layer_type: None}
        for index, kind in enumerate(self.config.layer_types):
            if kind in masks:
                continue
            past, window = given[index, "keys", 0].shape[2], self._window(index)
            query, key = torch.arange(length)[:, None], torch.arange(past + length)[None] - past
            mask = key <= query
            if window is not None:
                mask = mask & (key >= query - window) & (key >= -seen)
            masks[kind] = mask[None, None]
        return masks


def _log_sigmoid(x: Any) -> Any:
    """In the place of the exporter's Log(Sigmoid(x)): onnxruntime's Sigmoid is 0 below -18, and its logarithm -inf."""
    from onnxscript import opset18

    return opset18.Neg(opset18.Softplus(opset18.Neg(x)))


@contextmanager
def _by_tokens(config: Any) -> Iterator[None]:
    """Let the recurrences run token by token, which is one loop in the graph: chunks have the size of those of long
    texts, for a single token too. Local-global models, whose recurrence counts tokens in Python, keep them."""
    before = config.linear_attn_implementation
    if not isinstance(config, LocalGlobalConfig):
        config.linear_attn_implementation = "recurrent"
    try:
        yield
    finally:
        config.linear_attn_implementation = before


@contextmanager
def _errors_only(logger: str | None) -> Iterator[None]:
    """Silence the advice and warnings of a logger, None for the root."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)


def export_onnx(model: PreTrainedModel, path: str | Path) -> Path:
    """Write `model` as an ONNX file; the module's docstring names inputs and outputs.

    Args:
        model: one of lalm's; a causal language model becomes a step of decoding, everything else an encoder.
        path: the .onnx file.

    Raises:
        ValueError: the model is not one of lalm's, or has what a graph cannot hold; the message names it.
        ImportError: onnx or onnxscript is missing.
    """
    if not isinstance(model, LalmPreTrainedModel):
        raise ValueError(f"export_onnx takes a model of lalm, got {type(model).__name__}.")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"export_onnx takes float32 weights, got {dtypes}: call model.float() first.")
    try:
        from onnx_ir.passes.common import RemoveUnusedNodesPass  # comes with onnxscript
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    was_training = model.training
    model = model.eval().cpu()
    batch, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    both: dict[int, Any] = {0: batch, 1: length}
    ids = torch.zeros(2, 9, dtype=torch.int64)
    graph: nn.Module
    arguments: tuple
    shapes: Any
    if type(model).__name__.endswith("ForCausalLM"):
        graph = step = _Step(model)
        arguments = (ids, torch.tensor(5), step.example)
        shapes = (both, None, [{0: batch} | step.grows(name) for name in step.names])
        names = [f"{layer}.{kind}.{number}" for layer, kind, number in step.names]
        inputs = ["input_ids", "seen", *(f"past.{name}" for name in names)]
        outputs = ["logits", *(f"present.{name}" for name in names)]
    else:
        graph, arguments, shapes = _Encoder(model), (ids, torch.ones_like(ids)), (both, both)
        inputs = ["input_ids", "attention_mask"]
        is_headless = not hasattr(model, model.base_model_prefix)
        outputs = ["last_hidden_state" if is_headless else "logits"]
    try:
        with (
            torch.no_grad(),
            _by_tokens(model.config),
            _errors_only("torch.onnx"),
        ):  # it names what torchvision would add
            program = torch.export.export(graph, arguments, dynamic_shapes=shapes, strict=False)
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
                custom_translation_table={torch.ops.aten.log_sigmoid.default: _log_sigmoid},
            )
    except RuntimeError as error:
        raise ValueError(f"{type(model).__name__} has no ONNX graph: {one_line(error)}") from error
    finally:
        model.train(was_training)
    RemoveUnusedNodesPass()(made.model)  # type: ignore[union-attr]  # onnxruntime would warn of them
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))  # type: ignore[union-attr]
    return Path(path)


def quantize_int8(source: str | Path, target: str | Path) -> Path:
    """Write the graph `source` with the weights of its linear layers in int8, one scale per column; activations are
    quantised as they come (onnxruntime's dynamic quantiser)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    with _errors_only(None):  # it advises another preprocessing
        quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )
    return Path(target)


class OnnxEncoder(nn.Module):
    """An encoder's graph in the place of the model: ids and mask `[B, T]` -> `last_hidden_state [B, T, D]`."""

    def __init__(self, path: str | Path, config: PreTrainedConfig):
        super().__init__()
        from onnxruntime import InferenceSession, SessionOptions  # type: ignore[import-untyped]

        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.config, self.session = config, InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> BaseModelOutput:
        given = {"input_ids": input_ids.cpu().numpy(), "attention_mask": attention_mask.cpu().numpy()}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.session.run(None, given)[0]))


def sentence_transformer(folder: str | Path, file_name: str = "onnx/model.onnx", **options) -> "SentenceTransformer":
    """A SentenceTransformer that runs the graph `file_name` of its folder by onnxruntime, on the CPU. `options` are
    those of SentenceTransformer. (Its own `backend="onnx"` loads optimum-onnx, whose newest release, 0.1.0, does not
    import with transformers 5.)

    Raises:
        ValueError: the folder has no such graph.
    """
    from sentence_transformers import SentenceTransformer

    path = Path(folder) / file_name
    if not path.is_file():
        raise ValueError(f"{folder} has no {file_name}: make it by python -m lalm export-onnx {folder}.")
    model = SentenceTransformer(str(folder), device="cpu", **options)
    transformer: Any = model[0]
    transformer.model = OnnxEncoder(path, transformer.model.config)
    return model


def _load(name: str) -> PreTrainedModel:
    """The model of a folder or Hub name: with its language-model head if it is causal, else the backbone."""
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, LalmConfig):
        raise UserError(f"{name} is a {config.model_type}: export-onnx takes models of lalm.")
    auto: Any = AutoModelForCausalLM if config.is_causal else AutoModel
    return auto.from_pretrained(name, dtype=torch.float32)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lalm export-onnx", description="Write a model as an ONNX graph.")
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("output", nargs="?", type=Path, help="the .onnx file; without it MODEL/onnx/model.onnx")
    parser.add_argument("--int8", action="store_true", help="also write it with int8 weights, as *_int8.onnx")
    given = parser.parse_args(arguments)
    output = given.output or Path(given.model) / "onnx" / "model.onnx"
    if given.output is None and not Path(given.model).is_dir():
        raise UserError(f"{given.model} is no folder: name the .onnx file to write as second argument.")
    if output.suffix != ".onnx":
        raise UserError(f"output must be a file that ends in .onnx, got {output}.")
    with extra_needed("export-onnx", "onnx"):  # before the minutes that a graph takes
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    go_offline_without_network()
    try:
        model = _load(given.model)
    except (OSError, ValueError) as error:
        raise UserError(refusal(given.model, "model", error)) from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            made = export_onnx(model, Path(folder) / output.name)
            small = quantize_int8(made, made.with_stem(f"{made.stem}_int8")) if given.int8 else None
            for path in [made, *([small] if small else [])]:
                path.replace(output.parent / path.name)
                print(f"{output.parent / path.name}: {(output.parent / path.name).stat().st_size / 1e6:.1f} MB")
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error
