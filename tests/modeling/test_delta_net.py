"""What only (gated) DeltaNet has: its gate's parameters, unit keys, write strengths, and other people's delta rule."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from lalm.configuration.configuration_delta_net import DeltaNetConfig
from lalm.modeling.layers import unit_length
from lalm.modeling.modeling_delta_net import DecayGate, DeltaNetForCausalLM, DeltaNetModel
from lalm.modeling.ops.delta.delta_rule import chunk_delta_rule, chunk_gated_delta_rule
from tests.modeling.exact import assert_close, tokens
from tests.ops.cases import CASES, make_inputs, relative_error
from tests.variants import TINY

SIZES = TINY | {"decay": "head"}


def test_fresh_gate_is_in_its_range():
    gate = DecayGate(4096)
    gate.reset_parameters()
    rate, step = gate.A_log.exp(), F.softplus(gate.dt_bias)
    assert 0 < rate.min() < 0.1
    assert 15.9 < rate.max() <= 16 * (1 + 1e-6)
    assert abs(rate.mean() - 8) < 0.5
    assert 1e-3 * (1 - 1e-3) < step.min() < 1.1e-3
    assert 0.09 < step.max() < 0.1 * (1 + 1e-3)
    assert abs(step.log().mean() - math.log(1e-2)) < 0.1, "log-uniform"
    assert (gate(torch.randn(3, 5, 4096)) < 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_stays_in_float32(dtype, tmp_path):
    DeltaNetForCausalLM(DeltaNetConfig(**SIZES)).save_pretrained(tmp_path)
    for model in (
        DeltaNetForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        DeltaNetModel.from_pretrained(tmp_path, dtype=dtype),
    ):
        kinds = {name: p.dtype for name, p in model.named_parameters()}
        gates = {name for name in kinds if name.endswith(("A_log", "dt_bias"))}
        assert len(gates) == 2 * SIZES["num_hidden_layers"]
        assert all(kinds[name] == (torch.float32 if name in gates else dtype) for name in kinds)
        assert model(tokens(1, 9))[0].dtype == dtype


def test_gate_is_computed_in_float32_whatever_comes_in():
    gate = DecayGate(2)
    gate.reset_parameters()
    x = torch.randn(1, 7, 2).bfloat16()
    expected = gate(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x), expected)
    assert gate(x).dtype == torch.float32


def test_stock_trainer_never_decays_the_gate(tmp_path):
    model = DeltaNetForCausalLM(DeltaNetConfig(**SIZES))
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1, report_to="none", use_cpu=True))
    decayed = trainer.get_decay_parameter_names(model)
    assert not [name for name in decayed if name.endswith(("A_log", "dt_bias")) or "norm" in name]
    assert "model.layers.0.mixer.a_proj.weight" in decayed
    groups = trainer.create_optimizer().param_groups
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(p) for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))} <= plain


def test_keys_have_unit_length():
    x = torch.randn(2, 3, 4, 8)
    assert_close(unit_length(x).norm(dim=-1), torch.ones(2, 3, 4), tolerance=1e-5)
    assert unit_length(torch.zeros(1, 1, 1, 8)).isfinite().all()
    assert unit_length(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("gated", [False, True])
def test_rule_is_that_of_transformers(gated):
    """Its reference takes [B, T, H, K] and scales q by K^-1/2."""
    case = next(case for case in CASES if case.name == "delta_gated")
    x = make_inputs(case, 70, dtype=torch.float32)
    g = x["g"] if gated else torch.zeros_like(x["g"])
    expected, state = torch_recurrent_gated_delta_rule(
        x["q"], x["k"], x["v"], g, x["beta"], x["initial_state"], output_final_state=True
    )
    args = (x["q"], x["k"], x["v"], *([g] if gated else []), x["beta"])
    form = chunk_gated_delta_rule if gated else chunk_delta_rule
    o, final = form(*args, initial_state=x["initial_state"], output_final_state=True)
    assert relative_error(o, expected) < 1e-5
    assert relative_error(final, state) < 1e-5


def test_negative_eigenvalues_double_the_write():
    torch.manual_seed(0)
    model = DeltaNetModel(DeltaNetConfig(**TINY))
    ids = tokens(1, 12)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        for layer in model.layers:
            layer.mixer.strongest_write = 2
        doubled = model(ids).last_hidden_state
        other = DeltaNetModel(DeltaNetConfig(**TINY, allow_neg_eigval=True))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids).last_hidden_state, doubled)
    assert (plain - doubled).abs().max() > 1e-6


def test_output_gate_follows_the_decay_gate():
    assert not DeltaNetConfig(**TINY).use_output_gate
    assert DeltaNetConfig(**SIZES).use_output_gate
    assert not DeltaNetConfig(**SIZES, use_output_gate=False).use_output_gate
