"""Recipes, flags and config overrides: precedence, types and messages."""

import json
import os
from itertools import pairwise

import pytest
import yaml

from lalm.configuration.configuration_gla import GLAConfig
from lalm.errors import UserError
from lalm.training.clm.arguments import ARGUMENT_CLASSES, parse_arguments
from lalm.training.flag_names import MEANT
from lalm.training.recipe import field_names, parse_overrides
from lalm.training.sts.arguments import STS_ARGUMENT_CLASSES


@pytest.fixture
def recipe(tmp_path):
    def write(values: dict, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
def test_flags_win_over_the_recipe(recipe, name):
    path = recipe({"block_size": 64, "learning_rate": "3e-4", "seed": 7, "do_train": True, "packing": "concat"}, name)
    _, data, training = parse_arguments([path, "--block_size", "32", "--seed=9"])
    assert (data.block_size, data.packing, training.seed) == (32, "concat", 9)
    assert training.learning_rate == 3e-4
    assert training.do_train
    assert not training.do_eval


def test_config_overrides_merge_key_by_key(recipe):
    path = recipe({"config_overrides": {"hidden_size": 64, "full_attention_layers": [1], "sliding_window": None}})
    model, _, _ = parse_arguments([path, "--config_overrides", "hidden_size=32", "tie_word_embeddings=true"])
    assert model.overrides == {
        "hidden_size": 32,
        "full_attention_layers": [1],
        "sliding_window": None,
        "tie_word_embeddings": True,
    }


def test_local_files_replace_the_dataset_of_the_recipe(recipe):
    path = recipe({"dataset_name": "some/set", "dataset_config_name": "v1", "text_column": "body"})
    _, data, _ = parse_arguments([path, "--train_file", "a.txt", "b.txt"])
    assert (data.dataset_name, data.dataset_config_name) == (None, None)
    assert (data.train_file, data.text_column) == (["a.txt", "b.txt"], "body")
    path = recipe({"train_file": ["a.txt"], "validation_file": "b.txt"})
    _, data, _ = parse_arguments([path, "--dataset_name", "some/set"])
    assert (data.dataset_name, data.train_file, data.validation_file) == ("some/set", None, None)


def test_a_checkpoint_replaces_the_overrides_of_the_recipe(recipe):
    path = recipe({"model_type": "lalm_gla", "config_overrides": {"hidden_size": 64}})
    model, _, _ = parse_arguments([path, "--model_name_or_path", "somewhere"])
    assert (model.model_name_or_path, model.model_type, model.overrides) == ("somewhere", "lalm_gla", {})


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["a=1,b=2.5,c=true,d=null"], {"a": 1, "b": 2.5, "c": True, "d": None}),
        (["layers=[1,3],name=elu", "e=None"], {"layers": [1, 3], "name": "elu", "e": None}),
        (['rope={"theta": 1e4, "kind": "default"},x=1'], {"rope": {"theta": 1e4, "kind": "default"}, "x": 1}),
        (['{"a": [1, 2], "b": "x,y"}'], {"a": [1, 2], "b": "x,y"}),
        (['b="x,y",c=False'], {"b": "x,y", "c": False}),
    ],
)  # fmt: skip
def test_override_values(items, expected):
    assert parse_overrides(items) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--blok_size", "12"], "unknown argument '--blok_size' (did you mean 'block_size'?)"),
        (["--block_size", "many"], "argument --block_size/--block-size: invalid int value: 'many'"),
        (["--block_size", "1"], "--block_size is 1; it must be at least 2"),
        (["--packing", "stack"], "--packing is 'stack'; choose one of documents, concat"),
        (["--block_size", "8", "--eval_stride", "9"], "--eval_stride is 9; it must lie in 1 .. block_size (8)"),
        (["--dataset_name", "x", "--train_file", "y"], "--dataset_name contradicts --train_file"),
        (["--model_name_or_path", "x", "--config_overrides", "a=1"], "contradicts --model_name_or_path"),
        (["--config_overrides", "hidden_size"], "'hidden_size' is not of the form key=value"),
        (["--config_overrides", "a=[1,"], "'[1,' is not valid JSON"),
        (["--fp16", "--use_cpu"], "--fp16 needs a GPU; use --bf16 on CPU"),
        (["--lr_scheduler_type", "wobbly"], "wobbly"),
        (["no_such.yaml"], "cannot read the recipe no_such.yaml"),
    ],
)
def test_bad_arguments_give_one_clear_message(argv, message):
    with pytest.raises(UserError) as caught:
        parse_arguments(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    {
        "--batch_size": "per_device_train_batch_size", "--batch-size": "per_device_train_batch_size",
        "--lr": "learning_rate", "--epochs": "num_train_epochs", "--steps": "max_steps", "--output": "output_dir",
        "--dataset": "dataset_name", "--model": "model_name_or_path", "--tokenizer": "tokenizer_name",
        "--warmup_ratio": "warmup_steps", "--grad_accum": "gradient_accumulation_steps", "--seq_len": "block_size",
        "--max_seq_length": "block_size", "--optimizer": "optim", "--evaluation_strategy": "eval_strategy",
        "--overwrite_output_dir": "start_over", "--no_cuda": "use_cpu", "--blok_size": "block_size",
    }.items(),
)  # fmt: skip
def test_what_users_of_other_scripts_type_is_understood(typed, meant, recipe):
    with pytest.raises(UserError, match=rf"unknown argument '{typed}' \(did you mean '{meant}'\?\)"):
        parse_arguments([typed, "1"])
    with pytest.raises(UserError, match=rf"\(did you mean '{meant}'\?\)"):
        parse_arguments([recipe({typed[2:]: 1})])


