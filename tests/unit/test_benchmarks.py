"""The benchmarks' one entry, the suite that fits into a time, and two benchmarks at a tiny size."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.comm import Communicator, Pending, Tag
from apb.errors import ApbError, InputError
from benchmarks import exchange, startup, suite
from benchmarks.__main__ import listing, main
from benchmarks.catalogue import BENCHMARKS, CPU_JOBS, GPU_JOBS, Job
from benchmarks.environment import ROOT
from benchmarks.exchange_rank import Case, Seconds, run_exchanges
from benchmarks.suite import Journal, Launcher, Outcome, Suite
from benchmarks.tracing import Run as TracedRun
from benchmarks.tracing import added_shares
from rank_pool import RankPool

PoolOf = Callable[[int], RankPool]
SOURCE = "abc"
JOBS = [Job(name, name, (), minutes) for name, minutes in (("a", 1.0), ("b", 5.0), ("c", 2.0))]


class Machine:
    """Runs jobs at a speed of its own, and fails where it is told to."""

    def __init__(self, *, pace: float = 1.0, fails: Sequence[str] = ()) -> None:
        self.pace, self.fails = pace, fails
        self.ran: list[str] = []
        self.limits: list[float] = []

    def __call__(self, job: Job, limit_s: float) -> Outcome:
        self.ran.append(job.name)
        self.limits.append(limit_s)
        status = "failed" if job.name in self.fails else "done"
        seconds = 60 * self.pace * job.minutes
        return Outcome(
            job=job.name,
            arguments=list(job.arguments),
            revision=SOURCE,
            status=status,
            seconds=seconds,
            report=f"{job.name}.md" if status == "done" else None,
        )


def statuses(
    journal: Path, machine: Machine, *, minutes: float, jobs: Sequence[Job] = tuple(JOBS)
) -> dict[str, str]:
    ran = Suite(jobs, machine, Journal(journal), budget_s=60 * minutes, source=SOURCE)
    return {one.job: one.status for one in ran.outcomes()}


def test_what_does_not_fit_is_left_out_and_what_comes_after_it_is_not(tmp_path: Path) -> None:
    machine = Machine()
    found = statuses(tmp_path / "j", machine, minutes=4)
    assert found == {"a": "done", "b": "left out", "c": "done"}
    assert machine.limits == [240, 180]


def test_a_slow_machine_is_given_less_to_do(tmp_path: Path) -> None:
    machine = Machine(pace=2.0)
    found = statuses(tmp_path / "j", machine, minutes=5)
    assert found == {"a": "done", "b": "left out", "c": "left out"}


def test_finished_jobs_are_not_run_again_and_their_time_counts(tmp_path: Path) -> None:
    assert statuses(tmp_path / "j", Machine(), minutes=4)["b"] == "left out"
    again = Machine()
    assert statuses(tmp_path / "j", again, minutes=4)["b"] == "left out"
    assert again.ran == []
    assert statuses(tmp_path / "j", again, minutes=8)["b"] == "done"
    assert again.ran == ["b"]
    assert again.limits == [300]


def test_failed_jobs_are_tried_again(tmp_path: Path) -> None:
    found = statuses(tmp_path / "j", Machine(fails=["a"]), minutes=20)
    assert found == {"a": "failed", "b": "done", "c": "done"}
    again = Machine()
    assert set(statuses(tmp_path / "j", again, minutes=20).values()) == {"done"}
    assert again.ran == ["a"]


def test_another_source_or_other_settings_are_run_anew(tmp_path: Path) -> None:
    machine = Machine()
    statuses(tmp_path / "j", machine, minutes=20)
    changed = [JOBS[0], JOBS[1]._replace(arguments=("--more",))]
    statuses(tmp_path / "j", machine, minutes=40, jobs=changed)
    assert machine.ran == ["a", "b", "c", "b"]
    other = Suite(JOBS, machine, Journal(tmp_path / "j"), budget_s=1e6, source="other")
    list(other.outcomes())
    assert machine.ran[4:] == ["a", "b", "c"]


def test_a_line_that_was_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "j"
    statuses(path, Machine(), minutes=20)
    text = path.read_text()
    path.write_text(text[: len(text) - 9])
    again = Machine()
    statuses(path, again, minutes=20)
    assert again.ran == ["c"]
    assert len(Journal(path).outcomes) == 3


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.2, 5)), max_size=8), st.floats(1, 200))
def test_a_budget_is_kept_where_estimates_hold(
    tmp_path_factory: pytest.TempPathFactory, jobs: list[tuple[float, float]], budget: float
) -> None:
    pace = jobs[0][1] if jobs else 1.0
    listed = [Job(f"{index}", "x", (), minutes) for index, (minutes, _) in enumerate(jobs)]
    machine = Machine(pace=pace)
    journal = tmp_path_factory.mktemp("journal") / "j"
    statuses(journal, machine, minutes=budget, jobs=listed)
    spent = sum(60 * pace * job.minutes for job in listed if job.name in machine.ran[1:])
    assert spent <= 60 * budget


def test_missing_needs_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ran = Suite(
        [JOBS[0]._replace(needs="root")],
        Machine(),
        Journal(tmp_path / "j"),
        budget_s=1e6,
        source=SOURCE,
    )
    [outcome] = ran.outcomes()
    assert (outcome.status, outcome.reason) == ("left out", "it needs root")


def test_a_launched_job_is_ended_at_its_limit_and_its_failure_is_told(tmp_path: Path) -> None:
    launch = Launcher(tmp_path, tmp_path / "logs", SOURCE)
    late = launch(Job("late", "startup", ("--model", "tiny"), 1.0), 0.3)
    assert late.status == "failed"
    assert late.reason.startswith("it was not done within the time that was left")
    assert late.seconds < 20
    wrong = launch(Job("wrong", "nothing", (), 1.0), 100.0)
    assert wrong.status == "failed"
    assert wrong.reason.startswith("no benchmark nothing: choose one of prefill,")


def test_a_page_links_what_was_done_and_says_why_the_rest_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "Launcher", lambda *_: Machine(fails=["b"]))
    monkeypatch.setattr(suite, "CPU_JOBS", [*JOBS, Job("d", "d", (), 1e6)])
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "_MODEL", str(ROOT / "tests" / "fixtures"))
    monkeypatch.setattr("benchmarks.suite.Checkpoint.find", lambda _: None)
    (tmp_path / "a.svg").write_text("<svg/>")
    with pytest.raises(ApbError, match=r"1 of 4 failed \(b\); see .*all_cpu_"):
        suite.run(suite.parse(["--budget", "1h", "--out", str(tmp_path)]))
    [page] = tmp_path.glob("all_cpu_*.md")
    text = page.read_text()
    assert "| [a](a.md) | done | 1.0 min |" in text
    assert "| b | failed | 5.0 min |" in text
    assert "| d | left out |" in text
    assert "![a.svg](a.svg)" in text


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("60m", 3600), ("1.5h", 5400)])
def test_budgets_have_units(text: str, seconds: float) -> None:
    assert suite.parse(["--budget", text]).budget == seconds


@pytest.mark.parametrize("text", ["", "0m", "-3m", "soon", "5d"])
def test_what_is_no_time_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        suite.parse([f"--budget={text}"])
    assert exit_info.value.code == 2
    assert "is no time such as 90s, 60m or 3h" in capsys.readouterr().err


def test_every_benchmark_is_listed_and_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == listing()
    names = {line.split()[0] for line in listed[2:]}
    assert names == {*BENCHMARKS, "all"}
    with_entry = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} & set(BENCHMARKS)
    assert with_entry == set(BENCHMARKS)


def test_an_unknown_benchmark_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefil"]) == 2
    assert capsys.readouterr().err.startswith("no benchmark prefil: choose one of prefill, ")


@pytest.mark.parametrize("job", [*CPU_JOBS, *GPU_JOBS], ids=lambda job: job.name)
def test_every_job_is_a_call_that_its_benchmark_takes(job: Job) -> None:
    module = import_module(f"benchmarks.{job.benchmark}")
    assert isinstance(module._parse([*job.arguments, "--out", "x"]), argparse.Namespace)


CASE = Case(
    model="tiny",
    context_len=700,
    question_len=8,
    dtype="bfloat16",
    device="cpu",
    wire="auto",
    overrides=(),
    repeats=2,
)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, wire="int8", overrides=("method.layout=zigzag", "method.min_block_len=16")),
        replace(CASE, dtype="float32", overrides=("method.anchor=replicated",)),
    ],
    ids=["bfloat16", "int8 zigzag", "replicated"],
)
def test_what_arrives_is_what_was_sent(pool_of: PoolOf, case: Case) -> None:
    found: list[list[Seconds]] = pool_of(3).run(run_exchanges, [case])
    received = [one.received_bytes for (one,) in found]
    assert max(received) > 0
    assert all(len(one.transfer) == len(one.unpack) == 2 for (one,) in found)


def spoil(comm: Communicator, case: Case) -> list[Seconds]:
    """Exchanges in which the last rank's received bytes are those of another block."""
    unspoiled = Communicator.exchange

    def exchanged(
        self: Communicator, outgoing: Mapping[int, Any], incoming: Mapping[int, Any], tag: Tag
    ) -> Pending[dict[int, Any]]:
        pending = unspoiled(self, outgoing, incoming, tag)

        def finish() -> dict[int, Any]:
            arrived = pending.wait()
            return {rank: x.roll(1, dims=0) for rank, x in arrived.items()}

        return Pending(finish)

    Communicator.exchange = exchanged  # type: ignore[method-assign]
    try:
        return run_exchanges(comm, [case])
    finally:
        Communicator.exchange = unspoiled  # type: ignore[method-assign]


