"""Who is to blame when a gang of ranks fails or stalls, and whether it may start again.

Judgement only: it is given what was seen and the time, and holds no process and no clock.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, NamedTuple

from apb.errors import EngineDeadError, InputError, PeerLostError, RankFailure
from apb.heartbeat import Beat, Stage


@dataclass(kw_only=True, slots=True)
class SupervisionConfig:
    """How long ranks may go without progress, in seconds, and how often they may start again.

    Attributes:
        start_s: until a new rank has imported its libraries and met the others.
        load_s: to check and tokenise a request and to read (or download) the weights.
        layer_s: one layer of a prefill, at least; see `slack`.
        exchange_s: a message, while all ranks wait for one.
        step_s: one decoded token.
        heartbeat_s: without a word from a rank's process on another machine, or to take a request.
        slack: a layer or token may take this many times what the cost model predicts.
        drain_s: for the running request once the command line is told to end (SIGTERM).
        restarts: that a gang is granted within `restart_window_s`.
        restart_window_s: see `restarts`.
    """

    start_s: float = 300.0
    load_s: float = 1800.0
    layer_s: float = 60.0
    exchange_s: float = 120.0
    step_s: float = 60.0
    heartbeat_s: float = 20.0
    slack: float = 10.0
    drain_s: float = 20.0
    restarts: int = 3
    restart_window_s: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "restarts" else 0.1
            if not least <= value <= 1e9:  # so is NaN
                raise InputError(f"supervision.{field.name}={value} must be {least} to 1e9")

    def budget(self, beat: Beat) -> tuple[str, float]:
        """The setting that bounds what a rank does, and the seconds that it grants here."""
        name = "exchange_s" if beat.waiting else _BUDGETS[beat.stage]
        granted: float = getattr(self, name)
        return f"supervision.{name}={granted:g}", max(granted, self.slack * beat.expected_ms / 1000)


_BUDGETS = {
    Stage.START: "start_s",
    Stage.IDLE: "heartbeat_s",
    Stage.LOAD: "load_s",
    Stage.PREFILL: "layer_s",
    Stage.DECODE: "step_s",
    Stage.LEFT: "heartbeat_s",
}


class Stall(NamedTuple):
    """A gang that does not advance."""

    rank: int | None
    """Whom the others wait for; None where they all wait at the same place."""
    beat: Beat
    seconds: float
    limit: str
    is_silent: bool = False
    """Whether nothing was heard of the rank in all that time."""

    def failure(self, host: str) -> RankFailure:
        place, did = self.beat.place, "made no progress"
        if self.is_silent:
            place, did = last_heard_in(self.beat), "has not been heard of"
        reason = f"{did} for {self.seconds:.1f} s, more than {self.limit} allows"
        return RankFailure(self.rank, host, place, reason)


def last_heard_in(beat: Beat) -> str:
    """The place of a rank that others know by an earlier heartbeat only."""
    return f"last heard of in {beat.place}"


LOOK_S = 5.0
"""Who has looked away for longer, stopped or on a sleeping machine, knows nothing of the time."""


class Watcher:
    """Compares successive heartbeats of a gang with what each stage may take.

    They have to be looked at every few seconds (`LOOK_S`).
    """

    def __init__(self, config: SupervisionConfig) -> None:
        self._config = config
        self._seen: list[Beat] = []
        self._since: list[float] = []
        self._heard_at: list[float] = []
        self._looked_at = 0.0

    def observe(
        self,
        beats: Sequence[Beat],
        now: float,
        *,
        request: int = 0,
        unheard: Container[int] = (),
    ) -> Stall | None:
        """The stall that these heartbeats reveal, if there is one.

        A rank that works is measured by its own progress. Ranks that wait are not, unless all do.

        Args:
            beats: of all ranks, in rank order.
            now: seconds on any clock that does not jump.
            request: the number of the request that ranks should have taken by now.
            unheard: ranks whose heartbeat is an earlier one, as they have not answered since.
        """
        if now - self._looked_at > LOOK_S:
            self.forget()
        self._looked_at = now
        if not self._seen:
            self._seen = [Beat()] * len(beats)
            self._since, self._heard_at = [now] * len(beats), [now] * len(beats)
        for rank, beat in enumerate(beats):
            if rank not in unheard:
                self._heard_at[rank] = now
            if beat != self._seen[rank]:
                self._seen[rank], self._since[rank] = beat, now
        active = [rank for rank, beat in enumerate(beats) if _is_active(beat, request)]
        if active and (silent := self._silent(now)) is not None:
            return silent
        working = [rank for rank in active if not beats[rank].waiting]
        late = [rank for rank in working if self._is_late(rank, now)]
        if late:
            return self._stall(min(late, key=lambda rank: _position(beats[rank])), now)
        waiting = [rank for rank in active if beats[rank].waiting]
        last = max(waiting, key=lambda rank: self._since[rank], default=None)
        if last is None or not self._is_late(last, now):
            return None
        if not working:
            return None if _is_someone_away(beats) else self._odd_one_out(waiting, now)
        return self._lost(working, last, now)

    def forget(self) -> None:
        """Begin anew: nobody looked for a while, so that what is seen next counts from then."""
        self._seen = []

    def silence_s(self, rank: int, now: float) -> float:
        """For how long nothing was heard of a rank, at the time of the last look."""
        return now - self._heard_at[rank]

    @property
    def _has_met(self) -> bool:
        """Whether the gang has: all ranks if one, whatever was last heard of the others."""
        return any(beat.stage not in (Stage.START, Stage.LEFT) for beat in self._seen)

    def _silent(self, now: float) -> Stall | None:
        """The rank that nothing was heard of for longest, if that is too long."""

        def setting(rank: int) -> str:
            # Who is still importing libraries cannot answer.
            is_starting = self._seen[rank].stage is Stage.START and not self._has_met
            return "start_s" if is_starting else "heartbeat_s"

        silent = [
            rank
            for rank, beat in enumerate(self._seen)
            if beat.stage is not Stage.LEFT
            and self.silence_s(rank, now) > getattr(self._config, setting(rank))
        ]
        if not silent:
            return None
        rank = max(silent, key=lambda rank: self.silence_s(rank, now))
        limit = f"supervision.{setting(rank)}={getattr(self._config, setting(rank)):g}"
        return Stall(rank, self._seen[rank], self.silence_s(rank, now), limit, is_silent=True)

    def _lost(self, working: Sequence[int], last: int, now: float) -> Stall | None:
        """Of ranks that work as far as is known, the one not heard of for longest, if none was
        since the last of the others began to wait: it need not be at work any more.
        """
        if not self._has_met or any(self._heard_at[rank] > self._since[last] for rank in working):
            return None
        rank = min(working, key=lambda rank: self._heard_at[rank])
        limit = self._config.budget(self._seen[last])[0]
        return Stall(rank, self._seen[rank], self.silence_s(rank, now), limit, is_silent=True)

    def _is_late(self, rank: int, now: float) -> bool:
        return now - self._since[rank] > self._config.budget(self._seen[rank])[1]

    def _stall(self, rank: int, now: float) -> Stall:
        beat, since = self._seen[rank], self._since[rank]
        is_silent = self._heard_at[rank] <= since
        return Stall(rank, beat, now - since, self._config.budget(beat)[0], is_silent)

    def _odd_one_out(self, waiting: Sequence[int], now: float) -> Stall:
        """All wait: a single rank that is elsewhere than the rest has skipped or missed a message.

        It has skipped one if it is ahead: nobody can pass a collective that another has not begun.
        """
        places = {rank: (self._seen[rank].step, self._seen[rank].layer) for rank in waiting}
        first, last = min(places.values()), max(places.values())
        ahead = [rank for rank in waiting if places[rank] == last]
        behind = [rank for rank in waiting if places[rank] == first]
        if first == last:
            return self._stall(waiting[0], now)._replace(rank=None)
        return self._stall(ahead[0] if len(ahead) == 1 else behind[0], now)


def _is_active(beat: Beat, request: int) -> bool:
    if beat.stage is Stage.IDLE:
        return beat.request < request
    return beat.stage is not Stage.LEFT


def _is_someone_away(beats: Sequence[Beat]) -> bool:
    """Whether a rank without a driver has still to make the call that the others are in."""
    latest = max(beat.request for beat in beats)
    return any(beat.stage is Stage.IDLE and beat.request < latest for beat in beats)


def _position(beat: Beat) -> tuple[int, int, int]:
    return beat.request, beat.stage, beat.layer


class Blame(IntEnum):
    """How likely what is known of a rank's end is the first cause; the lowest is taken first."""

    MURDERED = 0
    """Its process ended without a word."""
    RAISED = 1
    """It failed in its own work."""
    ACCUSED = 2
    """Its message was not the one that another rank waited for."""
    VICTIM = 3
    """It lost its connection to another rank."""


