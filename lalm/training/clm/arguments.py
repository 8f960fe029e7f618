# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Arguments of run_clm.py: four dataclasses, read from flags or from one YAML/JSON recipe plus flags."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from lalm.errors import UserError
from lalm.training.argument_checks import check_training
from lalm.training.clm.stage_arguments import StageArguments
from lalm.training.recipe import parse_dataclasses
from lalm.training.results import EVALUATION_KEYS
from lalm.training.shared_arguments import RunArguments
from lalm.training.shared_arguments import option as _option

DATA_SOURCES = ("dataset_name", "train_file", "validation_file", "test_file")
PACKINGS = ("documents", "concat")
BOUNDARIES = ("auto", "row", "article", "paragraph", "file")
CURRICULA = ("none", "grow_p2", "phases")
SHARED = {"phase_shares": "--phase_lengths", "train_shares": "--train_file"}
STREAMED_EVAL_SAMPLES = 1000
MEASURED_TOKENS = 1024


# ruff: noqa: RUF009  `_option` is `dataclasses.field` with a help text


@dataclass
class ModelArguments:
    """Which model to train: a new one (`model_type`) or an existing one (`model_name_or_path`)."""

    model_type: str | None = _option(
        None, "Train a new model of this type: lalm_gla, lalm_linear, llama ... Default: a small lalm_gla."
    )
    config_overrides: list[str] | None = _option(
        None,
        "Fields of the new model's config as key=value, the values in JSON (true, null, [1, 3], {...}) or plain text; "
        "also one JSON object. A recipe gives a mapping. Flags are merged over the recipe key by key.",
    )
    overrides: dict[str, Any] = field(default_factory=dict, init=False)  # config_overrides, read by parse_arguments
    model_name_or_path: str | None = _option(
        None, "Continue from this checkpoint (folder or Hub name), or score it: --do_eval or --do_test alone."
    )
    compare_with: list[str] | None = _option(
        None, "Other models (folders or Hub names) to score on the same text as --model_name_or_path, in one table."
    )
    tokenizer_name: str | None = _option(
        None, "Tokenizer (folder or Hub name). Default: the checkpoint's, or one trained on the training text."
    )
    tokenizer_vocab_size: int = _option(4096, "Vocabulary of a tokenizer trained here (byte-level BPE).")
    dtype: str = _option(
        "auto", "Weights: auto (float32 for a new model, as stored otherwise), float32, bfloat16, float16."
    )
    attn_implementation: str | None = _option(None, "Softmax attention: eager, sdpa, flash_attention_2 ...")
    model_revision: str = _option("main", "Branch, tag or commit of the checkpoint and its tokenizer.")
    token: str | None = _option(None, "Hub token; default: the one stored by `hf auth login`.")
    trust_remote_code: bool = _option(False, "Allow a checkpoint or tokenizer from the Hub to run its own code.")
    cache_dir: str | None = _option(None, "Where downloads and prepared data are kept. Default: the HF cache.")

    def __post_init__(self):
        dtypes = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in dtypes:
            raise ValueError(f"--dtype is '{self.dtype}'; choose one of {', '.join(dtypes)}")
        if self.tokenizer_vocab_size < 257:
            raise ValueError(
                f"--tokenizer_vocab_size is {self.tokenizer_vocab_size}; a byte-level tokenizer needs at least 258"
            )
        if self.model_name_or_path and self.config_overrides:
            raise ValueError(
                "--config_overrides shapes a new model and contradicts --model_name_or_path; give one of them"
            )


