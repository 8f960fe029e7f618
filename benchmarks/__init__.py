# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks of speed and memory, each a ratio to a named baseline: `python -m benchmarks.run`."""
