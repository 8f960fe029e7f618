# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What users' tools do to a model: smooth its labels, offload or quantise its layers, resize, copy and pickle it."""

import copy
import io
import logging
import pickle

import accelerate
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lalm.configuration.configuration_base import NO_LIMIT
from lalm.modeling.layers import make_linear, takes_apply
from tests.modeling.exact import assert_close, tokens
from tests.modeling.test_training import enable_checkpointing
from tests.variants import ENCODER_HEADS, HEADS, ROWS, each_variant, every_encoder, every_row

NAMED = {row.name: row for row in ROWS}
every_head = pytest.mark.parametrize("head", HEADS)
SOFT = 1e-5  # of float32 models


def call(model, head, ids):
    """What a head gives for `ids`, as one tensor."""
    out = model(ids)
    return out.last_hidden_state if head == "AutoModel" else out.logits


def smoothed(logits, labels, epsilon):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=epsilon)


@each_variant
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "lora"])
def test_trainer_smooths_shifted_labels(row, wrap, tmp_path):
    model, ids = row.build(dtype=torch.float32), tokens(2, 12)
    if wrap:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).eval()
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none"))
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert_close(found, smoothed(model(ids).logits[:, :-1], ids[:, 1:], 0.1), tolerance=SOFT)


def test_users_subclass_is_smoothed_alike(tmp_path):
    from lalm import GLAForCausalLM

    class Renamed(GLAForCausalLM):
        pass

    model, ids = Renamed(NAMED["gla_plain"].config()).eval(), tokens(2, 12)
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none"))
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert_close(found, smoothed(model(ids).logits[:, :-1], ids[:, 1:], 0.1), tolerance=SOFT)


@every_encoder
def test_trainer_does_not_shift_what_stands_at_its_token(row, tmp_path):
    model, ids = row.build("AutoModelForMaskedLM", dtype=torch.float32), tokens(2, 12)
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none"))
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert_close(found, smoothed(model(ids).logits, ids, 0.1), tolerance=SOFT)