@dataclass
class DataArguments:
    """Which text to train on, what a document is, and how documents become blocks of tokens."""

    dataset_name: str | None = _option(
        None, "Hub dataset. Without it and without files: the Python language reference in pydoc_data.topics."
    )
    dataset_config_name: str | None = _option(None, "Configuration of the Hub dataset.")
    train_file: list[str] | None = _option(None, "Training files: txt, json, jsonl, csv, tsv, parquet, gzip too.")
    validation_file: list[str] | None = _option(None, "Validation files.")
    test_file: list[str] | None = _option(None, "Test files, scored once at the end with --do_test.")
    text_column: str | None = _option(None, "Column that holds the text. Default: 'text', or the only text column.")
    validation_split_percentage: float = _option(
        5.0,
        "Without a validation split: the share of training rows, taken from the end, that is held out. Of a stream it "
        "is the first 1,000 rows.",
    )
    streaming: bool = _option(
        False,
        "Read and tokenize the training text while training, again and again; needs --max_steps. A tokenizer that is "
        "trained here sees the first 5 million characters.",
    )
    shuffle_buffer: int | None = _option(
        None,
        "--streaming: documents that are held in memory, a random one of which comes next; 0: the order of the text. "
        "Default: 10,000 where a document is a row, else 0.",
    )
    document_boundary: str = _option(
        "auto",
        "What a document is: row (a record, or a line of a text file), article (WikiText ' = Title = ' headings), "
        "paragraph (between blank lines), file; auto = row for records, file for text files.",
    )
    packing: str = _option(
        "documents",
        "documents: blocks hold several documents, separated by position_ids that restart; concat: one stream, cut.",
    )
    block_size: int = _option(256, "Tokens in a block.")
    curriculum: str = _option(
        "none",
        "How far tokens look back in the course of the training: none; grow_p2, pieces of documents of 2^i tokens, "
        "short ones more often early, in cycles (Dataset Decomposition); phases, --phase_lengths one after another.",
    )
    curriculum_cycles: int = _option(8, "Cycles of grow_p2 in an epoch.")
    phase_lengths: list[int] | None = _option(
        None, "--curriculum phases: lengths, the last at most block_size. Default: a quarter, half and all of it."
    )
    phase_shares: list[float] | None = _option(
        None, "--curriculum phases: share of the steps of each, 1 together. Default: equal shares."
    )
    train_shares: list[float] | None = _option(
        None, "Share of the training blocks from each --train_file, 1 together. Default: each block once in an epoch."
    )
    eval_stride: int | None = _option(
        None,
        "Step of the evaluation window, 1 .. block_size; below block_size every token is scored with at least "
        "block_size - eval_stride tokens of context. Default: block_size (blocks that do not overlap).",
    )
    max_train_samples: int | None = _option(None, "Use this many training blocks at most.")
    max_eval_samples: int | None = _option(
        None,
        f"Use this many evaluation blocks a split at most. Default: all, with --streaming {STREAMED_EVAL_SAMPLES}.",
    )
    measure_tokens: int | None = _option(
        None,
        f"Tokens of one sequence with which the cache, the speeds of prefill and decoding and the peak memory are "
        f"measured; 0: they are not. Default: {MEASURED_TOKENS} for an evaluation alone, 0 for a run that trains.",
    )
    preprocessing_num_workers: int | None = _option(None, "Processes that tokenize.")
    overwrite_cache: bool = _option(False, "Tokenize again instead of reading the cache.")

    def __post_init__(self):
        self._check_choice("packing", PACKINGS)
        self._check_choice("document_boundary", BOUNDARIES)
        if self.block_size < 2:
            raise ValueError(f"--block_size is {self.block_size}; it must be at least 2")
        if self.eval_stride is None:
            self.eval_stride = self.block_size
        if not 1 <= self.eval_stride <= self.block_size:
            raise ValueError(
                f"--eval_stride is {self.eval_stride}; it must lie in 1 .. block_size ({self.block_size})"
            )
        if self.measure_tokens is not None and self.measure_tokens < 0:
            raise ValueError(f"--measure_tokens is {self.measure_tokens}; it must be at least 0")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError("--validation_split_percentage must lie between 0 and 100, both excluded")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.shuffle_buffer is not None and (self.shuffle_buffer < 0 or not self.streaming):
            raise ValueError(f"--shuffle_buffer is {self.shuffle_buffer}; it must be at least 0, with --streaming")
        if self.streaming and self.max_eval_samples is None:
            self.max_eval_samples = STREAMED_EVAL_SAMPLES
        self._check_order()
        files = [name for name in DATA_SOURCES[1:] if getattr(self, name)]
        if self.dataset_name and files:
            raise ValueError(f"--dataset_name contradicts --{files[0]}; give a Hub dataset or local files")
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError("--dataset_config_name needs --dataset_name")

    def _check_order(self) -> None:
        self._check_choice("curriculum", CURRICULA)
        if self.curriculum_cycles < 1:
            raise ValueError(f"--curriculum_cycles is {self.curriculum_cycles}; it must be at least 1")
        if self.curriculum == "phases":
            self.phase_lengths = self.phase_lengths or [max(2, self.block_size // part) for part in (4, 2, 1)]
            self.phase_shares = self.phase_shares or [1 / len(self.phase_lengths)] * len(self.phase_lengths)
            if not 2 <= min(self.phase_lengths) <= max(self.phase_lengths) <= self.block_size:
                raise ValueError(
                    f"--phase_lengths {' '.join(map(str, self.phase_lengths))} must lie in 2 .. --block_size "
                    f"{self.block_size}"
                )
        elif self.phase_lengths or self.phase_shares:
            raise ValueError("--phase_lengths and --phase_shares need --curriculum phases")
        for name, counted in (("phase_shares", self.phase_lengths), ("train_shares", self.train_file)):
            if (shares := getattr(self, name)) is None:
                continue
            if len(shares) != len(counted or []):
                raise ValueError(f"--{name} has {len(shares)} numbers for {len(counted or [])} {SHARED[name]}")
            if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-3:
                raise ValueError(f"--{name} must be above 0 and sum to 1; their sum is {sum(shares):g}")
        if self.packing != "documents" and self.curriculum == "grow_p2":
            raise ValueError("--curriculum grow_p2 cuts documents and needs --packing documents")
        if self.curriculum == "grow_p2" and self.train_shares:
            raise ValueError("--curriculum grow_p2 has an order of its own and contradicts --train_shares")
        if self.streaming and (self.curriculum != "none" or self.train_shares):
            raise ValueError(
                "--streaming makes blocks while training; --curriculum and --train_shares order blocks that are there "
                "before it: drop --streaming, or take a part of the text by --train_file"
            )
        if self.max_train_samples and (self.curriculum == "grow_p2" or self.train_shares):
            raise ValueError("--max_train_samples has no meaning with --curriculum grow_p2 or --train_shares; drop it")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"--{name} is '{getattr(self, name)}'; choose one of {', '.join(choices)}")


@dataclass
class ClmTrainingArguments(StageArguments, RunArguments, TrainingArguments):
    """`TrainingArguments` with defaults for language modelling from scratch, and arguments of our own."""

    must_match: ClassVar[tuple[str, ...]] = (
        "model_type", "overrides", "model_name_or_path", "tokenizer_name", "tokenizer_vocab_size", "dtype",
        "dataset_name", "dataset_config_name", "train_file", "text_column", "streaming", "shuffle_buffer",
        "document_boundary", "packing", "block_size", "curriculum", "curriculum_cycles", "phase_lengths",
        "phase_shares", "train_shares", "max_train_samples", "seed", "stage", "teacher", "keep_softmax_layers",
        "lora_rank", "feature_positions",
    )  # fmt: skip

    without_meaning: ClassVar[dict[str, str]] = {
        "prediction_loss_only": "perplexity and accuracy are summed over tokens, which needs the predictions",
        "eval_use_gather_object": "the figures of an evaluation are gathered as tensors",
        "remove_unused_columns": "the collator makes what the model takes from columns that the model has not",
    }
    metric_names: ClassVar[tuple[str, ...]] = tuple(f"eval_{key}" for key in EVALUATION_KEYS)

    tokens_per_update: int | None = _option(
        None,
        "Tokens of one update, all processes together: sets --gradient_accumulation_steps, rounded up to a batch.",
    )
    output_dir: str | None = _option("lalm-output", "Folder of the checkpoints, results, loss curve and model card.")
    learning_rate: float = _option(1e-3, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = _option("warmup_stable_decay", "Learning-rate schedule.")
    warmup_steps: float = _option(0.05, "Warm-up steps, or below 1 their share of all steps.")
    weight_decay: float = _option(0.1, "Weight decay, not applied to biases and norms.")
    adam_beta2: float = _option(0.95, "Second beta of AdamW.")
    num_train_epochs: float = _option(1.0, "Passes over the training text.")
    logging_steps: float = _option(10, "Log every so many steps.")
    logging_first_step: bool = _option(True, "Log the first step too: what the loss is at the start.")
    save_total_limit: int | None = _option(2, "Checkpoints kept.")
    include_num_input_tokens_seen: str = _option("all", "Count the tokens seen: all, non_padding or no.")
    remove_unused_columns: bool = _option(False, "Not used: the collator makes exactly what the model takes.")
    gate_logging_steps: int = _option(
        0, "Log half-lives, write strengths and states of every layer (lalm.inspect) every so many steps; 0: never."
    )
    batch_eval_metrics: bool = _option(True, "Sum the evaluation batch by batch (always on).")

    def __post_init__(self):
        self.check_run()
        self.check_stage()
        if self.label_names not in (None, [], ["labels"]):
            raise ValueError(f"--label_names is {' '.join(self.label_names)}; the labels of a block are 'labels'")
        self.do_test = self.do_test or self.do_predict
        # asked before `TrainingArguments` sets do_eval for a training that evaluates
        nothing_chosen = not (self.do_train or self.do_eval or self.do_test)
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # left alone, transformers would keep the highest perplexity
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "perplexity"))
        super().__post_init__()
        if nothing_chosen:
            self.do_train = self.do_eval = True
        # per-token sums need every batch, and the metric is written for sums
        self.batch_eval_metrics = True
        check_training(self)


