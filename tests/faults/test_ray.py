"""Faults of the table on Ray ranks, one gang after the other: named, and the next request answered.

A gang answers, then meets its fault; so the gang that follows proves that there is a next request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from apb import LLM, EngineDeadError, RequestError, SamplingParams
from faults.scenarios import NAMED_WITHIN_S, OVERRIDES, RAY, SCENARIOS, WORLD_SIZE, Scenario

ray = pytest.importorskip("ray", reason="needs ray")

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
DOCUMENT = "The mill stood by the river, and the miller kept bees. " * 20
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
REPLY_S = 1.0
"""What Ray needs to report a death, and the driver to ask for heartbeats."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=WORLD_SIZE,
        include_dashboard=False,
        object_store_memory=80_000_000,
    )
    yield
    ray.shutdown()


def ranks() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "RankActor" in child.name()]


def planned() -> list[tuple[int, int, Scenario]]:
    """Gang, request and scenario: each gang answers its second request and fails in a later one."""
    plan, gang, request = [], 0, 3
    for name in RAY:
        scenario = next(it for it in SCENARIOS if it.name == name)
        plan.append((gang, request, scenario))
        lost = scenario.ends == "gang"
        gang, request = (gang + 1, 3) if lost else (gang, request + 2)
    return plan


def test_faults_are_named_and_the_next_requests_are_answered(
    cluster: None, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    texts = [scenario.text(request=request, gang=gang) for gang, request, scenario in planned()]
    monkeypatch.setenv("APB_FAULTS", ";".join(texts))
    settings = ["model=tiny", "launcher=ray", f"world_size={WORLD_SIZE}", *OVERRIDES]
    with LLM.from_overrides(settings) as llm:
        llm.make_needle(kind="single", context_len=600, depth=0.5, seed=0)
        expected = ask(llm)
        for *_, scenario in planned():
            with subtests.test(scenario.name):
                check(llm, scenario)
            assert ask(llm) == expected
    give_up = time.monotonic() + 15
    while ranks():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def ask(llm: LLM) -> list[int]:
    return llm.ask(DOCUMENT, "Who kept bees?", PARAMS).token_ids


def check(llm: LLM, scenario: Scenario) -> None:
    if scenario.ends == "request":
        with pytest.raises(RequestError, match=scenario.words):
            ask(llm)
        return
    begin = time.monotonic()
    with pytest.raises(EngineDeadError) as raised:
        ask(llm)
    took, error, failure = time.monotonic() - begin, raised.value, raised.value.failure
    assert failure is not None, error
    assert failure.rank == scenario.rank, error
    assert failure.host == ray.util.get_node_ip_address()
    assert took < scenario.budget_s + NAMED_WITHIN_S + REPLY_S
    # Ray says neither how a process ended nor where: its last heartbeat is half a second old.
    is_old = scenario.kind in ("kill", "exit0", "stop")
    place = scenario.place or scenario.stage
    assert failure.place.startswith("last heard of in " if is_old else place), error
    words = "ended without a word" if scenario.kind == "kill" else scenario.words
    assert words in failure.reason
    if scenario.kind == "hang":
        assert "apb/faults.py" in failure.stack
