# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Arguments of run_sts.py: three dataclasses, read from flags or from one YAML/JSON recipe plus flags."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainingArguments

from lalm.errors import UserError
from lalm.training.argument_checks import check_training
from lalm.training.recipe import parse_dataclasses, parse_overrides
from lalm.training.shared_arguments import RunArguments
from lalm.training.shared_arguments import option as _option
from lalm.training.sts.augmentation import AUGMENTATIONS
from lalm.training.sts.losses import LAYER_MAPS
from lalm.training.sts.tasks import TASKS
from lalm.training.sts.teacher import DEFAULT_TEACHER, PRECISIONS

# what a stage uses where an argument is not given; the weights of `relational` and the learning rates are LAM's
STAGES: dict[str, dict[str, Any]] = {
    "distill": {
        "embedding_weight": 1.0, "layer_weight": 1.0, "similarity_weight": 0.0, "margin_weight": 0.0,
        "embedding_metric": "cosine", "retention_weight": 0.0, "learning_rate": 5e-4,
    },
    "relational": {
        "embedding_weight": 0.5, "layer_weight": 0.5, "similarity_weight": 0.5, "margin_weight": 2.5,
        "embedding_metric": "mse", "retention_weight": 0.0, "learning_rate": 3e-5,
    },
    "finetune": {
        "embedding_weight": 0.0, "layer_weight": 0.0, "similarity_weight": 0.0, "margin_weight": 0.0,
        "embedding_metric": "cosine", "retention_weight": 0.05, "learning_rate": 1.5e-5,
    },
}  # fmt: skip
# kinds of data of the stage finetune and their shares of the batches, LAM's
MIXTURE = {"sts": 0.35, "nli": 0.20, "qa": 0.15, "paraphrase": 0.20, "triplet": 0.10}
# kinds that LAM's mixture does not have
KINDS = (*MIXTURE, "document", "text")
CHOICES = {
    "stage": tuple(STAGES),
    "embedding_metric": ("cosine", "mse", "l2"),
    "layer_map": LAYER_MAPS,
    "teacher_vectors": ("auto", "cached", "live"),
    "teacher_precision": PRECISIONS,
    "curriculum": ("none", "grow_p2", "phases"),
    "row_order": ("random", "easy_to_hard"),
    "save_dtype": ("auto", "float32", "bfloat16"),
}


def _check_choices(arguments: Any) -> None:
    for name, choices in CHOICES.items():
        value = getattr(arguments, name, None)
        if value is not None and value not in choices:
            raise ValueError(f"--{name} is '{value}'; choose one of {', '.join(choices)}")


def _check_range(arguments: Any, names: tuple[str, ...], low: float) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= low:
            raise ValueError(f"--{name} is {value:g}; it must be at least {low:g}")


# ruff: noqa: RUF009  `_option` is `dataclasses.field` with a help text


@dataclass
class StsModelArguments:
    """Which model to evaluate or train, and which to learn from."""

    model_name_or_path: str | None = _option(
        None,
        "Model to evaluate or to train further: a folder or a Hub name. --stage distill makes one from the teacher "
        "without it; --eval_only takes checkpoints/lam-minilm-l6, or the teacher where that is missing.",
    )
    teacher: str = _option(DEFAULT_TEACHER, "Model to learn from: folder or Hub name of a sentence transformer.")
    teacher_prompt: str | None = _option(
        None,
        "Put before every text that the teacher reads: 'query: ' for E5. Default: its own default prompt, if any.",
    )
    teacher_bf16: bool = _option(False, "Load the teacher in bfloat16: twice as fast on CPUs that have it.")
    baseline: str | None = _option(
        None, "Second model: its figures and a paired bootstrap interval of the difference are shown."
    )
    config_overrides: list[str] | None = _option(
        None,
        "Fields of a new student's config as key=value (--stage distill without --model_name_or_path), the values in "
        "JSON: use_flux=false. A recipe gives a mapping. Flags are merged over the recipe key by key.",
    )
    overrides: dict[str, Any] = field(default_factory=dict, init=False)  # config_overrides, read by parse_arguments
    ridge_texts: int = _option(768, "Texts on which a new student's output projections are fitted; 0: not fitted.")
    model_max_length: int = _option(8192, "Tokens of a text that a new student reads; the rest is cut.")
    freeze: list[str] | None = _option(
        None, "Weights whose names contain one of these are not trained: embed_tokens embed_norm ..."
    )
    save_dtype: str = _option("auto", "Weights of the saved model: auto (as trained), float32, bfloat16.")
    token: str | None = _option(None, "Hub token; default: the one stored by `hf auth login`.")
    trust_remote_code: bool = _option(False, "Allow a model from the Hub to run its own code.")
    cache_dir: str | None = _option(None, "Where downloads and teachers' vectors are kept. Default: the HF cache.")

    def __post_init__(self):
        _check_choices(self)
        _check_range(self, ("ridge_texts",), 0)
        _check_range(self, ("model_max_length",), 1)


