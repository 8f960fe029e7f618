# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Training on a GPU: 24 layers x 1,024 in bfloat16 against fla's own models and Llama, and the dual-state kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lalm
from benchmarks import gates
from benchmarks.cases_ops import OPS, Inputs, output_of
from benchmarks.models import LLAMA, facts, train_step
from benchmarks.registry import Comparison, GateError, Ratio, Run, register
from lalm.convert.fla import config_to_fla, state_dict_to_fla
from lalm.modeling.ops.delta.dual_state import dual_state_delta

triton_dual_state_delta = partial(dual_state_delta, implementation="triton")

SIZES: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 4}
# Our configuration, the prefix of fla's class, and our fields, for the models that both have (lalm/convert/fla.py).
VARIANTS: dict[str, tuple[type[lalm.LalmConfig], str, dict[str, Any]]] = {
    "gla": (lalm.GLAConfig, "GLA", {}),
    "retnet": (lalm.RetNetConfig, "RetNet", {}),
    "delta_net": (lalm.DeltaNetConfig, "DeltaNet", {}),
    "gated_delta_net": (lalm.DeltaNetConfig, "GatedDeltaNet", {"decay": "head"}),
}
TOKENS = 16384  # per step, whatever the sequence length
BFLOAT16 = 3e-2


def ours_and_theirs(name: str, device: str = "cuda", **changes: Any) -> tuple[Any, Any]:
    """Our model on fla's kernels and fla's own model, with the same weights."""
    import fla.models

    config_class, prefix, fields = VARIANTS[name]
    ours = AutoModelForCausalLM.from_config(
        config_class(**SIZES | fields | {"linear_attn_implementation": "fla"} | changes), dtype=torch.bfloat16
    )
    theirs_config = {key: value for key, value in config_to_fla(ours.config).items() if key != "model_type"}
    theirs = getattr(fla.models, f"{prefix}ForCausalLM")(getattr(fla.models, f"{prefix}Config")(**theirs_config))
    theirs.load_state_dict(state_dict_to_fla(ours.state_dict(), ours.config))
    return ours.to(device), theirs.to(device, torch.bfloat16)


def llama(device: str = "cuda", **changes: Any) -> Any:
    config = LlamaConfig(**SIZES | {"intermediate_size": 2816, "attn_implementation": "sdpa"} | changes)
    model: Any = LlamaForCausalLM(config)
    return model.to(device, torch.bfloat16)


def with_flash(step: Any) -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        step()


def same_loss(ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    """Gate: equal losses, and embedding gradients whose cosine is close to 1."""
    found, expected = (
        gates.parameter_gradients(model, model(input_ids=ids, labels=ids, use_cache=False).loss)
        for model in (ours, theirs)
    )
    gates.near("loss", found["loss"], expected["loss"], BFLOAT16)
    a, b = found["model.embed_tokens.weight"].float(), expected["model.embeddings.weight"].float()
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    if not cosine > 0.99:
        raise GateError(f"gradient of the embeddings: cosine {cosine:.4f}")


def training(length: int, against_llama: float) -> Comparison:
    """Train steps of our variants on fla's kernels, of fla's own models, and of Llama with flash attention."""
    ids = torch.randint(SIZES["vocab_size"], (TOKENS // length, length), device="cuda")
    softmax = llama(max_position_embeddings=length)
    runs = {LLAMA: Run(partial(with_flash, train_step(softmax, ids)), None, facts(softmax, TOKENS))}
    ratios, shape = [], f"[{TOKENS // length}, {length}] train step"
    for name in VARIANTS:
        ours, theirs = ours_and_theirs(name)
        gate = partial(same_loss, ours, theirs, ids[:1, :512])
        runs[name] = Run(train_step(ours, ids), gate, facts(ours, TOKENS))
        runs[f"fla {name}"] = Run(train_step(theirs, ids), None, facts(theirs, TOKENS))
        ratios += [Ratio(name, f"fla {name}", shape, 0.97), Ratio(name, LLAMA, shape, against_llama)]
    return Comparison(runs, ratios, "bfloat16")


def dual_state(length: int = 4096) -> Comparison:
    """The dual-state delta rule against fla's gated delta rule, which does half as much work."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def on_gpu(x: Inputs) -> Inputs:
        kept = {"g", "read", "coupling"}
        return {key: tensor.cuda().to(torch.float32 if key in kept else torch.bfloat16) for key, tensor in x.items()}

    def step(function: Any, leaves: Inputs) -> None:
        out = function(**leaves)
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    def right(function: Any, x: Inputs) -> None:
        first = gates.prefix(x, 256)
        exact = {key: tensor.float() for key, tensor in first.items()}
        expected = output_of(OPS["dual_state"].recurrent, **exact)
        gates.near("output", function(**first).float(), expected, BFLOAT16)

    x, y = (on_gpu(OPS[name].inputs(length)) for name in ("dual_state", "gated_delta"))
    ours = partial(output_of, triton_dual_state_delta)
    theirs = partial(output_of, chunk_gated_delta_rule)
    leaves = [{key: tensor.clone().requires_grad_() for key, tensor in inputs.items()} for inputs in (x, y)]
    runs = {
        "fla gated delta": Run(partial(step, theirs, leaves[1])),
        "dual_state": Run(partial(step, ours, leaves[0]), partial(right, ours, x)),
    }
    ratio = Ratio("dual_state", "fla gated delta", f"[1, {length}, 8, 64] fwd+bwd", 2.5, at_most=True)
    return Comparison(runs, [ratio], "bfloat16")


for _length, _target in ((2048, 1.0), (16384, 1.5)):
    register(
        f"gpu_train_{_length}",
        f"24 x 1,024, bfloat16, T = {_length}: >= 0.97x fla's models, >= {_target:g}x Llama with flash attention",
        partial(training, _length, _target),
        budget=60,
        needs="cuda",
    )
register(
    "gpu_dual_state",
    "dual-state kernel, T = 4,096, bfloat16: <= 2.5x the time of fla's gated delta rule",
    dual_state,
    budget=5,
    needs="cuda",
)
