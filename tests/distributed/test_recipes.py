"""recipes/accelerate: every file is one that accelerate reads, and those for CPUs train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.distributed.launch import ROOT
from tests.training.conftest import TINY_MODELS, sentences

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
ENGINES = {"ddp": "multi_gpu", "machines": "multi_gpu", "cpu_processes": "multi_gpu", "cpu": "use_cpu"}
ENGINES |= {"fsdp2": "use_fsdp", "fsdp2_sharded": "use_fsdp", "zero2": "use_deepspeed", "zero3": "use_deepspeed"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the validation sets OMP_NUM_THREADS
    load_config_from_file(str(path))
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "run_clm.py"])
    )
    assert getattr(arguments, ENGINES[path.stem])
    assert f"recipes/accelerate/{path.name} " in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("recipe", "processes"), [("cpu", 1), ("cpu_processes", 2)])
def test_it_trains_on_the_cpu(recipe, processes, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(60, 0)), encoding="utf-8")
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file"]
    launch += [ROOT / "recipes" / "accelerate" / f"{recipe}.yaml", "run_clm.py", "--model_type", "lalm_gla"]
    launch += ["--config_overrides", TINY_MODELS["lalm_gla"], "--train_file", text, "--block_size", "24"]
    launch += ["--validation_file", text, "--tokenizer_vocab_size", "300", "--max_steps", "2"]
    launch += ["--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, launch)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["training"]["world_size"] == processes
    assert done.stdout.count("results are in") == 1
