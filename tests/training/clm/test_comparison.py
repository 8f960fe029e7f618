"""An evaluation alone: quality, memory and speed of several models in one table."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, MambaConfig

import run_clm
from lalm.errors import UserError
from lalm.training.clm.comparison import bits_per_byte, measured_ids, size
from lalm.training.clm.decoding import COST_KEYS, inference_cost
from lalm.training.clm.packing import PackedDataset, TokenStream
from lalm.training.clm.peak_memory import PeakMemory

pytestmark = pytest.mark.slow


def test_two_models_in_one_table(tiny_run, texts, tmp_path, capsys):
    trained = {
        name: tiny_run("--do_train", "--do_eval", model_type=name, output=name) for name in ("llama", "lalm_gla")
    }
    assert not set(COST_KEYS) & set(trained["llama"]), "a run that trains is not slowed down"
    capsys.readouterr()
    argv = ["--do_eval", "--do_test", "--validation_file", str(texts["validation"]), "--test_file", str(texts["test"])]
    argv += ["--document_boundary", "row", "--block_size", "24", "--measure_tokens", "40", "--disable_tqdm", "true"]
    argv += ["--model_name_or_path", str(tmp_path / "llama"), "--output_dir", str(tmp_path / "scores")]
    results = run_clm.main([*argv, "--compare_with", str(tmp_path / "lalm_gla")])
    rows = json.loads((tmp_path / "scores" / "comparison.json").read_text(encoding="utf-8"))
    assert len(rows) == 2
    for name, row in ((name, rows[str(tmp_path / name)]) for name in trained):
        assert row["model_type"] == name
        assert row["eval_loss"] == pytest.approx(trained[name]["eval_loss"], rel=1e-6)
        assert row["eval_bits_per_byte"] == pytest.approx(trained[name]["eval_bits_per_byte"], rel=1e-6)
        assert min(row[key] for key in COST_KEYS) > 0
        assert row["context"] == 40
    ours, llama = rows[str(tmp_path / "lalm_gla")], rows[str(tmp_path / "llama")]
    assert (llama["cache_bytes"], ours["cache_bytes"]) == (4 * 2 * 2 * 16 * 40, 4 * 2 * 2 * 4 * 8)
    assert results == {key: value for key, value in llama.items() if key not in ("model", "model_type")}
    table = (tmp_path / "scores" / "comparison.md").read_text(encoding="utf-8")
    assert f"| `lalm_gla` | {ours['parameters'] / 1e6:.3g}M | {ours['eval_perplexity']:.2f} |" in table
    assert table in capsys.readouterr().out
    card = (tmp_path / "scores" / "README.md").read_text(encoding="utf-8")
    assert "Nothing was trained." in card
    assert "cache per sequence: 10.2 kB (40 tokens)" in card
    entries = {entry.metric_type: entry.metric_value for entry in ModelCard(card).data.eval_results}
    assert {key: entries[key] for key in ("cache_bytes", "peak_memory_bytes", "decode_tokens_per_second")} == {
        key: llama[key] for key in ("cache_bytes", "peak_memory_bytes", "decode_tokens_per_second")
    }
    with pytest.raises(UserError, match="holds a run, whose figures would be overwritten"):
        run_clm.main([*argv[:-1], str(tmp_path / "lalm_gla")])


@pytest.mark.parametrize("flags", [("--do_train", "--model_name_or_path", "x"), ("--do_eval",)])
def test_what_is_compared_is_not_trained(flags):
    with pytest.raises(UserError, match="--compare_with needs --model_name_or_path, and --do_eval or --do_test"):
        run_clm.main(["--compare_with", "y", *flags])


def test_a_model_with_another_name_for_its_cache():
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 61,
        "state_size": 4,
        "conv_kernel": 4,
        "expand": 2,
    }
    model = AutoModelForCausalLM.from_config(MambaConfig(**sizes)).eval()
    figures = inference_cost(model, torch.randint(61, (1, 12)))
    assert figures["cache_bytes"] == 2 * 4 * 32 * (4 + 4)
    assert figures["decode_tokens_per_second"] > 0


def test_the_peak_counts_freed_memory_again():
    for _ in range(2):
        with PeakMemory(torch.device("cpu")) as peak:
            torch.ones(2**24).sum()  # 64 MiB
        assert peak.rise is None or 0.9 < peak.rise / 2**26 < 1.5


def packed(tokens):
    starts = np.zeros(len(tokens), dtype=bool)
    return PackedDataset(TokenStream(np.array(tokens, dtype=np.int32), starts), 4, 4, False)


def test_bits_per_byte_do_not_depend_on_the_tokens():
    class Letters:
        def decode(self, ids, skip_special_tokens):
            return "ab" * len(ids)

    # nats of a token of two bytes, uniform over 256 ** 2
    assert bits_per_byte(math.log(2**16), packed([0] * 8), Letters()) == pytest.approx(8)


def test_the_tokens_that_are_read_fit_the_positions():
    class Config:
        max_position_embeddings = 48

    ids = measured_ids(packed([3, 1, 4, 1, 5]), Config(), 100)
    assert ids.tolist() == [[3, 1, 4, 1, 5, 3, 1, 4, 1, 5, 3, 1, 4, 1, 5, 3]]


def test_sizes_are_written_in_their_unit():
    assert [size(count) for count in (12, 8192, 1.05e6, 24.5e6, 1.2e9)] == [
        "12 B",
        "8.19 kB",
        "1.05 MB",
        "24.5 MB",
        "1.2 GB",
    ]
