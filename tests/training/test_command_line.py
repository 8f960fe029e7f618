"""Mistakes at the command line: one line, exit code 2, no traceback. And the commands as they are typed."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import run_clm
from lalm.errors import exit_on_user_error
from lalm.modeling.linearize import student_config
from lalm.modeling.modeling_lam import LamModel
from lalm.training.clm.arguments import parse_arguments
from lalm.training.clm.model_builder import new_config
from lalm.training.clm.tokenizer import train_tokenizer
from lalm.training.sts.arguments import parse_sts_arguments
from lalm.training.sts.sources import Source
from tests.training.conftest import TINY_MODELS
from tests.training.sts import tiny_models as sts_tiny

pytestmark = pytest.mark.slow

ROOT = Path(run_clm.__file__).parent
CHAIN = ("distill", "relational", "finetune")
TINY_LLAMA = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2,intermediate_size=24"


def fails(capsys, *argv):
    """Run main as the script does and return its one line."""
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: run_clm.main([*argv, "--disable_tqdm", "true"]))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_type", "lalm_glo"], "(did you mean 'lalm_gla'?); ours are lalm_linear, lalm_gla"),
        (["--config_overrides", "hiden_size=8"], "lalm_gla has no field 'hiden_size' (did you mean 'hidden_size'?)"),
        (["--config_overrides", "hidden_size=large"], "hidden_size"),
        (["--config_overrides", "hidden_size=30,num_attention_heads=4"], "num_attention_heads"),
        (["--config_overrides", "vocab_size=100"], "--config_overrides: vocab_size 100 is below the tokenizer's"),
        (["--train_file", "missing.txt"], "--train_file: there is no file missing.txt"),
        (["--streaming", "--do_train"], "--streaming does not know how long the text is; give --max_steps"),
        (["--model_name_or_path", "missing/folder"], "--model_name_or_path: cannot load a tokenizer from 'missing/f"),
        (["--tokenizer_name", "missing/folder"], "no folder missing/folder, and the Hub gives no such tokenizer: "),
        (["--tokenizer_name", "/missing/folder"], "there is no folder /missing/folder"),
        (["--tokenizer_name", "./missing"], "there is no folder ./missing"),
        (["--config_overrides", "n_layers=2"], "lalm_gla has no field 'n_layers' (did you mean 'num_hidden_layers'?)"),
        (["--config_overrides", "num_hidden_layers=1000000000"], "num_hidden_layers is 1,000,000,000; more than"),
        (["--model_type", "qwen2", "--config_overrides", "num_hidden_layers=1000000000"], "more than 10,000"),
        (["--config_overrides", "hidden_size=100000000"], "the weights of this lalm_gla model take"),
        (["--config_overrides", "hidden_size=100000000000"], "take more than can be counted, and the machine has"),
        (["--config_overrides", "norm_eps=NaN"], "--config_overrides: norm_eps must be finite, got nan"),
        (["--config_overrides", "hidden_ratio=Infinity"], "--config_overrides: hidden_ratio must be finite, got inf"),
        (["--attn_implementation", "flash_attention_9"], "flash_attention_9"),
        (["--push_to_hub", "--hub_token", "hf_none"], "--push_to_hub: "),
        (["--report_to", "trackioo"], "--report_to: there is no tracker 'trackioo'"),
    ],
)  # fmt: skip
def test_mistakes(texts, tmp_path, capsys, flags, message):
    base = ["--train_file", str(texts["train"]), "--validation_file", str(texts["validation"])]
    base += [
        "--tokenizer_vocab_size",
        "300",
        "--output_dir",
        str(tmp_path / "run"),
        "--cache_dir",
        str(tmp_path / "c"),
    ]
    assert message in fails(capsys, *base, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--model_type", "lalm_glo"],
        ["--config_overrides", "hiden_size=8"],
        ["--tokenizer_name", "missing"],
        ["--model_name_or_path", "missing"],
        ["--push_to_hub"],
    ],
)
def test_names_are_looked_up_before_any_text_is_read(texts, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr("lalm.training.clm.run.prepare_data", None)
    fails(capsys, "--train_file", str(texts["train"]), "--output_dir", str(tmp_path / "run"), *flags)


def test_a_folder_without_weights(tiny_run, texts, tmp_path, capsys, monkeypatch):
    tiny_run("--do_train")
    (tmp_path / "run" / "model.safetensors").unlink()
    monkeypatch.setattr("lalm.training.clm.run.prepare_data", None)
    line = fails(capsys, "--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "next"))
    assert line == f"error: --model_name_or_path: the folder {tmp_path / 'run'} holds no weights (*.safetensors)"


def test_ctrl_c_is_one_line(tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(interrupted)
    assert caught.value.code == 130
    assert capsys.readouterr().err.strip() == (
        "error: interrupted; saved checkpoints stay, and the same command resumes from the last of them"
    )


def test_a_run_that_is_interrupted_resumes(texts, tmp_path):
    """SIGINT in the middle of the training: one line, 130, and the checkpoints stay."""
    argv = ["--model_type", "lalm_linear", "--config_overrides", TINY_MODELS["lalm_linear"], "--save_steps", "1"]
    argv += ["--train_file", str(texts["train"]), "--validation_file", str(texts["validation"]), "--block_size", "24"]
    argv += ["--tokenizer_vocab_size", "300", "--max_steps", "100000", "--output_dir", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LALM_DEBUG": "0"}
    command = [sys.executable, str(ROOT / "run_clm.py"), *argv]
    # A test run in the background ignores Ctrl-C, and so would what it starts.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hears
    )
    deadline = time.monotonic() + 200
    while not any((tmp_path / "out").glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert (
        errors.strip().splitlines()[-1].startswith("error: interrupted; saved checkpoints stay, and the same command")
    )
    assert any((tmp_path / "out").glob("checkpoint-*"))


def test_a_missing_extra_is_one_line(tmp_path):
    """run_sts.py where sentence-transformers is not installed."""
    code = "import sys, runpy; sys.modules['sentence_transformers'] = None; sys.argv = ['run_sts.py']; "
    code += f"runpy.run_path({str(ROOT / 'run_sts.py')!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line == ("error: run_sts.py needs sentence_transformers, which is not installed: pip install 'lalm[sts]'")


def test_nothing_said_about_the_model_means_a_small_one():
    model, data, _ = parse_arguments([])
    config = new_config(model, train_tokenizer(["a b"], 300), data.block_size)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("lalm_gla", 128, 4)


def test_a_checkpoint_of_another_type(tiny_run, texts, tmp_path, capsys):
    tiny_run("--do_train")
    flags = ["--model_name_or_path", str(tmp_path / "run"), "--model_type", "lalm_gla", "--do_eval"]
    line = fails(
        capsys, *flags, "--validation_file", str(texts["validation"]), "--output_dir", str(tmp_path / "other")
    )
    assert "is a llama checkpoint, not lalm_gla" in line


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LALM_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown argument"):
        exit_on_user_error(lambda: run_clm.main(["--nonsense"]))


def test_an_error_of_ours_keeps_its_traceback():
    def broken():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        exit_on_user_error(broken)


def run_script(tmp_path, *argv, launcher=()):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LALM_DEBUG": "0"}
    command = [sys.executable, *launcher, str(ROOT / "run_clm.py"), *argv]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)


def test_script_exit_code_and_stderr(tmp_path):
    done = run_script(tmp_path, "--train_file", "nowhere.txt")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: --train_file: there is no file nowhere.txt"
    assert "Traceback" not in done.stderr


def test_accelerate_launch_with_a_recipe(texts, tmp_path):
    recipe = {"model_type": "llama", "config_overrides": TINY_LLAMA.replace(",", " ").split(), "max_steps": 2}
    recipe |= {"train_file": str(texts["train"]), "validation_file": str(texts["validation"]), "block_size": 32}
    recipe |= {"tokenizer_vocab_size": 300, "document_boundary": "row", "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
    done = run_script(tmp_path, "recipe.json", "--output_dir", "out", "--max_steps", "3", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "validation perplexity" in done.stdout
    results = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert results["steps"] == 3
    assert "accelerate launch run_clm.py recipe.json" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
STAGES = [path for path in RECIPES if "stage" in yaml.safe_load(path.read_text(encoding="utf-8"))]
PLANS = [path for path in RECIPES if path.name == "recall.yaml"]  # tests/training/test_recall_recipe.py


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in STAGES + PLANS], ids=lambda path: path.name)
def test_every_recipe_parses_and_its_model_can_be_built(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    of_any_type = "model_type" not in recipe and "based_on" not in recipe
    model, data, training = parse_arguments([str(path), *(["--model_type", "lalm_gla"] if of_any_type else [])])
    config = new_config(model, train_tokenizer(["a b"], 300), data.block_size)
    assert config.model_type == model.model_type
    for key, value in model.overrides.items():
        assert getattr(config, key) == value
    assert training.do_train
    assert training.do_test


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.name)
def test_every_recipe_of_run_sts_parses_and_fits_a_student(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    model, data, training = parse_sts_arguments([str(path)])
    assert training.stage == recipe["stage"]
    assert (training.stage == "distill") == (model.model_name_or_path is None)
    student = LamModel.from_softmax_encoder(bert := sts_tiny.bert(layers=6), student_config(bert, **model.overrides))
    for key, value in model.overrides.items():
        assert getattr(student.config, key) == value
    for part in model.freeze or []:
        assert any(part in name for name, _ in student.named_parameters()), part
    for kind in ("train", "nli", "qa", "paraphrase", "triplet"):
        files = getattr(data, f"{kind}_file") or []
        assert all(Source.parse(name, kind) for name in files)
        assert not files or kind == "train" or kind in data.shares, f"{kind} has files and no share of the batches"


def test_the_stages_hand_their_models_on():
    recipes = [yaml.safe_load((ROOT / "recipes" / f"lam_{stage}.yaml").read_text("utf-8")) for stage in CHAIN]
    assert [recipe["stage"] for recipe in recipes] == list(CHAIN)
    for earlier, later in pairwise(recipes):
        assert later["model_name_or_path"] == earlier["output_dir"]
