"""Every field of `TrainingArguments` works in run_clm.py and run_sts.py, or is refused before any work.

A field that a new transformers adds fails `test_no_field_is_forgotten` until it stands in a table here.
"""

import importlib.util
import json
from dataclasses import fields

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainingArguments

from lalm.errors import UserError
from lalm.training.clm.arguments import DataArguments, ModelArguments, parse_arguments
from lalm.training.sts.arguments import StsDataArguments, StsModelArguments, StsTrainingArguments, parse_sts_arguments

NAN = ("nan", "inf", "-inf")
# flags that train and score a tiny model, each group in one run
RUNS = {
    "numbers": """--learning_rate 1e-3 --warmup_steps 1 --weight_decay 0.1 --adam_beta1 0.8 --adam_beta2 0.9
        --adam_epsilon 1e-7 --max_grad_norm 0.5 --gradient_accumulation_steps 2 --per_device_eval_batch_size 3
        --average_tokens_across_devices false --label_smoothing_factor 0.1 --neftune_noise_alpha 5 --seed 3
        --data_seed 4 --torch_empty_cache_steps 1 --num_train_epochs 2""",
    "saving": """--save_steps 1 --save_total_limit 1 --save_strategy steps --save_only_model --save_on_each_node
        --eval_strategy steps --eval_steps 1 --eval_delay 1 --eval_on_start --load_best_model_at_end
        --metric_for_best_model perplexity --greater_is_better false --enable_jit_checkpoint
        --restore_callback_states_from_checkpoint --ignore_data_skip --hub_token x --hub_private_repo true
        --hub_model_id a/b --hub_strategy end --hub_always_push --hub_revision r""",
    "speed": """--bf16 --bf16_full_eval --activation_checkpointing --activation_checkpointing_kwargs
        {"use_reentrant":true} --auto_find_batch_size --use_cache --full_determinism --use_cpu --tf32 false
        --optim adafactor --lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":0.3}""",
    "old names": """--gradient_checkpointing --gradient_checkpointing_kwargs {"use_reentrant":false}
        --fp16_full_eval --optim sgd --optim_args momentum=0.9 --optim_target_modules all-linear""",
    "log": """--logging_strategy steps --logging_steps 1 --logging_first_step --log_on_each_node false
        --logging_nan_inf_filter false --include_num_input_tokens_seen non_padding --log_level error
        --log_level_replica error --disable_tqdm true --report_to none --run_name x --project x --trackio_space_id x
        --trackio_bucket_id x --trackio_static_space_id x --debug underflow_overflow""",
    "evaluation": """--eval_do_concat_batches false --eval_accumulation_steps 1 --include_for_metrics inputs
        --batch_eval_metrics false --label_names labels --do_train --do_eval --do_predict""",
    "data": """--dataloader_drop_last --dataloader_pin_memory false --dataloader_in_order false
        --dataloader_num_workers 1 --dataloader_persistent_workers --dataloader_prefetch_factor 2
        --dataloader_multiprocessing_context fork --train_sampling_strategy group_by_length --length_column_name x
        --accelerator_config {"split_batches":true} --max_steps 2 --per_device_train_batch_size 4""",
    "processes": """--ddp_find_unused_parameters true --ddp_bucket_cap_mb 1 --ddp_broadcast_buffers true
        --ddp_static_graph true --ddp_timeout 60 --local_rank 0 --fsdp_config {"x":1}""",
}  # fmt: skip
# what one process without a GPU and the packages in question cannot have; None is tested elsewhere
NEEDS = {
    "--fsdp full_shard": "--fsdp needs several processes",
    "--ddp_backend gloo": "--ddp_backend needs several processes; start the script with accelerate launch",
    "--deepspeed nofile.json": "--deepspeed needs a package that is not installed: pip install deepspeed",
    "--parallelism_config x": "--parallelism_config",
    "--use_liger_kernel": "--use_liger_kernel: it needs a package that is not installed: pip install liger-kernel",
    "--liger_kernel_config x": "--liger_kernel_config",
    "--fp16": "--fp16 needs a GPU; use --bf16 on CPU",
    "--tf32 true": "--tf32 requires",
    "--optim lomo": "--optim: You need to install `lomo_optim`",
    "--optim grokadamw": "--optim: Please install grokadamw",
    "--debug tpu_metrics_debug": "--debug tpu_metrics_debug needs a TPU",
    "--report_to trackioo": None,  # lalm.training.tracking
    "--push_to_hub": None,  # tests/training/test_hub_push.py
    "--resume_from_checkpoint nowhere": None,  # tests/training/test_checkpoints.py
    "--skip_memory_metrics false": None,  # works, and takes long
    "--output_dir x": None,
    "--torch_compile": None,
    "--torch_compile_mode default": None,
}
WRONG = {
    "--per_device_train_batch_size 0": "--per_device_train_batch_size is 0; it must be at least 1",
    "--per_device_eval_batch_size -1": "--per_device_eval_batch_size is -1; it must be at least 1",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps is 0; it must be at least 1",
    "--eval_accumulation_steps 0": "--eval_accumulation_steps is 0",
    "--max_steps 0": "--max_steps is 0; give a number of steps, or -1",
    "--max_steps -5": "--max_steps is -5; it must be at least -1",
    "--num_train_epochs -1": "--num_train_epochs is -1; it must be at least 0",
    "--learning_rate -1": "--learning_rate is -1; it must be at least 0",
    "--weight_decay -1": "--weight_decay is -1",
    "--adam_beta1 1": "--adam_beta1 is 1; it must be at least 0 and below 1",
    "--adam_beta2 2": "--adam_beta2 is 2; it must be at least 0 and below 1",
    "--adam_epsilon -1": "--adam_epsilon is -1",
    "--max_grad_norm -1": "--max_grad_norm is -1",
    "--warmup_steps -1": "--warmup_steps is -1",
    "--seed -1": "--seed is -1; it must be at least 0 and at most 4294967295",
    "--seed 4294967296": "--seed is",
    "--data_seed -1": "--data_seed is -1",
    "--logging_steps -1": "--logging_steps is -1",
    "--logging_steps 0": "non-zero --logging_steps",
    "--save_steps -1": "--save_steps is -1",
    "--eval_delay -1": "--eval_delay is -1",
    "--dataloader_num_workers -1": "--dataloader_num_workers is -1",
    "--dataloader_persistent_workers": "--dataloader_*: persistent_workers option needs num_workers > 0",
    "--dataloader_prefetch_factor 0 --dataloader_num_workers 1": "--dataloader_prefetch_factor is 0",
    "--dataloader_multiprocessing_context spawn": "--dataloader_*: multiprocessing_context can only be used with",
    "--ddp_timeout -1": "--ddp_timeout is -1",
    "--lr_scheduler_type wobbly": "wobbly",
    "--lr_scheduler_type cosine_with_min_lr": "--lr_scheduler_type, --lr_scheduler_kwargs: One of min_lr",
    '--lr_scheduler_kwargs {"x":1}': "unexpected keyword argument 'x'",
    '--lr_scheduler_kwargs {"decay_type":"wobbly"}': "Unknown decay type: wobbly",
    "--lr_scheduler_kwargs nofile.json": "--lr_scheduler_kwargs is 'nofile.json', which is no JSON object",
    "--lr_scheduler_kwargs {broken": "line 1 column 2",
    "--optim_args junk": "--optim: ",
    '--activation_checkpointing_kwargs {"bogus":1}': "--activation_checkpointing_kwargs: ",
    "--accelerator_config nofile.json": "nofile.json",
    '--accelerator_config {"junk":1}': "junk",
    "--fsdp_config nofile.json": "--fsdp_config is 'nofile.json', which is no JSON object and no file",
}
WRONG_FOR_TEXT = {
    "--torch_compile_backend nosuch": "--torch_compile: there is no backend 'nosuch'",
    "--torch_compile_mode nosuch": "--torch_compile: there is no mode 'nosuch'",
    "--prediction_loss_only": "--prediction_loss_only has no use here: perplexity and accuracy are summed over tokens",
    "--remove_unused_columns true": "--remove_unused_columns has no use here",
    "--eval_use_gather_object": "--eval_use_gather_object has no use here",
    "--label_names junk": "--label_names is junk",
    "--label_smoothing_factor 1": "--label_smoothing_factor is 1; it must be at least 0 and below 1",
    "--neftune_noise_alpha -1": "--neftune_noise_alpha is -1",
    "--include_num_input_tokens_seen junk": "choose one of all, non_padding, no",
    "--eval_strategy steps --eval_steps -1": "--eval_steps is -1",
    "--save_strategy best": "there is no best checkpoint without evaluations",
    "--eval_strategy steps --metric_for_best_model acuracy": "there is no metric 'acuracy' (did you mean",
}
WRONG_FOR_SENTENCES = {
    "--label_smoothing_factor 0.1": "--label_smoothing_factor has no use here",
    "--neftune_noise_alpha 5": "--neftune_noise_alpha has no use here",
    "--torch_compile_backend eager": "--torch_compile has no use here",
    "--batch_sampler no_duplicates": "--batch_sampler has no use here",
    "--multi_dataset_batch_sampler round_robin": "--multi_dataset_batch_sampler has no use here",
    '--router_mapping {"text":"query"}': "--router_mapping has no use here",
    '--learning_rate_mapping {"(":1e-3}': "--learning_rate_mapping: '(' is no regular expression",
    "--metric_for_best_model pearson": "there is no metric 'pearson'",
    "--margin nan": "--margin is nan; it must be a finite number",
    "--projection_learning_rate inf": "--projection_learning_rate is inf",
    "--train_file a --train_weights nan": "--train_weights is nan",
}
# fields of other versions than the one installed
KNOWN = {item.name for item in fields(TrainingArguments)}
OTHER_VERSIONS = {"activation_checkpointing", "activation_checkpointing_kwargs", "warmup_ratio"}


