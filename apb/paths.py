"""Where `apb` finds its configuration and keeps its models."""

from __future__ import annotations

import os
from pathlib import Path


def config_dir() -> Path:
    """The packaged configuration, or the checkout's where `apb` runs from one."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "conf"


def shipped_weights() -> Path:
    """The folder that holds small weights which come with apb, one folder per model."""
    return Path(__file__).parent / "weights"


def data_home() -> Path:
    """The folder that holds what apb keeps on a machine; it may not exist yet."""
    if home := os.environ.get("APB_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apb"


def model_home() -> Path:
    """The folder that holds one folder per fetched model; it may not exist yet."""
    return data_home() / "models"