@dataclass
class StsDataArguments:
    """Pairs to score and texts to train on. Strings of STS-B's validation and test splits are never trained on.

    A source of pairs is a file or a Hub data set (`org/name` or `org/name/config`), and may name its columns and the
    rows to take: `pairs.tsv.gz::1,2`, `snli.jsonl::sentence1,sentence2::gold_label=entailment`.
    """

    data_dir: str | None = _option(
        None, "Folder with STS-B (stsb-en-train.csv ...). Default: sentence-transformers/stsb, else built-in pairs."
    )
    tasks: list[str] | None = _option(
        None, f"Further test sets to score: {', '.join(TASKS)}. From the Hub (mteb/sts12-sts ...) or --tasks_dir."
    )
    tasks_dir: str | None = _option(None, "Folder with SentEval's data for --tasks: STS/STS12-en-test ..., SICK.")
    train_file: list[str] | None = _option(
        None,
        "Training data: texts for --stage distill (txt, csv, tsv, json, jsonl, parquet, gzip too; every text column), "
        "sources of pairs for --stage relational. Default: data sets of the Hub. --stage finetune with a share of "
        "'text' keeps the teacher's vectors of these texts.",
    )
    train_weights: list[float] | None = _option(
        None, "For each --train_file: how often it is seen in an epoch; 0.5 takes a random half of it."
    )
    nli_file: list[str] | None = _option(None, "--stage finetune: sources of (anchor, entailed[, contradicting]).")
    qa_file: list[str] | None = _option(None, "--stage finetune: sources of (question, answer).")
    paraphrase_file: list[str] | None = _option(None, "--stage finetune: sources of (text, paraphrase).")
    triplet_file: list[str] | None = _option(None, "--stage finetune: sources of (anchor, positive, negative).")
    document_file: list[str] | None = _option(
        None, "--stage finetune: articles with title and text, to be found by their title and sentences."
    )
    held_out_file: list[str] | None = _option(None, "Titles of articles, one a line, that --document_file leaves out.")
    document_tokens: int = _option(4096, "Tokens of the longest document, about; lengths are drawn from 256 on.")
    mixture: list[str] | None = _option(
        None,
        "--stage finetune: shares of the batches as kind=share, a kind left out has none. Default: "
        + " ".join(f"{kind}={share:g}" for kind, share in MIXTURE.items()),
    )
    shares: dict[str, float] = field(default_factory=dict, init=False)  # mixture, read by __post_init__
    mine_negatives: int = _option(
        0, "--stage finetune: hard negatives to mine with the teacher for each pair without a negative."
    )
    mine_range_min: int = _option(10, "Mining skips this many nearest texts, which may be paraphrases.")
    mine_range_max: int = _option(60, "Mining looks at this many nearest texts.")
    mine_margin: float = _option(0.05, "A mined negative is at least this share less similar than the positive.")
    max_train_samples: int | None = _option(None, "Use this many training rows of each source at most, random ones.")
    augmentation: list[str] | None = _option(
        None,
        "Altered copies of the training rows, one for each that is named: word_deletion, word_swap. The first text of "
        "a row is altered; the other texts and the score stay.",
    )
    augmentation_rate: float = _option(0.1, "Share of the words that --augmentation deletes or exchanges.")
    row_order: str = _option(
        "random",
        "random, or easy_to_hard: pairs whose words tell how alike they are before those whose words mislead, in ten "
        "degrees.",
    )
    teacher_vectors: str = _option(
        "auto",
        "Teacher's vectors: cached (all texts once, kept on disk), live (in every step), auto: live where the teacher "
        "runs anyway, for its layers.",
    )
    teacher_precision: str = _option("float16", "Cached vectors: float16 or float32.")

    def __post_init__(self):
        _check_choices(self)
        _check_range(self, ("mine_negatives", "mine_range_min"), 0)
        _check_range(self, ("max_train_samples", "mine_range_max", "document_tokens"), 1)
        if unknown := [name for name in self.tasks or [] if name not in TASKS]:
            raise ValueError(f"--tasks is '{unknown[0]}'; choose among {', '.join(TASKS)}")
        if self.tasks_dir and not self.tasks:
            raise ValueError(f"--tasks_dir holds data for --tasks; give --tasks {' '.join(TASKS)}")
        if self.mine_range_max <= self.mine_range_min:
            raise ValueError("--mine_range_max must be above --mine_range_min")
        if not 0 <= self.mine_margin < 1:
            raise ValueError(f"--mine_margin is {self.mine_margin:g}; it must lie in [0, 1)")
        if unknown := [name for name in self.augmentation or [] if name not in AUGMENTATIONS]:
            raise ValueError(f"--augmentation is '{unknown[0]}'; choose among {', '.join(AUGMENTATIONS)}")
        if not 0 < self.augmentation_rate < 1:
            raise ValueError(f"--augmentation_rate is {self.augmentation_rate:g}; it must lie between 0 and 1")
        if self.train_weights is not None:
            files = len(self.train_file or [])
            if len(self.train_weights) != files:
                raise ValueError(f"--train_weights has {len(self.train_weights)} numbers for {files} --train_file")
            if min(self.train_weights) <= 0:
                raise ValueError("--train_weights must be above 0")
        self.shares = self._shares()

    def _shares(self) -> dict[str, float]:
        shares = parse_overrides(self.mixture, "--mixture") if self.mixture else dict(MIXTURE)
        for kind, share in shares.items():
            if kind not in KINDS:
                raise ValueError(f"--mixture: there is no kind '{kind}'; there are {', '.join(KINDS)}")
            try:
                shares[kind] = float(share)
            except (TypeError, ValueError):
                shares[kind] = -1.0
            if not 0 <= shares[kind] < math.inf:
                raise ValueError(f"--mixture: {kind}={share}: a share is a number of at least 0")
        if not sum(shares.values()):
            raise ValueError("--mixture: all shares are 0")
        return {kind: share for kind, share in shares.items() if share}


