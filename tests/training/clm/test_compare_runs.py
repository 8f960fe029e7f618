"""Several runs in one picture and one table."""

import json
import sys

import pytest

from lalm.errors import UserError
from lalm.training.clm.compare_runs import main


def write_run(folder, model_type, losses):
    folder.mkdir()
    log = [{"step": 20 * i, "loss": loss} for i, loss in enumerate(losses, start=1)] + [{"step": 60, "eval_loss": 2.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "all_results.json").write_text(json.dumps({"test_perplexity": 12.34, "tokens_per_second": 1234.5}))
    return str(folder)


def test_picture_and_table(tmp_path, capsys):
    runs = [write_run(tmp_path / name, f"lalm_{name}", [3.0, 2.5, 2.25]) for name in ("gla", "retnet")]
    picture = tmp_path / "curves.png"
    main([*runs, "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| gla | `lalm_gla` | 3.000 | 2.250 | 12.3 | 1,234 |" in printed
    assert "`lalm_retnet`" in printed


def test_the_table_needs_no_matplotlib(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([write_run(tmp_path / "gla", "lalm_gla", [3.0, 2.5]), "--output", str(tmp_path / "curves.png")])
    assert "| gla | `lalm_gla` | 3.000 | 2.500 |" in capsys.readouterr().out
    assert "no loss curve is drawn (pip install 'lalm[plot]')" in caplog.text


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        main([str(tmp_path / "nothing")])
