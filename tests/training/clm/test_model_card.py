# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a card says of the command that made a model."""

import pytest

from lalm.training.run_facts import command_line

SPELLINGS = ("--token", "--hub_token", "--hub-token")


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("joined", [True, False], ids=["=", "space"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_no_secret_is_in_it(name, joined, place):
    secret = [f"{name}=hf_secret"] if joined else [name, "hf_secret"]
    rest = ["--push_to_hub", "--seed", "3"]
    text = command_line([*secret, *rest] if place == "first" else [*rest, *secret], "run_clm.py")
    assert "hf_secret" not in text
    assert f"{name}=..." in text or f"{name} ..." in text
    assert "--push_to_hub --seed 3" in text
