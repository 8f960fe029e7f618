# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Whether the Hub can be reached; its libraries retry for half a minute and more where it cannot."""

import logging
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

logger = logging.getLogger(__name__)


def go_offline_without_network() -> None:
    """Set the libraries of the Hub to offline mode if its address is unknown here.

    What is cached is found all the same. Behind a proxy an unknown address says nothing.
    """
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or getproxies() or host is None:
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        logger.info("%s cannot be reached: only what is local or cached can be used", host)
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            from datasets import config

            config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True
