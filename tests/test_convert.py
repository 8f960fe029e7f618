"""Checkpoints of flash-linear-attention: against what its own classes hold and computed (tests/fla_reference.py)."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lalm
from lalm.convert import command_line
from lalm.convert.fla import config_from_fla, config_to_fla, from_fla, state_dict_from_fla, state_dict_to_fla, to_fla
from lalm.errors import UserError
from tests.fla_reference import FOLDER, LENGTHS, MODELS, input_ids, weight

every_model = pytest.mark.parametrize("name", MODELS)


def fixture(name):
    """(fla's configuration, shapes by name, logits by length, the weights)."""
    stored = json.loads((FOLDER / f"fla_0.6.0_{name}.json").read_text(encoding="utf-8"))
    state = {key: weight(key, torch.Size(shape)) for key, shape in stored["shapes"].items()}
    if stored["config"]["tie_word_embeddings"]:
        state["model.embeddings.weight"] = state["lm_head.weight"]  # what was loaded last into the one tensor
    return stored["config"], stored["shapes"], stored["logits"], state


@pytest.fixture
def checkpoint(tmp_path):
    """Write the checkpoint that fla would have saved; returns its folder."""

    def write(name, **changes):
        config, _, _, state = fixture(name)
        folder = tmp_path / "theirs"
        folder.mkdir()
        if config["tie_word_embeddings"]:
            del state["lm_head.weight"]
        (folder / "config.json").write_text(json.dumps(config | changes))
        (folder / "tokenizer_config.json").write_text("{}")
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


@every_model
def test_logits_are_those_of_fla(name, checkpoint):
    """float32 on both sides, two layers: sums in another order, about 100 eps of the largest logit."""
    model = from_fla(str(checkpoint(name)))
    _, _, logits, _ = fixture(name)
    for length in LENGTHS:
        expected = torch.tensor(logits[str(length)], dtype=torch.float64)
        with torch.no_grad():
            actual = model(input_ids(length)).logits[0, -5:].double()
        assert expected.abs().max() > 0.1
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@every_model
def test_names_and_shapes_go_both_ways(name):
    theirs, shapes, _, state = fixture(name)
    config = config_from_fla(theirs)
    ours = state_dict_from_fla(state, config)
    (variant,) = [row for row in lalm.VARIANTS if row.config is type(config)]
    with torch.device("meta"):
        model = variant.models["AutoModelForCausalLM"](config)
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in model.state_dict().items()}
    back = state_dict_to_fla(ours, config)
    assert {key: list(x.shape) for key, x in back.items()} == shapes
    assert all(torch.equal(back[key], state[key]) for key in state)


@every_model
def test_configuration_goes_both_ways(name):
    theirs = fixture(name)[0]
    back = config_to_fla(config_from_fla(theirs))
    assert {key: theirs[key] for key in back if key in theirs and key != "architectures"} == {
        key: value for key, value in back.items() if key in theirs and key != "architectures"
    }
    assert config_from_fla(back).to_dict() == config_from_fla(theirs).to_dict()


@pytest.mark.parametrize("name", ["gla_conv", "gated_deltanet"])
def test_command_line_there_and_back(name, checkpoint, tmp_path, capsys):
    theirs = checkpoint(name)
    command_line.main(["from_fla", str(theirs), str(tmp_path / "ours")])
    assert "is written" in capsys.readouterr().out
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    command_line.main(["to_fla", str(tmp_path / "ours"), str(tmp_path / "back")])
    model, again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), from_fla(str(tmp_path / "back"))
    with torch.no_grad():
        assert torch.equal(model(input_ids(20)).logits, again(input_ids(20)).logits)


REFUSED = [
    ("gla", {"use_gv": True}, "use_gv = True"),
    ("gla", {"clamp_min": -3.0}, "clamp_min = -3.0"),
    ("gla", {"num_kv_heads": 1}, "num_kv_heads = 1"),
    ("gla", {"attn": {"layers": [0]}}, "attn = "),
    ("gla", {"model_type": "rwkv7"}, "rwkv7"),
    ("gla", {"some_new_field": 3}, "some_new_field = 3"),
    ("retnet", {"feature_map": "relu"}, "feature_map = 'relu'"),
    ("delta_net", {"qk_norm": "sum"}, "qk_norm = 'sum'"),
    ("delta_net", {"use_beta": False}, "use_beta = False"),
    ("gated_deltanet", {"num_v_heads": 4}, "num_v_heads = 4"),
    ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation = 'sigmoid'"),
    ("kda", {"lower_bound": -5.0}, "lower_bound = -5.0"),
    ("linear_attn", {"feature_map": "hedgehog"}, "feature_map = 'hedgehog'"),
    ("linear_attn", {"norm_q": True}, "norm_q = True"),
    ("gla", {"use_short_conv": True}, "lacks model.layers.0.attn.q_conv1d.weight"),
    ("gla_conv", {"use_short_conv": False}, "does not account for"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_cannot_be_exact_is_refused_and_nothing_written(name, change, message, checkpoint, tmp_path):
    folder = checkpoint(name, **change)
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        from_fla(str(folder))
    with pytest.raises(UserError, match="from_fla"):
        command_line.main(["from_fla", str(folder), str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"full_attention_layers": [1]}, "full_attention_layers"),
        ({"position_embedding_type": "rope"}, "position_embedding_type"),
        ({"qk_norm": True}, "qk_norm"),
        ({"mlp_type": "mlp"}, "mlp_type"),
        ({"gate_logit_normalizer": 8}, "gate_logit_normalizer"),
    ],
)
def test_ours_without_a_counterpart_is_refused(fields, message, tmp_path):
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = lalm.GLAForCausalLM(lalm.GLAConfig(**sizes, **fields))
    with pytest.raises(ValueError, match=message):
        to_fla(model, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="from_fla"):
        command_line.main(["from_fla", str(tmp_path / "nothing"), str(tmp_path / "ours")])


def test_a_name_that_gives_no_checkpoint_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="from_fla: there is no folder no/such, and the Hub gives no such checkpoint"):
        command_line.main(["from_fla", "no/such", str(tmp_path / "out")])