def test_every_hint_leads_to_a_name_of_a_script_or_a_configuration():
    known = {*field_names(ARGUMENT_CLASSES), *field_names(STS_ARGUMENT_CLASSES), *GLAConfig.__dataclass_fields__}
    assert set(MEANT) - known == set()
    names = field_names(ARGUMENT_CLASSES)
    taken = [theirs for ours, aliases in MEANT.items() if ours in names for theirs in aliases if theirs in names]
    assert taken == [], "a name that exists needs no hint"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]\n",
        "config_overrides: &a {hidden_size: *a}\n",
        "train_file: &a [x]\nvalidation_file: " + "[" * 5000 + "]" * 5000,
        "a: &a [1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefg")),
    ],
    ids=["list", "mapping", "deep", "many"],
)
def test_a_recipe_without_an_end(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="nests too deep, or refers to itself; write its values out"):
        parse_arguments([str(tmp_path / "recipe.yaml")])


def test_json_without_an_end(tmp_path):
    (tmp_path / "recipe.json").write_text('{"a":' * 5000 + "1" + "}" * 5000, encoding="utf-8")
    with pytest.raises(UserError, match="nests too deep"):
        parse_arguments([str(tmp_path / "recipe.json")])
    with pytest.raises(UserError, match="--config_overrides: .* nests too deep"):
        parse_arguments(["--config_overrides", "a=" + "[" * 100_000])


def test_a_recipe_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="it is no regular file"):
        parse_arguments([str(tmp_path / "recipe.yaml")])


def test_unknown_recipe_key_names_the_nearest(recipe):
    with pytest.raises(UserError, match=r"unknown field 'blok_size' \(did you mean 'block_size'\?\)"):
        parse_arguments([recipe({"blok_size": 3})])


def test_recipe_values_are_type_checked(recipe):
    with pytest.raises(UserError, match="invalid int value"):
        parse_arguments([recipe({"block_size": 1.5})])


def test_nothing_to_do_means_train_and_evaluate():
    _, _, training = parse_arguments([])
    assert (training.do_train, training.do_eval, training.do_test) == (True, True, False)


def test_bf16_works_on_a_machine_without_gpu():
    _, _, training = parse_arguments(["--bf16"])
    assert training.bf16
