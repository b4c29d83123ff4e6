"""Gangs one after the other: when one is lost, the next is on its way before anyone asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, NamedTuple

from apb.config import RunConfig
from apb.errors import EngineDeadError, RankFailure
from apb.launchers.base import Session
from apb.methods.plan import Reduced
from apb.supervision import RestartBudget


class Survivors(NamedTuple):
    """Which ranks of the first gang are left, by the numbers that they had in it."""

    world_size: int
    """Of the first gang."""
    ranks: tuple[int, ...]
    losses: tuple[str, ...] = ()

    @classmethod
    def all_of(cls, world_size: int) -> Survivors:
        return cls(world_size, tuple(range(world_size)))

    def without(self, failure: RankFailure) -> Survivors:
        """Those that remain once a rank, as the present gang numbers them, is lost as well."""
        ranks = [rank for number, rank in enumerate(self.ranks) if number != failure.rank]
        return Survivors(self.world_size, tuple(ranks), (*self.losses, failure.sentence))

    @property
    def reduced(self) -> Reduced | None:
        """What they have to know to read everything; None where nobody was lost."""
        return Reduced(self.world_size, "; ".join(self.losses)) if self.losses else None


class RestartingSession(Session):
    """Replaces a lost gang, so that the request after a failed one is answered.

    A gang that never got as far as reading is not replaced: the next would fare no better. With
    ``on_rank_loss=degrade`` the next gang has a rank less, and is asked again what the lost one was
    asked, unless that had begun to answer: its cache is gone, and a sampled or 16-bit answer need
    not go on as it began.
    """

    def __init__(
        self,
        open_gang: Callable[[int, Survivors], Session],
        world_size: int,
        config: RunConfig,
        *,
        leave: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The first gang starts at once.

        Args:
            open_gang: given the number of restarts so far and who is left, starts these ranks and
                does not wait.
            world_size: of the first gang.
            config: says what is to become of lost gangs.
            leave: what remains to do once the last gang has ended.
        """
        self._open_gang, self._leave, self._clock = open_gang, leave, clock
        self._config, self._budget = config.supervision, RestartBudget(config.supervision)
        self._replaces = config.on_failure == "restart"
        self._degrades = config.on_rank_loss == "degrade"
        self.world_size = world_size
        self._restarts, self._survivors = 0, Survivors.all_of(world_size)
        self._gang = open_gang(0, self._survivors)

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        lost = self._gang.failure()
        if lost is not None and not self._restart(lost.failure):
            raise self._explained(lost)
        has_begun = False
        while True:
            try:
                with closing(self._gang.call(op, **arguments)) as replies:
                    for reply in replies:
                        has_begun = True
                        yield reply
                return
            except EngineDeadError as error:
                asks_again = self._asks_again(error.failure, has_begun=has_begun)
                if not self._restart(error.failure) or not asks_again:
                    raise

    def failure(self) -> EngineDeadError | None:
        return self._gang.failure()

    def close(self) -> None:
        self._replaces = False
        self._gang.close()
        self._leave()

    def _asks_again(self, failure: RankFailure | None, *, has_begun: bool) -> bool:
        """Whether the next gang gets the request that was lost with this one."""
        if failure is None or failure.rank is None:
            return False
        # A rank that died just before cannot have died of this request.
        return not failure.had_request or (self._can_do_without_one and not has_begun)

    @property
    def _can_do_without_one(self) -> bool:
        return self._degrades and len(self._survivors.ranks) > 1

    def _restart(self, failure: RankFailure | None) -> bool:
        """Start the next gang if one is granted."""
        self.has_worked |= self._gang.has_worked
        if not self.has_worked or not self._replaces or not self._budget.spend(self._clock()):
            return False
        if self._can_do_without_one and failure is not None and failure.rank is not None:
            self._survivors = self._survivors.without(failure)
        self._gang.close()
        self._restarts += 1
        self._gang = self._open_gang(self._restarts, self._survivors)
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
