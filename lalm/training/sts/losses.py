# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Losses of run_sts.py, in the interface of sentence-transformers: `loss(features of each text column, labels)`.

`DistillationLoss` is the loss of the stages distill and relational, `ScoreLoss` and `WithPenalties` complete what
sentence-transformers has for the stage finetune. Each embeds a column once and returns its terms by name, weighted:
the Trainer adds them up and logs them one by one. A term of weight 0 is not computed.

Legend: B rows of C text columns, N = B C texts, E student's and F teacher's size of an embedding, T tokens, D hidden.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, CosineSimilarityLoss, EmbedDistillLoss
from torch import Tensor, nn
from torch.nn import functional as F

from lalm.errors import UserError

TERMS = ("embedding", "layers", "similarity", "margin", "contrastive")
LAYER_MAPS = ("uniform", "last", "final")
# texts whose teacher vectors are closer than this are one text: not each other's negatives
SAME_TEXT = 0.99


def similarity_kl(student_NE: Tensor, teacher_NF: Tensor, temperature: float = 0.04) -> Tensor:
    """KL(softmax(T T^t / temperature) || softmax(S S^t / temperature)), mean of the N rows, the diagonal included.

    S and T are the rows of unit length. Relational knowledge distillation over a batch: LAM's stage 2; SEED (Fang et
    al. 2021, arXiv 2101.04731) has a queue in place of the batch. The widths E and F may differ.
    """
    ours, theirs = (F.normalize(x.float(), dim=-1) for x in (student_NE, teacher_NF))
    log_s, log_t = (F.log_softmax(x @ x.T / temperature, dim=-1) for x in (ours, theirs))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def contrastive_margin(a_BE: Tensor, b_BE: Tensor, margin: float = 0.2, same_BB: Tensor | None = None) -> Tensor:
    """Mean of relu(margin - cos(a_i, b_i) + max_{j != i} cos(a_i, b_j)), and the same from b to a; 0 for one pair.

    Hardest negative in the batch: VSE++ (Faghri et al. 2018, arXiv 1707.05612), as in LAM's stage 2.

    Args:
        same_BB: True where b_j says the same as a_i and is no negative, besides the diagonal.
    """
    scores = F.normalize(a_BE.float(), dim=-1) @ F.normalize(b_BE.float(), dim=-1).T
    positive = scores.diagonal()
    off = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    off = off if same_BB is None else off | same_BB
    # a row without negatives costs nothing: relu(margin - 2 - positive) is 0
    negatives = scores.masked_fill(off, -2.0)
    losses = [F.relu(margin - positive + negatives.amax(dim)).mean() for dim in (0, 1)]
    return torch.stack(losses).mean()


def contrastive_cross_entropy(
    a_BE: Tensor, b_BE: Tensor, same_BB: Tensor | None = None, scale: float = 20.0, smoothing: float = 0.1
) -> Tensor:
    """Cross-entropy of finding b_i for a_i among all b by `scale` times the cosine, and the same from b to a.

    InfoNCE in both directions with smoothed labels, as in LAM's stage 1.

    Args:
        same_BB: True where b_j says the same as a_i and is no negative, besides the diagonal.
    """
    scores = scale * F.normalize(a_BE.float(), dim=-1) @ F.normalize(b_BE.float(), dim=-1).T
    if same_BB is not None:
        # at the lowest score rather than at minus infinity, which a smoothed label would make infinite
        other = same_BB & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(other, float(scores.detach().amin()))
    target = torch.arange(len(scores), device=scores.device)
    losses = [F.cross_entropy(x, target, label_smoothing=smoothing) for x in (scores, scores.T)]
    return torch.stack(losses).mean()


