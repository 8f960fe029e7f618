# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`python -m lalm.convert`."""

from lalm.convert.command_line import main
from lalm.errors import exit_on_user_error

exit_on_user_error(main)