@dataclass
class StsTrainingArguments(RunArguments, SentenceTransformerTrainingArguments):
    """`SentenceTransformerTrainingArguments` with our defaults, the stage, its losses and its batches."""

    script: ClassVar[str] = "run_sts.py"
    must_match: ClassVar[tuple[str, ...]] = (
        "stage", "model_name_or_path", "teacher", "teacher_prompt", "overrides", "ridge_texts", "freeze", "data_dir",
        "train_file", "train_weights", "nli_file", "qa_file", "paraphrase_file", "triplet_file", "shares",
        "document_file", "held_out_file", "document_tokens",
        "mine_negatives", "mine_range_min", "mine_range_max", "mine_margin", "matryoshka_dims", "max_train_samples",
        "augmentation", "augmentation_rate", "row_order",
        "max_seq_length", "seed",
    )  # fmt: skip
    changes_training: ClassVar[tuple[str, ...]] = (
        *RunArguments.changes_training, "embedding_weight", "layer_weight", "similarity_weight", "margin_weight",
        "contrastive_weight", "embedding_metric", "layer_map", "temperature", "margin", "sts_mse_weight",
        "orthogonal_weight", "retention_weight", "max_batch_tokens", "curriculum", "curriculum_cycles",
        "early_stopping_patience", "projection_learning_rate",
    )  # fmt: skip

    # sentence-transformers' list is older than transformers' own
    _VALID_DICT_FIELDS = sorted(
        {*TrainingArguments._VALID_DICT_FIELDS, *SentenceTransformerTrainingArguments._VALID_DICT_FIELDS}
    )
    without_meaning: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "the losses of sentence embeddings have no classes",
        "torch_compile": "the losses look inside the model",
        "neftune_noise_alpha": "the Trainer finds no table of embeddings in a sentence transformer",
        "batch_sampler": "each stage makes its own batches",
        "multi_dataset_batch_sampler": "--mixture says how data sets are mixed",
        "router_mapping": "the students have no router",
    }
    metric_names: ClassVar[tuple[str, ...]] = ("eval_sts-dev_pearson_cosine", "eval_sts-dev_spearman_cosine")

    output_dir: str | None = _option(
        None, "Folder of the checkpoints, results, plots and model card. Default: lalm-sts-<stage>, lalm-sts-eval."
    )
    stage: str | None = _option(None, "Training stage: distill, relational or finetune. Without one: --eval_only.")
    eval_only: bool = _option(False, "Score the validation and test splits, and train nothing.")
    embedding_weight: float | None = _option(None, "Weight of the distance to the teacher's vectors.")
    layer_weight: float | None = _option(None, "Weight of the error of the hidden states.")
    similarity_weight: float | None = _option(None, "Weight of the divergence of the similarities in a batch.")
    margin_weight: float | None = _option(None, "Weight of the contrastive margin between pairs.")
    contrastive_weight: float = _option(
        0.0, "Weight of the cross-entropy of finding a text's pair, or its teacher's vector, in the batch."
    )
    embedding_metric: str | None = _option(None, "Distance to the teacher's vectors: cosine, mse, l2.")
    layer_map: str = _option("uniform", "Which of the teacher's layers are matched: uniform, last, final (only one).")
    temperature: float = _option(0.04, "Temperature of the similarities in a batch.")
    margin: float = _option(0.2, "Contrastive margin, in cosine.")
    sts_mse_weight: float = _option(
        10.0, "--stage finetune: weight of the squared error next to CoSENT on STS scores."
    )
    orthogonal_weight: float = _option(0.0, "Weight of |W W^T - I|^2 per row of the q, k and v projections.")
    retention_weight: float | None = _option(None, "Weight of |w - w_0|^2, the distance from the stage's start.")
    matryoshka_dims: list[int] | None = _option(None, "--stage finetune: sizes to which vectors may be cut: 384 128.")
    max_seq_length: int = _option(128, "Training texts are cut to this many tokens. The model's own limit stays.")
    max_batch_tokens: int | None = _option(
        None, "Batches of long texts get fewer rows, so that rows times longest text stay below this."
    )
    curriculum: str = _option(
        "none",
        "Order of text lengths: none, grow_p2 (short ones more often early, in cycles), phases (short half, all, "
        "long half).",
    )
    curriculum_cycles: int = _option(8, "Cycles of grow_p2 in an epoch.")
    early_stopping_patience: int = _option(0, "Stop after so many evaluations without a better dev Pearson; 0: never.")
    learning_rate: float | None = _option(None, "Peak learning rate of AdamW; the default depends on the stage.")  # type: ignore[assignment]
    projection_learning_rate: float = _option(2e-4, "Learning rate of maps to the width of another teacher.")
    lr_scheduler_type: str = _option("warmup_stable_decay", "Learning-rate schedule.")
    warmup_steps: float = _option(0.05, "Warm-up steps, or below 1 their share of all steps.")
    weight_decay: float = _option(0.01, "Weight decay, not applied to biases and norms.")
    adam_beta2: float = _option(0.98, "Second beta of AdamW.")
    per_device_train_batch_size: int = _option(64, "Rows in a batch.")
    per_device_eval_batch_size: int = _option(64, "Texts in a batch of the evaluation.")
    num_train_epochs: float = _option(1.0, "Passes over the training data.")
    logging_steps: float = _option(10, "Log every so many steps.")
    logging_first_step: bool = _option(True, "Log the first step too: what the loss is at the start.")
    eval_strategy: str = _option("steps", "When dev is scored: steps, epoch or no.")
    eval_steps: float | None = _option(0.1, "Score dev every so many steps, or below 1 their share of all steps.")
    eval_on_start: bool = _option(True, "Score dev before the first step too.")
    save_total_limit: int | None = _option(2, "Checkpoints kept.")
    load_best_model_at_end: bool = _option(True, "End with the weights of the best dev score.")
    metric_for_best_model: str | None = _option("eval_sts-dev_pearson_cosine", "What 'best' is.")
    greater_is_better: bool | None = _option(True, "The best is the greatest.")

    def __post_init__(self):
        self.check_run()
        _check_choices(self)
        names = ("embedding_weight", "layer_weight", "similarity_weight", "margin_weight", "retention_weight")
        others = ("contrastive_weight", "orthogonal_weight", "sts_mse_weight", "early_stopping_patience")
        _check_range(self, (*names, *others), 0)
        _check_range(self, ("max_seq_length", "curriculum_cycles"), 1)
        if self.temperature <= 0:
            raise ValueError(f"--temperature is {self.temperature:g}; it must be above 0")
        if self.stage and self.eval_only:
            raise ValueError("--eval_only trains nothing and contradicts --stage; give one of them")
        for name, value in STAGES[self.stage or "distill"].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.eval_strategy == "no":
            if self.early_stopping_patience:
                raise ValueError("--early_stopping_patience needs evaluations; drop --eval_strategy no")
            self.load_best_model_at_end = self.eval_on_start = False
        if self.load_best_model_at_end:
            # the best weights are those of a checkpoint
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.save_steps
        self._check_stage()
        self.output_dir = self.output_dir or f"lalm-sts-{self.stage or 'eval'}"
        super().__post_init__()
        self.do_train, self.do_eval = self.stage is not None, True
        self.do_test = self.do_test or self.do_predict
        for pattern in self.learning_rate_mapping or {}:
            try:
                re.compile(pattern)
            except re.error as error:  # noqa: PERF203
                raise ValueError(f"--learning_rate_mapping: '{pattern}' is no regular expression: {error}") from None
        check_training(self)

    def _check_stage(self) -> None:
        if self.matryoshka_dims and self.stage not in (None, "finetune"):
            raise ValueError("--matryoshka_dims is for --stage finetune")
        if self.stage in ("distill", "relational"):
            weights = self.loss_weights
            if not any(weights.values()):
                raise ValueError(f"every weight of --stage {self.stage} is 0: nothing would be learnt")
            if self.stage == "distill" and weights["margin"]:
                raise ValueError("--margin_weight needs pairs of texts; use --stage relational")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights of `DistillationLoss`."""
        names = {"embedding": "embedding", "layers": "layer", "similarity": "similarity", "margin": "margin"}
        names["contrastive"] = "contrastive"
        return {term: float(getattr(self, f"{name}_weight") or 0) for term, name in names.items()}

    @property
    def max_length(self) -> int:
        """`max_seq_length`, by the name that the collator of sentence-transformers looks for."""
        return self.max_seq_length


STS_ARGUMENT_CLASSES = (StsModelArguments, StsDataArguments, StsTrainingArguments)


def reconcile(recipe: dict, given: set[str]) -> dict:
    """Drop from the recipe what the flags replace as a whole: the weights of other files, a new student's config.

    An evaluation alone makes no student and must not write into the folder of the recipe's training.
    """
    dropped: set[str] = set()
    if "train_file" in given:
        dropped.add("train_weights")
    if "model_name_or_path" in given:
        dropped.add("config_overrides")
    if "eval_only" in given:
        dropped |= {"stage", "output_dir", "config_overrides"}
    return {key: value for key, value in recipe.items() if key not in dropped}


def parse_sts_arguments(argv: list[str]) -> tuple[StsModelArguments, StsDataArguments, StsTrainingArguments]:
    """Parse ``[recipe.yaml] --flag value ...`` into the three dataclasses.

    Raises:
        UserError: unknown names (the nearest one is given), wrong types, contradictory options, a stage without the
            checkpoint that it continues.
    """
    model, data, training = parse_dataclasses(STS_ARGUMENT_CLASSES, argv, "run_sts.py", reconcile)
    if training.stage in ("relational", "finetune") and not model.model_name_or_path:
        before = "distill" if training.stage == "relational" else "relational"
        raise UserError(
            f"--stage {training.stage} continues a model: give --model_name_or_path, the --output_dir of a run of "
            f"--stage {before}"
        )
    if data.row_order != "random" and training.curriculum != "none":
        raise UserError(
            f"--row_order {data.row_order} contradicts --curriculum {training.curriculum}; give one of them"
        )
    if data.row_order != "random" and training.stage == "distill":
        raise UserError(
            "--row_order easy_to_hard compares the texts of a pair; --stage distill has none: --curriculum"
        )
    if model.overrides and (model.model_name_or_path or training.stage != "distill"):
        raise UserError("--config_overrides shapes a new student: --stage distill without --model_name_or_path")
    return model, data, training
