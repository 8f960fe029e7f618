"""What a document is, and how documents become one stream of tokens."""

from itertools import pairwise

import pytest
from datasets import Dataset

from lalm.training.clm.arguments import DataArguments
from lalm.training.clm.documents import ARTICLE_HEADING, resolve_boundary, split_pieces
from lalm.training.clm.packing import TokenStream
from lalm.training.clm.tokenizer import train_tokenizer
from lalm.training.text_rows import SplitRows

WIKI = [
    " \n",
    " = First = \n",
    " \n",
    " Some text . \n",
    " = not a heading = \n",
    " \n",
    " = = Section = = \n",
    " \n",
    " More text . \n",
    " \n",
    " = Second = \n",
    " \n",
    " The end . \n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WIKI, 300)


def documents(tokenizer, parts, boundary, is_text_file=True, packing="documents"):
    """Run rows through the pipeline and decode the documents again, with their special tokens."""
    rows = SplitRows([Dataset.from_dict({"text": part}) for part in parts], is_text_file, "test")
    data = DataArguments(document_boundary=boundary, packing=packing)
    stream = TokenStream.from_pieces(split_pieces(rows, tokenizer, data))
    ends = [*stream.starts.nonzero()[0], len(stream.tokens)]
    return [tokenizer.decode(stream.tokens[a:b]) for a, b in pairwise(ends)]


def wrapped(*texts):
    return [f"<|endoftext|>{text}<|endoftext|>" for text in texts]


def test_articles_begin_at_top_level_headings_between_blank_lines(tokenizer):
    first = " = First = \n Some text . \n = not a heading = \n = = Section = = \n More text . \n"
    assert documents(tokenizer, [WIKI], "article") == wrapped(first, " = Second = \n The end . \n")


def test_articles_are_the_same_from_the_hub(tokenizer):
    """The Hub's WikiText has '' where the files have ' \\n'."""
    hub = ["" if not line.strip() else line for line in WIKI]
    assert documents(tokenizer, [hub], "article", False) == documents(tokenizer, [WIKI], "article")


def test_rows_paragraphs_and_files(tokenizer):
    lines = ["a b\n", "c\n", "\n", "d\n"]
    assert documents(tokenizer, [lines], "row") == wrapped("a b", "c", "d")
    assert documents(tokenizer, [lines], "paragraph") == wrapped("a b\nc\n", "d\n")
    assert documents(tokenizer, [lines, ["e"]], "file") == wrapped("a b\nc\n\nd\n", "e\n")
    assert documents(tokenizer, [lines, ["e"]], "paragraph") == wrapped("a b\nc\n", "d\n", "e\n")


def test_records_keep_their_line_breaks(tokenizer):
    assert documents(tokenizer, [["a\n\nb\n", "", None, "c"]], "row", False) == wrapped("a\n\nb\n", "c")


def test_concatenated_text_has_one_separator_between_documents(tokenizer):
    assert documents(tokenizer, [["a\n", "b\n"]], "row", packing="concat") == ["a<|endoftext|>", "b<|endoftext|>"]


def test_auto_boundary():
    assert resolve_boundary(DataArguments(), SplitRows([], True, "")) == "file"
    assert resolve_boundary(DataArguments(), SplitRows([], False, "")) == "row"
    assert resolve_boundary(DataArguments(document_boundary="article"), SplitRows([], False, "")) == "article"


@pytest.mark.parametrize(
    ("line", "is_heading"),
    [
        (" = Robert <unk> = \n", True),
        (" = X = Y = \n", True),
        (" = = Career = = \n", False),
        (" = = = Early = = = \n", False),
        (" = \n", False),
        (" a = b \n", False),
        ("= Title =", True),
    ],
)
def test_headings(line, is_heading):
    assert bool(ARTICLE_HEADING.match(line)) == is_heading
