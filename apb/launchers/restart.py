"""Gangs one after the other: when one is lost, the next is on its way before anyone asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

from apb.errors import EngineDeadError
from apb.launchers.base import Session
from apb.supervision import RestartBudget, SupervisionConfig


class RestartingSession(Session):
    """Replaces a lost gang, so that the request after a failed one is answered.

    A gang that never got as far as reading is not replaced: the next would fare no better.
    """

    def __init__(
        self,
        open_gang: Callable[[int], Session],
        config: SupervisionConfig,
        *,
        replaces: bool = True,
        leave: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The first gang starts at once.

        Args:
            open_gang: given the number of restarts so far, starts ranks and does not wait.
            config: how many restarts are granted.
            replaces: whether any are.
            leave: what remains to do once the last gang has ended.
        """
        self._open_gang, self._leave, self._clock = open_gang, leave, clock
        self._config, self._budget = config, RestartBudget(config)
        self._replaces, self._restarts = replaces, 0
        self._gang = open_gang(0)

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        lost = self._gang.failure()
        if lost is not None and not self._restart():
            raise self._explained(lost)
        while True:
            try:
                yield from self._gang.call(op, **arguments)
                return
            except EngineDeadError as error:
                # A rank that died just before cannot have died of this request.
                untaken = error.failure is not None and not error.failure.had_request
                if not self._restart() or not untaken:
                    raise

    def close(self) -> None:
        self._replaces = False
        self._gang.close()
        self._leave()

    def _restart(self) -> bool:
        """Start the next gang if one is granted."""
        self.has_worked |= self._gang.has_worked
        if not self.has_worked or not self._replaces or not self._budget.spend(self._clock()):
            return False
        self._gang.close()
        self._restarts += 1
        self._gang = self._open_gang(self._restarts)
        return True

    def _explained(self, lost: EngineDeadError) -> EngineDeadError:
        if not self.has_worked or not self._replaces:
            return lost
        limits = self._config
        return EngineDeadError(
            f"{lost}; no restart is left (supervision.restarts={limits.restarts} within "
            f"{limits.restart_window_s:g} s)",
            lost.failure,
        )