def offloaded(model, how, folder):
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    model.save_pretrained(folder / "model")
    places = {name: "cpu" for name, _ in model.named_children()} | {"lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "off")


@every_row
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_loss(row, how, tmp_path):
    model, ids = row.build(dtype=torch.float32), tokens(2, 12)
    expected = model(ids, labels=ids, logits_to_keep=1)
    model = offloaded(model, how, tmp_path)
    with torch.no_grad():
        for keep in (0, 1, torch.tensor([2, 5])):
            found = model(ids, labels=ids, logits_to_keep=keep)
            assert_close(found.loss, expected.loss, f"loss, logits_to_keep={keep}", tolerance=SOFT)
        assert_close(model(ids, labels=ids, logits_to_keep=1).logits, expected.logits, "logits", tolerance=SOFT)


@each_variant
def test_head_on_disk_gives_the_same_loss(row, tmp_path):
    model, ids = row.build(dtype=torch.float32, tie_word_embeddings=False), tokens(2, 12)
    expected = model(ids, labels=ids, logits_to_keep=1).loss
    model = offloaded(model, "map", tmp_path)
    assert model.hf_device_map["lm_head"] == "disk"
    with torch.no_grad():
        assert_close(model(ids, labels=ids, logits_to_keep=1).loss, expected, tolerance=SOFT)


@each_variant
@every_head
def test_every_head_can_be_offloaded(row, head):
    model, ids = row.build(head, dtype=torch.float32), tokens(2, 12)
    expected = call(model, head, ids)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        assert_close(call(model, head, ids), expected, tolerance=SOFT)


@every_encoder
def test_encoders_can_be_offloaded(row):
    for head in ENCODER_HEADS:
        model, ids = row.build(head, dtype=torch.float32), tokens(2, 12)
        expected = call(model, head, ids)
        accelerate.cpu_offload(model, execution_device="cpu")
        with torch.no_grad():
            assert_close(call(model, head, ids), expected, head, tolerance=SOFT)


@each_variant
def test_hooks_of_a_user_see_the_logits(row):
    model, ids = row.build(), tokens(2, 12)
    expected, seen = model(ids, labels=ids).loss, []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_close(model(ids, labels=ids, logits_to_keep=1).loss, expected, tolerance=1e-6)
    assert seen == [(2, 12, 61)]


@every_row
def test_linear_layers_are_torchs_own(row):
    layers = [module for module in row.build().modules() if isinstance(module, nn.Linear)]
    assert len(layers) > 5
    assert {type(layer) for layer in layers} == {nn.Linear}


@each_variant
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_takes_every_linear_layer(row):
    model, ids = row.build(dtype=torch.float32), tokens(2, 12)
    expected = model(ids).logits
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not [module for module in small.modules() if type(module) is nn.Linear]
    found = small(ids, labels=ids, logits_to_keep=12)
    # Eight bits a weight: near, and not the same.
    assert 0 < (found.logits - expected).norm() / expected.norm() < 0.2
    assert_close(found.loss, small(ids, labels=ids).loss, "loss", tolerance=SOFT)


class Doubled(nn.Linear):
    """What a tool may put in the place of a layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_replaced_layer_is_called_as_it_is():
    model, ids = NAMED["gla_plain"].build(), tokens(2, 12)
    head = Doubled(32, 61, bias=False).double()
    head.weight = model.lm_head.weight
    expected = 2 * model(ids).logits
    model.lm_head = head
    out = model(ids, labels=ids, logits_to_keep=1)
    assert_close(out.logits, expected[:, -1:], "logits")
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(out.loss.double(), loss, "loss", tolerance=1e-6)


def copied(layer):
    return copy.deepcopy(layer)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copied, pickled, saved])
def test_copy_of_a_layer_multiplies_by_its_own_weights(way):
    layer, x = make_linear(24, 40), torch.randn(3, 24)
    twin = way(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert takes_apply(twin)
    assert_close(twin(x), F.linear(x, twin.weight, twin.bias), tolerance=1e-6)
    assert twin.weight.abs().max() > 0


@every_row
def test_resized_head_survives_initialisation_and_keeps_its_product(row):
    model = row.build(tie_word_embeddings=False)
    model.resize_token_embeddings(70)
    head, table = model.lm_head.weight.clone(), model.get_input_embeddings().weight.clone()
    assert takes_apply(model.lm_head)
    model.post_init()
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.get_input_embeddings().weight, table)


@each_variant
@every_head
def test_blocks_named_for_accelerate_are_in_the_model(row, head):
    model = row.build(head)
    names = {type(module).__name__ for module in model.modules()}
    assert len(model._no_split_modules) == 1
    assert set(model._no_split_modules) <= names
    assert {type(layer).__name__ for layer in model.base_model.layers} == set(model._no_split_modules)


def written(model, ids, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@every_row
def test_generate_in_train_mode_with_checkpointing(row):
    model, ids = row.build(), tokens(2, 9)
    expected = written(model, ids)
    enable_checkpointing(model.train())
    assert torch.equal(written(model, ids), expected)


@each_variant
def test_no_type_offers_itself_to_engines_that_keep_keys_only(row):
    assert not row.model_class().is_backend_compatible()


@each_variant
def test_sharded_tokens_are_refused(row, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    model, ids = row.build(), tokens(2, 12)
    expected = model(ids).logits
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with (
            context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]),
            pytest.raises(ValueError, match="context_parallel shards the tokens"),
        ):
            model(ids)
        assert torch.equal(model(ids).logits, expected)
    finally:
        torch.distributed.destroy_process_group()


@every_row
def test_saved_tied_weights_are_not_missing(row):
    model = row.build(tie_word_embeddings=True)
    stored = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    other = row.build(tie_word_embeddings=True, seed=1)
    found = other.load_state_dict(stored)
    assert not found.missing_keys
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert other.lm_head.weight is other.get_input_embeddings().weight


@every_row
def test_no_limit_where_there_is_no_table(row, caplog):
    config = row.config(max_position_embeddings=-1)
    has_table = config.position_embedding_type in config.tables
    assert config.max_position_embeddings == (config.table_size if has_table else NO_LIMIT)
    assert row.config(max_position_embeddings=-1).max_position_embeddings == config.max_position_embeddings
    if has_table:
        return
    model = row.build(max_position_embeddings=-1)
    logging.getLogger("transformers").addHandler(caplog.handler)
    # By default 20 new tokens, which a limit below the prompt would forbid.
    assert model.generate(tokens(1, 9), eos_token_id=None, do_sample=False).shape == (1, 29)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "maximum length" not in caplog.text


def test_gateless_delta_net_keeps_nothing_in_float32():
    assert NAMED["delta_net_gated"].build()._keep_in_fp32_modules_strict == {"gate_bias"}
    assert not NAMED["delta_net_plain"].build()._keep_in_fp32_modules_strict


@each_variant
def test_accelerate_refuses_to_shard_tokens(row):
    with pytest.raises(ValueError, match="recurrent state"):
        accelerate.big_modeling._refuse_recurrent_layers_under_sequence_parallelism(row.build())
