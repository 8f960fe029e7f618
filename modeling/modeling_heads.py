# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The heads of every variant, written once; a variant names the backbone."""

from functools import partial
from typing import ClassVar, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import can_return_tuple, logging

from lalm.configuration.configuration_base import LalmConfig
from lalm.modeling.layers import make_linear, product, takes_apply
from lalm.modeling.mixers import Mixer
from lalm.modeling.model_inputs import masks_ahead
from lalm.modeling.modeling_base import LalmModel, LalmPreTrainedModel
from lalm.modeling.ops.dense.cross_entropy import causal_lm_loss

# Under transformers' own logger, so that its verbosity settings hold.
logger = logging.get_logger("transformers.lalm")


class _Head(LalmPreTrainedModel):
    """A model for a task: its class stands among those that transformers knows by name. The Trainer shifts the labels
    of a smoothed loss for such only, model cards name their task, and the Auto classes' own registry is not asked."""

    model_class: ClassVar[type[LalmModel]]
    names: ClassVar[dict[str, str]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "model_class"):
            return
        kind = cast(type[LalmConfig], cls.config_class).model_type
        # A second class of one type (a user's subclass) stands under its own name: it is values that are looked up.
        is_taken = cls.names.get(kind, cls.__name__) != cls.__name__
        cls.names[cls.__name__ if is_taken else kind] = cls.__name__


class LalmForCausalLM(_Head, GenerationMixin):
    """Language model: backbone and `lm_head`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    lm_head_bias: ClassVar[bool] = False

    def __init__(self, config: LalmConfig):
        if not config.is_causal:
            raise ValueError(
                "A causal language model needs is_causal=True; AutoModelForMaskedLM takes is_causal=False."
            )
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = make_linear(config.embedding_size, config.vocab_size, bias=self.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `LalmModel.forward`; `labels [B, T]` (-100 is ignored) are shifted by one and give the mean
        cross-entropy in nats, over `num_items_in_batch` tokens if that is passed. `logits_to_keep` limits the logits
        to that many last positions, or to the positions of an index tensor. The loss still covers all positions; it is
        computed in chunks, so that training with `logits_to_keep=1` never holds all logits `[B, T, V]`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, kept, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits_and_loss(
        self, hidden_states: torch.Tensor, kept: slice | torch.Tensor, labels: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the positions `kept`, and the loss of all, in one call of the head: offloaded or sharded weights
        are there only while it runs."""
        if labels is None:
            return self.lm_head(hidden_states[:, kept]), None
        wants_all = isinstance(kept, slice) and kept == slice(0, None)
        if not wants_all and self.loss_function is ForCausalLMLoss and takes_apply(self.lm_head):
            both = partial(_kept_logits_and_loss, kept=kept, labels=labels, **kwargs)
            return self.lm_head(hidden_states, apply=both)
        logits = self.lm_head(hidden_states)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return logits[:, kept], loss

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: torch.Tensor | None, past_key_values: Cache | None, **kwargs
    ) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """What generate() makes of a mask `[B, S + T]` beforehand: nothing where it does not compile, since whoever
        puts tokens in front (PEFT's prompt tuning) has to find the mask of all tokens."""
        if isinstance(past_key_values, DynamicCache):
            return attention_mask
        if kwargs["inputs_embeds"].device.type != "cpu":
            logger.warning_once(
                "generate() compiles the model for a static cache, which takes minutes at the first call: pass "
                "disable_compile=True if few tokens are wanted."
            )
        return masks_ahead(attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As the stock one, of models without a recurrent layer.

        Raises:
            ValueError: a layer is recurrent.
        """
        if Mixer.layer_type in self.config.layer_types:
            raise ValueError(
                "Continuous batching (generate_batch) pages keys and values, and a recurrent state has none: use "
                "generate() with a padded batch, or python -m lalm.serve."
            )
        return super().init_continuous_batching(*args, **kwargs)


def _kept_logits_and_loss(hidden_states, weight, bias, kept, labels, **kwargs):
    """The loss in pieces: logits of all positions never exist at once."""
    loss = causal_lm_loss(hidden_states, weight, bias, labels, **kwargs)
    return product(hidden_states[:, kept], weight, bias), loss


class LalmForMaskedLM(_Head):
    """Masked language model: a backbone that reads both sides, and `lm_head`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    names = MODEL_FOR_MASKED_LM_MAPPING_NAMES
    lm_head_bias: ClassVar[bool] = False

    def __init__(self, config: LalmConfig):
        if config.is_causal:
            raise ValueError("A masked language model reads both sides: set is_causal=False in the configuration.")
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = make_linear(config.embedding_size, config.vocab_size, bias=self.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """As `LalmModel.forward`; `labels [B, T]` (-100 is ignored) stand at the tokens they name, unshifted."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LalmForSequenceClassification(_Head):
    """One label (or regression target) a sequence, read at the last real token; of an encoder, at the mean of all."""

    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    def __init__(self, config: LalmConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.model = self.model_class(config)
        self.score = make_linear(config.embedding_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """As `LalmModel.forward`. The last real token is the last with `attention_mask` 1; without a mask the last
        that is not `config.pad_token_id`; with neither, a batch of one counts as unpadded. The loss is the mean over
        the labels; with `num_items_in_batch` their sum over that many.

        Raises:
            ValueError: a batch without `attention_mask` and without `pad_token_id`, where padding cannot be told.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        real = self._real_tokens(hidden_states, input_ids, attention_mask)
        if self.config.is_causal:
            last = (real * torch.arange(real.shape[1], device=real.device)).argmax(-1)
            pooled = hidden_states[torch.arange(real.shape[0], device=real.device), last]
        else:
            weight = real[..., None].to(hidden_states.dtype)
            pooled = (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        pooled_logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self._loss(pooled_logits, labels, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        """The loss of `config.problem_type`, which the stock function finds out and sets if it is None."""
        if labels.is_floating_point():  # torch 2.11 has no gradient of a mean square of two dtypes
            wider = torch.promote_types(logits.dtype, labels.dtype)
            logits, labels = logits.to(wider), labels.to(wider)
        arguments = {"logits": logits, "labels": labels, "pooled_logits": logits, "config": self.config, **kwargs}
        is_single = self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1
        is_single = is_single and labels.dtype in (torch.long, torch.int)
        if num_items_in_batch is None:
            return self.loss_function(**arguments)
        if is_single or self.loss_function is not ForSequenceClassificationLoss:
            return self.loss_function(**arguments, num_items_in_batch=num_items_in_batch)
        # the stock losses of the other problems are means over one batch, whatever the count, and the Trainer divides
        # by the number of accumulated batches only where it has not passed a count
        items = torch.as_tensor(num_items_in_batch, device=logits.device)
        return self.loss_function(**arguments) * labels.numel() / items

    def _real_tokens(self, hidden_states, input_ids, attention_mask) -> torch.Tensor:
        """bool `[B, T]`, False on padding."""
        batch, length = hidden_states.shape[:2]
        if attention_mask is not None:
            return attention_mask[:, -length:] != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        if batch > 1:
            raise ValueError(
                "Cannot tell padding in this batch: pass attention_mask, or input_ids with config.pad_token_id set."
            )
        return torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)


class LalmForTokenClassification(_Head):
    """One label per token."""

    names = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

    def __init__(self, config: LalmConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.model = self.model_class(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = make_linear(config.embedding_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """As `LalmModel.forward`; `labels [B, T]`, -100 is ignored."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "LalmForCausalLM",
    "LalmForMaskedLM",
    "LalmForSequenceClassification",
    "LalmForTokenClassification",
]
