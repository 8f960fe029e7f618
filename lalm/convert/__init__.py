# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other libraries: `python -m lalm.convert`."""
