# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The stages that make a linear student of a softmax teacher (LoLCATs, Zhang et al., arXiv 2410.10254).

A stage takes the place of the student's forward while it trains, so that the stock Trainer, DDP, mixed precision,
checkpoints and resume are those of any other run; in eval mode the student is itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from lalm.convert.centroids import fit_centroids, watch_attention, window_linear_layers
from lalm.convert.closed_forms import fit_output_projections, layer_sensitivity, linear_layers
from lalm.convert.softmax import from_softmax, student_config
from lalm.errors import UserError, one_line, refusal
from lalm.modeling.modeling_heads import LalmForCausalLM
from lalm.modeling.window_linear_mixer import WindowLinearMixer
from lalm.training.clm.arguments import ClmTrainingArguments, ModelArguments
from lalm.training.clm.model_builder import hub_options, load_checkpoint, torch_dtype
from lalm.training.clm.packing import PackingCollator
from lalm.training.clm.tokenizer import load_tokenizer
from lalm.training.loss_curve import write_loss_curves
from lalm.training.results import EVALUATION_KEYS, save_results

logger = logging.getLogger(__name__)

IGNORED = -100
# Tokens whose logits exist at once in the distillation loss.
PIECE = 256
NOTHING = "--stage transfer: no layer is linear (in lalm_linear: with a window_size): there is nothing to train"


