"""A gang as its driver sees it: requests out, replies back, and an end as soon as one rank fails.

How ranks come to be, and how one reaches them, differs between launchers: that is `Ranks`.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Container, Generator, Sequence
from typing import Any, NoReturn

from apb.errors import EngineDeadError, InputError, RankFailure, RequestError
from apb.heartbeat import Beat, Stage
from apb.launchers.base import Session
from apb.methods.decode import OWNER
from apb.methods.plan import Reduced
from apb.supervision import Blame, Report, Stall, SupervisionConfig, Watcher, first_cause

_POLL_S = 0.25
_CANCEL_S = 10.0
"""How long a cancelled request may go on, where no layer is expected to take long."""


class Ranks(ABC):
    """The ranks of one gang. They begin to start when this is made, and nothing outlives `end`."""

    world_size: int
    settle_s = 0.5
    """How long the other ranks may take to report once one has failed."""

    @property
    def greeting(self) -> dict[str, Any]:
        """What ranks have to know besides their settings."""
        return {}

    def meet(self) -> None:  # noqa: B027
        """Wait until all ranks are there and about to serve; repeating it does no harm.

        Raises:
            InputError: there is no room for them, or they cannot work together.
            EngineDeadError: one has not come up.
        """

    @abstractmethod
    def post(self, encoded: bytes, ranks: Sequence[int]) -> None:
        """Send if anyone is there; that a rank is gone shows when its reply is awaited.

        Until they have met all ranks are sent the same.

        Raises:
            RequestError: there is no room for the message; no rank has got it.
        """

    @abstractmethod
    def ready(self, timeout_s: float, *, besides: Container[int] = ()) -> list[int]:
        """Ranks that have said something or have ended, besides those that are known.

        Raises:
            EngineDeadError: another thread has ended them all.
        """

    @abstractmethod
    def receive(self, rank: int) -> bytes | None:
        """What the rank says next; None where it has ended without a word."""

    @property
    @abstractmethod
    def ended(self) -> list[int]:
        """Ranks that have ended."""

    @abstractmethod
    def beats(self) -> list[Beat]:
        """What is known of every rank's progress, in rank order."""

    @property
    def unheard(self) -> Container[int]:
        """Ranks that have not answered when they were last asked for their heartbeat."""
        return ()

    @abstractmethod
    def host(self, rank: int) -> str:
        """The machine that the rank is on."""

    @abstractmethod
    def is_stopped(self, rank: int) -> bool:
        """Whether a signal has stopped the rank's process; False where nobody can say."""

    @abstractmethod
    def stack_of(self, rank: int) -> str:
        """What the main thread of a running rank is at; empty where it cannot tell."""

    @abstractmethod
    def death(self, rank: int, request: int) -> RankFailure:
        """How a rank has ended without a word; `request` is the number of the last request."""

    @abstractmethod
    def wait(self) -> None:
        """Give ranks that were told to exit the time to do so."""

    @abstractmethod
    def end(self) -> None:
        """Kill what is left; repeating it does no harm."""


