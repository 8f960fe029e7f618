# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The scripts that made figures: `python -m experiments.<name>` from the root of the repository."""
