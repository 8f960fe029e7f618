# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory, each as a ratio to a named baseline: `python -m benchmarks.run` (see benchmarks/results)."""