def named(flags: str) -> set[str]:
    return {word[2:] for word in flags.split() if word.startswith("--")}


def usable(flags: str) -> list[str]:
    """The flags that this version of transformers has, with their values."""
    words, keep = [], True
    for word in flags.split():
        if word.startswith("--"):
            keep = word[2:] in KNOWN
        if keep:
            words.append(word)
    return words


def test_no_field_is_forgotten():
    tested = set().union(*(named(flags) for flags in [*RUNS.values(), *NEEDS, *WRONG, *WRONG_FOR_TEXT]))
    assert KNOWN - tested == set()
    ours = {item.name for item in fields(SentenceTransformerTrainingArguments)} - KNOWN
    assert ours - set().union(*map(named, WRONG_FOR_SENTENCES)) - OTHER_VERSIONS == {"prompts"}


@pytest.mark.parametrize("group", RUNS)
@pytest.mark.slow
def test_what_works(tiny_run, tmp_path, texts, group):
    flags = usable(RUNS[group])
    results = tiny_run("--do_train", "--do_eval", "--test_file", str(texts["test"]), "--max_steps", "2", *flags)
    assert results["steps"] == 2
    assert 100 < results["eval_perplexity"] < 400
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("flags", [*WRONG, *(flag for flag, message in NEEDS.items() if message)])
@pytest.mark.parametrize("parse", [parse_arguments, parse_sts_arguments])
def test_what_is_refused_by_both(parse, flags):
    refused(parse, flags, WRONG.get(flags) or NEEDS[flags])


