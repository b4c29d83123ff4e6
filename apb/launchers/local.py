"""Ranks as processes of this machine.

They are plain subprocesses and not multiprocessing children, so that notebooks and scripts without
a ``__main__`` guard work. Driver and ranks exchange JSON over socket pairs; the ranks meet through
a file, so that two gangs never compete for a port, and show their progress in another one.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

from apb.errors import EngineDeadError, InputError, RankFailure, RequestError
from apb.launchers.base import Session
from apb.launchers.processes import RankProcesses
from apb.methods.decode import OWNER
from apb.supervision import Blame, Report, SupervisionConfig, Watcher, first_cause

_POLL_S = 0.25
_AUTOPSY_S = 0.5
"""How long the other ranks may take to report once one has failed."""
_CANCEL_S = 10.0
"""How long a cancelled request may go on; a layer of a prefill can take longer."""


class LocalSession(Session):
    """A gang of `world_size` subprocesses, killed together as soon as one fails or hangs."""

    def __init__(
        self,
        overrides: Sequence[str],
        *,
        world_size: int,
        supervision: SupervisionConfig,
        restarts: int = 0,
    ) -> None:
        """Start the processes and do not wait; `restarts` is how many gangs came before."""
        self._processes = RankProcesses(world_size)
        self._watcher = Watcher(supervision)
        self._failure: EngineDeadError | None = None
        self._busy, self._requests = False, 0
        self._greetings = 1
        """Replies that precede those of the first call: the ranks have met, the model is loaded."""
        folder = self._processes.folder
        self._send({"overrides": list(overrides), "folder": folder, "restarts": restarts})
        if restarts:  # so that the model is there when somebody asks
            self._request("load")
            self._greetings += 1

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        if self._failure is not None:
            raise _again(self._failure)
        self._await_greetings()
        self._request(op, **arguments)
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
                self._watcher.forget()  # whoever reads the replies may have taken a break
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
        if self._failure is None and self._processes.ended:
            self._end(self._autopsy({}))
        return self._failure and _again(self._failure)

    def close(self) -> None:
        if self._failure is None:
            self._failure = EngineDeadError("the engine was closed")
            self._send({"op": "exit"})
            if not self._greetings and not self._busy:
                self._processes.wait()
        self._processes.end()

    def _await_greetings(self) -> None:
        self._watcher.forget()
        try:
            while self._greetings:
                self._next_reply()
                self._greetings -= 1
        except InputError as error:  # the ranks have ended with it
            self._end(EngineDeadError(str(error)))
            raise

    def _request(self, op: str, **arguments: Any) -> None:
        self._send({"op": op, "arguments": arguments})
        self._requests += 1

    def _send(self, message: dict[str, Any]) -> None:
        encoded = json.dumps(message).encode()
        for rank in range(self._processes.world_size):
            self._processes.post(rank, encoded)

    def _cancel(self) -> None:
        """End a request whose caller has stopped listening, and drop what it still says."""
        self._processes.post(OWNER, json.dumps({"op": "cancel"}).encode())
        deadline = time.monotonic() + _CANCEL_S
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
        while not (ready := self._processes.ready(_POLL_S)):
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
        encoded = self._processes.receive(rank)
        message: dict[str, Any] | None = None if encoded is None else json.loads(encoded)
        return message

    def _look_for_stall(self) -> None:
        beats, now = self._processes.board.read(), time.monotonic()
        stall = self._watcher.observe(beats, now, request=self._requests)
        if stall is None:
            return
        failure = stall.failure(socket.gethostname())
        if stall.rank is not None and self._processes.is_stopped(stall.rank):
            failure = failure._replace(reason=f"was stopped by a signal and {failure.reason}")
        elif stall.rank is not None:
            failure = failure._replace(stack=self._processes.stack_of(stall.rank))
        self._die(EngineDeadError.of(failure))

    def _autopsy(self, heard: dict[int, dict[str, Any] | None]) -> EngineDeadError:
        """Why the ranks fail, from what those say that do so at the same time.

        Raises:
            InputError: a rank has refused its settings.
        """
        ended = {rank: time.monotonic() for rank in heard}
        deadline = time.monotonic() + _AUTOPSY_S
        while len(heard) < self._processes.world_size and time.monotonic() < deadline:
            for rank in self._processes.ready(_POLL_S, besides=heard):
                message = self._heard(rank)
                if message is None or not message.keys().isdisjoint(("report", "error")):
                    heard[rank], ended[rank] = message, time.monotonic()
        for message in heard.values():
            if message is not None and "error" in message:
                raise InputError(message["error"])
        reports = [self._report(rank, heard[rank], at_s) for rank, at_s in ended.items()]
        return EngineDeadError.of(first_cause(reports))

    def _report(self, rank: int, message: dict[str, Any] | None, at_s: float) -> Report:
        if message is not None:
            return Report.from_json(message["report"])
        code = self._processes.exit_code(rank)
        reason = f"ended without a word (exit code {code})"
        if code is not None and code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                reason += ", as the system does when memory runs out"
        beat = self._processes.board.read()[rank]
        failure = RankFailure(
            rank,
            socket.gethostname(),
            beat.place,
            reason,
            code,
            had_request=beat.request == self._requests,
        )
        return Report(Blame.MURDERED, at_s, failure)

    def _die(self, error: EngineDeadError) -> NoReturn:
        self._end(error)
        raise error

    def _end(self, error: EngineDeadError) -> None:
        self._failure = error
        self._processes.end()


def _again(error: EngineDeadError) -> EngineDeadError:
    """The same cause for another request: an exception that is raised twice mixes its traces."""
    return EngineDeadError(str(error), error.failure)
