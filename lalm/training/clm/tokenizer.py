# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer of a run: loaded from a folder or the Hub, or trained on the training text."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lalm.errors import UserError, refusal
from lalm.training.clm.arguments import ModelArguments

logger = logging.getLogger(__name__)

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
# characters of a stream that its tokenizer is trained on; a stream may have no end
STREAM_SAMPLE = 5_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (any text round-trips, no unknown token).

    ``<|endoftext|>`` (id 0) begins and ends a document, ``<|padding|>`` (id 1) is apart, so that a frozen padding row
    or a loss that ignores padding never touches it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def is_bare_gpt2_folder(name: str) -> bool:
    """Tell a folder with GPT-2's two files and no tokenizer config, which AutoTokenizer cannot recognise."""
    folder = Path(name)
    has = {file: (folder / file).is_file() for file in ("vocab.json", "merges.txt")}
    return all(has.values()) and not any(
        (folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "config.json")
    )


def load_tokenizer(name: str, model: ModelArguments) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or Hub name.

    Raises:
        UserError: there is none, or it has no token to end a document with.
    """
    path = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    try:
        if is_bare_gpt2_folder(path):
            tokenizer = GPT2Tokenizer.from_pretrained(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                path,
                revision=model.model_revision if name == model.model_name_or_path else "main",
                token=model.token,
                cache_dir=model.cache_dir,
                trust_remote_code=model.trust_remote_code,
            )
    except Exception as error:
        flag = "--tokenizer_name" if name == model.tokenizer_name else "--model_name_or_path"
        reason = refusal(name, "tokenizer", error)
        raise UserError(f"{flag}: cannot load a tokenizer from '{name}': {reason}") from None
    if tokenizer.eos_token_id is None:
        logger.warning("the tokenizer %s has no end-of-text token: documents are joined without one", name)
    # a missing padding token stays missing: padding with eos would give eos a frozen embedding row in stock models
    # blocks are cut by run_clm.py; a limit here would only warn about long documents
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Iterate over the first texts, the last of them cut, of `limit` characters together."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def make_tokenizer(
    model: ModelArguments, texts: Iterable[str] | None, limit: int | None = None
) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer; `texts` is the training text, read only if a tokenizer has to be trained.

    Args:
        limit: characters of the text to train on, from its beginning; None: all.
    """
    name = model.tokenizer_name or model.model_name_or_path
    if name is not None:
        return load_tokenizer(name, model)
    if texts is None:
        raise UserError("there is no training text to train a tokenizer on; give --tokenizer_name")
    part = ""
    if limit is not None:
        texts = list(first_characters(texts, limit))
        part = f"the first {len(texts):,} rows ({sum(map(len, texts)):,} characters) of "
    tokenizer = train_tokenizer(texts, model.tokenizer_vocab_size)
    logger.info("trained a byte-level BPE tokenizer of %d tokens on %sthe training text", len(tokenizer), part)
    return tokenizer
