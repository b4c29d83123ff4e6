"""How long a request that nobody listens to any more may go on before its ranks are killed."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from contextlib import closing

import pytest

from apb.errors import RankFailure
from apb.heartbeat import Beat, Stage
from apb.launchers.gang import GangSession, Ranks
from apb.supervision import SupervisionConfig


class SlowRank(Ranks):
    """One rank that stays in a layer for a while once it has said a piece; also the clock."""

    world_size = 1

    def __init__(self, *, layer_s: float, expected_s: float) -> None:
        self._layer_s, self._expected_s = layer_s, expected_s
        self._now, self._replies = 0.0, list[str]()
        self._said_at = 0.0

    def time(self) -> float:
        return self._now

    monotonic = time

    def post(self, encoded: bytes, ranks: Sequence[int]) -> None:
        op = json.loads(encoded).get("op")
        if op != "cancel":
            self._replies.append(json.dumps({"piece": "x"} if op == "ask" else {"result": None}))
            return
        self._said_at = self._now + self._layer_s
        self._replies.append(json.dumps({"result": None}))

    def ready(self, timeout_s: float, *, besides: Container[int] = ()) -> list[int]:
        self._now += timeout_s
        return [0] if self._replies and self._now >= self._said_at else []

    def receive(self, rank: int) -> bytes | None:
        return self._replies.pop(0).encode()

    @property
    def ended(self) -> list[int]:
        return []

    def beats(self) -> list[Beat]:
        expected_ms = int(1000 * self._expected_s)
        return [Beat(stage=Stage.PREFILL, request=1, expected_ms=expected_ms)]

    def host(self, rank: int) -> str:
        return "here"

    def is_stopped(self, rank: int) -> bool:
        return False

    def stack_of(self, rank: int) -> str:
        return ""

    def death(self, rank: int, request: int) -> RankFailure:
        raise AssertionError("it has not ended")

    def wait(self) -> None: ...

    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("layer_s", "expected_s", "survives"), [(30, 5, True), (8, 0, True), (30, 0.1, False)]
)
def test_a_cancelled_request_may_end_its_layer(
    layer_s: float, expected_s: float, survives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = SlowRank(layer_s=layer_s, expected_s=expected_s)
    monkeypatch.setattr("apb.launchers.gang.time", rank)
    session = GangSession(rank, [], supervision=SupervisionConfig())
    with closing(session.call("ask")) as replies:
        next(replies)
    failure = session.failure()
    assert (failure is None) == survives
    assert survives or "a cancelled request did not end" in str(failure)