class Stage:
    """In the place of a student's `forward`: a loss that looks at the teacher while the student trains."""

    def __init__(self, student: LalmForCausalLM, teacher: LalmForCausalLM):
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.own_forward, self.scores_teacher = student.forward, False
        self.feature_positions = 0  # how far the blocks are shifted at random
        student.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output, or while it trains `{"loss": ...}` alone."""
        if self.scores_teacher:
            return self.teacher(*args, **kwargs)
        if not self.student.training:
            return self.own_forward(*args, **kwargs)
        labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        for name in ("logits_to_keep", "use_cache"):
            kwargs.pop(name, None)
        room = self.feature_positions - labels.shape[1]
        if room > 0:
            kwargs = shifted(kwargs, int(torch.randint(room + 1, ())))
        loss = self.loss(labels, **kwargs)
        if items is not None:  # the Trainer adds up the losses of accumulated batches
            loss = loss * (labels[:, 1:] != IGNORED).sum() / items
        return CausalLMOutputWithPast(loss=loss)

    def loss(self, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The mean loss of a batch."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make the student what is to be saved."""

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Inside, the model that the Trainer evaluates is the teacher."""
        self.scores_teacher = True
        try:
            yield
        finally:
            self.scores_teacher = False


class Transfer(Stage):
    """Relative squared error of each new layer for the inputs that the teacher's layer gets; the mean of all."""

    def __init__(self, student: LalmForCausalLM, teacher: LalmForCausalLM):
        super().__init__(student, teacher)
        self.layers = linear_layers(student)
        if not self.layers:
            raise UserError(NOTHING)
        self.errors: dict[int, float] = {}  # of each layer, a running mean over batches
        freeze_inherited(student, teacher)
        for mixer in self.layers.values():  # a mixer without a window has projections to which it must grow used
            if not isinstance(mixer, WindowLinearMixer):
                mixer.requires_grad_(True)

    def loss(self, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """As in the base class."""
        with watch_attention(self.teacher, self.layers) as seen, torch.no_grad():
            self.teacher.model(**inputs, use_cache=False)
        errors = []
        for index, mixer in self.layers.items():
            found, _ = mixer(seen[index].inputs, **seen[index].options)
            wanted = seen[index].outputs
            errors.append((found - wanted).float().square().sum() / wanted.float().square().sum().clamp(min=1e-12))
            before = self.errors.get(index, errors[-1].item())
            self.errors[index] = 0.95 * before + 0.05 * errors[-1].item()
        return torch.stack(errors).mean()


class Distill(Stage):
    """KL divergence of the student from the teacher at a temperature, and the loss on the text."""

    def __init__(
        self, student: LalmForCausalLM, teacher: LalmForCausalLM, temperature: float, weight: float, lora_rank: int = 0
    ):
        super().__init__(student, teacher)
        self.temperature, self.weight = temperature, weight
        self.lora = None
        if lora_rank:
            self.lora = add_lora(student, lora_rank)
            freeze_inherited(student, teacher)

    def finish(self) -> None:
        """Add LoRA's products to the weights and take it away."""
        if self.lora is not None:
            self.lora.merge_and_unload()
            self.lora = None

    def loss(self, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """As in the base class."""
        with torch.no_grad():
            wanted = self.teacher.model(**inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        found = self.student.model(**inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        kept = targets != IGNORED
        pieces = zip(*(x[kept].split(PIECE) for x in (found, wanted, targets)), strict=True)
        sums = [checkpoint(self._piece, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(sums).sum() / kept.sum().clamp(min=1) if sums else found.sum() * 0

    def _piece(self, found: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.student.lm_head(found).float()
        text = F.cross_entropy(logits, targets, reduction="sum")
        with torch.no_grad():
            teacher = (self.teacher.lm_head(wanted).float() / self.temperature).log_softmax(-1)
        own = (logits / self.temperature).log_softmax(-1)
        divergence = F.kl_div(own, teacher, log_target=True, reduction="sum") * self.temperature**2
        return self.weight * divergence + (1 - self.weight) * text


def shifted(batch: dict[str, Any], by: int) -> dict[str, Any]:
    """A batch at later positions. Rotary attention gives the same there; feature maps of rotated keys do not."""
    ids = batch["input_ids"]
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return batch | {"position_ids": positions + by}


def freeze_inherited(student: LalmForCausalLM, teacher: LalmForCausalLM) -> None:
    """Train what the teacher has no parameter for, and nothing else."""
    names = {name for name, _ in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.replace(".base_layer", "") not in names)


def add_lora(student: LalmForCausalLM, rank: int) -> Any:
    """Put LoRA (Hu et al., arXiv 2106.09685) of this rank, alpha twice that, on the projections of every mixer.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise UserError("--lora_rank needs PEFT: pip install lalm[peft]") from None
    targets = [f"{part}_proj" for part in "qkvo"]
    return LoraModel(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), "default")


def check_stage(arguments: ModelArguments, training: ClmTrainingArguments, block_size: int) -> None:
    """Refuse a teacher that has no student, and a student that has not its teacher, before any text is read. The
    tokenizer is the teacher's.

    Raises:
        UserError: the flag or field is named.
    """
    name = str(training.teacher)
    try:
        theirs = AutoConfig.from_pretrained(name, **hub_options(arguments))
    except Exception as error:
        raise UserError(f"--teacher: cannot read a config from '{name}': {refusal(name, 'model', error)}") from None
    try:
        config = new_student_config(arguments, training, theirs)
    except ValueError as error:
        raise UserError(f"--teacher {name}: {one_line(error)}") from None
    if training.stage == "transfer" and not arguments.model_name_or_path and not _can_transfer(config):
        raise UserError(NOTHING)
    if training.feature_positions and config.position_embedding_type != "rope":
        raise UserError(f"--feature_positions: the positions of --teacher {name} are not rotary; drop it")
    window = getattr(config, "window_size", None)
    if not arguments.model_name_or_path and window and window > block_size:
        raise UserError(f"--config_overrides: window_size {window} is above --block_size {block_size}; lower it")
    if arguments.tokenizer_name:
        own = load_tokenizer(arguments.tokenizer_name, arguments).get_vocab()
        if own != load_tokenizer(name, arguments).get_vocab():
            raise UserError(f"--tokenizer_name {arguments.tokenizer_name} is not the tokenizer of --teacher {name}")
    arguments.tokenizer_name = arguments.tokenizer_name or name


def _can_transfer(config: Any) -> bool:
    """Whether a layer is linear, and in `lalm_linear` has a window."""
    has_window = config.model_type != "lalm_linear" or config.window_size is not None
    return has_window and WindowLinearMixer.layer_type in config.layer_types


def new_student_config(arguments: ModelArguments, training: ClmTrainingArguments, theirs: Any) -> Any:
    """The configuration that a new student of a teacher's configuration `theirs` gets."""
    kept = training.kept_layers
    kept = list(range(kept)) if isinstance(kept, int) else kept  # as many as will be chosen
    return student_config(theirs, arguments.model_type or "lalm_linear", kept, **arguments.overrides)


def build_stage(arguments: ModelArguments, training: ClmTrainingArguments, data: Any, block_size: int) -> Stage:
    """Load the teacher, make or load the student, and put the stage in the place of the student's forward.

    Raises:
        UserError: a model that cannot be loaded, or does not fit the other; the message names it.
    """
    try:
        stock = AutoModelForCausalLM.from_pretrained(
            str(training.teacher), dtype=torch_dtype(arguments.dtype), **hub_options(arguments)
        )
        teacher = from_softmax(stock, keep_softmax_layers=range(stock.config.num_hidden_layers), share=True)
        if arguments.model_name_or_path:
            student = load_checkpoint(arguments, data.tokenizer, block_size)
        else:
            blocks = first_blocks(training, data, block_size)
            student = new_student(arguments, training, stock, teacher, blocks)
    except (ValueError, OSError) as error:
        raise UserError(f"--stage {training.stage}: {one_line(error)}") from error
    check_pair(student, teacher)
    student = cast(LalmForCausalLM, student)
    for model in (student, teacher):
        cast(torch.nn.Module, model).to(training.device)
    if training.stage == "transfer":
        stage: Stage = Transfer(student, teacher)
    else:
        stage = Distill(student, teacher, training.distill_temperature, training.distill_weight, training.lora_rank)
    stage.feature_positions = training.feature_positions
    return stage


def check_pair(student: Any, teacher: LalmForCausalLM) -> None:
    """Refuse a student of another shape than its teacher."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        own, other = getattr(student.config, name, None), getattr(teacher.config, name)
        if own != other:
            raise UserError(f"--model_name_or_path: the student's {name} is {own}, the teacher's {other}")
    if not isinstance(student, LalmForCausalLM):
        raise UserError(f"--model_name_or_path: {student.config.model_type} is no type of ours")


def first_blocks(training: ClmTrainingArguments, data: Any, block_size: int) -> list[dict[str, torch.Tensor]]:
    """The first training blocks, from which a new student gets what has a closed form."""
    blocks, collate = data.splits.get("train"), PackingCollator(block_size, 0)
    if blocks is None:
        return []
    batches = [collate([item]) for item, _ in zip(blocks, range(training.centroid_blocks), strict=False)]
    step = max(0, training.feature_positions - block_size) // max(1, len(batches) - 1)
    return [shifted(batch, index * step) if step else batch for index, batch in enumerate(batches)]


def new_student(
    arguments: ModelArguments, training: ClmTrainingArguments, stock: Any, teacher: LalmForCausalLM, blocks: list
) -> LalmForCausalLM:
    """A student of the transformers model `stock`, with the parts in closed form set; `teacher` is `stock` as ours.

    Raises:
        ValueError: what cannot be represented, or too little text; the message names it.
    """
    kind, kept = arguments.model_type or "lalm_linear", training.kept_layers

    def make(kept: list[int]) -> LalmForCausalLM:
        # The transfer of heads with a window leaves alone what both have.
        share = training.stage == "transfer" and kind == "lalm_linear"
        student = from_softmax(stock, kind, kept, share=share, **arguments.overrides)
        cast(torch.nn.Module, student).to(training.device)
        if not blocks:
            return student
        logger.info("closed forms from %d blocks", len(blocks))
        if getattr(student.config, "feature_map", "") == "centroids":
            fit_centroids(student, teacher, blocks)
        elif not window_linear_layers(student):
            fit_output_projections(student, teacher, blocks)
        return student

    cast(torch.nn.Module, teacher).to(training.device)
    if not isinstance(kept, int):
        return make(kept)
    rises = layer_sensitivity(make([]), teacher, blocks)
    kept = sorted(sorted(rises, key=rises.__getitem__)[-kept:])
    logger.info("layers kept softmax: %s", " ".join(map(str, kept)))
    return make(kept)


def score_teacher(trainer: Any, stage: Stage, splits: dict[str, Any], results: dict) -> None:
    """Score the teacher on every split that the student was scored on, under `teacher_<split>_...`."""
    for prefix, split in (("eval", "validation"), ("test", "test")):
        if f"{prefix}_perplexity" in results:
            with stage.as_teacher():
                metrics = trainer.evaluate(splits[split], metric_key_prefix=f"teacher_{prefix}")
            figures = {f"teacher_{prefix}_{key}": metrics[f"teacher_{prefix}_{key}"] for key in EVALUATION_KEYS}
            results |= figures
            if trainer.is_world_process_zero():
                save_results(trainer.args.folder, f"teacher_{prefix}", figures)


def report_stage(trainer: Any, stage: Stage) -> None:
    """Write and draw the error of every layer, if this run measured them."""
    errors = getattr(stage, "errors", None)
    if not errors or not trainer.is_world_process_zero():
        return
    named = {str(index): round(error, 6) for index, error in errors.items()}
    save_results(trainer.args.folder, "layer_errors", named)
    points = {"linear layers": sorted(errors.items())}
    write_loss_curves(points, trainer.args.folder / "layer_errors.png", "error by layer", " (relative, squared)")
