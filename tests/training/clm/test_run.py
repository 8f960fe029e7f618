"""The whole script: trajectories through the command line, results, model card, every kind of model and data."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lalm.errors import UserError
from lalm.training.clm.arguments import parse_arguments
from lalm.training.clm.model_builder import new_config, our_model_types
from tests.training.conftest import TINY_MODELS

pytestmark = pytest.mark.slow

MODEL_TYPES = list(TINY_MODELS)
TRAIN_ONLY = ("--do_train",)


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_batch_of_4_is_4_accumulated_batches_of_1(tiny_run, tmp_path, model_type):
    """Blocks score unequal numbers of tokens, so a mean of means would show here."""
    tiny_run(*TRAIN_ONLY, model_type=model_type, output="batch")
    accumulated = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")
    tiny_run(*TRAIN_ONLY, *accumulated, model_type=model_type, output="accumulated")
    one, four = losses(tmp_path / "batch"), losses(tmp_path / "accumulated")
    assert list(one) == [1, 2, 3, 4]
    assert one == pytest.approx(four, rel=2e-5)
    for name, weight in weights(tmp_path / "batch").items():
        torch.testing.assert_close(weight, weights(tmp_path / "accumulated")[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_resumed_run_equals_a_straight_one(tiny_run, tmp_path, model_type):
    flags = (*TRAIN_ONLY, "--save_steps", "2", "--seed", "5")
    straight = tiny_run(*flags, model_type=model_type, output="straight")
    # what an interruption after step 3 leaves behind
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "straight" / "run.json", tmp_path / "resumed")
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = tiny_run(*flags, model_type=model_type, output="resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert resumed["tokens_seen"] == straight["tokens_seen"] == 4 * 4 * 24
    for name, weight in weights(tmp_path / "straight").items():
        assert torch.equal(weight, weights(tmp_path / "resumed")[name]), name


def test_every_variant_is_trained_here():
    assert set(our_model_types()) <= set(TINY_MODELS)


@pytest.mark.parametrize("model_type", our_model_types())
def test_a_type_without_sizes_is_small(model_type, tmp_path):
    """`run_clm.py --model_type <each>` alone must suit a laptop."""
    arguments, _, _ = parse_arguments(["--model_type", model_type, "--output_dir", str(tmp_path)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(new_config(arguments, tokenizer, block_size=128))
    assert model.config.model_type == model_type
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 3_000_000


def test_results_card_and_curve(tiny_run, texts, tmp_path, capsys):
    flags = ("--do_train", "--do_eval", "--do_test", "--test_file", str(texts["test"]), "--eval_on_start")
    results = tiny_run(*flags, "--max_steps", "12", "--learning_rate", "1e-2", "--eval_stride", "12", "--seed", "3")
    folder = tmp_path / "run"
    assert results["eval_perplexity"] < 0.8 * results["before_perplexity"]
    assert results["before_perplexity"] == pytest.approx(300, rel=0.2), "an untrained model is nearly uniform"
    assert math.log(results["test_perplexity"]) == pytest.approx(results["test_loss"])
    assert json.loads((folder / "all_results.json").read_text(encoding="utf-8")) == results
    for name in ("train", "eval", "test"):
        assert (folder / f"{name}_results.json").is_file()
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for expected in (
        "trained from scratch",
        f"| test | {results['test_perplexity']:.2f} |",
        f"| validation, before training | {results['before_perplexity']:.2f} |",
        "windows of 24 tokens and stride 12",
        "--model_type llama",
        "train.txt: 60 documents (row)",
        "seed: 3",
        f"tokens seen: {results['tokens_seen']:,}",
        "Hardware: ",
    ):
        assert expected in card, expected
    assert "fine-tuned" not in card
    assert "trust_remote_code" not in card
    output = capsys.readouterr().out
    assert f"(before training {results['before_perplexity']:.2f})" in output
    assert "tokens/s" in output


def test_the_log_tells_speed_and_time_left(tiny_run, tmp_path):
    tiny_run(*TRAIN_ONLY)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    lines = [entry for entry in history if "loss" in entry]
    assert len(lines) == 4
    assert all(entry["tokens_per_second"] > 0 and entry["eta_minutes"] >= 0 for entry in lines)
    assert lines[-1]["eta_minutes"] == 0


def test_wsd_decays_over_the_last_part(tiny_run, tmp_path):
    tiny_run(
        *TRAIN_ONLY, "--max_steps", "10", "--decay_ratio", "0.3", "--warmup_steps", "2", "--learning_rate", "1e-3"
    )
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates[:2] == [0, 5e-4]
    assert rates[2:8] == [1e-3] * 6
    assert 0 < rates[9] < rates[8] < 1e-3


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_checkpoint_trains_on_and_is_evaluated_alone(tiny_run, tmp_path, model_type):
    first = tiny_run("--do_train", "--do_eval", model_type=model_type)
    base = ["--train_file", str(tmp_path / "train.txt"), "--validation_file", str(tmp_path / "validation.txt")]
    base += ["--document_boundary", "row", "--block_size", "24", "--disable_tqdm", "true", "--trust_remote_code"]
    base += ["--model_name_or_path", str(tmp_path / "run"), "--model_type", model_type]
    import run_clm

    again = run_clm.main([*base, "--do_eval", "--output_dir", str(tmp_path / "evaluated")])
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert not (tmp_path / "evaluated" / "model.safetensors").exists()
    further = run_clm.main([*base, "--output_dir", str(tmp_path / "further"), "--max_steps", "4"])
    assert further["eval_loss"] < first["eval_loss"]
    card = (tmp_path / "further" / "README.md").read_text(encoding="utf-8")
    assert f"trained further from `{tmp_path / 'run'}`" in card
    assert ("trust_remote_code=True" in card) == model_type.startswith("lalm_")


@pytest.mark.parametrize("flags", [("--packing", "concat"), ("--streaming",), ("--bf16",)])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_other_ways_to_train(tiny_run, model_type, flags):
    results = tiny_run("--do_train", "--do_eval", *flags, model_type=model_type)
    assert results["eval_perplexity"] < 300
    assert results["steps"] == 4


def test_streaming_trains_on_the_mapped_tokens(tiny_run, tmp_path):
    """One pass without shuffling differs from the mapped run in order only; the tokens seen are the same."""
    mapped = tiny_run(*TRAIN_ONLY, output="mapped")
    streamed = tiny_run(*TRAIN_ONLY, "--streaming", output="streamed")
    assert streamed["tokens_seen"] == mapped["tokens_seen"]
    assert streamed["final_loss"] == pytest.approx(mapped["final_loss"], rel=0.1)


@pytest.mark.parametrize(
    ("step", "flags"),
    [(2, ()), (4, ()), (6, ("--gradient_accumulation_steps", "2")), (4, ("--dataloader_num_workers", "2"))],
)
def test_a_resumed_stream_equals_a_straight_one(tiny_run, tmp_path, step, flags):
    """In its first pass or a later one; a pass of 9 blocks ends within a batch of 4, and within an accumulation."""
    flags = (*TRAIN_ONLY, "--streaming", "--max_train_samples", "9", "--max_steps", "10", "--save_steps", "2", *flags)
    tiny_run(*flags, "--save_total_limit", "5", output="straight")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "straight" / "run.json", tmp_path / "resumed")
    name = f"checkpoint-{step}"
    shutil.copytree(tmp_path / "straight" / name, tmp_path / "resumed" / name)
    tiny_run(*flags, output="resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert set(losses(tmp_path / "resumed")) == set(range(1, 11))
    for name, weight in weights(tmp_path / "straight").items():
        assert torch.equal(weight, weights(tmp_path / "resumed")[name]), name


def test_a_stream_is_read_no_further_than_it_must_be(tiny_run, texts, caplog, monkeypatch):
    """The text for a tokenizer and the validation text are samples from the beginning, and both are told."""
    monkeypatch.setattr("lalm.training.clm.data.STREAM_SAMPLE", 100)
    monkeypatch.setattr("lalm.training.clm.arguments.STREAMED_EVAL_SAMPLES", 2)
    monkeypatch.setattr("lalm.training.clm.data.PROGRESS_SECONDS", 0)
    results = tiny_run("--do_train", "--do_eval", "--streaming")
    rows = texts["train"].read_text(encoding="utf-8").splitlines(keepends=True)
    count = next(n for n in range(len(rows)) if len("".join(rows[:n])) >= 100)
    assert f"tokens on the first {count} rows (100 characters) of the training text" in caplog.text
    assert results["eval_tokens_scored"] <= 2 * 24
    assert "validation: reading validation.txt" in caplog.text
    assert re.search(r"validation: \d+ tokens read so far", caplog.text)
    assert "only the first 2 blocks are used" in caplog.text


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_a_stream_has_no_epochs(tiny_run, name):
    with pytest.raises(UserError, match=f"--{name} epoch: --streaming does not know where an epoch ends; use steps"):
        tiny_run("--do_train", "--streaming", f"--{name}", "epoch")


def test_saved_tokenizer_and_special_tokens_fit_the_model(tiny_run, tmp_path):
    tiny_run(*TRAIN_ONLY, "--config_overrides", TINY_MODELS["llama"] + ",vocab_size=320")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == 320
    assert len(tokenizer) <= 300
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(model.config, name) for name in ids] == [0, 0, 1]
    assert model.generation_config.eos_token_id in (0, [0])  # a list up to transformers 5.20


def test_gates_are_logged(tiny_run, tmp_path, caplog):
    tiny_run("--gate_logging_steps", "2", model_type="lalm_gla")
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    logged = {entry["step"]: entry for entry in state["log_history"] if "gates_1/half_life" in entry}
    assert sorted(logged) == [2, 4]
    assert 8 < logged[4]["gates_0/half_life"] < 30
    with pytest.raises(UserError, match="--gate_logging_steps needs one of lalm's models, LlamaForCausalLM is none"):
        tiny_run("--gate_logging_steps", "2", output="llama")
