"""Documents and their queries: what is drawn of an article, what is left out, and the loss with its queue."""

import json
import random

import pytest
import torch
from torch.nn import functional as F

from lalm.errors import UserError
from lalm.training.sts.documents import DocumentLoss, document_row, load_documents, titles_in

BODY = " ".join(f"Sentence number {n} says one of several things about topic {n}." for n in range(200))


class Table(torch.nn.Module):
    """A sentence transformer whose vectors are the rows of a table."""

    def __init__(self, rows: int = 8, size: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(rows, size))

    def forward(self, features):
        return {"sentence_embedding": self.weight[features["input_ids"]]}


def columns(*rows: list[int]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor(row)} for row in rows]


def test_a_document_is_cut_and_its_queries_come_from_what_is_left():
    for seed in range(20):
        row = document_row("Title", BODY, 512, random.Random(seed))
        text = row["document"]
        assert BODY.startswith(text)
        assert 256 * 4.5 - 1 <= len(text) <= 512 * 4.5
        assert row["title"] == "Title"
        assert row["late"] != row["later"]
        for name in ("late", "later"):
            assert text.index(row[name]) > len(text) // 2
        assert row["random"] in text
        assert all(row[name].endswith(".") for name in ("late", "later", "random"))
    assert document_row("Title", "No sentence here " * 200, 512, random.Random(0)) is None


def test_held_out_and_short_articles_are_left_out(tmp_path):
    rows = [("Kept", BODY), ("Held out!", BODY), ("Short", BODY[:300]), ("Also kept", "Also kept\n\n" + BODY)]
    path, titles = tmp_path / "articles.jsonl", tmp_path / "titles.txt"
    path.write_text("\n".join(json.dumps({"title": title, "text": text}) for title, text in rows), encoding="utf-8")
    titles.write_text("held OUT\n\n", encoding="utf-8")
    found = load_documents([str(path)], titles_in([str(titles)]), 512, seed=0)
    assert found["title"] == ["Kept", "Also kept"]
    assert found["label"] == [0, 1]
    assert found["document"][1].startswith("Sentence number 0")
    assert found[:] == load_documents([str(path)], {"Held out"}, 512, seed=0)[:]
    with pytest.raises(UserError, match="no article of 400 words is left"):
        load_documents([str(path)], {"Kept", "Held out", "Also kept"}, 512, seed=0)
    with pytest.raises(UserError, match="--held_out_file"):
        titles_in([str(tmp_path / "absent.txt")])


def test_earlier_documents_are_negatives_but_not_the_same_one():
    model = Table()
    loss = DocumentLoss(model, memory=3, scale=2.0)
    unit = F.normalize(model.weight, dim=-1)

    def expected(query, candidates):
        return F.cross_entropy(2 * unit[query] @ unit[candidates].T, torch.arange(len(query)))

    first = loss(columns([0, 1], [2, 3], [4, 5]), torch.tensor([10, 11]))["document"]
    torch.testing.assert_close(first, (expected([2, 3], [0, 1]) + expected([4, 5], [0, 1])) / 2)
    # document 10 comes again, as row 6 of the table: its remembered vector, row 0, is no negative of it
    second = loss(columns([6, 7], [2, 3]), torch.tensor([10, 12]))["document"]
    by_row = [expected([2], [6, 7, 1]), F.cross_entropy(2 * unit[[3]] @ unit[[6, 7, 0, 1]].T, torch.tensor([1]))]
    torch.testing.assert_close(second, torch.stack(by_row).mean())
    # the newest three are kept, without gradients
    kept, numbers = loss.remembered[0]
    assert numbers.tolist() == [10, 12, 10]
    assert not kept.requires_grad
    torch.testing.assert_close(kept, unit[[6, 7, 0]].detach())
    second.backward()
    assert model.weight.grad[6].abs().sum() > 0
    assert model.weight.grad[0].abs().sum() == 0
    loss.eval()(columns([2], [3]), torch.tensor([5]))
    assert loss.remembered[0][1].tolist() == [10, 12, 10]
