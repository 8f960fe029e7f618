"""Saving, loading, Auto classes, resizing, half precision, adapters, and weights that a checkpoint does not hold."""

import copy
import json
import math

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lalm.configuration.configuration_based import BasedConfig
from tests.modeling.exact import assert_close, run, tokens
from tests.variants import HEADS, each_variant, every_row, few_rows

LENGTH = 11
CAUSAL = "AutoModelForCausalLM"
weights_file = "model.safetensors"


def fields(config):
    """All that a configuration says, but for where it was read from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


@every_row
def test_saved_model_loads_equal(row, tmp_path):
    """Through the Auto class, to the last bit, tied or not; and the configuration comes back whole."""
    model, ids = row.build(dtype=torch.float32), tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == row.config().tie_word_embeddings
    assert fields(loaded.config) == fields(model.config)


@every_row
def test_checkpoint_holds_the_parameters_by_name_once(row, tmp_path):
    """Trainer resumes by raw names, so the file and the module tree must agree; tied weights are stored once."""
    model = row.build()
    model.save_pretrained(tmp_path)
    expected = set(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.remove("lm_head.weight")
    assert set(load_file(tmp_path / weights_file)) == expected


@every_row
def test_config_round_trip(row, tmp_path):
    config = row.config(num_labels=5)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is row.config_class
    assert fields(loaded) == fields(config)
    assert fields(row.config_class.from_dict(config.to_dict())) == fields(config)
    assert loaded.layer_types == config.layer_types
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == row.config_class.model_type
    assert "layer_types" not in stored, "a stored foreign layer type breaks Trainer's resume"


@each_variant
@pytest.mark.parametrize("head", HEADS)
def test_every_head_through_its_auto_class(row, head, tmp_path):
    model, ids = row.build(head, dtype=torch.float32, num_labels=4), tokens(2, LENGTH)
    auto = getattr(transformers, head)
    assert type(auto.from_config(model.config)) is type(model)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model) is row.model_class(head)
    assert loaded.config.architectures == [type(model).__name__]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])


@each_variant
@pytest.mark.parametrize("head", [head for head in HEADS if head != CAUSAL])
def test_other_heads_from_a_causal_checkpoint(row, head, tmp_path):
    """The backbone is found; a head of its own starts fresh, and finite."""
    model, ids = row.build(dtype=torch.float32, num_labels=4), tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, head).from_pretrained(tmp_path)
    body = loaded if head == "AutoModel" else loaded.model
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert loaded(ids)[0].isfinite().all()
    if head != "AutoModel":
        assert 0.01 < loaded.score.weight.std() < 0.04, "initializer_range is 0.02"


@each_variant
def test_causal_model_from_a_backbone_checkpoint(row, tmp_path):
    model, ids = row.build("AutoModel", dtype=torch.float32), tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).last_hidden_state, model(ids).last_hidden_state)


@few_rows
def test_bfloat16_checkpoint(row, tmp_path):
    model, ids = row.build(dtype=torch.bfloat16), tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.model.layers[0].mlp_norm.weight, model.model.layers[0].mlp_norm.weight.float())
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert run(narrow, ids)[0].isfinite().all()


@every_row
@pytest.mark.parametrize("size", [70, 50])
def test_resized_embeddings(row, size, tmp_path):
    model, ids = row.build(dtype=torch.float32), tokens(2, LENGTH, high=50)
    before, _ = run(model, ids)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert type(model.lm_head) is type(row.build().lm_head)
    after, _ = run(model, ids)
    kept = min(size, 61)
    assert_close(after[..., :kept], before[..., :kept], "old logits", tolerance=1e-5)
    labels = model(ids, labels=ids)
    assert labels.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, ids)[0], after)
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == row.config().tie_word_embeddings


def statistics(model):
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (t.float().mean().item(), t.float().std(correction=0).item()) for name, t in state.items()}


@every_row
def test_fresh_models_are_initialised(row):
    """Uninitialised memory is NaN in these tests. Gains are 1, biases finite, matrices at initializer_range."""
    model = row.model_class()(row.config())
    for name, (mean, deviation) in statistics(model).items():
        assert max(abs(mean), deviation) < 10, f"{name}: mean {mean}, deviation {deviation}"
        assert mean == mean, f"{name} holds memory that nobody has written"
        if "norm" in name and name.endswith("weight"):
            assert (mean, deviation) == (1, 0), name
        if name.endswith("proj.weight"):
            smaller = row.config_class is BasedConfig and name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(2 * row.config().num_hidden_layers if smaller else 1)
            assert 0.6 * expected < deviation < 1.4 * expected, f"{name}: {deviation} is not near {expected}"


@every_row
def test_missing_weights_are_initialised_on_load(row, tmp_path):
    """from_pretrained builds on the meta device: what the file lacks must come out as in a fresh model, not as NaN."""
    torch.manual_seed(0)
    model = row.model_class()(row.config())
    model.save_pretrained(tmp_path)
    kept = "model.layers.0.mlp_norm.weight"
    save_file({kept: torch.full_like(model.state_dict()[kept], 3.0)}, tmp_path / weights_file, {"format": "pt"})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.state_dict()[kept] == 3).all(), "a weight that is in the file was overwritten"
    fresh = statistics(model)
    for name, (mean, deviation) in statistics(loaded).items():
        # Two random numbers have no statistics; test_delta_net.py checks the range of those that heads have.
        if name != kept and loaded.state_dict()[name].numel() > 8:
            expected_mean, expected = fresh[name]
            assert abs(deviation - expected) <= 0.35 * expected, f"{name}: deviation {deviation}, fresh {expected}"
            assert abs(mean - expected_mean) <= 0.6 * expected + 1e-6, f"{name}: mean {mean}, fresh {expected_mean}"


@every_row
def test_loaded_weights_survive_when_others_are_missing(row, tmp_path):
    """Only what is missing is initialised: parameters set up together must not overwrite one another."""
    model = row.build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / weights_file)
    names = [name for name in stored if "layers.0" in name]
    for offset in (0, 1):
        missing = names[offset::2]
        save_file({k: v for k, v in stored.items() if k not in missing}, tmp_path / weights_file, {"format": "pt"})
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        for name, value in loaded.state_dict().items():
            assert value.isfinite().all(), name
            if name in stored and name not in missing:
                assert torch.equal(value, stored[name]), f"{name} was in the file and has been overwritten"


@few_rows
def test_deepcopy_of_a_model(row):
    model, ids = row.build(), tokens(2, LENGTH)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(run(twin, ids)[0], run(row.build(), ids)[0], "logits of the copy")


@each_variant
def test_device_map(row, tmp_path):
    """accelerate's dispatch hooks every module and splits at _no_split_modules."""
    model, ids = row.build(dtype=torch.float32), tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])
    layers = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers": "cpu"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=layers)
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])


def adapted(row):
    model = row.build(dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_alpha=8)
    return peft.get_peft_model(model, config).eval()


@few_rows
def test_lora_trains_merges_and_generates(row, tmp_path):
    """PEFT finds the linear layers itself; merging, saving and loading keep what was learned."""
    model, ids = adapted(row), tokens(2, LENGTH)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before, _ = run(model, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), f"{name} is frozen and has moved"
    after, _ = run(model, ids)
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(row.build(dtype=torch.float32), tmp_path).eval()
    assert_close(run(loaded, ids)[0], after, "loaded adapter", tolerance=1e-6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    text = model.generate(input_ids=ids, **options)
    merged = model.merge_and_unload()
    assert_close(run(merged, ids)[0], after, "merged adapter", tolerance=1e-4)
    assert torch.equal(merged.generate(ids, **options), text)
