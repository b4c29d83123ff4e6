"""Many requests with a fault in every tenth: no hang, no wrong answer, nothing that piles up."""

from __future__ import annotations

import random

import psutil
import pytest

from apb import EngineDeadError, RequestError
from apb.errors import RankFailure
from faults.leftovers import Leftovers, left_since
from faults.test_local import _forked, ask, expected, open_llm

__all__ = ["_forked", "expected"]  # fixtures

REQUESTS, FAULTS = 200, 20
FATAL = ["kill", "exit0", "raise", "oom", "hang", "stop"]
MOST_MEMORY = 16 * 2**20
"""Bytes that the driver may grow by, allocators being what they are."""


def planned(draw: random.Random) -> str:
    """Faults in every tenth request on average, the first request of a gang having the number 2.

    Each ends its gang but for NaN, which a request of every third gang meets on the way.
    """
    texts, number = [], 2
    for gang in range(FAULTS):
        rank, stage = draw.randrange(3), draw.choice(["load", "prefill", "exchange", "decode"])
        at = number + draw.randrange(1, 2 * REQUESTS // FAULTS - 1)
        fatal = draw.choice([kind for kind in FATAL if (kind, stage) != ("hang", "load")])
        if stage == "load" and fatal == "stop":
            fatal = "kill"  # the budget of loading is long
        texts.append(f"rank={rank},stage={stage},kind={fatal},request={at},gang={gang}")
        if gang % 3 == 0:
            texts.append(f"rank=0,stage=exchange,kind=nan,request={at - 1},gang={gang}")
    return ";".join(texts)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_two_hundred_requests_with_faults_in_a_tenth(
    expected: list[int], monkeypatch: pytest.MonkeyPatch, before: Leftovers
) -> None:
    monkeypatch.setenv("APB_FAULTS", planned(random.Random(0)))
    refused = answered = 0
    failures = list[RankFailure | None]()
    resident = list[int]()
    with open_llm() as llm:
        while answered + len(failures) + refused < REQUESTS:
            try:
                assert ask(llm) == expected
                answered += 1
            except EngineDeadError as error:
                failures.append(error.failure)
            except RequestError:
                refused += 1
            resident.append(psutil.Process().memory_info().rss)
    after = Leftovers.now()
    print(  # noqa: T201
        f"{answered} answered, {len(failures)} gangs lost, {refused} refused",
        f"driver: {resident[20] / 2**20:.1f} MiB after 20 requests, {resident[-1] / 2**20:.1f} MiB "
        f"after {REQUESTS}",
        *(
            f"{name}: {getattr(before, name)} before, {getattr(after, name)} after"
            for name in ("threads", "open_files")
        ),
        *(
            f"{name}: {len(getattr(before, name))} before, {len(getattr(after, name))} after"
            for name in ("processes", "folders", "shared_memory")
        ),
        sep="\n",
    )
    assert len(failures) >= FAULTS // 2
    assert all(failure is not None and failure.rank is not None for failure in failures)
    assert refused >= 3
    assert resident[-1] - resident[20] < MOST_MEMORY
    assert left_since(before) == []