def layer_error(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """|S - T|^2 / |T|^2 over the real tokens: the mean squared error of a layer, relative to the layer's scale.

    As in TinyBERT (Jiao et al. 2020, arXiv 1909.10351) and LAM's stages 1 and 2, which leave the scale in.
    """
    mask = mask_BT.bool()
    theirs = teacher_BTD[mask].float()
    return (student_BTD[mask].float() - theirs).square().mean() / theirs.square().mean().clamp_min(1e-12)


def match_layers(student: int, teacher: int, rule: str = "uniform") -> list[tuple[int, int]]:
    """Pair the outputs of layers 1 .. student with the teacher's: evenly, with its last ones, or the final pair only.

    Raises:
        ValueError: unknown rule, or `last` for a teacher with fewer layers.
    """
    if rule not in LAYER_MAPS:
        raise ValueError(f"layer_map is '{rule}'; choose one of {', '.join(LAYER_MAPS)}")
    if rule == "final":
        return [(student, teacher)]
    if rule == "last" and teacher < student:
        raise ValueError(f"layer_map 'last' needs a teacher of at least {student} layers, it has {teacher}")
    shift = teacher - student
    return [(i, i + shift if rule == "last" else max(1, round(i * teacher / student))) for i in range(1, student + 1)]


def bare(model: nn.Module) -> SentenceTransformer:
    """The sentence transformer inside a wrapper for several devices."""
    return cast(SentenceTransformer, getattr(model, "module", model))


def backbone(model: nn.Module) -> Any:
    """The transformers model inside a sentence transformer."""
    return cast(Any, bare(model)[0]).auto_model


@contextmanager
def _hidden_states(model: nn.Module, wanted: bool) -> Iterator[None]:
    config = backbone(model).config
    before = config.output_hidden_states
    config.output_hidden_states = wanted
    try:
        yield
    finally:
        config.output_hidden_states = before


def run_encoder(
    model: nn.Module, features: Mapping[str, Any], with_layers: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Sentence embeddings `[B, E]` and, if asked for, the hidden states of all layers, each `[B, T, D]`."""
    with _hidden_states(model, with_layers):
        output = model(dict(features))
    return output["sentence_embedding"], output["all_layer_embeddings"] if with_layers else None


def prompt_ids(teacher: SentenceTransformer) -> list[int]:
    """The tokens of a teacher's default prompt, without special tokens."""
    prompt = teacher.prompts.get(teacher.default_prompt_name or "") or ""
    return teacher.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []


def with_prompt(inputs: dict[str, Tensor], prompt: list[int]) -> dict[str, Tensor]:
    """Insert the tokens of a prompt after the first token of every text, each tensor `[B, T]`."""
    if not prompt:
        return inputs
    fill: dict[str, Any] = {"input_ids": prompt, "attention_mask": 1, "token_type_ids": 0}
    found = {}
    for name, value in inputs.items():
        middle = value.new_tensor(fill[name]).expand(len(value), len(prompt))
        found[name] = torch.cat([value[:, :1], middle, value[:, 1:]], dim=1)
    return found


def fit_projection(student_NE: Tensor, teacher_NF: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight `[F, E]` and bias `[F]` of the ridge regression teacher ~ student: where a projection starts."""
    x, y = student_NE.double(), teacher_NF.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + penalty, (x - x_mean).T @ (y - y_mean)).T
    return weight.to(student_NE.dtype), (y_mean - weight @ x_mean).to(student_NE.dtype)


class DistillationLoss(nn.Module):
    """What a student learns from a teacher: its vectors, hidden states, and similarities within a batch.

    Terms (each times its weight): `embedding`, sentence-transformers' EmbedDistillLoss; `layers`, the mean of
    `layer_error` over the paired layers; `similarity`, `similarity_kl`; `margin`, `contrastive_margin` between the
    first two columns; `contrastive`, `contrastive_cross_entropy` between them, or between the student's and the
    teacher's vectors where there is one column. A teacher of another width is met in its own space: linear maps from
    the student's width, which are trained with the student (LAM's released code computes them without gradients). A
    map from the teacher's side could shrink its target to nothing. The default prompt of the teacher stands before
    each of its texts.

    Args:
        weights: term -> weight.
        teacher: runs on the student's tokens for the term `layers`, and for batches without labels.
        teacher_dim: F; None takes the teacher's.
        metric: cosine, mse or l2, of EmbedDistillLoss.

    Labels: the teacher's vectors `[B, F]` or `[B, C, F]`; None to compute them with `teacher`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        weights: Mapping[str, float],
        teacher: SentenceTransformer | None = None,
        teacher_dim: int | None = None,
        metric: str = "cosine",
        layer_map: str = "uniform",
        temperature: float = 0.04,
        margin: float = 0.2,
    ):
        super().__init__()
        self.model = model
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self.temperature, self.margin, self.metric, self.layer_map = temperature, margin, metric, layer_map
        if unknown := set(weights) - set(TERMS):
            raise ValueError(f"there is no term '{unknown.pop()}' in DistillationLoss; it has {', '.join(TERMS)}")
        if not self.weights:
            raise ValueError("every weight of DistillationLoss is 0")
        if teacher is None and ("layers" in self.weights or teacher_dim is None):
            raise ValueError("DistillationLoss needs the teacher for the term 'layers', and teacher_dim without one")
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        size = teacher_dim or cast(SentenceTransformer, teacher).get_embedding_dimension()
        same_size = size == model.get_embedding_dimension()
        self.embedding: EmbedDistillLoss | None = None
        if "embedding" in self.weights:
            self.embedding = EmbedDistillLoss(model, cast(Any, metric), None if same_size else size)
        self.pairs: list[tuple[int, int]] = []
        self.layer_projections = nn.ModuleList()
        if "layers" in self.weights:
            self._pair_layers()

    def _pair_layers(self) -> None:
        ours, theirs = backbone(self.model).config, backbone(cast(nn.Module, self.teacher)).config
        self.pairs = match_layers(ours.num_hidden_layers, theirs.num_hidden_layers, self.layer_map)
        if ours.hidden_size != theirs.hidden_size:
            maps = [nn.Linear(ours.hidden_size, theirs.hidden_size) for _ in self.pairs]
            self.layer_projections.extend(maps)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Tensor]:
        columns = list(sentence_features)
        with_layers = "layers" in self.weights
        ours = [run_encoder(self.model, column, with_layers) for column in columns]
        theirs = self._teach(columns) if with_layers or labels is None else []
        if labels is None:
            labels = torch.stack([vectors for vectors, _ in theirs], dim=1)
        targets = _by_column(labels, len(columns))
        vectors = [embedding for embedding, _ in ours]
        terms: dict[str, Tensor] = {}
        if self.embedding is not None:
            terms["embedding"] = self.embedding.compute_loss_from_embeddings(vectors, targets)
        if with_layers:
            states = zip(columns, ours, theirs, strict=True)
            errors = [self._layers(column, a[1], b[1]) for column, a, b in states]
            terms["layers"] = torch.stack(errors).mean()
        if "similarity" in self.weights:
            terms["similarity"] = similarity_kl(torch.cat(vectors), torch.cat(targets), self.temperature)
        if "margin" in self.weights:
            terms["margin"] = self._margin(vectors, targets)
        if "contrastive" in self.weights:
            terms["contrastive"] = self._contrast(vectors, targets)
        return {name: self.weights[name] * term for name, term in terms.items()}

    @torch.no_grad()
    def _teach(self, columns: list[dict[str, Tensor]]) -> list[tuple[Tensor, tuple[Tensor, ...] | None]]:
        teacher = cast(SentenceTransformer, self.teacher).eval()
        given = ("input_ids", "attention_mask", "token_type_ids")
        found = []
        for column in columns:
            inputs = {name: column[name] for name in given if name in column}
            prompt = prompt_ids(teacher)
            vectors, states = run_encoder(teacher, with_prompt(inputs, prompt), "layers" in self.weights)
            if states is not None and prompt:
                states = tuple(torch.cat([x[:, :1], x[:, 1 + len(prompt) :]], dim=1) for x in states)
            if not torch.isfinite(vectors).all():
                row = int((~torch.isfinite(vectors)).any(-1).nonzero()[0])
                text = teacher.tokenizer.decode(column["input_ids"][row], skip_special_tokens=True)
                raise UserError(f"the teacher's vector of '{text[:80]}' is not finite; another --teacher is needed")
            found.append((vectors, states))
        return found

    def _layers(self, column: dict[str, Tensor], ours: Any, theirs: Any) -> Tensor:
        errors = []
        for index, (i, j) in enumerate(self.pairs):
            state = self.layer_projections[index](ours[i]) if self.layer_projections else ours[i]
            errors.append(layer_error(state, theirs[j], column["attention_mask"]))
        return torch.stack(errors).mean()

    def _margin(self, vectors: list[Tensor], targets: list[Tensor]) -> Tensor:
        if len(vectors) < 2:
            raise ValueError("the term 'margin' needs pairs of texts; set its weight to 0 for single texts")
        first, second = (F.normalize(target.float(), dim=-1) for target in targets[:2])
        return contrastive_margin(vectors[0], vectors[1], self.margin, first @ second.T >= SAME_TEXT)

    def _contrast(self, vectors: list[Tensor], targets: list[Tensor]) -> Tensor:
        units = [F.normalize(target.float(), dim=-1) for target in targets[:2]]
        same = units[0] @ units[-1].T >= SAME_TEXT
        if len(vectors) > 1:
            return contrastive_cross_entropy(vectors[0], vectors[1], same)
        projection = None if self.embedding is None else self.embedding.projection
        ours = vectors[0] if projection is None else projection(vectors[0])
        if ours.shape[-1] != targets[0].shape[-1]:
            raise ValueError("the term 'contrastive' needs the term 'embedding' for a teacher of another width")
        return contrastive_cross_entropy(ours, targets[0], same)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {"weights": self.weights, "metric": self.metric, "layers": self.pairs, "temperature": self.temperature}


