# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The parts of run_sts.py: data, teacher, losses, stages, trainer, evaluation and card of sentence encoders."""
