# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Where the messages of the training scripts go."""

import logging

from transformers.utils import logging as transformers_logging

logger = logging.getLogger("lalm.training")


def set_up_logging(training) -> None:
    """Log warnings and our own messages on the main process, errors on the others."""
    # a handler of our own: one on the root logger would print the messages of the Hub client twice
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if training.should_log else logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(training.get_process_log_level() if training.log_level != "passive" else 30)
    logging.getLogger("transformers.lalm").setLevel(logger.level)  # which implementation of an op runs