class GangSession(Session):
    """A gang whose ranks are killed together as soon as one of them fails or hangs."""

    def __init__(
        self,
        ranks: Ranks,
        overrides: Sequence[str],
        *,
        supervision: SupervisionConfig,
        restarts: int = 0,
        reduced: Reduced | None = None,
    ) -> None:
        """Tell the ranks their settings and do not wait.

        Args:
            restarts: how many gangs came before.
            reduced: where these ranks are what is left of more.
        """
        self._ranks, self._watcher = ranks, Watcher(supervision)
        self._slack = supervision.slack
        self._failure: EngineDeadError | None = None
        self._busy, self._requests = False, 0
        self._greetings = 1
        """Replies that precede those of the first call: the ranks have met, the model is loaded."""
        settings = {"overrides": list(overrides), "restarts": restarts, "reduced": reduced}
        self._send({**ranks.greeting, **settings})
        if restarts:  # so that the model is there when somebody asks
            self._request("load")
            self._greetings += 1

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        if self._failure is not None:
            raise _again(self._failure)
        self._await_greetings()
        finished, self._busy = False, True
        try:
            self._request(op, **arguments)
            while not finished:
                reply = self._next_reply()
                finished = "result" in reply
                self.has_worked |= finished
                yield reply
                self._watcher.forget()  # whoever reads the replies may have taken a break
        except (InputError, RequestError):  # it has ended, and the ranks go on
            self.has_worked = True
            raise
        except (GeneratorExit, KeyboardInterrupt):
            if not finished and self._failure is None:
                self._cancel()
            raise
        except BaseException:
            if not finished and self._failure is None:  # such as the end of the program
                self._end(EngineDeadError("the engine was stopped while a request ran"))
            raise
        finally:
            self._busy = False

    def failure(self) -> EngineDeadError | None:
        if self._failure is None and self._ranks.ended:
            self._end(self._autopsy({}))
        return self._failure and _again(self._failure)

    def close(self) -> None:
        if self._failure is None:
            self._failure = EngineDeadError("the engine was closed")
            self._send({"op": "exit"})
            if not self._greetings and not self._busy:
                self._ranks.wait()
        self._ranks.end()

    def _await_greetings(self) -> None:
        self._watcher.forget()
        try:
            self._ranks.meet()
            while self._greetings:
                self._next_reply()
                self._greetings -= 1
        except InputError as error:  # the ranks have ended with it
            self._end(EngineDeadError(str(error)))
            raise
        except EngineDeadError as error:
            self._end(error)
            raise

    def _request(self, op: str, **arguments: Any) -> None:
        try:
            self._send({"op": op, "arguments": arguments})
            self._requests += 1
        except RequestError:
            raise
        except BaseException:  # some ranks may have it and others not
            self._end(EngineDeadError("the engine was stopped while a request was being sent"))
            raise

    def _send(self, message: dict[str, Any]) -> None:
        self._ranks.post(json.dumps(message).encode(), range(self._ranks.world_size))

    def _cancel(self) -> None:
        """End a request whose caller has stopped listening, and drop what it still says."""
        self._ranks.post(json.dumps({"op": "cancel"}).encode(), [OWNER])
        layer_s = self._ranks.beats()[OWNER].expected_ms / 1000
        deadline = time.monotonic() + max(_CANCEL_S, self._slack * layer_s)
        try:
            while "result" not in self._next_reply(deadline):
                pass
        except (InputError, RequestError, EngineDeadError):
            pass  # it has ended, or the next call learns why the ranks have
        except KeyboardInterrupt:  # who asks again must not get this request's replies
            self._end(EngineDeadError("the engine was stopped while a request was being cancelled"))
            raise

    def _next_reply(self, deadline: float = float("inf")) -> dict[str, Any]:
        """Rank 0's next message. The others only speak, or end, when they fail."""
        while not (ready := self._ranks.ready(_POLL_S)):
            self._look_for_stall()
            if time.monotonic() > deadline:
                self._die(EngineDeadError("the ranks were killed: a cancelled request did not end"))
        message = self._heard(OWNER) if ready == [OWNER] else None
        if message is None or "report" in message:
            self._die(self._autopsy({OWNER: message} if ready == [OWNER] else {}))
        if "error" not in message:
            return message
        kind = InputError if message["kind"] == InputError.__name__ else RequestError
        raise kind(message["error"])

    def _heard(self, rank: int) -> dict[str, Any] | None:
        encoded = self._ranks.receive(rank)
        message: dict[str, Any] | None = None if encoded is None else json.loads(encoded)
        return message

    def _look_for_stall(self) -> None:
        beats, unheard = self._ranks.beats(), self._ranks.unheard
        now = time.monotonic()
        stall = self._watcher.observe(beats, now, request=self._requests, unheard=unheard)
        if stall is not None:
            self._die(EngineDeadError.of(self._examined(stall)))

    def _examined(self, stall: Stall) -> RankFailure:
        """A stall with what can be found out about the rank that causes it."""
        if stall.rank is None:
            return stall.failure("")
        failure = stall.failure(self._ranks.host(stall.rank))
        if self._ranks.is_stopped(stall.rank):
            return failure._replace(reason=f"was stopped by a signal and {failure.reason}")
        return failure._replace(stack=self._ranks.stack_of(stall.rank))

    def _autopsy(self, heard: dict[int, dict[str, Any] | None]) -> EngineDeadError:
        """Why the ranks fail, from what those say that do so at the same time.

        Raises:
            InputError: a rank has refused its settings.
        """
        ended = {rank: time.time() for rank in heard}
        deadline = time.monotonic() + self._ranks.settle_s
        while len(heard) < self._ranks.world_size and time.monotonic() < deadline:
            for rank in self._ranks.ready(_POLL_S, besides=heard):
                message = self._heard(rank)
                if message is None or not message.keys().isdisjoint(("report", "error")):
                    heard[rank], ended[rank] = message, time.time()
        for message in heard.values():
            if message is not None and "error" in message:
                raise InputError(message["error"])
        reports = [self._report(rank, heard[rank], at_s) for rank, at_s in ended.items()]
        return EngineDeadError.of(first_cause(reports))

    def _report(self, rank: int, message: dict[str, Any] | None, at_s: float) -> Report:
        if message is not None:
            return Report.from_json(message["report"])
        return Report(Blame.MURDERED, at_s, self._ranks.death(rank, self._requests))

    def _die(self, error: EngineDeadError) -> NoReturn:
        self._end(error)
        raise error

    def _end(self, error: EngineDeadError) -> None:
        """Fail every call from now on with this."""
        if self._failure is None:
            self._failure = error
            self.has_worked |= any(beat.stage >= Stage.PREFILL for beat in self._ranks.beats())
        self._ranks.end()


def _again(error: EngineDeadError) -> EngineDeadError:
    """The same cause for another request: an exception that is raised twice mixes its traces."""
    return EngineDeadError(str(error), error.failure)
