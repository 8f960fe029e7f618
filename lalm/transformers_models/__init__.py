# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Our kernels under the linear-attention models that ship inside transformers, on the CPU."""

from lalm.transformers_models.door import Replacement, use_in_transformers
from lalm.transformers_models.families import FAMILIES

__all__ = ["FAMILIES", "Replacement", "use_in_transformers"]
