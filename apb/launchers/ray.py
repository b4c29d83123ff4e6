"""Ranks as actors of a Ray cluster; the driver needs no GPU.

Ray places and starts the ranks, carries requests, replies and heartbeats, and reports dead
processes. Tensors go between ranks by torch.distributed, as with every other launcher.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections import deque
from collections.abc import Container, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from apb.config import RunConfig
from apb.errors import EngineDeadError, InputError, RankFailure
from apb.heartbeat import Beat
from apb.launcher_config import RayLauncherConfig
from apb.launchers.gang import Ranks
from apb.launchers.ray_cluster import (
    Place,
    await_room,
    bundle,
    check_versions,
    count_gpus,
    local_ranks,
    places,
    reserve,
)
from apb.launchers.ray_rank import INBOX, OUTBOX, PULSE, RankActor, passed_on
from apb.methods.decode import OWNER
from apb.supervision import last_heard_in

_EXIT_S = 5.0
_ASK_S = 0.5
"""How often a rank is asked for its heartbeat."""
_QUESTION_S = 1.0
"""How long a rank may take to answer a question about itself or a neighbour."""
_INLINE_BYTES = 2**16


class RayRanks(Ranks):
    """Actors in a placement group of their own."""

    settle_s = 1.0  # Ray reports a killed process about 0.3 s after its peers their lost connection

    def __init__(self, config: RunConfig, world_size: int) -> None:
        """Ask for room and for an actor in each part of it; the cluster has been joined."""
        assert isinstance(config.launcher, RayLauncherConfig)
        self.world_size = world_size
        self._launcher, self._start_s = config.launcher, config.supervision.start_s
        self._wanted = bundle(self._launcher, gpu=runs_on_gpus(config))
        self._group = reserve(self._launcher, self._wanted, world_size)
        self._actors: list[Any] = []
        self._finalizer = weakref.finalize(self, _end, self._actors, self._group)
        self._actors += [self._actor(index) for index in range(world_size)]
        self._places: list[Place] = []
        self._runs: list[Any] = []
        self._posted: dict[int, Any] = {}
        self._deaths: dict[int, str] = {}
        self._unread = [deque[bytes]() for _ in range(world_size)]
        self._beats = [Beat()] * world_size
        self._asked: dict[int, Any] = {}
        self._ask_at = 0.0

    def _actor(self, index: int) -> Any:
        # Every GPU of a node stays visible: what Ray hides, NCCL cannot use between ranks.
        variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        if threads := os.environ.get("OMP_NUM_THREADS"):
            variables["OMP_NUM_THREADS"] = threads
        remote: Any = ray.remote  # its types know fewer options
        actor = remote(concurrency_groups={INBOX: 1, OUTBOX: 1, PULSE: 1})(RankActor)
        options = actor.options(
            num_cpus=self._wanted["CPU"],
            num_gpus=self._wanted.get("GPU", 0),
            resources=dict(self._launcher.resources),
            max_restarts=0,  # a rank that came back alone would have no peers
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            runtime_env={"env_vars": variables},
        )
        environment = passed_on(os.environ, self._launcher.environment)
        return options.remote(environment=environment, folder=os.getcwd())

    def meet(self) -> None:
        if self._runs:
            return
        await_room(self._group, self._launcher, self._wanted)
        self._places = places(self._group)
        by_bundle = list(self._actors)
        self._actors[:] = [by_bundle[place.bundle] for place in self._places]
        check_versions(self._places, self._facts())
        host = self._places[OWNER].address
        port = self._store_port(host)
        nodes = [place.node for place in self._places]
        self._listen()
        self._runs = [
            self._actors[rank].run.remote(
                rank,
                self.world_size,
                local_rank=local_rank,
                local_world_size=nodes.count(place.node),
                address=place.address,
                store=(host, port),
            )
            for rank, (place, local_rank) in enumerate(
                zip(self._places, local_ranks(self._places), strict=True)
            )
        ]

    def _store_port(self, host: str) -> int:
        """Where the owner keeps what ranks meet at."""
        try:
            port: int = ray.get(self._actors[OWNER].host_store.remote(host))
        except RayError as error:
            failure = RankFailure(OWNER, host, Beat().place, _reason(error))
            raise EngineDeadError.of(failure) from error
        return port

    def _facts(self) -> list[dict[str, str]]:
        asked = [actor.facts.remote() for actor in self._actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=self._start_s)
        facts = []
        for rank, answer in enumerate(asked):
            address = self._places[rank].address
            if answer not in answered:
                reason = f"has not come up within supervision.start_s={self._start_s:g}"
                raise EngineDeadError.of(RankFailure(rank, address, Beat().place, reason))
            try:
                facts.append(ray.get(answer))
            except RayError as error:
                missing = "No module named" in str(error)
                advice = "install apb and what it needs there" if missing else "see Ray's log"
                raise InputError(
                    f"node {address} cannot start rank {rank} ({_reason(error)}): {advice}"
                ) from error
        return facts

    def post(self, encoded: bytes, ranks: Sequence[int]) -> None:
        message: Any = encoded
        if len(encoded) > _INLINE_BYTES:
            message = ray.put(encoded)  # one copy per node, not one per rank
        for rank in ranks:
            post = self._actors[rank].post.options(concurrency_group=INBOX)
            self._posted[rank] = post.remote(message)
        self._ask()  # what is known of a rank that stops at once should not be from long ago

    def ready(self, timeout_s: float, *, besides: Container[int] = ()) -> list[int]:
        waiting = {run: rank for rank, run in enumerate(self._runs) if rank not in besides}
        if OWNER not in besides:
            waiting[self._heard] = OWNER
        unread = {rank for rank in waiting.values() if self._unread[rank]}
        if unread or not waiting:
            return sorted(unread)
        try:
            ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
            found = {waiting[reference] for reference in _arrived(list(waiting))}
        except (RayError, ValueError):
            raise EngineDeadError("the engine was closed") from None
        if not self._finalizer.alive:
            raise EngineDeadError("the engine was closed")
        return sorted(found)

    def receive(self, rank: int) -> bytes | None:
        """A rank's `run` returns what nobody has taken, and raises where its process has died."""
        unread = self._unread[rank]
        try:
            if not unread and rank == OWNER and _arrived([self._heard]):
                unread.extend(ray.get(self._heard))
                self._listen()
            elif not unread and _arrived([self._runs[rank]]) and rank not in self._deaths:
                self._deaths[rank] = "it has stopped to serve"
                unread.extend(ray.get(self._runs[rank]))
        except RayError as error:
            self._deaths[rank] = _reason(error)
        return unread.popleft() if unread else None

    def _listen(self) -> None:
        self._heard = self._actors[OWNER].take.options(concurrency_group=OUTBOX).remote()

    @property
    def ended(self) -> list[int]:
        ended = _arrived(self._runs)
        return [rank for rank, run in enumerate(self._runs) if run in ended]

    def beats(self) -> list[Beat]:
        if not self._runs:
            return []
        arrived = _arrived(list(self._asked.values()))
        for rank, answer in list(self._asked.items()):
            if answer in arrived:
                del self._asked[rank]
                with contextlib.suppress(RayError):  # it has died, which its `run` tells
                    self._beats[rank] = Beat.read(ray.get(answer))
        if time.monotonic() >= self._ask_at:
            self._ask()
        return list(self._beats)

    def _ask(self) -> None:
        self._ask_at = time.monotonic() + _ASK_S
        for rank in set(range(self.world_size)) - self._asked.keys():
            beat = self._actors[rank].beat.options(concurrency_group=PULSE)
            self._asked[rank] = beat.remote()

    @property
    def unheard(self) -> Container[int]:
        return self._asked.keys()

    def host(self, rank: int) -> str:
        return self._places[rank].address

    def is_stopped(self, rank: int) -> bool:
        """As the first neighbour that answers sees it; False for a rank alone on its node."""
        node, pid = self._places[rank].node, self._beats[rank].pid
        asked = [
            self._actors[other].is_stopped.options(concurrency_group=PULSE).remote(pid)
            for other, place in enumerate(self._places)
            if place.node == node and other != rank
        ]
        answered = ray.wait(asked, timeout=_QUESTION_S)[0] if asked else []
        return bool(answered and _answer(answered[0]))

    def stack_of(self, rank: int) -> str:
        stack = self._actors[rank].stack.options(concurrency_group=PULSE)
        return str(_answer(stack.remote()) or "")

    def death(self, rank: int, request: int) -> RankFailure:
        """Ray does not tell exit codes, and the rank's place is as old as its last heartbeat."""
        reason = f"ended without a word ({self._deaths[rank]})"
        return RankFailure(
            rank,
            self.host(rank),
            last_heard_in(self._beats[rank]),
            reason,
            had_request=self._was_delivered(rank),
        )

    def _was_delivered(self, rank: int) -> bool:
        """Whether it may have got the last message; Ray may fail that later than its `run`."""
        try:
            ray.get(self._posted[rank], timeout=_QUESTION_S)
        except RayError as error:
            return isinstance(error, GetTimeoutError)
        return True

    def wait(self) -> None:
        ray.wait(self._runs, num_returns=len(self._runs), timeout=_EXIT_S)

    def end(self) -> None:
        self._finalizer()


def runs_on_gpus(config: RunConfig) -> bool:
    """Whether ranks get a GPU each; the cluster has been joined."""
    return config.device == "cuda" or (config.device == "auto" and count_gpus() > 0)


def _arrived(references: Sequence[Any]) -> set[Any]:
    """Those that need not be waited for."""
    if not references:
        return set()
    return set(ray.wait(list(references), num_returns=len(references), timeout=0)[0])


def _answer(reference: Any) -> Any:
    """What a rank says to a question; None if it does not answer in time."""
    try:
        return ray.get(reference, timeout=_QUESTION_S)
    except (GetTimeoutError, RayError):
        return None


def _reason(error: RayError) -> str:
    """What happened to a rank, in a few words out of Ray's paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if missing := next((line for line in lines if "No module named" in line), None):
        return missing.partition("Error: ")[2] or missing
    if isinstance(error, RayActorError):
        detail = next((line for line in lines if "dead because" in line), lines[0])
        return detail.partition(". ")[0].rstrip(".")
    return lines[-1]


def _end(actors: Sequence[Any], group: PlacementGroup) -> None:
    """Kill the actors and give their resources back."""
    if not ray.is_initialized():  # who left the cluster has ended them
        return
    with contextlib.suppress(RayError):
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
