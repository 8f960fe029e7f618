# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Parts of the training scripts: arguments, text, tokenizer, packing, model, trainer, checkpoints and model card."""
