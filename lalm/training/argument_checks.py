# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What `TrainingArguments` leaves to the middle of a run is refused here, before any text is read.

Numbers are held against a table of ranges. Optimizer, schedule, data loader and activation checkpointing are made once
in miniature, so that whatever torch or transformers say of their options is said now.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, get_scheduler

from lalm.errors import nearest_hint, one_line

LARGEST_SEED = 2**32 - 1
# the lowest and the highest value; what lies between is left to torch and transformers
RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "torch_empty_cache_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "max_steps": (-1, math.inf),
    "warmup_steps": (0, math.inf),
    "logging_steps": (0, math.inf),
    "gate_logging_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "eval_delay": (0, math.inf),
    "save_steps": (0, math.inf),
    "save_total_limit": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, math.nextafter(1, 0)),
    "adam_beta2": (0, math.nextafter(1, 0)),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "label_smoothing_factor": (0, math.nextafter(1, 0)),
    "neftune_noise_alpha": (0, math.inf),
    "seed": (0, LARGEST_SEED),
    "data_seed": (0, LARGEST_SEED),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "ddp_bucket_cap_mb": (1, math.inf),
    "ddp_timeout": (1, math.inf),
}
TOKEN_COUNTS = ("all", "non_padding", "no")
# optimizers that choose among the weights of the real model
PICKY_OPTIMIZERS = ("galore", "apollo", "lomo")
# the largest miniature schedule; a run whose length is not known yet counts as this long
MINIATURE_STEPS = 1000


def check_finite(arguments: Any) -> None:
    """Refuse NaN and infinity in any field of a dataclass of arguments.

    Raises:
        ValueError: it names the flag.
    """
    for item in fields(arguments):
        value = getattr(arguments, item.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"--{item.name} is {number}; it must be a finite number")


def check_ranges(training: Any) -> None:
    """Refuse numbers that no run can have, before `TrainingArguments.__post_init__` computes with them.

    Raises:
        ValueError: it names the flag and the range.
    """
    check_finite(training)
    for name, (low, high) in RANGES.items():
        value = getattr(training, name, None)
        if value is None or isinstance(value, bool) or low <= value <= high:
            continue
        above = " and below 1" if high < 1 else f" and at most {high}" if high < math.inf else ""
        raise ValueError(f"--{name} is {value:g}; it must be at least {low:g}{above}")
    if training.max_steps == 0:
        raise ValueError("--max_steps is 0; give a number of steps, or -1 for --num_train_epochs passes")


def check_training(training: Any) -> None:
    """Refuse what `TrainingArguments` accepts and a run would fall over later.

    Args:
        training: `RunArguments` with `TrainingArguments`, initialised.

    Raises:
        ValueError: it names the flag and says what is wrong.
    """
    for flag, check in CHECKS:
        try:
            check(training)
        except Exception as error:  # noqa: PERF203
            # torch, accelerate and transformers have an error type for each of these mistakes
            raise ValueError(f"{flag}{one_line(error)}") from None


def check_meaning(training: Any) -> None:
    """Refuse what is given and could do nothing, or break something, in this script."""
    for item in fields(training):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name in training.without_meaning and getattr(training, item.name) != default:
            raise ValueError(f"--{item.name} has no use here: {training.without_meaning[item.name]}; drop it")


def check_files(training: Any) -> None:
    """A dictionary may be given as the path of a file; only that of accelerate, FSDP and DeepSpeed is read from it."""
    for name in training._VALID_DICT_FIELDS:
        value = getattr(training, name, None)
        if isinstance(value, str) and value and (name.endswith("_kwargs") or not os.path.isfile(value)):
            kinds = "no JSON object" if name.endswith("_kwargs") else "no JSON object and no file"
            raise ValueError(f"--{name} is '{value}', which is {kinds}")


def check_optimizer(training: Any) -> None:
    """Create the optimizer for a 2 x 2 layer."""
    picky = any(name in str(training.optim) for name in PICKY_OPTIMIZERS)
    layer = torch.nn.Linear(2, 2)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training, layer)  # type: ignore[arg-type]
        optimizer_class(layer.parameters(), **options)
    except ImportError:
        raise
    except Exception:
        if not picky:
            raise


