"""Tiny texts and runs. Runs go through `run_clm.main`, as the command line does, in this process."""

import random

import pytest

import run_clm
from tests.training.sts.tiny_world import StsWorld

SIZES = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=24"
TINY_MODELS = {
    "llama": f"{SIZES},num_key_value_heads=2",
    "lalm_gla": SIZES,
    "lalm_linear": f"{SIZES},use_short_conv=true",
    "lalm_retnet": SIZES,
    "lalm_delta_net": f"{SIZES},decay=head",
    "lalm_based": f"{SIZES},feature_dim=4,linear_attention_layers=[0],sliding_attention_layers=[1],sliding_window=8",
    "lalm_local_global": f"{SIZES},num_local_heads=1,local_attn_window_size=8,blindspot_size=2",
    "lalm_lam": SIZES,
}
WORDS = ["linear", "attention", "keeps", "a", "state", "of", "fixed", "size", "and", "reads", "each", "token", "once"]


def sentences(count: int, seed: int) -> list[str]:
    """Return `count` lines of 3 to 12 words: documents of unequal length."""
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(3, 12))) + "." for _ in range(count)]


@pytest.fixture
def texts(tmp_path):
    """Paths of a training, a validation and a test file, one document a line."""
    paths = {}
    for seed, (split, count) in enumerate({"train": 60, "validation": 12, "test": 12}.items()):
        paths[split] = tmp_path / f"{split}.txt"
        paths[split].write_text("\n".join(sentences(count, seed)) + "\n", encoding="utf-8")
    return paths


@pytest.fixture
def tiny_run(texts, tmp_path):
    """Return run(*flags, model_type=..., output=...) -> results; 4 steps unless the flags say otherwise."""

    def run(*flags: str, model_type: str = "llama", output: str = "run") -> dict:
        argv = [
            *("--model_type", model_type, "--config_overrides", TINY_MODELS[model_type]),
            *("--train_file", str(texts["train"]), "--validation_file", str(texts["validation"])),
            *("--document_boundary", "row", "--tokenizer_vocab_size", "300", "--block_size", "24"),
            *("--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4"),
            *(
                "--output_dir",
                str(tmp_path / output),
                "--cache_dir",
                str(tmp_path / "cache"),
                "--disable_tqdm",
                "true",
            ),
        ]
        return run_clm.main([*argv, *flags])

    return run


@pytest.fixture(scope="session")
def sts_world(tmp_path_factory) -> StsWorld:
    """A folder for runs of run_sts.py."""
    return StsWorld(tmp_path_factory.mktemp("sts"))


@pytest.fixture(scope="session")
def chain(sts_world) -> dict[str, dict]:
    """The results of the three stages, one after the other, in folders of their names; the last saves in bfloat16."""
    dtypes = {"distill": "float32", "relational": "float32", "finetune": "bfloat16"}
    return {stage: sts_world.run(stage, "--save_dtype", dtype, output=stage) for stage, dtype in dtypes.items()}
