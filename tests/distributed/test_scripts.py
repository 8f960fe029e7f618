"""run_clm.py and run_sts.py with two processes, under DDP and FSDP2: equal losses, checkpoints that resume under any
other layout, damaged ones passed over, everything written once."""

import json

import pytest

import run_clm
from tests.distributed.launch import launch
from tests.training.conftest import TINY_MODELS, sentences
from tests.training.sts.tiny_world import StsWorld

pytestmark = pytest.mark.slow

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ENGINES = {
    "ddp": {},
    "full": FSDP | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "sharded": FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}
# Runs of four steps, resumed under another engine up to step 6. Those named "cut" lose a part of checkpoint 4 before.
RESUMED = {
    "ddp": "ddp",
    "ddp-full": "full",
    "full-sharded": "sharded",
    "sharded-sharded": "sharded",
    "sharded-ddp": "ddp",
    "ddp-cut": "ddp",
    "full-cut": "full",
    "sharded-cut": "sharded",
}
CUT = {"ddp": "model.safetensors", "full": "optimizer.bin", "sharded": "pytorch_model_fsdp_0/__1_0.distcp"}
STAGES = ("distill", "relational", "finetune")


class Runs:
    """A folder of runs, and what each of them gave, by name and process."""

    def __init__(self, folder):
        self.folder, self.found = folder, {}
        for seed, (split, count) in enumerate({"train": 60, "validation": 12}.items()):
            (folder / f"{split}.txt").write_text("\n".join(sentences(count, seed)) + "\n", encoding="utf-8")

    def arguments(self, name: str, steps: int, batch: int = 4) -> list[str]:
        settings = {"model_type": "lalm_gla", "train_file": self.folder / "train.txt", "save_steps": 2}
        settings |= {"validation_file": self.folder / "validation.txt", "document_boundary": "row"}
        settings |= {"tokenizer_vocab_size": 300, "block_size": 24, "logging_steps": 1, "max_steps": steps}
        settings |= {"per_device_train_batch_size": batch, "disable_tqdm": "true", "lr_scheduler_type": "constant"}
        settings |= {"output_dir": self.folder / name, "cache_dir": self.folder / "cache"}
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return [*flags, "--config_overrides", TINY_MODELS["lalm_gla"]]

    def losses(self, name: str) -> list[float]:
        history = json.loads((self.folder / name / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs, commands = Runs(tmp_path_factory.mktemp("scripts")), {}

    def add(name: str, script: str, argv: list[str], engine: str, **options) -> None:
        commands[name] = {"script": script, "argv": argv, "environment": ENGINES[engine], **options}

    for name in RESUMED:
        add(f"{name} begun", "run_clm", runs.arguments(name, 4), name.partition("-")[0])
    for name, engine in RESUMED.items():
        cut = runs.folder / name / "checkpoint-4" / CUT[engine]
        options = {"truncate": str(cut)} if name.endswith("cut") else {}
        add(name, "run_clm", runs.arguments(name, 6), engine, **options)
    add("once more", "run_clm", runs.arguments("sharded-sharded", 6), "sharded")
    world = StsWorld(runs.folder)
    for stage in STAGES:
        add(stage, "run_sts", world.arguments(stage, output=stage), "ddp")
    add("refused", "run_sts", world.arguments("distill", output="refused"), "full")
    (runs.folder / "commands.json").write_text(json.dumps(list(commands.values())))
    launch(2, "tests.distributed.scripts", str(runs.folder / "commands.json"), str(runs.folder / "found"))
    parts = [json.loads((runs.folder / f"found.{rank}.json").read_text()) for rank in range(2)]
    runs.found = {name: found for name, *found in zip(commands, *parts, strict=True)}
    return runs


def test_every_command_ends_well_and_the_second_process_is_silent(runs):
    for name, (first, second) in runs.found.items():
        if name == "refused":
            continue
        assert "results" in first, (name, first)
        assert "results" in second, (name, second)
        assert second["stdout"] == "", name
        assert "INFO" not in second["stderr"], name
        assert "WARNING" not in second["stderr"], name
    assert runs.found["ddp"][0]["stdout"].count("results are in") == 1


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_resumes_under_every_layout(runs, name):
    """Bit for bit the losses of DDP throughout, whatever saved the checkpoint and whatever reads it."""
    logged, step = runs.found[name][0]["stderr"], 2 if name.endswith("cut") else 4
    assert f"resuming from {runs.folder / name / f'checkpoint-{step}'} " in logged
    damaged = runs.folder / name / "checkpoint-4"
    assert (f"{damaged} is incomplete" in logged) == name.endswith("cut"), logged
    assert runs.losses(name) == pytest.approx(runs.losses("ddp"), rel=1e-6)
    assert len(runs.losses(name)) == 6
    assert runs.found[name][0]["results"]["eval_loss"] == pytest.approx(
        runs.found["ddp"][0]["results"]["eval_loss"], rel=1e-6
    )
    assert not (runs.folder / name / ".saving").exists()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in (runs.folder / name).iterdir()
    }


def test_one_process_resumes_a_sharded_checkpoint(runs):
    results = run_clm.main(runs.arguments("sharded-ddp", 8, batch=8))
    other = run_clm.main(runs.arguments("ddp", 8, batch=8))
    assert results["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-6)
    losses = runs.losses("sharded-ddp")
    assert len(losses) == 8
    assert losses == pytest.approx(runs.losses("ddp"), rel=1e-6)


def test_a_finished_sharded_run_is_evaluated_again(runs):
    found, earlier = runs.found["once more"][0], runs.found["sharded-sharded"][0]
    assert "nothing is left to train" in found["stderr"]
    assert found["results"]["eval_loss"] == pytest.approx(earlier["results"]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_of_sentence_encoders(runs, stage):
    assert (runs.folder / stage / "model.safetensors").is_file()
    assert len(runs.losses(stage)) == 8
    assert runs.found[stage][0]["stdout"].count("results are in") == 1


def test_sentence_encoders_under_fsdp_are_refused_in_one_line(runs):
    for found in runs.found["refused"]:
        assert found["error"].startswith("FSDP cannot shard the modules of sentence-transformers: train")
    assert not (runs.folder / "refused" / "model.safetensors").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_damaged_checkpoint_of_deepspeed_is_passed_over(tmp_path, stage):
    pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    runs, engine = Runs(tmp_path), tmp_path / "zero.json"
    settings = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    settings |= {"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine.write_text(json.dumps(settings))
    flags = ["--deepspeed", str(engine), "--ddp_backend", "gloo", "--use_cpu"]
    names = {"whole": 6, "cut": 4, "cut again": 6}
    commands = [
        {"script": "run_clm", "argv": [*runs.arguments(name.split()[0], steps), *flags]}
        for name, steps in names.items()
    ]
    optimizer = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    commands[2]["truncate"] = str(tmp_path / "cut" / "checkpoint-4" / "global_step4" / optimizer)
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    launch(2, "tests.distributed.scripts", str(tmp_path / "commands.json"), str(tmp_path / "found"))
    logged = json.loads((tmp_path / "found.0.json").read_text())[2]["stderr"]
    assert f"checkpoint-4 is incomplete (global_step4/{optimizer} is damaged" in logged
    assert f"resuming from {tmp_path / 'cut' / 'checkpoint-2'} " in logged
    assert runs.losses("cut") == runs.losses("whole")
    assert len(runs.losses("cut")) == 6
