"""A tiny BERT teacher with a tokenizer of its own and a LAM student of it, as sentence transformers."""

import random
import tempfile

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lalm.modeling.modeling_lam import LamModel

VOCABULARY = (
    "a the man woman child dog cat bird is are was plays eats reads runs sings near under over red blue small big "
    "guitar book tree house river song ball market slowly loudly today never two three people kitchen garden"
)
WORDS = VOCABULARY.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Different random sentences of 3 words and more."""
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(source.choices(WORDS, k=source.randint(3, longest)))] = None
    return list(found)


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """WordPiece over `words`, with [CLS] and [SEP] around every text."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)


def sentence_transformer(model, words: list[str] = WORDS) -> SentenceTransformer:
    """A model with mean pooling and unit length, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer(words).save_pretrained(folder)
        encoder = Transformer(folder)
    size = encoder.get_embedding_dimension()
    return SentenceTransformer(modules=[encoder, Pooling(size, "mean"), Normalize()], device="cpu")


def bert(width: int = 32, layers: int = 2, words: list[str] = WORDS) -> BertModel:
    config = BertConfig(
        vocab_size=len(words) + len(SPECIAL), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(width + layers)
    return BertModel(config).eval()


def teacher(width: int = 32, layers: int = 2, words: list[str] = WORDS) -> SentenceTransformer:
    return sentence_transformer(bert(width, layers, words), words)


def student() -> SentenceTransformer:
    """LAM with the weights of `teacher()`."""
    model = bert()
    return sentence_transformer(LamModel.from_softmax_encoder(model))