class Report(NamedTuple):
    """How one rank has ended, as it says itself or as its process shows."""

    blame: Blame
    at_s: float
    """On one clock for all reports."""
    failure: RankFailure

    @classmethod
    def of(cls, error: Exception, *, rank: int, host: str, place: str, at_s: float) -> Report:
        """What a rank says of the error that ends it; to be called while it is handled."""
        failure = RankFailure(rank, host, place, f"failed: {_described(error)}")
        if isinstance(error, PeerLostError):
            return cls(Blame.VICTIM, at_s, failure._replace(reason=f"failed: {error}"))
        if isinstance(error, EngineDeadError) and error.failure is not None:
            return cls(Blame.ACCUSED, at_s, error.failure._replace(host=host))
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            failure = failure._replace(reason=f"ran out of memory: {_described(error)}")
        return cls(Blame.RAISED, at_s, failure._replace(stack=traceback.format_exc().strip()))

    @classmethod
    def from_json(cls, values: list[Any]) -> Report:
        blame, at_s, failure = values
        return cls(Blame(blame), at_s, RankFailure(*failure))


def _described(error: Exception) -> str:
    """On one line, whatever the error's text is."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def first_cause(reports: Sequence[Report]) -> RankFailure:
    """The failure that the others follow from, whoever reported first."""
    return min(reports, key=lambda report: (report.blame, report.at_s)).failure


class RestartBudget:
    """How often a gang may start again within a sliding window."""

    def __init__(self, config: SupervisionConfig) -> None:
        self._most, self._window_s = config.restarts, config.restart_window_s
        self._starts: deque[float] = deque()

    def spend(self, now: float) -> bool:
        """Take one restart if one is left at this time."""
        while self._starts and now - self._starts[0] >= self._window_s:
            self._starts.popleft()
        if len(self._starts) >= self._most:
            return False
        self._starts.append(now)
        return True
