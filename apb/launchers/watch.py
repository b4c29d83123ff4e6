"""Supervision among equals: ranks without a driver watch each other through the store.

Each rank has a thread that publishes its heartbeat and judges all of them. Whoever finds the cause
of a failure first writes it down for all and prints it; then every rank ends, so that whoever
started them (torchrun's agent, Slurm) sees the failure at once and may start them again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from typing import NamedTuple

from apb.clock import machine
from apb.errors import EngineDeadError, RankFailure
from apb.heartbeat import Beat, Pulse, Stage
from apb.launchers.process_state import is_gone
from apb.launchers.rendezvous import Store
from apb.supervision import Blame, Report, SupervisionConfig, Watcher, last_heard_in

_BEAT_S = 0.5
_EXPLAIN_S = 3.0
"""How long a rank that lost a peer looks for the cause before it reports itself."""
_SILENT_S = 2.0
"""After which a rank that stopped beating is the cause, once another has lost a peer."""
_UNWIND_S = 1.0
"""How long a rank's main thread has to raise the cause before the process ends."""

_DONE = (Stage.IDLE, Stage.LEFT)


class _Sign(NamedTuple):
    """A rank's word on itself."""

    turn: int = 0
    host: str = ""
    """What people call the machine; others may be called the same."""
    space: str = ""
    """Where the process's number means it: ranks with the same can look for each other's."""
    beat: Beat = Beat()


class StoreWatch:
    """One rank's watch over all of them."""

    def __init__(
        self,
        store: Store,
        pulse: Pulse,
        *,
        rank: int,
        world_size: int,
        config: SupervisionConfig,
    ) -> None:
        self._store, self._pulse, self._rank = store, pulse, rank
        self._watcher = Watcher(config)
        self._host, self._space = socket.gethostname(), process_space()
        self._parent, self._turn = os.getppid(), 0
        self._keys = [f"beat{rank}" for rank in range(world_size)]
        self._signs = [_Sign()] * world_size
        self._has_failed, self._stopping = threading.Event(), threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="apb-watch", daemon=True)
        self._thread.start()

    def explain(self, error: Exception) -> EngineDeadError:
        """The first cause of an error in this rank's main thread, agreed on by all ranks."""
        place, now = self._pulse.beat.place, time.monotonic()
        report = Report.of(error, rank=self._rank, host=self._host, place=place, at_s=now)
        self._has_failed.set()
        cause = None
        try:
            while report.blame is Blame.VICTIM and time.monotonic() < now + _EXPLAIN_S:
                if (cause := self._cause()) is not None:
                    break
                time.sleep(_BEAT_S / 5)
            cause = cause or self._agree(report.failure)
        except RuntimeError:  # the store has gone as well
            cause = report.failure
        found = EngineDeadError.of(cause)
        found.is_told = True
        return found

    def stop(self) -> None:
        """Leave, so that the others do not take silence for a failure."""
        self._pulse.enter(Stage.LEFT)
        self._stopping.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._publish()

    def _run(self) -> None:
        while not self._stopping.wait(_BEAT_S):
            try:
                self._publish()
                cause = self._cause() or self._judge()
            except RuntimeError:
                cause = self._without_store()
            if cause is not None:
                self._obey(cause)
            if os.getppid() != self._parent:
                os._exit(1)  # torchrun's agent was killed and cannot end its ranks

    def _publish(self) -> None:
        self._turn += 1
        sign = json.dumps([self._turn, self._host, self._space, self._pulse.beat])
        self._store.set(self._keys[self._rank], sign)

    def _judge(self) -> RankFailure | None:
        """The failure that the heartbeats reveal, told to all."""
        if not self._store.check(self._keys):
            return None
        now, unheard = time.monotonic(), set[int]()
        for rank, text in enumerate(self._store.multi_get(self._keys)):
            turn, host, space, beat = json.loads(text)
            if turn == self._signs[rank].turn:
                unheard.add(rank)
            self._signs[rank] = _Sign(turn, host, space, Beat.read(beat))
        stall = self._watcher.observe([sign.beat for sign in self._signs], now, unheard=unheard)
        failure = self._lost(now)
        if failure is None and stall is not None:
            failure = stall.failure(self._host_of(stall.rank))
        return None if failure is None else self._agree(failure)

    def _lost(self, now: float) -> RankFailure | None:
        """A rank whose process has ended or, once this one has lost a peer, is likely to have.

        One that is between requests may have ended in order.
        """
        failed = self._has_failed.is_set()
        for rank, (_, host, space, beat) in enumerate(self._signs):
            place, silent_s = last_heard_in(beat), self._watcher.silence_s(rank, now)
            if beat.stage is Stage.LEFT:
                continue
            watched = space == self._space and (failed or beat.stage is not Stage.IDLE)
            if watched and is_gone(beat.pid):
                return RankFailure(rank, host, place, "ended without a word")
            if failed and silent_s > _SILENT_S:
                reason = f"has not been heard of for {silent_s:.1f} s"
                return RankFailure(rank, host, place, reason)
        return None

    def _cause(self) -> RankFailure | None:
        if not self._store.check(["cause"]):
            return None
        return _written(self._store.multi_get(["cause"])[0])

    def _agree(self, failure: RankFailure) -> RankFailure:
        """The first cause that any rank has found; whoever wrote it prints it."""
        mine = json.dumps([uuid.uuid4().hex, failure])  # another may find the very same
        found = self._store.compare_set("cause", "", mine).decode()
        if found == mine:
            text = "\n".join(filter(None, [f"apb: {failure.sentence}", failure.stack]))
            print(text, file=sys.stderr, flush=True)  # noqa: T201
        return _written(found)

    def _without_store(self) -> RankFailure | None:
        """What the loss of the store means: nothing once its keeper or this rank is done."""
        if self._pulse.beat.stage in _DONE or self._signs[0].beat.stage in _DONE:
            self._stopping.set()
            return None
        place = self._pulse.beat.place
        reason = "took the store along that rank 0 or torchrun's agent keeps"
        return RankFailure(0, self._host_of(0), place, reason)

    def _obey(self, cause: RankFailure) -> None:
        """End this rank: by its main thread if that has noticed, or else from here."""
        culprit = cause.rank
        if culprit == self._rank and not self._has_failed.is_set():
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            stack = "".join(traceback.format_stack(frame))
            print(f"stack of rank {culprit}:\n{stack}", file=sys.stderr, flush=True)  # noqa: T201
        if self._has_failed.wait(_UNWIND_S):
            self._stopping.set()
            return
        if culprit not in (None, self._rank) and self._signs[culprit].space == self._space:
            with suppress(ProcessLookupError):  # it may be stopped, which no other signal ends
                os.kill(self._signs[culprit].beat.pid, signal.SIGKILL)
        os._exit(1)

    def _host_of(self, rank: int | None) -> str:
        return self._host if rank is None else self._signs[rank].host


def process_space() -> str:
    """What numbers this process: a machine, and there a process namespace."""
    parts = [machine()]
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _written(cause: str | bytes) -> RankFailure:
    """The failure in the store, whoever wrote it."""
    _, failure = json.loads(cause)
    return RankFailure(*failure)
