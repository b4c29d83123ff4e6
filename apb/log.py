"""One line per event, prefixed with the rank."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def configure_logging(rank: int, world_size: int | None) -> None:
    """Send apb's log to stderr: everything from INFO on rank 0, warnings elsewhere.

    The driver of a local gang is no rank and has no `world_size`.

    Only apb's own logger is touched; an application that has given it handlers keeps them.
    """
    logger = logging.getLogger("apb")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        who = "apb" if world_size is None else f"r{rank}/{world_size}"
        handler.setFormatter(logging.Formatter(f"[{who}] %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    # It would report every retry of every rank; what failed in the end is raised.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def log_to_file(path: Path) -> None:
    """Also write apb's log to `path`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("apb").addHandler(handler)
