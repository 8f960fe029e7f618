# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Multi-query associative recall: its task, and how models are scored on it."""
