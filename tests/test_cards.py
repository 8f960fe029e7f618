"""The metadata of the cards in this repository can be read, and their figures are those of the text."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import lalm

ROOT = Path(__file__).parents[1]
CARDS = sorted([*(ROOT / "model_cards").glob("*.md"), *(ROOT / "checkpoints").glob("*/README.md")])


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_has_metadata_with_the_figures_of_its_text(path):
    card = ModelCard(path.read_text(encoding="utf-8"))
    data = card.data
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert data.library_name in ("transformers", "sentence-transformers")
    assert {"lalm", "linear-attention"} <= set(data.tags)
    types = {row.config.model_type for row in lalm.VARIANTS}
    assert types & set(data.tags) or path.stem == "README"
    assert data.datasets or data.base_model
    assert data.eval_results
    for result in data.eval_results:
        written = rf"(?<![\d.]){re.escape(f'{result.metric_value:g}')}0?(?!\d)"
        assert re.search(written, card.text), f"{result.metric_type} {result.metric_value} is not in the text"
        assert result.dataset_split in ("validation", "test")


def test_every_type_has_a_card():
    told = {tag for path in CARDS for tag in ModelCard(path.read_text(encoding="utf-8")).data.tags}
    assert {row.config.model_type for row in lalm.VARIANTS} <= told
