"""Everything that fits into a time on a new machine: ``python -m benchmarks all --budget 60m``.

Jobs run one after the other, the smallest useful ones first, and their reports are linked on one
page. The same command goes on where an earlier one ended: finished jobs of the same source are not
run again, and their time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TextIO

import torch

from apb.config import named_model
from apb.errors import ApbError, InputError
from apb.hf.checkpoint import Checkpoint
from apb.markdown import table
from benchmarks.catalogue import CPU_JOBS, GPU_JOBS, Job
from benchmarks.environment import REPORTS, ROOT, Environment, hardware_slug
from benchmarks.report import print_report, write_report

_MODEL = "smollm2-135m"
_UNITS = {"s": 1, "m": 60, "h": 3600, "": 60}
_GRACE_S = 10.0
_REPORT = re.compile(r"^report: (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a job."""

    job: str
    arguments: list[str]
    revision: str
    status: str
    """`done`, `failed` or `left out`."""
    seconds: float = 0.0
    report: str | None = None
    """The Markdown file's name in the folder of reports."""
    reason: str = ""


Run = Callable[[Job, float], Outcome]
"""Runs a job within some seconds; never raises for what goes wrong with it."""


class Journal:
    """Finished jobs, one JSON object a line, each on disk before the next job begins."""

    def __init__(self, path: Path) -> None:
        """A last line without its end, which a crash has left, is dropped."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self.outcomes = [Outcome(**json.loads(line)) for line in whole.splitlines()]

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


class Suite:
    """Jobs in order, those of them that fit into a time."""

    def __init__(
        self, jobs: Sequence[Job], run: Run, journal: Journal, *, budget_s: float, source: str
    ) -> None:
        self._jobs, self._run, self._journal, self._source = jobs, run, journal, source
        self._left_s = budget_s
        self._ratios: list[float] = []
        """Seconds that jobs took, over those in the catalogue."""

    def outcomes(self) -> Iterator[Outcome]:
        """Of every job; those that the journal has, of the same source, are not run again."""
        known = {
            (one.job, *one.arguments): one
            for one in self._journal.outcomes
            if (one.status, one.revision) == ("done", self._source)
        }
        finished = {job: known.get((job.name, *job.arguments)) for job in self._jobs}
        for job, found in finished.items():
            if found is not None:
                self._count(job, found)
        for job, found in finished.items():
            yield found or self._try(job)

    def _try(self, job: Job) -> Outcome:
        expected_s = self.expected_s(job)
        blank = Outcome(
            job=job.name, arguments=list(job.arguments), revision=self._source, status="left out"
        )
        if reason := missing(job):
            return replace(blank, reason=reason)
        if expected_s > self._left_s:
            words = f"about {minutes(expected_s)} and {minutes(self._left_s)} are left"
            return replace(blank, reason=f"it takes {words}")
        print(f"{job.name}: about {minutes(expected_s)}", file=sys.stderr)
        outcome = self._run(job, self._left_s)
        self._journal.add(outcome)
        self._count(job, outcome)
        return outcome

    def expected_s(self, job: Job) -> float:
        """By the catalogue, and by what other jobs have taken here."""
        return 60 * job.minutes * (median(self._ratios) if self._ratios else 1.0)

    def _count(self, job: Job, outcome: Outcome) -> None:
        self._left_s -= outcome.seconds
        if outcome.status == "done":
            self._ratios.append(outcome.seconds / (60 * job.minutes))


def missing(job: Job) -> str:
    """What the job needs and this machine lacks."""
    match job.needs:
        case "root" if os.geteuid():
            return "it needs root"
        case "ray" if not find_spec("ray"):
            return "it needs Ray: pip install '.[ray]'"
        case "gpus" if torch.cuda.device_count() < 2:
            return "it needs two GPUs"
    return ""


def minutes(seconds: float) -> str:
    return f"{max(0.0, seconds) / 60:.1f} min"


class Launcher:
    """Runs a job as a process of its own, whose output goes to a log."""

    def __init__(self, folder: Path, logs: Path, source: str) -> None:
        self._folder, self._logs, self._source = folder, logs, source
        logs.mkdir(parents=True, exist_ok=True)

    def __call__(self, job: Job, limit_s: float) -> Outcome:
        log = self._logs / f"{re.sub('[^a-z0-9]+', '-', job.name.lower())}.log"
        command = [sys.executable, "-m", "benchmarks", job.benchmark, *job.arguments]
        command += ["--out", str(self._folder)]
        begin = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            status, reason = self._wait(command, file, limit_s)
        said = log.read_text(encoding="utf-8")
        reports = _REPORT.findall(said)
        if status == "failed" and not reason:
            reason = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        return Outcome(
            job=job.name,
            arguments=list(job.arguments),
            revision=self._source,
            status=status,
            seconds=time.monotonic() - begin,
            report=Path(reports[-1]).name if reports and status == "done" else None,
            reason=f"{reason} ({log})" if reason else "",
        )

    def _wait(self, command: list[str], file: TextIO, limit_s: float) -> tuple[str, str]:
        # A session of its own, so that it can be ended with the ranks that it has started.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return "failed", "it was not done within the time that was left"
        else:
            return ("done", "") if code == 0 else ("failed", "")
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--budget", type=_seconds, default="60m", help="such as 90s, 60m or 3h")
    parser.add_argument("--gpu", action="store_true", help="what runs on one GPU")
    parser.add_argument("--out", type=Path, default=REPORTS)
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no time such as 90s, 60m or 3h")
    return float(found[1]) * _UNITS[found[2]]


def run(args: argparse.Namespace) -> Path:
    """Run what fits and write the page; returns it.

    Raises:
        InputError: no GPU, or no model.
        ApbError: a job failed; the page is written all the same.
    """
    if args.gpu and not torch.cuda.is_available():
        raise InputError("--gpu: torch finds no GPU here")
    Checkpoint.find(named_model(_MODEL))
    environment = Environment.read("benchmarks")
    source = environment.revision
    args.out.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if args.gpu else "cpu"
    logs = ROOT / "outputs" / "benchmarks"
    journal = Journal(logs / f"{kind}_{hardware_slug()}.jsonl")
    # Reports that went to another folder, or are gone, are made again.
    journal.outcomes = [
        one for one in journal.outcomes if not one.report or (args.out / one.report).is_file()
    ]
    suite = Suite(
        GPU_JOBS if args.gpu else CPU_JOBS,
        Launcher(args.out.absolute(), logs, source),
        journal,
        budget_s=args.budget,
        source=source,
    )
    outcomes: list[Outcome] = []
    path: Path = args.out
    for outcome in suite.outcomes():
        outcomes.append(outcome)
        print(_line(outcome), file=sys.stderr)
        data = {
            "environment": environment.to_json(),
            "outcomes": [asdict(one) for one in outcomes],
        }
        path = write_report(args.out, "all", kind, _render(outcomes, environment, args), data)
    if failed := [one.job for one in outcomes if one.status == "failed"]:
        raise ApbError(f"{len(failed)} of {len(outcomes)} failed ({'; '.join(failed)}); see {path}")
    return path


def _line(one: Outcome) -> str:
    took = f" in {minutes(one.seconds)}" if one.seconds else ""
    return f"{one.job}: {one.status}{took}{f': {one.reason}' if one.reason else ''}"


def _render(
    outcomes: Sequence[Outcome], environment: Environment, args: argparse.Namespace
) -> list[str]:
    rows = [
        [
            f"[{one.job}]({one.report})" if one.report else one.job,
            one.status,
            minutes(one.seconds) if one.seconds else "",
            one.reason.replace("|", "/"),
        ]
        for one in outcomes
    ]
    charts = dict.fromkeys(
        Path(one.report).with_suffix(".svg").name for one in outcomes if one.report
    )
    return [
        f"# Benchmarks on {environment.hardware}",
        "",
        *environment.lines(),
        f"* budget {minutes(args.budget)}; each report has its own command and settings. A later "
        "one of a name has written over the earlier one, whose lengths it repeats.",
        "",
        *table(["benchmark", "", "time", "reason"], rows),
        "",
        *(f"![{name}]({name})" for name in charts if (args.out / name).is_file()),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return print_report(lambda: run(args))
