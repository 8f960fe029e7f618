"""Tokenizers: trained on the spot, and loaded from bare GPT-2 files."""

import json

import pytest

from lalm.errors import UserError
from lalm.training.clm.arguments import ModelArguments
from lalm.training.clm.tokenizer import END_OF_TEXT, make_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 20


def test_a_trained_tokenizer_round_trips_any_text(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    assert 258 <= len(tokenizer) <= 300
    for text in ("the cat", "Ünïcode ☃ 漢字\n\ttabs", "  spaces  ", "never seen: qzx!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat") / 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    tokenizer.save_pretrained(tmp_path)
    again = make_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)), None)
    assert again("the dog ☃")["input_ids"] == tokenizer("the dog ☃")["input_ids"]
    assert again.eos_token_id == 0


def test_training_is_deterministic():
    assert train_tokenizer(TEXTS, 300).get_vocab() == train_tokenizer(iter(TEXTS), 300).get_vocab()


def test_a_folder_with_only_gpt2_files_loads(tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th", "the", END_OF_TEXT])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    tokenizer = make_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)), None)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"]) == ["the"]
    assert tokenizer.eos_token_id == vocabulary[END_OF_TEXT]
    assert tokenizer.pad_token_id is None
    assert len(tokenizer) == len(vocabulary)


def test_messages(tmp_path):
    with pytest.raises(UserError, match="--tokenizer_name: cannot load a tokenizer from"):
        make_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)), None)
    with pytest.raises(UserError, match="no training text to train a tokenizer on"):
        make_tokenizer(ModelArguments(), None)
