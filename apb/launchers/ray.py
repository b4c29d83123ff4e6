"""Ranks as actors of a Ray cluster; the driver needs no GPU.

Ray places and starts the ranks, carries requests and replies, and reports dead processes. Tensors
go between ranks by torch.distributed, as with every other launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from apb.config import RunConfig
from apb.errors import EngineDeadError, InputError, RequestError
from apb.launcher_config import RayLauncherConfig
from apb.launchers.base import Session
from apb.launchers.ray_cluster import (
    Place,
    bundle,
    check_versions,
    connect,
    count_gpus,
    local_ranks,
    places,
    reserve,
)
from apb.launchers.ray_rank import INBOX, OUTBOX, RankActor, passed_on
from apb.methods.decode import OWNER

_EXIT_S = 5.0
_INLINE_BYTES = 2**16
_REPORT_S = 1.0
"""Ray reports a killed process about 0.3 s after its peers report their lost connections."""


class RaySession(Session):
    """A gang of actors in a placement group, killed together as soon as one of them fails."""

    def __init__(self, config: RunConfig, overrides: Sequence[str]) -> None:
        """Start the ranks.

        Raises:
            InputError: no cluster, no room, nodes that differ, or a setting that a rank refuses.
            EngineDeadError: a rank did not come up.
        """
        launcher = config.launcher
        assert isinstance(launcher, RayLauncherConfig)
        leaves = connect(launcher.address)
        self._ranks: list[Any] = []
        self._groups: list[PlacementGroup] = []
        self._finalizer = weakref.finalize(self, _end, self._ranks, self._groups, leaves)
        self._cause: str | None = None
        self._busy = False
        self._unread: deque[dict[str, Any]] = deque()
        try:
            self._places = self._start(launcher, config)
            self._run(overrides)
            self._next_reply()
        except BaseException:
            self._finalizer()
            raise

    def _start(self, launcher: RayLauncherConfig, config: RunConfig) -> list[Place]:
        """Make the actors; returns where they are, once their nodes are known to agree."""
        on_gpus = config.device == "cuda" or (config.device == "auto" and count_gpus() > 0)
        world_size = config.world_size or (max(1, count_gpus()) if on_gpus else 1)
        wanted = bundle(launcher, gpu=on_gpus)
        group = reserve(launcher, wanted, world_size)
        self._groups.append(group)
        order = places(group)
        nodes = [place.node for place in order]
        # Every GPU of a node stays visible: what Ray hides, NCCL cannot use between ranks.
        variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        if threads := os.environ.get("OMP_NUM_THREADS"):
            variables["OMP_NUM_THREADS"] = threads
        remote: Any = ray.remote  # its types know fewer options
        actor = remote(concurrency_groups={INBOX: 1, OUTBOX: 1})(RankActor)
        for rank, (place, local_rank) in enumerate(zip(order, local_ranks(order), strict=True)):
            options = actor.options(
                num_cpus=wanted["CPU"],
                num_gpus=wanted.get("GPU", 0),
                resources=dict(launcher.resources),
                max_restarts=0,  # a rank that came back alone would have no peers
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, place.bundle),
                runtime_env={"env_vars": variables},
            )
            self._ranks.append(
                options.remote(
                    rank=rank,
                    world_size=world_size,
                    local_rank=local_rank,
                    local_world_size=nodes.count(place.node),
                    environment=passed_on(os.environ, launcher.environment),
                    folder=os.getcwd(),
                )
            )
        check_versions(order, [self._facts(rank, place) for rank, place in enumerate(order)])
        return order

    def _facts(self, rank: int, place: Place) -> dict[str, str]:
        try:
            facts: dict[str, str] = ray.get(self._ranks[rank].facts.remote())
        except RayError as error:
            missing = "No module named" in str(error)
            advice = "install apb and what it needs there" if missing else "see Ray's log"
            raise InputError(
                f"node {place.address} cannot start rank {rank} ({_reason(error)}): {advice}"
            ) from error
        return facts

    def _run(self, overrides: Sequence[str]) -> None:
        """Let the ranks meet and listen to the owner from now on."""
        host = self._places[OWNER].address
        port: int = ray.get(self._ranks[OWNER].host_store.remote(host))
        self._runs = [
            rank.run.remote(place.address, (host, port))
            for rank, place in zip(self._ranks, self._places, strict=True)
        ]
        self._listen()
        self._send({"overrides": list(overrides), "init_method": "env://"}, self._ranks)

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        if self._cause is not None:
            raise EngineDeadError(self._cause)
        self._send({"op": op, "arguments": arguments}, self._ranks)
        finished, self._busy = False, True
        try:
            while not finished:
                try:
                    reply = self._next_reply()
                except (InputError, RequestError):
                    finished = True
                    raise
                finished = "result" in reply
                yield reply
        finally:
            if not finished and self._cause is None:
                self._cancel()
            self._busy = False

    def close(self) -> None:
        if self._finalizer.alive and self._cause is None:
            self._cause = "the engine was closed"
            if not self._busy:
                self._send({"op": "exit"}, self._ranks)
                ray.wait(self._runs, num_returns=len(self._runs), timeout=_EXIT_S)
        self._finalizer()

    def _cancel(self) -> None:
        """End a request whose caller has stopped listening, and drop what it still says."""
        self._send({"op": "cancel"}, self._ranks[OWNER : OWNER + 1])
        try:
            while "result" not in self._next_reply():
                pass
        except (InputError, RequestError):
            pass
        except KeyboardInterrupt:  # who asks again must not get this request's replies
            self._stop("the engine was stopped while a request was being cancelled")
            raise

    def _send(self, message: dict[str, Any], ranks: Sequence[Any]) -> None:
        encoded: Any = json.dumps(message).encode()
        if len(encoded) > _INLINE_BYTES:
            encoded = ray.put(encoded)  # one copy per node, not one per rank
        for rank in ranks:  # that one is gone shows when its reply is awaited
            rank.post.options(concurrency_group=INBOX).remote(encoded)

    def _listen(self) -> None:
        self._heard = self._ranks[OWNER].take.options(concurrency_group=OUTBOX).remote()

    def _next_reply(self) -> dict[str, Any]:
        """The owner's next message. A rank's `run` only ends when the rank does."""
        while not self._unread:
            try:
                ready, _ = ray.wait([self._heard, *self._runs], num_returns=1)
            except (RayError, ValueError):  # another thread has closed the session
                raise EngineDeadError(self._cause or "the engine was closed") from None
            if self._cause is not None:
                raise EngineDeadError(self._cause)
            if ready[0] != self._heard:
                self._raise(self._first_cause())
            try:
                messages = ray.get(self._heard)
            except RayError:
                self._raise(self._first_cause())
            self._unread.extend(json.loads(message) for message in messages)
            self._listen()
        message: dict[str, Any] = self._unread.popleft()
        if "error" not in message:
            return message
        is_dead = message["kind"] == EngineDeadError.__name__
        self._raise(self._first_cause(message) if is_dead else message)

    def _first_cause(self, said: dict[str, Any] | None = None) -> dict[str, Any]:
        """What went wrong first: a process that died, else what a rank said, rank 0 last.

        Here is where the gang learns of a rank's end: `run` returns or raises.
        """
        give_up = time.monotonic() + _REPORT_S
        waiting, causes = dict(zip(self._runs, range(len(self._runs)), strict=True)), []
        while waiting and (left := give_up - time.monotonic()) > 0:
            for ended in ray.wait(list(waiting), num_returns=1, timeout=left)[0]:
                rank = waiting.pop(ended)
                try:
                    words = [json.loads(message) for message in ray.get(ended)]
                except RayError as error:
                    where = f"rank {rank} on node {self._places[rank].address}"
                    return _dead(f"{where} {_reason(error)}")
                causes += [word for word in words if "error" in word]
        return next(iter([*causes, *([said] if said else [])]), _dead("a rank ended too early"))

    def _raise(self, message: dict[str, Any]) -> NoReturn:
        if message["kind"] == InputError.__name__:
            raise InputError(message["error"])
        if message["kind"] == RequestError.__name__:
            raise RequestError(message["error"])
        self._stop(message["error"])
        raise EngineDeadError(message["error"])

    def _stop(self, cause: str) -> None:
        self._cause = cause
        self._finalizer()


def _dead(cause: str) -> dict[str, Any]:
    return {"error": cause, "kind": EngineDeadError.__name__}


def _reason(error: RayError) -> str:
    """What happened to a rank, in a few words out of Ray's paragraphs."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if missing := next((line for line in lines if "No module named" in line), None):
        return missing.partition("Error: ")[2] or missing
    if isinstance(error, RayActorError):
        detail = next((line for line in lines if "dead because" in line), lines[0])
        return f"ended without a word ({detail.partition('. ')[0].rstrip('.')})"
    return f"failed: {lines[-1]}"


def _end(ranks: Sequence[Any], groups: Sequence[PlacementGroup], leaves: bool) -> None:
    """Kill the actors, give their resources back and leave the cluster."""
    if not ray.is_initialized():  # who left the cluster has ended them
        return
    with contextlib.suppress(RayError):
        for rank in ranks:
            ray.kill(rank)
        for group in groups:
            remove_placement_group(group)
    if leaves:
        ray.shutdown()