def refused(parse, flags: str, message: str) -> None:
    if flags.split()[0][2:] in OTHER_VERSIONS - KNOWN:
        pytest.skip("not a field of this transformers")
    package = {"--use_liger_kernel": "liger_kernel", "--deepspeed nofile.json": "deepspeed"}.get(flags)
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    if flags in ("--fp16", "--tf32 true") and torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as caught:
        parse(flags.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", WRONG_FOR_TEXT)
def test_what_run_clm_refuses(flags):
    refused(parse_arguments, flags, WRONG_FOR_TEXT[flags])


@pytest.mark.parametrize("flags", WRONG_FOR_SENTENCES)
def test_what_run_sts_refuses(flags):
    refused(parse_sts_arguments, flags, WRONG_FOR_SENTENCES[flags])


def float_flags(classes) -> list[str]:
    found = {item.name for cls in classes for item in fields(cls) if item.init and "float" in str(item.type)}
    return sorted(found)


@pytest.mark.parametrize("value", NAN)
def test_no_float_may_be_nan_or_infinite(value):
    for name in float_flags((ModelArguments, DataArguments, TrainingArguments)):
        with pytest.raises(UserError, match=name):
            parse_arguments([f"--{name}={value}"])
    for name in float_flags((StsModelArguments, StsDataArguments, StsTrainingArguments)):
        if name not in ("learning_rate_mapping", "warmup_ratio"):
            with pytest.raises(UserError, match=name):
                parse_sts_arguments(["--train_file", "a", f"--{name}={value}"])


def test_a_run_that_evaluates_trains(tiny_run):
    results = tiny_run("--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2")
    assert results["steps"] == 2
    assert results["eval_perplexity"] > 1
    for flags, expected in {
        "--do_train --eval_strategy epoch": (True, True, False),
        "--do_eval --eval_strategy epoch": (False, True, False),
        "--do_predict": (False, False, True),
    }.items():
        *_, training = parse_arguments(flags.split())
        assert (training.do_train, training.do_eval, training.do_test) == expected


def test_the_best_perplexity_is_the_lowest():
    flags = "--eval_strategy steps --load_best_model_at_end --metric_for_best_model"
    for name, greater in {"perplexity": False, "eval_perplexity": False, "accuracy": True, "loss": False}.items():
        *_, training = parse_arguments([*flags.split(), name])
        assert training.greater_is_better is greater


def test_too_few_blocks_for_a_batch(tiny_run, tmp_path):
    with pytest.raises(UserError, match=r"--dataloader_drop_last: the \d+ training blocks do not fill a batch of 900"):
        tiny_run("--do_train", "--dataloader_drop_last", "--per_device_train_batch_size", "900")
    assert not (tmp_path / "run").exists()


def test_drop_last_leaves_the_evaluation_whole(tiny_run):
    flags = ("--do_train", "--do_eval", "--per_device_eval_batch_size", "5")
    whole = tiny_run(*flags, output="whole")
    dropped = tiny_run(*flags, "--dataloader_drop_last", output="dropped")
    assert dropped["eval_tokens_scored"] == whole["eval_tokens_scored"]


def test_a_damaged_value_in_a_recipe_is_refused_too(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"learning_rate": float("nan")}), encoding="utf-8")
    with pytest.raises(UserError, match="--learning_rate is nan"):
        parse_arguments([str(tmp_path / "recipe.json")])
