# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
