"""Which launcher a configuration means, and its session."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from apb.config import RunConfig, plugin_name
from apb.errors import InputError
from apb.launchers.base import Session
from apb.launchers.local import LocalSession
from apb.launchers.restart import RestartingSession


def open_session(config: RunConfig, overrides: Callable[[], Sequence[str]]) -> Session:
    """`overrides` says which settings hold at the time, as later ranks start with those."""
    launcher = plugin_name("launcher", config.launcher)
    if launcher == "ray":
        if find_spec("ray") is None:
            raise InputError("launcher=ray needs one more package: pip install 'apb[ray]'")
        from apb.launchers.ray import RaySession

        return RaySession(config, overrides())
    if launcher == "torchrun" or (launcher == "auto" and inside_torchrun()):
        # Here, as it imports transformers, which the driver of a local gang does without.
        from apb.launchers.torchrun import TorchrunSession

        return TorchrunSession(config)
    world_size = config.world_size or default_world_size(config)

    def start(restarts: int) -> Session:
        return LocalSession(
            overrides(), world_size=world_size, supervision=config.supervision, restarts=restarts
        )

    if config.on_failure == "stop":
        return start(0)
    return RestartingSession(start, config.supervision)


def inside_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def default_world_size(config: RunConfig) -> int:
    import torch

    return 1 if config.device == "cpu" else max(1, torch.cuda.device_count())