def test_what_arrives_wrong_is_not_timed(pool_of: PoolOf) -> None:
    with pytest.raises(ApbError, match="received other keys and values than were sent"):
        pool_of(2).run(spoil, CASE)


def test_the_exchange_is_reported(
    pool_of: PoolOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exchange, "run_ranks", lambda ranks, _, program, **__: pool_of(ranks).run(program)
    )
    options = ["--model", "tiny", "--contexts", "700", "1400", "--ranks", "2", "--repeats", "2"]
    path = exchange.run(exchange._parse([*options, "--device", "cpu", "--out", str(tmp_path)]))
    data = json.loads(path.with_suffix(".json").read_text())
    first, second = data["exchanges"]
    assert (first["context_len"], second["context_len"]) == (700, 1400)
    assert second["received_bytes"][1] > first["received_bytes"][1] > 0
    assert first["received_bytes"][0] == 0
    assert "2 ranks, 1400 tokens" in path.read_text()
    assert path.with_suffix(".svg").is_file()


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(InputError, match="need as many GPUs"):
        exchange.run(exchange._parse(["--device", "cuda", "--ranks", "64"]))


def test_a_start_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "STATES", ("warm",))
    options = ["--model", "tiny", "--ranks", "1", "--repeats", "1", "--out", str(tmp_path)]
    path = startup.run(startup._parse(options))
    [one] = json.loads(path.with_suffix(".json").read_text())["runs"]
    assert set(one["seconds"]) == set(startup._MEANINGS)
    assert all(seconds >= 0 for seconds in one["seconds"].values())
    assert one["seconds"]["import"] > 0.1
    assert "weights: reading them" in path.read_text()


def test_starts_that_answer_differently_are_not_reported() -> None:
    run = startup.Run(state="warm", seconds={}, answers=[[1, 2], [1, 2]])
    startup.check_same([run, run])
    different: list[list[list[int]]] = [[[1, 2], [1, 3]], [[], []]]
    for answers in different:
        with pytest.raises(ApbError, match="different answers"):
            startup.check_same([replace(run, answers=answers)])


def test_eviction_leaves_files_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 9000)
    startup.evict([path])
    assert path.read_bytes() == b"x" * 9000


def test_what_a_trace_adds_is_a_mean_over_pairs() -> None:
    seconds = {(0, "without"): 1.0, (0, "with"): 1.1, (1, "without"): 2.0, (1, "with"): 2.0}
    runs = [
        TracedRun(repeat=repeat, mode=mode, seconds={"request": value}, token_ids=[])
        for (repeat, mode), value in seconds.items()
    ]
    added = added_shares(runs, "request")
    assert added.mean == pytest.approx(5.0)
    assert added.error == pytest.approx(5.0)


def test_the_list_needs_no_torch() -> None:
    """It is what a user sees first, and answers at once."""
    command = "import sys, benchmarks.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
