"""A lost gang is replaced within its budget; else every later request fails with the cause."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from apb.config import compose_config
from apb.errors import EngineDeadError, InputError, RankFailure, RequestError
from apb.launchers.base import Session
from apb.launchers.restart import RestartingSession, Survivors


class FakeGang(Session):
    """Answers with its number; `op` says what happens to it."""

    def __init__(self, number: int, survivors: Survivors) -> None:
        self.number, self.survivors, self.is_closed = number, survivors, False
        self.lost: EngineDeadError | None = None

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        if op == "find the first dead" and self.number == 0:
            failure = RankFailure(1, "here", "idle", "was killed", had_request=False)
            self.lost = EngineDeadError.of(failure)
        if op == "die":
            self.lost = EngineDeadError(f"gang {self.number} was killed")
        if op.startswith("lose") and self.number == 0:
            if op == "lose in an answer":
                yield {"piece": "half an"}
            self.lost = EngineDeadError.of(RankFailure(1, "here", "prefill, layer 3", "was killed"))
        if self.lost is not None:
            raise self.lost
        self.has_worked = True
        if op == "refuse":
            raise RequestError("refused")
        yield {"result": self.number}

    def failure(self) -> EngineDeadError | None:
        return self.lost

    def close(self) -> None:
        self.is_closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def started(clock: Clock, *settings: str) -> tuple[RestartingSession, list[FakeGang]]:
    gangs: list[FakeGang] = []

    def open_gang(number: int, survivors: Survivors) -> FakeGang:
        gangs.append(FakeGang(number, survivors))
        return gangs[-1]

    limits = ["supervision.restarts=2", "supervision.restart_window_s=60"]
    config = compose_config(["model=tiny", *limits, *settings])
    return RestartingSession(open_gang, 3, config, clock=clock), gangs


def ask(session: Session, op: str = "ask") -> Any:
    *_, last = session.call(op)
    return last["result"]


def test_the_request_after_a_failed_one_is_answered_by_the_next_gang() -> None:
    session, gangs = started(Clock())
    assert ask(session) == 0
    with pytest.raises(EngineDeadError, match="gang 0 was killed"):
        ask(session, "die")
    assert gangs[0].is_closed
    assert len(gangs) == 2, "the next gang is started before anyone asks"
    assert ask(session) == 1


def test_a_gang_that_was_lost_while_idle_costs_no_request() -> None:
    session, gangs = started(Clock())
    assert ask(session) == 0
    gangs[0].lost = EngineDeadError("gang 0 was killed")
    assert ask(session) == 1


def test_a_request_that_finds_a_rank_dead_goes_to_the_next_gang() -> None:
    session, gangs = started(Clock())
    assert ask(session) == 0
    assert ask(session, "find the first dead") == 1
    assert [gang.is_closed for gang in gangs] == [True, False]


def test_a_refused_request_keeps_the_gang() -> None:
    session, gangs = started(Clock())
    with pytest.raises(RequestError):
        ask(session, "refuse")
    assert ask(session) == 0
    assert len(gangs) == 1


def test_the_budget_is_spent_and_comes_back() -> None:
    clock = Clock()
    session, _ = started(clock)
    ask(session)
    for number in range(3):
        with pytest.raises(EngineDeadError, match=f"gang {number} was killed"):
            ask(session, "die")
    with pytest.raises(EngineDeadError, match=r"gang 2 was killed; no restart is left") as refusal:
        ask(session)
    assert "supervision.restarts=2 within 60 s" in str(refusal.value)
    clock.now = 60.0
    assert ask(session) == 3


def test_a_gang_that_never_worked_is_not_replaced() -> None:
    session, gangs = started(Clock())
    for _ in range(2):
        with pytest.raises(EngineDeadError, match=r"^gang 0 was killed$"):
            ask(session, "die")
    assert len(gangs) == 1


def test_after_closing_nothing_is_started() -> None:
    session, gangs = started(Clock())
    ask(session)
    session.close()
    gangs[0].lost = EngineDeadError("the engine was closed")
    with pytest.raises(EngineDeadError, match=r"^the engine was closed$"):
        ask(session)
    assert len(gangs) == 1


def test_with_on_failure_stop_nothing_is_started_again() -> None:
    session, gangs = started(Clock(), "on_failure=stop")
    ask(session)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match=r"^gang 0 was killed$"):
            ask(session, "die")
    assert len(gangs) == 1


def test_a_rank_lost_in_a_prefill_fails_the_request_unless_degraded_answers_are_wanted() -> None:
    session, gangs = started(Clock())
    ask(session)
    with pytest.raises(EngineDeadError, match="was killed"):
        ask(session, "lose a rank")
    assert [gang.survivors.ranks for gang in gangs] == [(0, 1, 2), (0, 1, 2)]
    assert gangs[1].survivors.reduced is None


def test_a_degraded_answer_comes_from_the_ranks_that_are_left() -> None:
    session, gangs = started(Clock(), "on_rank_loss=degrade")
    ask(session)
    assert ask(session, "lose a rank") == 1
    assert [gang.survivors.ranks for gang in gangs] == [(0, 1, 2), (0, 2)]
    assert gangs[1].survivors.reduced == (3, "rank 1 on here was killed (prefill, layer 3)")
    assert ask(session) == 1, "and so do later ones"
    gangs[1].lost = EngineDeadError.of(RankFailure(1, "there", "idle", "was killed"))
    assert ask(session) == 2
    assert gangs[2].survivors.ranks == (0,), "rank 1 of two is rank 2 of the first three"


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    session, gangs = started(Clock(), "on_rank_loss=degrade")
    ask(session)
    with pytest.raises(EngineDeadError, match="was killed"):
        ask(session, "lose in an answer")
    assert gangs[1].survivors.ranks == (0, 2)


def test_degraded_answers_need_ranks_that_start_again() -> None:
    with pytest.raises(InputError, match="on_rank_loss=degrade needs on_failure=restart"):
        started(Clock(), "on_rank_loss=degrade", "on_failure=stop")
