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

    A gang that never answered anything is not replaced: the next would fare no better.
    """

    def __init__(
        self,
        open_gang: Callable[[int], Session],
        config: SupervisionConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_gang`, given the number of restarts so far, starts ranks and does not wait."""
        self._open_gang, self._clock = open_gang, clock
        self._config, self._budget = config, RestartBudget(config)
        self._restarts, self._has_worked, self._is_closed = 0, False, False
        self._gang = open_gang(0)

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        lost = self._gang.failure()
        if lost is not None and not self._restart():
            raise self._explained(lost)
        while True:
            try:
                yield from self._gang.call(op, **arguments)
                break
            except EngineDeadError as error:
                # A rank that died just before cannot have died of this request.
                untaken = error.failure is not None and not error.failure.had_request
                if not self._restart() or not untaken:
                    raise
            except Exception:
                self._has_worked = True  # it has refused or failed this request alone
                raise
        self._has_worked = True

    def close(self) -> None:
        self._is_closed = True
        self._gang.close()

    def _restart(self) -> bool:
        """Start the next gang if one is granted."""
        if not self._has_worked or self._is_closed or not self._budget.spend(self._clock()):
            return False
        self._gang.close()
        self._restarts += 1
        self._gang = self._open_gang(self._restarts)
        return True

    def _explained(self, lost: EngineDeadError) -> EngineDeadError:
        if not self._has_worked or self._is_closed:
            return lost
        limits = self._config
        return EngineDeadError(
            f"{lost}; no restart is left (supervision.restarts={limits.restarts} within "
            f"{limits.restart_window_s:g} s)",
            lost.failure,
        )