def schedule_options(training: Any, steps: int) -> Any:
    """`lr_scheduler_kwargs`; warmup_stable_decay gets its decay from `decay_ratio` if it has no `num_decay_steps`."""
    options = training.lr_scheduler_kwargs or {}
    if training.lr_scheduler_type != "warmup_stable_decay" or "num_decay_steps" in options:
        return options
    room = steps - training.get_warmup_steps(steps)
    return {**options, "num_decay_steps": max(0, min(round(training.decay_ratio * steps), room))}


def check_schedule(training: Any) -> None:
    """Make the schedule and look at its first, middle and last steps."""
    steps = training.max_steps if training.max_steps > 0 else MINIATURE_STEPS
    warmup, options = training.get_warmup_steps(steps), schedule_options(training, steps)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=training.learning_rate)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps, options)
    for step in {0, 1, steps // 2, max(0, steps - 1), steps}:
        for factor in getattr(schedule, "lr_lambdas", []):
            if not math.isfinite(factor(step)):
                raise ValueError(
                    f"{SchedulerType(training.lr_scheduler_type).value} gives no finite rate at step {step}"
                )


def check_loader(training: Any) -> None:
    """Make a data loader; its workers would start with its first batch only."""
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=training.dataloader_num_workers,
        persistent_workers=training.dataloader_persistent_workers,
        prefetch_factor=training.dataloader_prefetch_factor,
        # without workers torch ignores it, and a typo would go unseen
        multiprocessing_context=training.dataloader_multiprocessing_context,
    )


def check_activation_checkpointing(training: Any) -> None:
    """Run a checkpointed layer."""
    # its name up to transformers 5.20
    options = getattr(training, "activation_checkpointing_kwargs", None) or training.gradient_checkpointing_kwargs
    checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **(options or {})})


def check_compiler(training: Any) -> None:
    """Look the backend and the mode of torch.compile up."""
    from accelerate.utils import DynamoBackend

    backend, mode = training.torch_compile_backend, training.torch_compile_mode
    names = [str(item.value).lower() for item in DynamoBackend]
    if backend is not None and backend.lower() not in names:
        raise ValueError(
            f"there is no backend '{backend}'{nearest_hint(backend, names)}; take one of {', '.join(names)}"
        )
    if mode is not None and mode not in (modes := list(torch._inductor.list_mode_options())):
        raise ValueError(f"there is no mode '{mode}'{nearest_hint(mode, modes)}; take one of {', '.join(modes)}")


def check_liger(training: Any) -> None:
    """Refuse the kernels of a package that is not installed."""
    if training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("it needs a package that is not installed: pip install liger-kernel")


def check_devices(training: Any) -> None:
    """Refuse what needs other processes or devices than there are."""
    if training.fsdp and training.parallel_mode.value != "distributed":
        raise ValueError("--fsdp needs several processes; start the script with accelerate launch")
    if "tpu_metrics_debug" in training.debug and importlib.util.find_spec("torch_xla") is None:
        raise ImportError("--debug tpu_metrics_debug needs a TPU and the package torch_xla")


def check_best(training: Any) -> None:
    """Refuse a best checkpoint that no evaluation chooses, or a metric that no evaluation gives."""
    if str(getattr(training.save_strategy, "value", training.save_strategy)) == "best" and not training.evaluates:
        raise ValueError("there is no best checkpoint without evaluations; give --eval_strategy steps or epoch")
    name = training.metric_for_best_model
    known = training.metric_names
    if name is not None and name not in known and f"eval_{name}" not in known:
        raise ValueError(f"there is no metric '{name}'{nearest_hint(name, known)}; there are {', '.join(known)}")


# with what its messages begin, if they do not name the flag themselves
CHECKS: tuple[tuple[str, Callable[[Any], None]], ...] = (
    ("", check_meaning),
    ("", check_files),
    ("", check_devices),
    ("--optim: ", check_optimizer),
    ("--lr_scheduler_type, --lr_scheduler_kwargs: ", check_schedule),
    ("--dataloader_*: ", check_loader),
    ("--activation_checkpointing_kwargs: ", check_activation_checkpointing),
    ("--torch_compile: ", check_compiler),
    ("--use_liger_kernel: ", check_liger),
    ("--save_strategy, --metric_for_best_model: ", check_best),
)
