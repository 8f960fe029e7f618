"""lalm.inspect against figures worked out by hand, over every kind of gate and state."""

import math

import pytest
import torch

import lalm
from lalm.inspection import CLOSED, HeadReport, Inspection, _occupied, inspect
from lalm.training.clm.tokenizer import train_tokenizer
from tests.modeling.exact import tokens
from tests.variants import ENCODERS, ROWS, each_variant

GATED = {row.name: row for row in (*ROWS, *ENCODERS)}


@each_variant
def test_states_and_gates_of_each_variant(row):
    model, ids = row.build(), tokens(2, 23)
    inspection = lalm.inspect(model, ids)
    assert isinstance(inspection, Inspection)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    linear = [i for i, kind in enumerate(model.config.layer_types) if kind == "lalm_linear_attention"]
    assert inspection.rows
    assert {one.layer for one in inspection.rows} <= set(linear)
    for one in inspection.rows:
        state = cache.layers[one.layer].recurrent_states[0][:, one.head]
        state = state if one.memory is None else state[:, one.memory]
        assert one.state_norm == pytest.approx(float(state.square().sum((1, 2)).mean().sqrt()), rel=1e-9)
        assert 1 <= one.state_rank <= min(state.shape[1:]) + 1e-9
        has_decay = row.name.split("_")[0] in ("gla", "retnet", "lam")
        assert (one.half_life is not None) == has_decay
    assert not model.training
    assert all("attend" not in vars(module) for module in model.modules())


def test_half_lives_are_those_of_the_decays():
    row = GATED["delta_net_gated"]
    model, ids = row.build(), tokens(2, 23)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.a_proj.weight.zero_()
            rate = math.log(2) / torch.tensor([5.0, 80.0], dtype=torch.float64)
            layer.mixer.gate_bias.A_log.copy_(rate.log())
            layer.mixer.gate_bias.dt_bias.fill_(math.log(math.e - 1))  # softplus gives 1
            layer.mixer.b_proj.weight.zero_()
    for one in inspect(model, ids).rows:
        expected = 5.0 if one.head == 0 else 80.0
        assert [one.half_life_10, one.half_life, one.half_life_90] == pytest.approx([expected] * 3, rel=1e-5)
        assert (one.open, one.closed) == (0, 0)
        assert one.write == pytest.approx(0.5)


def test_padding_and_mode_do_not_matter():
    row = GATED["gla_plain"]
    model, ids = row.build().train(), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    expected, found = inspect(model, ids).rows, inspect(model, padded, attention_mask=mask).rows
    assert model.training
    for one, other in zip(expected, found, strict=True):
        measured = {name: value for name, value in vars(one).items() if value is not None}
        assert measured == pytest.approx({name: getattr(other, name) for name in measured}, rel=1e-6)


def test_an_effective_rank_is_the_number_of_equal_singular_values():
    state = torch.zeros(1, 1, 6, 8)
    state[0, 0, :3, :3] = 2 * torch.eye(3)
    assert _occupied(state[:, 0]) == pytest.approx({"state_norm": math.sqrt(12), "state_rank": 3.0})
    assert _occupied(0 * state[:, 0])["state_norm"] == 0


@pytest.mark.parametrize("name", ["linear_encoder", "gla_encoder", "lam_encoder", "lam_encoder_one_memory"])
def test_encoders(name):
    rows = inspect(GATED[name].build("AutoModel"), tokens(2, 11)).rows
    directions = {one.direction for one in rows}
    assert directions == {"lam": {0, 1}, "gla": {0}, "lin": set()}[name[:3]]
    assert all(one.state_norm is None for one in rows)


def test_saturated_gates_are_named():
    found = Inspection(
        [
            HeadReport(0, 0, half_life=0.01, closed=1.0, open=0.0),
            HeadReport(1, 2, half_life=math.inf, closed=0.0, open=0.995, write=0.5),
            HeadReport(2, 1, memory=1, direction=1, write=CLOSED / 2),
            HeadReport(3, 0, half_life=9.0, closed=0.2, open=0.3, write=0.4),
        ]
    )
    first, second, third = found.warnings()
    assert first.startswith("layer 0, head 0 remembers nothing")
    assert second.startswith("layer 1, head 2 forgets nothing")
    assert third.startswith("layer 2, head 1, memory 1, backward writes nothing")
    assert found.scalars()["gates_1/half_life"] == pytest.approx(1e9)
    assert "| 3 | 0 |" in str(found)
    assert len(found.as_dicts()) == 4


def test_text_and_picture(tmp_path):
    model = GATED["lam_plain"].build(vocab_size=300)
    tokenizer = train_tokenizer(["a b c d"], 300)
    inspection = inspect(model, ["a b c", "d"], tokenizer)
    assert len(inspection.rows) == 8
    inspection.plot(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        inspect(model, "a b")
    with pytest.raises(ValueError, match="Linear has 0"):
        inspect(torch.nn.Linear(2, 2), "a b")
