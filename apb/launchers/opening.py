"""Which launcher a configuration means, and its session."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from apb.config import RunConfig, plugin_name
from apb.errors import InputError
from apb.launcher_config import RayLauncherConfig
from apb.launchers.base import Session
from apb.launchers.gang import GangSession, Ranks
from apb.launchers.processes import RankProcesses
from apb.launchers.restart import RestartingSession, Survivors


class _Launcher(NamedTuple):
    """How many ranks are asked for, how those with given numbers start, and how all is left."""

    world_size: int
    start: Callable[[Sequence[int]], Ranks]
    leave: Callable[[], None] = lambda: None


def open_session(config: RunConfig, overrides: Callable[[], Sequence[str]]) -> Session:
    """`overrides` says which settings hold at the time, as later ranks start with those."""
    name = plugin_name("launcher", config.launcher)
    if name == "torchrun" or (name == "auto" and inside_torchrun()):
        # Here, as it imports transformers, which the driver of a local gang does without.
        from apb.launchers.torchrun import TorchrunSession

        return TorchrunSession(config)
    launcher = _on_ray(config) if name == "ray" else _on_this_machine(config)

    def start(restarts: int, survivors: Survivors) -> Session:
        return GangSession(
            launcher.start(survivors.ranks),
            overrides(),
            supervision=config.supervision,
            restarts=restarts,
            reduced=survivors.reduced,
        )

    return RestartingSession(start, launcher.world_size, config, leave=launcher.leave)


def inside_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _on_this_machine(config: RunConfig) -> _Launcher:
    return _Launcher(config.world_size or default_world_size(config), RankProcesses)


def default_world_size(config: RunConfig) -> int:
    """Of a local gang: one rank per GPU, or one."""
    import torch

    return 1 if config.device == "cpu" else max(1, torch.cuda.device_count())


def _on_ray(config: RunConfig) -> _Launcher:
    if find_spec("ray") is None:
        raise InputError("launcher=ray needs one more package: pip install 'apb[ray]'")
    from apb.launchers.ray import RayRanks, runs_on_gpus
    from apb.launchers.ray_cluster import Cluster, count_gpus

    assert isinstance(config.launcher, RayLauncherConfig)
    cluster = Cluster(config.launcher.address)
    gpus = count_gpus() if runs_on_gpus(config) else 0
    world_size = config.world_size or max(1, gpus)
    return _Launcher(world_size, lambda ranks: RayRanks(config, len(ranks)), cluster.leave)