def _by_column(labels: Tensor, columns: int) -> list[Tensor]:
    """Teacher's vectors `[B, F]` (one column) or `[B, C, F]` -> C times `[B, F]`."""
    labels = labels.detach()
    labels = labels[:, None] if labels.dim() == 2 else labels
    if labels.dim() != 3 or labels.shape[1] != columns:
        raise ValueError(f"{columns} text columns need labels [B, {columns}, F], got {list(labels.shape)}")
    return list(labels.unbind(1))


class ScoreLoss(nn.Module):
    """Pairs with a score in [0, 1]: sentence-transformers' CoSENT plus `mse_weight` times its squared cosine error.

    CoSENT orders the pairs (Spearman), the squared error puts them on the line (Pearson).
    """

    def __init__(self, model: SentenceTransformer, mse_weight: float = 10.0, scale: float = 20.0):
        super().__init__()
        self.model, self.mse_weight = model, mse_weight
        self.cosent, self.mse = CoSENTLoss(model, scale), CosineSimilarityLoss(model)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        vectors = [self.model(dict(features))["sentence_embedding"] for features in sentence_features]
        loss = self.cosent.compute_loss_from_embeddings(vectors, labels)
        if self.mse_weight:
            loss = loss + self.mse_weight * self.mse.compute_loss_from_embeddings(vectors, labels)
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {"mse_weight": self.mse_weight, "scale": self.cosent.scale}


