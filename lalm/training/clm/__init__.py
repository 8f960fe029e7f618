# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The parts of run_clm.py: data, packing, model, trainer, perplexity and model card of language models."""
