"""Blocks: every token once, boundaries respected, labels that no document gives away to the next."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lalm.errors import UserError
from lalm.training.clm.packing import PackedDataset, PackingCollator, StreamingPackedDataset, TokenStream

LENGTHS = [5, 1, 17, 3, 8, 2, 30, 4]
PAD = 99


def pieces(lengths=tuple(LENGTHS)):
    """Documents of the given lengths with tokens 100, 101, ... over the stream, cut into pieces of 4."""
    position = 100
    for length in lengths:
        ids = np.arange(position, position + length, dtype=np.int32)
        for start in range(0, length, 4):
            yield ids[start : start + 4], start == 0
        position += length


@pytest.fixture
def stream():
    return TokenStream.from_pieces(pieces())


def collate(dataset, block_size):
    return PackingCollator(block_size, PAD)([dataset[i] for i in range(len(dataset))])


def document_of(stream):
    return np.cumsum(stream.starts) - 1


def test_no_token_is_lost_or_doubled(stream):
    dataset = PackedDataset(stream, 16)
    batch = collate(dataset, 16)
    tokens = batch["input_ids"].flatten()
    assert tokens[: len(stream.tokens)].tolist() == stream.tokens.tolist()
    assert (tokens[len(stream.tokens) :] == PAD).all()
    assert dataset.tokens_covered == len(stream.tokens) == sum(LENGTHS)


def test_positions_restart_at_documents_and_blocks(stream):
    batch = collate(PackedDataset(stream, 16), 16)
    owner = np.append(document_of(stream), [-1] * 10)
    for row, positions in enumerate(batch["position_ids"].tolist()):
        here = owner[row * 16 : row * 16 + 16]
        expected, count = [], 0
        for column, document in enumerate(here):
            count = 0 if column == 0 or document != here[column - 1] else count + 1
            expected.append(count)
        assert positions == expected


def test_first_tokens_of_documents_and_blocks_carry_no_label(stream):
    dataset = PackedDataset(stream, 16)
    batch = collate(dataset, 16)
    labels, ids = batch["labels"].flatten(), batch["input_ids"].flatten()
    for i in range(len(stream.tokens)):
        unlabelled = stream.starts[i] or i % 16 == 0
        assert labels[i] == (-100 if unlabelled else ids[i])
    assert (labels[len(stream.tokens) :] == -100).all()
    assert dataset.tokens_scored == int((labels != -100).sum())


@pytest.mark.parametrize("stride", [1, 5, 15, 16])
@pytest.mark.parametrize("separate", [True, False])
def test_every_token_is_scored_at_most_once(stream, stride, separate):
    dataset = PackedDataset(stream, 16, stride, separate)
    counts = np.zeros(len(stream.tokens), dtype=int)
    for i in range(len(dataset)):
        item = dataset[i]
        counts[item["input_ids"][item["scored"]] - 100] += 1
        new = 0 if i == 0 else 16 - stride
        assert not item["scored"][:new].any(), "a context token is scored again"
    expected = np.ones_like(counts)
    expected[0] = 0
    if separate:
        expected[stream.starts] = 0
    if stride == 16:
        expected[::16] = 0
    assert counts.tolist() == expected.tolist()
    assert dataset.tokens_scored == counts.sum()


def test_concatenated_blocks_know_no_documents(stream):
    batch = collate(PackedDataset(stream, 16, separate_documents=False), 16)
    assert set(batch) == {"input_ids", "labels"}
    assert (batch["labels"].flatten()[: len(stream.tokens)] == -100).sum() == -(-len(stream.tokens) // 16)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("max_blocks", [None, 3])
def test_streamed_blocks_are_the_mapped_ones(stream, separate, max_blocks):
    mapped = PackedDataset(stream, 16, separate_documents=separate, max_blocks=max_blocks)
    streamed = list(StreamingPackedDataset(lambda turn, share: pieces(), 16, separate, max_blocks).one_pass())
    assert len(streamed) == len(mapped)
    for block, expected in zip(streamed, (mapped[i] for i in range(len(mapped))), strict=True):
        assert block["input_ids"].tolist() == expected["input_ids"].tolist()
        assert block["scored"].tolist() == expected["scored"].tolist()
        assert (block["starts"] is None) == (expected["starts"] is None) == (not separate)


def test_streaming_begins_anew_where_the_text_ends():
    """A block of the next pass follows the last of this one at once, for every worker too."""
    dataset = StreamingPackedDataset(lambda turn, share: pieces(), 16)
    blocks = itertools.islice(dataset, 12)
    assert [int(block["input_ids"][0]) for block in blocks] == [100, 116, 132, 148, 164] * 2 + [100, 116]
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=PackingCollator(16, PAD))
    assert [batch["input_ids"][0, 0].item() for batch in itertools.islice(loader, 6)] == [100, 116, 132, 148, 164, 100]


def test_a_stream_with_nothing_to_score_is_refused():
    with pytest.raises(UserError, match="too short to score one token"):
        next(iter(StreamingPackedDataset(lambda turn, share: pieces((1,)), 16)))


def test_a_tail_without_anything_to_score_is_counted_as_left_out():
    stream = TokenStream.from_pieces(pieces((16, 1)))
    dataset = PackedDataset(stream, 16)
    assert (len(dataset), dataset.tokens_covered, len(stream.tokens)) == (1, 16, 17)
    assert len(PackedDataset(TokenStream.from_pieces([]), 16)) == 0
    assert len(PackedDataset(TokenStream.from_pieces(pieces((1,))), 16)) == 0


def test_max_tokens_stops_reading():
    def endless():
        for i in range(10):
            assert i < 3, "read on after max_tokens"
            yield np.arange(8, dtype=np.int32), i == 0

    assert len(TokenStream.from_pieces(endless(), 20).tokens) == 20


def test_packed_documents_get_the_loss_they_get_alone(stream):
    """With a stock softmax model: boundaries are seen through position_ids alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = LlamaForCausalLM(config).double().eval()
    batch = collate(PackedDataset(stream, 128), 128)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0]
        for document in range(len(LENGTHS)):
            where = np.flatnonzero(document_of(stream) == document)
            alone = model(input_ids=batch["input_ids"][:, where], use_cache=False).logits[0]
            torch.testing.assert_close(logits[where], alone, rtol=1e-9, atol=1e-9)
