# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a student has that its softmax teacher has not, as a small file, and the student made of it again.

    python -m lalm.convert to_adapter student/ adapter/ --teacher HuggingFaceTB/SmolLM2-135M
    python -m lalm.convert from_adapter adapter/ student/

After `--stage transfer` that is the feature maps: a few MB. After a full distillation every weight differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lalm
from lalm.convert.softmax import embeddings_of, place, student_state
from lalm.hub import staged_save
from lalm.modeling.modeling_heads import LalmForCausalLM

WEIGHTS, NOTE, CONFIG = "adapter_model.safetensors", "lalm_adapter.json", "config.json"


def save_adapter(student: LalmForCausalLM, teacher: PreTrainedModel, folder: str | Path, name: str) -> int:
    """Write the student's configuration and the weights in which it differs from `teacher`, whose folder or Hub name
    is `name`; all or nothing. Returns the bytes of the weights.

    Raises:
        ValueError: the student is not one of this teacher; the message names what differs.
        OSError: something cannot be written.
    """
    inherited = student_state(teacher, student.config)
    own = {}
    for key, x in student.named_parameters():
        other = inherited.get(key)
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{key} is {tuple(x.shape)} in the student and {tuple(other.shape)} in the teacher.")
        if other is None or not torch.equal(x, other.to(x)):
            own[key] = x.detach().contiguous().clone()
    if not own:
        raise ValueError("The student has nothing that the teacher has not.")
    with staged_save(folder) as staging:
        (staging / NOTE).write_text(json.dumps({"base_model": name}) + "\n", encoding="utf-8")
        (staging / CONFIG).write_text(student.config.to_json_string(), encoding="utf-8")
        save_file(own, staging / WEIGHTS, {"format": "pt"})
    return sum(x.numel() * x.element_size() for x in own.values())


def load_adapter(folder: str | Path, base_model: str | None = None) -> LalmForCausalLM:
    """The student of an adapter, in eval mode: the weights of its base model (or of `base_model`) and its own.

    Raises:
        ValueError: the base model is not the adapter's; the message names what does not fit.
        OSError: something cannot be read.
    """
    folder = Path(folder)
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    config, own = AutoConfig.from_pretrained(folder), load_file(folder / WEIGHTS)
    dtype = next(iter(own.values())).dtype
    teacher = AutoModelForCausalLM.from_pretrained(base_model or note["base_model"], dtype=dtype)
    (variant,) = [row for row in lalm.VARIANTS if row.config is type(config)]
    with torch.device("meta"):
        student = cast(LalmForCausalLM, variant.models["AutoModelForCausalLM"](config))
    state = student_state(teacher, config) | own
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    missing = place(student, state, embeddings_of(teacher))
    if missing:
        raise ValueError(f"Neither the adapter nor its base model holds {missing[0]}.")
    student.generation_config = teacher.generation_config
    return student.eval()


__all__ = ["load_adapter", "save_adapter"]
