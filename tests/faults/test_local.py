"""Every fault of the table on local ranks: named, cleared up, and the next request answered."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from apb import LLM, EngineDeadError, RequestError, SamplingParams
from apb.batch.__main__ import main as batch
from apb.launchers.gang import GangSession
from apb.launchers.processes import RankProcesses
from apb.launchers.restart import RestartingSession
from faults.forked_ranks import start_forked_rank
from faults.leftovers import Leftovers, left_since
from faults.scenarios import FAST, NAMED_WITHIN_S, OVERRIDES, SCENARIOS, WORLD_SIZE, Scenario

DOCUMENT = "The mill stood by the river, and the miller kept bees. " * 20
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
BACK_WITHIN_S = 15.0
"""10 s and what these ranks need to load their model."""


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb.launchers.processes.start_rank", start_forked_rank)
        yield


def open_llm(*overrides: str) -> LLM:
    """Ranks that are up but have not loaded the model: the first question does that."""
    llm = LLM.from_overrides(["model=tiny", f"world_size={WORLD_SIZE}", *OVERRIDES, *overrides])
    llm.make_needle(kind="single", context_len=600, depth=0.5, seed=0)
    return llm


def ask(llm: LLM) -> list[int]:
    return llm.ask(DOCUMENT, "Who kept bees?", PARAMS).token_ids


def lost(llm: LLM) -> EngineDeadError:
    """What a question fails with, without the frames it went through."""
    with pytest.raises(EngineDeadError) as raised:
        ask(llm)
    return raised.value.with_traceback(None)


@pytest.fixture(scope="module")
def expected(_forked: None) -> list[int]:
    """The answer without a fault, which also starts the server that ranks fork from."""
    with open_llm() as llm:
        return ask(llm)


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(it, id=it.name, marks=() if it.name in FAST else pytest.mark.faults)
        for it in SCENARIOS
    ],
)
def test_a_fault_is_named_and_the_next_request_is_answered(
    scenario: Scenario, expected: list[int], monkeypatch: pytest.MonkeyPatch, before: Leftovers
) -> None:
    monkeypatch.setenv("APB_FAULTS", scenario.text(request=2))
    with open_llm() as llm:
        begin = time.monotonic()
        if scenario.ends == "answer":
            assert ask(llm) == expected
        elif scenario.ends == "request":
            with pytest.raises(RequestError, match=scenario.words):
                ask(llm)
        else:
            error = lost(llm)
            assert time.monotonic() - begin < scenario.budget_s + NAMED_WITHIN_S
            check_blame(error, scenario)
        begin = time.monotonic()
        assert ask(llm) == expected
        assert time.monotonic() - begin < BACK_WITHIN_S
    assert left_since(before) == []


def ranks_of(llm: LLM) -> RankProcesses:
    session = llm._session
    assert isinstance(session, RestartingSession)
    assert isinstance(session._gang, GangSession)
    assert isinstance(session._gang._ranks, RankProcesses)
    return session._gang._ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_an_idle_rank_that_is_stopped_does_not_keep_a_long_document_waiting(
    rank: int, expected: list[int], before: Leftovers
) -> None:
    longer_than_any_buffer = DOCUMENT * 500
    with open_llm("supervision.heartbeat_s=2") as llm:
        assert ask(llm) == expected
        os.kill(ranks_of(llm)._ranks[rank].process.pid, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(EngineDeadError, match=f"rank {rank} .* was stopped by a signal"):
            llm.ask(longer_than_any_buffer, "Who kept bees?", PARAMS)
        assert time.monotonic() - begin < 2 + NAMED_WITHIN_S
    assert left_since(before) == []


def test_after_an_interrupt_between_two_ranks_messages_none_is_read_for_the_next(
    expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_llm() as llm:
        assert ask(llm) == expected
        ranks = ranks_of(llm)
        post = ranks.post

        def interrupted(encoded: bytes, _: Sequence[int]) -> None:
            post(encoded, [0])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ranks, "post", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.ask("Another document, which nobody waits for.", "Who?", PARAMS)
        assert ask(llm) == expected


def test_ranks_remove_the_messages_that_they_have_read(expected: list[int]) -> None:
    with open_llm() as llm:
        for _ in range(2):
            llm.ask(DOCUMENT * 5, "Who kept bees?", PARAMS)
        assert ask(llm) == expected
        assert list(Path(ranks_of(llm)._folder).glob("message*")) == []


def check_blame(error: EngineDeadError, scenario: Scenario) -> None:
    failure = error.failure
    assert failure is not None, error
    assert failure.rank == scenario.rank, error
    assert failure.place.startswith(scenario.place or scenario.stage), error
    assert scenario.words in failure.reason
    assert "\n" not in str(error)
    if scenario.kind == "hang":
        assert "apb/faults.py" in failure.stack, "the stack shows where the rank hangs"
    if scenario.kind in ("kill", "exit0"):
        assert failure.exit_code == (-9 if scenario.kind == "kill" else 0)


@pytest.mark.faults
def test_with_on_failure_stop_all_later_requests_fail_at_once(
    monkeypatch: pytest.MonkeyPatch,
    before: Leftovers,
) -> None:
    monkeypatch.setenv("APB_FAULTS", "rank=1,stage=prefill,kind=kill")
    llm = LLM.from_overrides(["model=tiny", "world_size=2", "on_failure=stop", *OVERRIDES])
    for _ in range(3):
        assert "rank 1 on" in str(lost(llm))
    assert left_since(before) == [], "also before it is closed"
    llm.close()


def test_a_cancelled_and_an_overdue_prefill_leave_the_ranks_ready(
    expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [f"rank={rank},stage=prefill,kind=slow,seconds=0.15" for rank in range(WORLD_SIZE)]
    monkeypatch.setenv("APB_FAULTS", ";".join(slow))
    with open_llm() as llm:
        with pytest.raises(RequestError, match=r"longer than timeout_s=0\.1"):
            llm.ask(DOCUMENT, "Who kept bees?", PARAMS, timeout_s=0.1)
        stream = llm.stream(DOCUMENT, "Who kept bees?", PARAMS)
        next(iter(stream))
        stream.close()
        assert ask(llm) == expected


def batch_command(folder: Path, *settings: str, rows: int) -> tuple[list[str], Path]:
    table, output = folder / "in.jsonl", folder / "out.jsonl"
    table.write_text("".join(json.dumps({"document": DOCUMENT}) + "\n" for _ in range(rows)))
    given = ["model=tiny", "world_size=2", *OVERRIDES, "decode.max_tokens=4", *settings]
    return [*given, f"input={table}", f"output={output}", "question=Who kept bees?"], output


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize("restarts", [1, 0])
def test_a_row_of_a_batch_that_ends_the_ranks_is_that_rows_error_while_they_come_back(
    restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APB_FAULTS", "rank=1,stage=prefill,kind=oom,request=2")
    command, output = batch_command(tmp_path, f"supervision.restarts={restarts}", rows=3)
    assert batch(command) == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["error"] is None for row in rows] == ([True, False, True] if restarts else [True])
    assert all("rank 1 on" in row["error"] for row in rows[1:2])


@pytest.mark.usefixtures("expected")
def test_sigterm_lets_a_batch_finish_its_row_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APB_FAULTS", "rank=0,stage=decode,kind=slow,seconds=0.1,request=2")
    command, output = batch_command(tmp_path, rows=6)
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def terminate() -> None:
        while not output.exists() or not output.read_bytes():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate, daemon=True)
    thread.start()
    try:
        assert batch(command) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["error"] for row in rows] == [None] * len(rows)
    assert len(rows) < 6
    assert "apb.batch: ended by SIGTERM" in capfd.readouterr().err
    monkeypatch.delenv("APB_FAULTS")
    assert batch(command) == 0
    assert output.read_text().splitlines()[: len(rows)] == [
        json.dumps(row, ensure_ascii=False) for row in rows
    ]
