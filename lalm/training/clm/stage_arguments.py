# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the stages that make a student of a softmax teacher."""

from dataclasses import dataclass
from typing import Any

from lalm.training.shared_arguments import option

STAGES = ("transfer", "distill")
# ruff: noqa: RUF009  `option` is `dataclasses.field` with a help text


@dataclass
class StageArguments:
    """What `run_clm.py --stage` needs; a mix-in of the training arguments."""

    stage: str | None = option(
        None,
        "transfer: train the new parameters of a linear student to give what each softmax layer of --teacher gives; "
        "distill: train the student on the teacher's distribution and on the text. Default: neither.",
    )
    teacher: str | None = option(None, "The softmax model that a stage learns from (folder or Hub name).")
    keep_softmax_layers: list[str] | None = option(
        None,
        "Layers of the teacher that stay softmax in a new student, as 7 15 23 29; or auto:N, the N whose linear layer "
        "costs the teacher most on the text of --centroid_blocks.",
    )
    centroid_blocks: int = option(
        16,
        "Training blocks from which a new student gets centroids or output projections; 0 leaves them as they are.",
    )
    feature_positions: int = option(
        0,
        "Rotary positions that the feature maps are to know: the blocks are read as if they began anywhere below. 0: "
        "those of a block.",
    )
    distill_temperature: float = option(1.0, "distill: temperature of both distributions.")
    distill_weight: float = option(
        0.9, "distill: share of the divergence from the teacher in the loss; the rest is the loss on the text."
    )
    lora_rank: int = option(
        0,
        "distill: rank of LoRA (PEFT) on the q, k, v and o projections, trained with the new parameters alone and "
        "added to the weights at the end; 0 trains everything.",
    )

    @property
    def kept_layers(self: Any) -> list[int] | int:
        """Numbers of the layers that stay softmax, or how many of them are to be chosen.

        Raises:
            ValueError: what is given is neither.
        """
        given = self.keep_softmax_layers or []
        try:
            if len(given) == 1 and given[0].startswith("auto:"):
                count = int(given[0].removeprefix("auto:"))
                if count > 0:
                    return count
            else:
                return [int(index) for index in given]
        except ValueError:
            pass
        raise ValueError(f"--keep_softmax_layers is '{' '.join(given)}'; give numbers of layers, or auto:N with N > 0")

    def check_stage(self: Any) -> None:
        """Refuse contradictory arguments.

        Raises:
            ValueError: the flag is named.
        """
        if self.stage is not None and self.stage not in STAGES:
            raise ValueError(f"--stage is '{self.stage}'; choose one of {', '.join(STAGES)}")
        if self.stage and not self.teacher:
            raise ValueError(f"--stage {self.stage} needs --teacher")
        given = {"teacher": self.teacher, "keep_softmax_layers": self.keep_softmax_layers}
        for name, value in given.items():
            if value is not None and not self.stage:
                raise ValueError(f"--{name} belongs to a --stage: {', '.join(STAGES)}")
        if isinstance(self.kept_layers, int) and not self.centroid_blocks:
            raise ValueError("--keep_softmax_layers auto:N measures on text: set --centroid_blocks above 0")
        if self.lora_rank < 0 or (self.lora_rank and self.stage != "distill"):
            raise ValueError(f"--lora_rank is {self.lora_rank}; it belongs to --stage distill and must be at least 0")
        if self.feature_positions < 0 or (self.feature_positions and not self.stage):
            raise ValueError(f"--feature_positions is {self.feature_positions}; it belongs to a --stage, at least 0")
        if self.centroid_blocks < 0:
            raise ValueError(f"--centroid_blocks is {self.centroid_blocks}; it must be at least 0")
        if self.distill_temperature <= 0:
            raise ValueError(f"--distill_temperature is {self.distill_temperature}; it must be positive")
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"--distill_weight is {self.distill_weight}; it must lie in 0 .. 1")
