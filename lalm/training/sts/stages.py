# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The stages of run_sts.py: the student, its loss, and the rows it is trained on.

distill: a student made from the teacher (or one that is given) learns its vectors and hidden states on texts.
relational: a student learns a teacher's similarities within batches of pairs, its vectors and its hidden states.
finetune: a student learns from a mixture of scored pairs, entailments, questions, paraphrases and triplets.
"""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import save_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    TripletDistanceMetric,
    TripletLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import mine_hard_negatives
from torch import nn

from lalm.errors import UserError, is_disk_full, nearest_hint, one_line
from lalm.modeling.linearize import fit_output_projections, student_config
from lalm.modeling.modeling_lam import LamModel
from lalm.training.checkpoints import checkpoints_of, read_record
from lalm.training.divergence import broken_weights
from lalm.training.sts.arguments import StsDataArguments, StsModelArguments, StsTrainingArguments
from lalm.training.sts.documents import DocumentLoss
from lalm.training.sts.losses import (
    DistillationLoss,
    OrthogonalRegulariser,
    Retention,
    ScoreLoss,
    WithPenalties,
    backbone,
    fit_projection,
    prompt_ids,
)
from lalm.training.sts.sources import TrainingData
from lalm.training.sts.teacher import TeacherVectors, default_cache, load_teacher, local_copy, teacher_vectors

logger = logging.getLogger(__name__)

PROBE = "The quick brown fox's 3 cubs aren't in São Paulo; 'lazy' dogs sleep."
# texts on which a map to the width of another teacher is fitted before it is trained
PROJECTION_TEXTS = 1024

Arguments = tuple[StsModelArguments, StsDataArguments, StsTrainingArguments]


@dataclass
class Stage:
    """What a Trainer needs of a stage."""

    model: SentenceTransformer
    train_dataset: Dataset | DatasetDict
    loss: nn.Module | dict[str, nn.Module]
    shares: list[float] = field(default_factory=list)


def load_model(name: str, arguments: StsModelArguments, device: str | None, flag: str) -> SentenceTransformer:
    """Load a sentence transformer, or a plain transformers encoder with mean pooling.

    Raises:
        UserError: there is none; a folder of a run that has not ended says so.
    """
    folder = Path(name).expanduser()
    if read_record(folder) is not None and not (folder / "train_results.json").is_file():
        checkpoint = next((f", or take its {path}" for path in checkpoints_of(folder)), "")
        raise UserError(f"{flag}: the run in {folder} has not ended; run its command again to resume it{checkpoint}")
    try:
        model = SentenceTransformer(
            str(folder) if folder.exists() else local_copy(name) or name,
            device=device,
            trust_remote_code=arguments.trust_remote_code,
            token=arguments.token,
            cache_folder=arguments.cache_dir,
        )
    except Exception as error:
        if is_disk_full(error):
            raise
        absent = f"there is no folder {name} (the --output_dir of an earlier stage?), and the Hub gives no such model"
        reason = f"cannot load {folder}" if folder.exists() else absent
        raise UserError(f"{flag}: {reason}: {one_line(error)}") from None
    if broken := broken_weights(model):
        raise UserError(f"{flag}: {name} holds NaN or infinity, first in {broken[0]}; take an earlier checkpoint")
    return model


def is_encoder(model: SentenceTransformer) -> bool:
    """Tell whether a sentence transformer begins with a model of transformers, rather than with static vectors."""
    return hasattr(model[0], "auto_model")


def positions_of(model: SentenceTransformer) -> int | None:
    """The number of positions that an encoder has; None without a limit."""
    positions = getattr(backbone(model).config, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def build_student(
    arguments: StsModelArguments, teacher: SentenceTransformer, texts: Sequence[str], max_length: int
) -> SentenceTransformer:
    """Make a LAM student of a BERT-like teacher: its weights, and output projections fitted on `texts` (ridge).

    Raises:
        UserError: the teacher is not of BERT's shape, or the config overrides do not fit it.
    """
    if not is_encoder(teacher):
        raise UserError("--teacher: it is no encoder that a student can be made of; give --model_name_or_path")
    encoder = copy.deepcopy(backbone(teacher)).float().eval()
    max_length = min(max_length, positions_of(teacher) or max_length)
    try:
        student = LamModel.from_softmax_encoder(encoder, student_config(encoder, **arguments.overrides)).eval()
    except (ValueError, TypeError) as error:
        raise UserError(f"--teacher, --config_overrides: {one_line(error)}") from None
    if arguments.ridge_texts:
        # texts of like length together: little padding
        few = sorted(texts[: arguments.ridge_texts], key=len)
        batches = [
            {name: value.to(encoder.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            for batch in (teacher.preprocess(few[i : i + 64], max_length=max_length) for i in range(0, len(few), 64))
        ]
        errors = fit_output_projections(student, encoder, batches)
        shown = " ".join(f"{error:.3f}" for error in errors)
        logger.info("student: output projections fitted on %d texts, relative errors %s", len(few), shown)
    return as_sentence_transformer(student, teacher, arguments.model_max_length)


def as_sentence_transformer(student: LamModel, teacher: SentenceTransformer, max_length: int) -> SentenceTransformer:
    """A student with the teacher's tokenizer, mean pooling and unit length."""
    tokenizer = copy.deepcopy(teacher.tokenizer)
    tokenizer.model_max_length = min(student.config.max_position_embeddings, max_length)
    with tempfile.TemporaryDirectory() as folder:
        # each process its own: save_pretrained writes weights on the first only
        student.config.save_pretrained(folder)
        save_model(student, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        module = Transformer(folder)
    cast(Any, module).auto_model.config._name_or_path = ""
    modules = [module, Pooling(module.get_embedding_dimension(), "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device=str(teacher.device))


def check_tokenizers(student: SentenceTransformer, teacher: SentenceTransformer) -> None:
    """Refuse a teacher whose tokens are not the student's.

    Raises:
        UserError: with what to do.
    """
    ours, theirs = student.tokenizer, teacher.tokenizer
    if not is_encoder(teacher):
        raise UserError("--teacher: it has no layers; set --layer_weight 0 and --teacher_vectors cached")
    if ours.get_vocab() != theirs.get_vocab() or ours(PROBE)["input_ids"] != theirs(PROBE)["input_ids"]:
        raise UserError(
            "--teacher: its tokenizer is not the student's, so that hidden states of the two cannot be compared token "
            "by token; set --layer_weight 0 and --teacher_vectors cached, or take a teacher with the same tokenizer"
        )


def freeze(model: SentenceTransformer, parts: Sequence[str]) -> None:
    """Take weights whose names contain one of `parts` out of the training.

    Raises:
        UserError: no name contains it.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            words = sorted({word for name in names for word in name.split(".")})
            raise UserError(f"--freeze: no weight has '{part}' in its name{nearest_hint(part, words)}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not any(part in name for part in parts))


class WithTeacherVectors:
    """Transform of a data set: its column ``row`` becomes ``label``, the teacher's vectors of the row's texts.

    Args:
        vectors: of all different texts.
        index: for each row, which of them are those of its columns, `[rows, columns]`.
    """

    def __init__(self, vectors: TeacherVectors, index: np.ndarray):
        self.vectors, self.index = vectors, index

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        labels = torch.from_numpy(self.vectors[self.index[batch["row"]]])
        return {name: values for name, values in batch.items() if name != "row"} | {"label": list(labels)}


def teacher_is_live(data: StsDataArguments, training: StsTrainingArguments) -> bool:
    """Whether the teacher runs in every step: it was asked for, or its layers are needed anyway."""
    needs_layers = bool(training.loss_weights["layers"])
    return data.teacher_vectors == "live" or (data.teacher_vectors == "auto" and needs_layers)


def with_teacher_vectors(rows: Dataset, teacher: SentenceTransformer, arguments: Arguments) -> Dataset:
    """Add the teacher's vectors of every text column as ``label``, read from the cache on disk where they are used."""
    model, data, training = arguments
    columns = [rows[name] for name in rows.column_names]
    place: dict[str, int] = {}
    index = np.array([[place.setdefault(text, len(place)) for text in column] for column in columns]).T
    limit = teacher.max_seq_length
    try:
        if is_encoder(teacher):
            teacher.max_seq_length = min(limit or training.max_seq_length, training.max_seq_length)
        with training.main_process_first(desc="teacher's vectors"):
            vectors = teacher_vectors(teacher, list(place), default_cache(model.cache_dir), data.teacher_precision)
    finally:
        if is_encoder(teacher):
            teacher.max_seq_length = limit
    rows = rows.add_column("row", list(range(len(rows))))
    return rows.with_transform(WithTeacherVectors(vectors, index))


def penalties_of(model: SentenceTransformer, training: StsTrainingArguments) -> dict[str, tuple[float, nn.Module]]:
    """The penalties on the weights that were asked for, by name, each with its weight.

    Raises:
        UserError: the model has no projections to hold orthogonal.
    """
    found: dict[str, tuple[float, nn.Module]] = {}
    if training.orthogonal_weight:
        try:
            found["orthogonal"] = (training.orthogonal_weight, OrthogonalRegulariser(model))
        except ValueError as error:
            raise UserError(f"--orthogonal_weight: {error}; set it to 0") from None
    if training.retention_weight:
        found["retention"] = (training.retention_weight, Retention(model))
    return found


def distillation_stage(
    model: SentenceTransformer, found: TrainingData, teacher: SentenceTransformer, arguments: Arguments
) -> Stage:
    """The stages distill and relational: `DistillationLoss` on texts or on pairs.

    Raises:
        UserError: tokenizers differ, or training texts may be longer than the teacher's positions, where that matters.
    """
    _, data, training = arguments
    live = teacher_is_live(data, training)
    if live or training.loss_weights["layers"]:
        check_tokenizers(model, teacher)
        positions = positions_of(teacher)
        prompt = len(prompt_ids(teacher))
        if positions and training.max_seq_length + prompt > positions:
            after = f" after its prompt of {prompt} tokens" if prompt else ""
            raise UserError(
                f"--max_seq_length {training.max_seq_length} is above the teacher's {positions - prompt} positions"
                f"{after}; lower it, or set --layer_weight 0 and --teacher_vectors cached"
            )
    rows = found.parts.get("pairs") or Dataset.from_dict({"text": found.texts})
    try:
        loss = DistillationLoss(
            model, training.loss_weights, teacher if live or training.loss_weights["layers"] else None,
            teacher.get_embedding_dimension(), str(training.embedding_metric), training.layer_map,
            training.temperature, training.margin,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(one_line(error)) from None
    start_projection(loss, teacher, rows[rows.column_names[0]][:PROJECTION_TEXTS])
    if not live:
        rows = with_teacher_vectors(rows, teacher, arguments)
    trained = WithPenalties(model, loss, penalties) if (penalties := penalties_of(model, training)) else loss
    return Stage(model, rows, trained)


def start_projection(loss: DistillationLoss, teacher: SentenceTransformer, texts: Sequence[str]) -> None:
    """Fit the map to the width of another teacher, if there is one, on some texts."""
    if loss.embedding is None or loss.embedding.projection is None:
        return
    ours, theirs = (
        model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False).float()
        for model in (loss.model, teacher)
    )
    weight, bias = fit_projection(ours, theirs)
    with torch.no_grad():
        loss.embedding.projection.weight.copy_(weight)
        loss.embedding.projection.bias.copy_(bias)


def kind_loss(kind: str, model: SentenceTransformer, training: StsTrainingArguments) -> nn.Module:
    """The loss of one kind of data of the stage finetune."""
    loss: nn.Module
    if kind == "document":
        loss = DocumentLoss(model)
    elif kind == "sts":
        loss = ScoreLoss(model, training.sts_mse_weight)
    elif kind == "triplet":
        loss = TripletLoss(model, TripletDistanceMetric.COSINE, training.margin)
    else:
        loss = MultipleNegativesRankingLoss(model)
    if training.matryoshka_dims:
        size = model.get_embedding_dimension() or 0
        if too_big := [size_ for size_ in training.matryoshka_dims if not 0 < size_ <= size]:
            raise UserError(f"--matryoshka_dims {too_big[0]} does not lie in 1 .. {size}, the size of the vectors")
        loss = MatryoshkaLoss(model, loss, training.matryoshka_dims)
    return loss


def with_negatives(rows: Dataset, teacher: SentenceTransformer, data: StsDataArguments, kind: str) -> Dataset:
    """Add hard negatives, mined among all positives with the teacher; rows without any are left out.

    Raises:
        UserError: none is found.
    """
    mined = mine_hard_negatives(
        rows, teacher, "anchor", "positive", range_min=data.mine_range_min, range_max=data.mine_range_max,
        relative_margin=data.mine_margin, num_negatives=data.mine_negatives, batch_size=64, verbose=False,
    )  # fmt: skip
    logger.info("%s: %d triplets mined from %d pairs", kind, len(mined), len(rows))
    if not len(mined):
        raise UserError(f"no hard negative is found for {kind}; lower --mine_range_min or --mine_margin")
    return mined


def text_part(
    model: SentenceTransformer, rows: Dataset, teacher: SentenceTransformer, arguments: Arguments
) -> tuple[Dataset, nn.Module]:
    """The kind text of the stage finetune: plain texts with the teacher's vectors as ``label``, and its loss.

    Raises:
        UserError: no weight says how much they count.
    """
    training = arguments[2]
    if not training.embedding_weight:
        raise UserError("--mixture has a share of 'text': give --embedding_weight")
    labelled = with_teacher_vectors(rows, teacher, arguments)[:]
    weights = {"embedding": training.embedding_weight}
    loss = DistillationLoss(model, weights, None, teacher.get_embedding_dimension(), str(training.embedding_metric))
    return Dataset.from_dict({name: labelled[name] for name in ("text", "label")}), loss


def finetune_stage(
    model: SentenceTransformer, found: TrainingData, teacher: SentenceTransformer | None, arguments: Arguments
) -> Stage:
    """The stage finetune: a loss for every kind of data, the batches by the mixture's shares."""
    _, data, training = arguments
    penalties = penalties_of(model, training)
    parts: dict[str, Dataset] = {}
    losses: dict[str, nn.Module] = {}
    for kind, rows in found.parts.items():
        if teacher is not None and data.mine_negatives and set(rows.column_names) == {"anchor", "positive"}:
            rows = with_negatives(rows, teacher, data, kind)
        if kind == "text":
            rows, loss = text_part(model, rows, cast(SentenceTransformer, teacher), arguments)
        else:
            loss = kind_loss(kind, model, training)
        parts[kind], losses[kind] = rows, WithPenalties(model, loss, penalties) if penalties else loss
    shares: Mapping[str, float] = data.shares
    return Stage(model, DatasetDict(parts), losses, [shares[kind] for kind in parts])


def build_stage(arguments: Arguments, found: TrainingData) -> Stage:
    """Load or make the student of a stage, load the teacher if it is needed, and put rows and loss together.

    Raises:
        UserError: a model cannot be loaded, or does not fit the other.
    """
    model_arguments, data, training = arguments
    device = "cpu" if training.use_cpu else str(training.device)
    teacher: SentenceTransformer | None = None
    if training.stage != "finetune" or data.mine_negatives or "text" in data.shares:
        teacher = load_teacher(
            model_arguments.teacher, model_arguments.teacher_bf16, device, model_arguments.trust_remote_code,
            model_arguments.token, model_arguments.cache_dir, model_arguments.teacher_prompt,
        )  # fmt: skip
    name = model_arguments.model_name_or_path
    if name:
        model = load_model(name, model_arguments, device, "--model_name_or_path").float()
        if not is_encoder(model):
            raise UserError(f"--model_name_or_path: {name} is no encoder of transformers; only those are trained here")
    else:
        model = build_student(
            model_arguments, cast(SentenceTransformer, teacher), found.texts, training.max_seq_length
        )
    freeze(model, model_arguments.freeze or [])
    if training.stage == "finetune":
        return finetune_stage(model, found, teacher, arguments)
    return distillation_stage(model, found, cast(SentenceTransformer, teacher), arguments)
