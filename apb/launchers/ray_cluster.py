"""What a gang needs of a Ray cluster: a connection, room for its ranks, and one set of versions."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from apb.errors import InputError
from apb.launcher_config import RayLauncherConfig
from apb.launchers.ray_rank import installed_versions

_LOG = logging.getLogger("apb")
_PATIENCE_S = 5
"""After this long a user is told what the ranks wait for."""


class Place(NamedTuple):
    """Where a rank runs: its bundle of the placement group, and the node's id and address."""

    bundle: int
    node: str
    address: str


class Cluster:
    """A connection to a Ray cluster, which a process has once."""

    def __init__(self, address: str) -> None:
        """Join the cluster, unless this process has already.

        Raises:
            InputError: there is none, it wants a token, or it runs other versions of Ray or Python.
        """
        self._leave = weakref.finalize(self, ray.shutdown)
        if ray.is_initialized():
            self._leave.detach()
        else:
            _connect(address)

    def leave(self) -> None:
        """Leave if this has joined; repeating it does no harm."""
        self._leave()


def _connect(address: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        if address == "local":
            ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING)
        else:
            ray.init(address=address, logging_level=logging.WARNING)
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        found = " ".join(str(error).split())
        raise InputError(f"the cluster and this process do not match: {found}") from error
    except RayError as error:
        if type(error).__name__ != "AuthenticationError":  # which older releases have not got
            raise
        raise InputError(
            f"the Ray cluster at launcher.address={address} asks for a token that this process has "
            "not got: put it into ~/.ray/auth_token or RAY_AUTH_TOKEN, or set "
            "RAY_AUTH_MODE=disabled on every node"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Ray cluster at launcher.address={address}: start one with `ray start --head`, "
            "give its HOST:PORT, or set launcher.address=local for one on this machine alone"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there


def _knock(address: str) -> None:
    """Raises OSError where nobody listens; Ray itself would ask for minutes."""
    address = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()


def count_gpus() -> int:
    """GPUs of the cluster, free or not."""
    return int(ray.cluster_resources().get("GPU", 0))


def bundle(config: RayLauncherConfig, *, gpu: bool) -> dict[str, float]:
    """The resources of one rank."""
    return {"CPU": config.cpus_per_rank, **({"GPU": 1} if gpu else {}), **config.resources}


def reserve(config: RayLauncherConfig, wanted: Mapping[str, float], ranks: int) -> PlacementGroup:
    """Ask for a placement group with `wanted` for each of the ranks, and do not wait for it."""
    group: PlacementGroup = placement_group([dict(wanted)] * ranks, strategy=config.strategy.value)
    return group


def await_room(
    group: PlacementGroup, config: RayLauncherConfig, wanted: Mapping[str, float]
) -> None:
    """Wait for a group that was reserved.

    Raises:
        InputError: the cluster has not had room within the time given.
    """
    # An infeasible group never fails by itself.
    if group.wait(min(_PATIENCE_S, config.placement_timeout_s)):
        return
    _LOG.info("waiting for %s", _shortage(wanted, group.bundle_count))
    if group.wait(max(0, config.placement_timeout_s - _PATIENCE_S)):
        return
    raise InputError(
        f"no room after launcher.placement_timeout_s={config.placement_timeout_s}: "
        f"{_shortage(wanted, group.bundle_count)}; "
        "start fewer ranks (world_size), add nodes, or let the job that holds them end"
    )


def _shortage(wanted: Mapping[str, float], ranks: int) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{ranks * amount:g} {name} (the cluster has {total.get(name, 0):g}, "
        f"{free.get(name, 0):g} free)"
        for name, amount in wanted.items()
    ]
    each = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    return f"{ranks} ranks of {each} each need {' and '.join(parts)}"


def places(group: PlacementGroup) -> list[Place]:
    """Where the ranks run, in rank order: the driver's node first, a node's ranks side by side."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    found = [Place(bundle, node, addresses[node]) for bundle, node in nodes.items()]
    return in_rank_order(found, first=ray.get_runtime_context().get_node_id())


def in_rank_order(found: Sequence[Place], *, first: str) -> list[Place]:
    """Ranks that pass blocks to one another most share a node; the node `first` has rank 0."""
    return sorted(
        found, key=lambda place: (place.node != first, place.address, place.node, place.bundle)
    )


def local_ranks(order: Sequence[Place]) -> list[int]:
    """Each rank's number among those of its node."""
    seen: Counter[str] = Counter()
    numbers = []
    for place in order:
        numbers.append(seen[place.node])
        seen[place.node] += 1
    return numbers


def check_versions(order: Sequence[Place], facts: Sequence[Mapping[str, str]]) -> None:
    """Raises InputError, naming the node, unless every rank has the driver's versions."""
    for place, versions in zip(order, facts, strict=True):
        for name, ours in installed_versions().items():
            if versions.get(name) != ours:
                raise InputError(
                    f"node {place.address} has {name} {versions.get(name)} and this process "
                    f"{name} {ours}: install the same on every node"
                )