ARGUMENT_CLASSES = (ModelArguments, DataArguments, ClmTrainingArguments)


def accumulate(training: ClmTrainingArguments, block_size: int) -> None:
    """Accumulate as many batches as make `tokens_per_update`."""
    wanted = training.tokens_per_update
    if wanted is None:
        return
    blocks = training.train_batch_size * training.world_size
    tokens = blocks * block_size
    if wanted < tokens:
        raise UserError(
            f"--tokens_per_update {wanted:,} is below one batch, which has {blocks} blocks of {block_size} tokens "
            f"({tokens:,}); lower --per_device_train_batch_size or --block_size"
        )
    if training.gradient_accumulation_steps not in (1, steps := -(-wanted // tokens)):
        raise UserError(
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps} contradicts --tokens_per_update, "
            f"which asks for {steps}; drop one of them"
        )
    training.gradient_accumulation_steps = steps


def reconcile(recipe: dict, given: set[str]) -> dict:
    """Drop from the recipe what the flags replace as a whole: the source of the text, or the model to start from."""
    dropped: set[str] = set()
    if "dataset_name" in given or given & set(DATA_SOURCES[1:]):
        dropped |= {*DATA_SOURCES, "dataset_config_name"} - given
    if "model_name_or_path" in given:
        dropped.add("config_overrides")
    elif given & {"model_type", "config_overrides"}:
        dropped.add("model_name_or_path")
    return {key: value for key, value in recipe.items() if key not in dropped}


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, ClmTrainingArguments]:
    """Parse ``[recipe.yaml] --flag value ...`` into the three dataclasses.

    `ModelArguments.overrides` holds the config overrides: the recipe's mapping with the flags merged over it.

    Raises:
        UserError: unknown names (the nearest one is given), wrong types, contradictory options.
    """
    model, data, training = parse_dataclasses(ARGUMENT_CLASSES, argv, "run_clm.py", reconcile)
    if model.model_name_or_path and model.overrides:
        raise UserError("config_overrides shapes a new model and contradicts model_name_or_path; give one of them")
    if model.compare_with and (training.do_train or not model.model_name_or_path):
        raise UserError("--compare_with needs --model_name_or_path, and --do_eval or --do_test without --do_train")
    accumulate(training, data.block_size)
    if data.measure_tokens is None:
        data.measure_tokens = 0 if training.do_train else MEASURED_TOKENS
    return model, data, training
