"""Curricula and mixtures of blocks, and the number of tokens in an update."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset

from lalm.errors import UserError
from lalm.training.clm.arguments import parse_arguments
from lalm.training.clm.block_order import BlockOrder, DecomposedBlocks, PhasedBlocks, binary_pieces
from lalm.training.clm.packing import PackedDataset, PackingCollator, TokenStream

pytestmark = pytest.mark.slow

START = (0, 1000)


def stream_of(lengths):
    """Tokens 0, 1, 2 ... in documents of some lengths."""
    starts = np.zeros(sum(lengths), dtype=bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    return TokenStream(np.arange(sum(lengths), dtype=np.int32), starts)


def test_a_document_is_cut_along_its_binary_expansion():
    assert binary_pieces(0b1011010, 2, 64) == [64, 16, 8, 2]
    assert binary_pieces(0b1011010, 16, 32) == [32, 32, 16], "what is below the shortest is dropped"


def test_blocks_hold_pieces_of_one_length_of_single_documents():
    lengths = np.random.default_rng(0).integers(1, 200, 200).tolist()
    stream = stream_of(lengths)
    document = np.cumsum(stream.starts) - 1
    blocks = DecomposedBlocks(stream, 64, seed=0)
    assert set(blocks.kinds) == {2, 4, 8, 16, 32, 64}
    seen = []
    for index in range(len(blocks)):
        item = blocks[index]
        assert len(item["input_ids"]) == 64
        for piece in item["input_ids"].reshape(-1, blocks.kinds[index]):
            assert (np.diff(piece) == 1).all()
            assert len(set(document[piece])) == 1
        assert item["starts"].sum() == 64 // blocks.kinds[index]
        assert (item["scored"] == ~item["starts"]).all()
        seen += item["input_ids"].tolist()
    assert len(set(seen)) == len(seen)
    whole = sum(sum(binary_pieces(length, 2, 64)) for length in lengths)
    assert whole - 64 * 6 < len(seen) <= whole
    with pytest.raises(UserError, match="--block_size is 48; --curriculum grow_p2 needs a power of two"):
        DecomposedBlocks(stream, 48, seed=0)


def test_grow_p2_draws_whole_batches_and_grows():
    blocks = DecomposedBlocks(stream_of([127] * 400), 64, seed=0)
    order = BlockOrder(blocks, 4, lambda: START, seed=0, cycles=2)
    indices = list(order)
    assert len(indices) == len(order) == len(set(indices))
    lengths = blocks.kinds[indices].reshape(-1, 4)
    assert (lengths == lengths[:, :1]).all(), "a batch has pieces of one length"
    halves = np.array_split(lengths[:, 0], 2)
    for cycle in halves:
        assert np.median(cycle[: len(cycle) // 4]) < np.median(cycle[-len(cycle) // 4 :])
    assert list(order) == indices
    assert list(BlockOrder(blocks, 4, lambda: (1, 1000), seed=0, cycles=2)) != indices


def test_a_phase_is_a_run_in_shorter_blocks():
    """The tokens, labels and positions of a phase are those of packing in blocks of its length."""
    stream = stream_of([5, 30, 9, 40, 12])
    phased = PhasedBlocks(PackedDataset(stream, 32), [8, 16, 32])
    for phase, length in enumerate((8, 16, 32)):
        keys = [phase * len(phased) + index for index in range(len(phased))]
        long = PackingCollator(32, 0)([phased[key] for key in keys])
        short = PackedDataset(stream, length)
        expected = PackingCollator(length, 0)([short[index] for index in range(96 // length)])
        for name in ("input_ids", "labels", "position_ids"):
            assert long[name].flatten().tolist() == expected[name].flatten().tolist(), (phase, name)


def test_phases_take_their_shares_of_the_run():
    phased = PhasedBlocks(PackedDataset(stream_of([640]), 32), [8, 16, 32])
    phases = []
    for epoch in range(3):  # of 20 blocks, 10 batches each
        order = BlockOrder(phased, 2, lambda epoch=epoch: (epoch, 30), seed=0, phase_ends=[0.5, 0.7, 1.0])
        phases += [key // 20 for key in order]
    assert phases == [0] * 30 + [1] * 12 + [2] * 18


def test_parts_are_mixed_by_their_shares():
    parts = ConcatDataset([PackedDataset(stream_of([32 * count]), 32) for count in (300, 100)])
    order = np.array(list(BlockOrder(parts, 4, lambda: START, seed=0, shares=[0.25, 0.75])))
    assert len(order) == 400
    assert 0.67 < (order >= 300).mean() < 0.83
    second = order[order >= 300]
    assert len(set(second[:100])) == 100, "a part is read whole before it begins anew"


FLAGS = {
    "grow_p2": ("--curriculum", "grow_p2", "--curriculum_cycles", "2"),
    "phases": ("--curriculum", "phases", "--phase_lengths", "4", "16", "--phase_shares", "0.5", "0.5"),
    "mixture": ("--train_shares", "0.3", "0.7"),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_a_resumed_curriculum_equals_a_straight_one(tiny_run, texts, tmp_path, kind):
    """Over the end of an epoch too: with blocks of 16 tokens there are about 12 steps in one."""
    files = ("--train_file", str(texts["train"]), str(texts["test"])) if kind == "mixture" else ()
    flags = ("--do_train", "--block_size", "16", "--max_steps", "16", "--save_steps", "7", *FLAGS[kind], *files)
    straight = tiny_run(*flags, "--save_total_limit", "5", output="straight")
    assert straight["tokens_seen"] == 16 * 4 * 16
    for step in (7, 14):
        folder = tmp_path / f"resumed-{step}"
        folder.mkdir()
        shutil.copy(tmp_path / "straight" / "run.json", folder)
        shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        tiny_run(*flags, output=folder.name)
        for name, weight in load_file(tmp_path / "straight" / "model.safetensors").items():
            assert torch.equal(weight, load_file(folder / "model.safetensors")[name]), (step, name)
    record = json.loads((tmp_path / "straight" / "run.json").read_text(encoding="utf-8"))
    assert record["text"]


def test_tokens_of_an_update():
    flags = ["--block_size", "128", "--per_device_train_batch_size", "4", "--tokens_per_update"]
    assert parse_arguments([*flags, "524288"])[2].gradient_accumulation_steps == 1024
    assert parse_arguments([*flags, "1000"])[2].gradient_accumulation_steps == 2, "rounded up"
    with pytest.raises(UserError, match=r"500 is below one batch, which has 4 blocks of 128 tokens \(512\); lower"):
        parse_arguments([*flags, "500"])
    with pytest.raises(UserError, match="--gradient_accumulation_steps 3 contradicts --tokens_per_update.*asks for 2"):
        parse_arguments([*flags, "1000", "--gradient_accumulation_steps", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--curriculum", "grow"], "--curriculum is 'grow'; choose one of none, grow_p2, phases"),
        (
            ["--curriculum", "phases", "--phase_lengths", "8", "512"],
            "--phase_lengths 8 512 must lie in 2 ..",
        ),
        (["--phase_lengths", "8", "512"], "need --curriculum phases"),
        (["--curriculum", "phases", "--phase_shares", "0.5", "0.6"], "has 2 numbers for 3 --phase_lengths"),
        (["--train_file", "a", "b", "--train_shares", "0.5", "0.6"], "must be above 0 and sum to 1; their sum is 1.1"),
        (["--train_shares", "1"], "--train_shares has 1 numbers for 0 --train_file"),
        (["--curriculum", "grow_p2", "--packing", "concat"], "cuts documents and needs --packing documents"),
        (["--curriculum", "grow_p2", "--streaming"], "--streaming makes blocks while training"),
        (["--curriculum", "phases", "--streaming"], "--streaming makes blocks while training"),
        (["--curriculum", "grow_p2", "--max_train_samples", "3"], "--max_train_samples has no meaning with"),
    ],
)
def test_contradictions(flags, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(flags)