class OrthogonalRegulariser(nn.Module):
    """Mean over the weights W `[m, n]` of |W W^t - I|^2 / m (of W^t W / n if m > n): LAM's stage 1, per row.

    Args:
        names: endings of the module names whose `weight` it holds, by default the q, k and v projections.
    """

    def __init__(self, model: SentenceTransformer, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")):
        super().__init__()
        bert = ("attention.self.query", "attention.self.key", "attention.self.value")
        found = [module for name, module in model.named_modules() if name.endswith((*names, *bert))]
        if not found:
            raise ValueError(f"the model has no modules named {', '.join(names)} to hold orthogonal")
        self.projections = nn.ModuleList(found)

    def forward(self) -> Tensor:
        losses = []
        for module in self.projections:
            weight = cast(Tensor, module.weight).float()
            weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
            excess = weight @ weight.T - torch.eye(len(weight), device=weight.device)
            losses.append(excess.square().sum() / len(weight))
        return torch.stack(losses).mean()


class Retention(nn.Module):
    """|w - w_0|^2 over all trained weights, w_0 those at construction: L2-SP (Li et al. 2018, arXiv 1802.01483).

    It keeps what the earlier stage taught, without a second forward pass.
    """

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model
        self.names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        weights = dict(model.named_parameters())
        for index, name in enumerate(self.names):
            self.register_buffer(f"start_{index}", weights[name].detach().clone(), persistent=False)

    def forward(self) -> Tensor:
        weights = dict(bare(self.model).named_parameters())
        starts = (getattr(self, f"start_{index}") for index in range(len(self.names)))
        pairs = zip(self.names, starts, strict=True)
        return torch.stack([(weights[name] - start).float().square().sum() for name, start in pairs]).sum()


class WithPenalties(nn.Module):
    """A loss plus weighted penalties on the weights, each logged under its name."""

    def __init__(self, model: SentenceTransformer, loss: nn.Module, penalties: Mapping[str, tuple[float, nn.Module]]):
        super().__init__()
        self.model, self.loss = model, loss
        self.weights = {name: weight for name, (weight, _) in penalties.items()}
        self.penalties = nn.ModuleDict({name: module for name, (_, module) in penalties.items()})

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> dict[str, Tensor]:
        found = self.loss(sentence_features, labels)
        terms = dict(found) if isinstance(found, dict) else {"task": found}
        for name, module in self.penalties.items():
            terms[name] = self.weights[name] * module()
        return terms
