"""Sequence and tensor parallelism with real processes equal one process: logits, loss and all gradients in float64."""

import json

import pytest
import torch
import torch.distributed as dist

from lalm.modeling.sequence_parallel import sequence_parallel
from lalm.modeling.tensor_parallel import check_tensor_parallel
from tests.distributed import sequences, tensors
from tests.distributed.launch import launch
from tests.variants import ENCODERS, ROWS

pytestmark = pytest.mark.slow

BY_NAME = {row.name: row for row in (*ROWS, *ENCODERS)}


def assert_equal(errors: dict[str, float]) -> None:
    assert errors.pop("loss") < 1e-6  # the stock loss is computed in float32
    assert max(errors.values()) < 1e-10, max(errors, key=errors.__getitem__)


@pytest.fixture(scope="module")
def split_sequences(tmp_path_factory):
    output = tmp_path_factory.mktemp("sequences") / "found.json"
    launch(4, "tests.distributed.sequences", str(output))
    return json.loads(output.read_text())


@pytest.mark.parametrize("processes", sequences.KINDS)
@pytest.mark.parametrize("row", [row.name for row in sequences.SPLIT])
def test_sequence_parallel_equals_one_process(row, processes, split_sequences):
    for kind in sequences.KINDS[processes]:
        assert_equal(split_sequences[f"{row}, {processes}, {kind}"])


def test_the_documented_trainer_equals_one_process(split_sequences, tmp_path):
    """The class in docs/scaling.md: four processes on each sequence, against the stock Trainer in one."""
    found, wanted = split_sequences["trainer"], sequences.trained(sequences.InOrder, str(tmp_path))
    assert len(found) == 8
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def split_tensors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensors")
    for row in tensors.SPLIT:
        row.build(tensors.head_of(row)).save_pretrained(folder / row.name)
    launch(2, "tests.distributed.tensors", str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("row", [row.name for row in tensors.SPLIT])
def test_tensor_parallel_equals_one_process(row, split_tensors):
    assert_equal(split_tensors[row])


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sequence_parallel_refuses(one_process):
    ids = torch.randint(3, 61, (1, 6))
    for name, reason in {"gla_hybrid_full": "full_attention", "gla_encoder": "is_causal=True"}.items():
        model = BY_NAME[name].build(tensors.head_of(BY_NAME[name]))
        with pytest.raises(ValueError, match=reason):
            sequence_parallel(model, ids)
    model = BY_NAME["gla_plain"].build().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="drops what layers hand on"):
        sequence_parallel(model, ids)
    with pytest.raises(ValueError, match="0 tokens"):
        sequence_parallel(model, ids[:, :0])


def test_sequence_parallel_of_one_process_is_the_model(one_process):
    given = sequences.inputs("padding and documents")
    model = BY_NAME["delta_net_gated"].build()
    output, wanted = sequence_parallel(model, **given), model(**given)
    torch.testing.assert_close(output.loss, wanted.loss)
    torch.testing.assert_close(output.logits, wanted.logits)
    with torch.no_grad():  # without labels, for a head or a backbone
        hidden = sequence_parallel(model.model, given["input_ids"]).last_hidden_state
    torch.testing.assert_close(hidden, model.model(given["input_ids"]).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("gla_plain", 4, "num_attention_heads = 2"),
        ("delta_net_hybrid_both", 4, "num_key_value_heads = 2"),
        ("lam_plain", 16, "num_attention_heads = 2"),
        ("based_plain", 2, "lalm_based has no tensor parallel plan"),
        ("local_global_plain", 2, "lalm_local_global has no tensor parallel plan"),
    ],
)
def test_tensor_parallel_refuses(name, size, reason):
    with pytest.raises(ValueError, match=reason):
        check_tensor_parallel(BY_NAME[name].config(), size)
