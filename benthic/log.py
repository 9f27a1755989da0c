"""Logging: one logger, to stderr, so that stdout carries data alone. Knows nobody."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("benthic")
logger.addHandler(logging.NullHandler())


def to_stderr(level: int = logging.INFO) -> None:
    """Send benthic's log lines to stderr; the command line calls this once, a library user may."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
