# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Arguments that run_clm.py and run_sts.py share."""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from lalm.training.argument_checks import TOKEN_COUNTS, check_ranges


def option(default, text: str):
    """Return a dataclass field with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    """What every run has besides `transformers.TrainingArguments`, of which this is a mix-in (named before it)."""

    script: ClassVar[str] = "run_clm.py"
    # a resumed run with another value in one of these arguments would be another run
    must_match: ClassVar[tuple[str, ...]] = ()
    # with another value in one of these it goes on, but in another way: that is said
    changes_training: ClassVar[tuple[str, ...]] = (
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "decay_ratio", "max_steps",
        "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "optim",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16",
        "fp16", "data_seed",
    )  # fmt: skip
    # fields of `TrainingArguments` that can do nothing in this script, each with the reason
    without_meaning: ClassVar[dict[str, str]] = {}
    # what an evaluation gives, and `metric_for_best_model` may name
    metric_names: ClassVar[tuple[str, ...]] = ()

    license: str = option("apache-2.0", "Licence of the weights, for the model card: mit, cc-by-4.0 ...")
    language: list[str] | None = field(
        default=None, metadata={"help": "Languages of the text, for the model card: en de ..."}
    )
    do_test: bool = option(False, "Score the test split once, after training.")
    start_over: bool = option(False, "Delete the earlier run in --output_dir instead of resuming it.")
    decay_ratio: float = option(
        0.2, "warmup_stable_decay: share of the steps that decay, if lr_scheduler_kwargs has no num_decay_steps."
    )

    def check_run(self: Any) -> None:
        """Fit the device and check what is ours; to be called before `TrainingArguments.__post_init__`."""
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.fp16 and self.use_cpu:
            raise ValueError("--fp16 needs a GPU; use --bf16 on CPU")
        if self.ddp_backend and "RANK" not in os.environ:
            raise ValueError("--ddp_backend needs several processes; start the script with accelerate launch")
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise ValueError("--deepspeed needs a package that is not installed: pip install deepspeed")
        check_ranges(self)
        # a flag passes true and false as text, and any text but "no" would count
        run: Any = self  # to the type checker, an assignment to self would declare the field a second time
        counted = str(run.include_num_input_tokens_seen).lower()
        run.include_num_input_tokens_seen = {"true": "all", "false": "no"}.get(counted, counted)
        if run.include_num_input_tokens_seen not in TOKEN_COUNTS:
            raise ValueError(
                f"--include_num_input_tokens_seen is '{counted}'; choose one of {', '.join(TOKEN_COUNTS)}"
            )
        if not 0 < self.decay_ratio <= 1:
            raise ValueError(f"--decay_ratio is {self.decay_ratio}; it must lie in (0, 1]")

    def __getstate__(self) -> dict[str, Any]:
        """Without the token: the Trainer pickles its arguments into training_args.bin."""
        return vars(self) | {"hub_token": None}

    @property
    def folder(self: Any) -> Path:
        """The output folder."""
        return Path(str(self.output_dir))

    @property
    def evaluates(self: Any) -> bool:
        """Whether the training is interrupted by evaluations."""
        return self.eval_strategy != "no"

    @property
    def trackers(self: Any) -> list[str]:
        """The experiment trackers to report to."""
        return list(self.report_to) if isinstance(self.report_to, list) else []
