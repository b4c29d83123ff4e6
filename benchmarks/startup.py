"""From a command to its first answer, cold and warm: ``python -m benchmarks.startup`` (Linux).

A fresh process imports apb, starts ranks, loads the weights and asks a short question twice. Before
a cold start the files of the model and of the libraries are put out of the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from apb.config import compose_config
from apb.errors import ApbError
from apb.hf.checkpoint import Checkpoint
from apb.markdown import table
from apb.metrics import threads_per_rank
from apb.model_config import ModelConfig
from benchmarks.chart import Bars
from benchmarks.environment import REPORTS, ROOT, Environment
from benchmarks.report import Spread, print_report, write_report

STATES = ("cold", "warm")
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "apb")
_MEANINGS = {
    "interpreter": "Python itself",
    "import": "`from apb import LLM`",
    "ranks": "until all ranks have imported, met and are ready for requests",
    "weights": "reading them, on the slowest rank",
    "first answer": "what else the first request takes: 4 tokens about a short text",
    "second answer": "the same request again",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process."""

    state: str
    seconds: dict[str, float]
    answers: list[list[int]]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="of a cold and a warm start")
    parser.add_argument("--override", action="append", default=[], help="as dtype=float32")
    parser.add_argument("--out", type=Path, default=REPORTS)
    args = parser.parse_args(argv)
    if args.ranks < 1 or args.repeats < 1:
        parser.error("--ranks and --repeats must be at least 1")
    return args


def run(args: argparse.Namespace) -> Path:
    """Measure and report; returns the report.

    Raises:
        InputError: a wrong setting.
        ApbError: a process failed, or answers differ.
    """
    environment = Environment.read("benchmarks.startup")
    threads = threads_per_rank(args.ranks)
    overrides = [f"model={args.model}", f"world_size={args.ranks}", "launcher=local"]
    overrides += [f"device={args.device}", "drafter=none", *args.override]
    files = list(_files(compose_config(overrides).model))
    runs = []
    for _ in range(args.repeats):
        for state in STATES:
            if state == "cold":
                evict(files)
            runs.append(_start(state, overrides, threads))
            print(_line(runs[-1]), file=sys.stderr)
    check_same(runs)
    data = {
        "environment": environment.to_json(),
        "settings": {**vars(args), "out": None, "threads": threads},
        "runs": [asdict(one) for one in runs],
    }
    lines = _render(runs, environment, args, threads)
    chart = Bars(
        title=f"From a command to its first answer, {args.model}",
        y_label="seconds",
        groups={
            state: {part: _spread(runs, state, part).median for part in list(_MEANINGS)[:-1]}
            for state in STATES
        },
        stacked=True,
    )
    return write_report(args.out, "startup", args.model, lines, data, chart)


def _start(state: str, overrides: Sequence[str], threads: int) -> Run:
    command = [sys.executable, "-m", "benchmarks.startup_process", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise ApbError(f"a process ended with exit code {done.returncode}; see its error above")
    told = json.loads(done.stdout.splitlines()[-1])
    seconds = {"interpreter": told["started"] - begin, **told["seconds"]}
    return Run(state=state, seconds=seconds, answers=told["answers"])


def check_same(runs: Sequence[Run]) -> None:
    """Raises ApbError where answers differ: then a speed means nothing."""
    answers = {tuple(answer) for one in runs for answer in one.answers}
    if len(answers) != 1 or () in answers:
        raise ApbError(f"{len(answers)} different answers to one question, so that speed is moot")


def _files(model: ModelConfig) -> Iterator[Path]:
    """What a start reads: weights, libraries, apb."""
    folders = [spec.submodule_search_locations for name in _LIBRARIES if (spec := find_spec(name))]
    roots = [Path(place) for places in folders for place in places or ()]
    if model.architecture is None:
        roots.append(Path(Checkpoint.find(model).location))
    for root in roots:
        yield from (path for path in root.rglob("*") if path.is_file())


def evict(files: Sequence[Path]) -> None:
    """Put files out of the page cache, but for the pages that some program has mapped (Linux)."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _spread(runs: Sequence[Run], state: str, part: str) -> Spread:
    return Spread.of([one.seconds[part] for one in runs if one.state == state])


def _line(one: Run) -> str:
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in one.seconds.items())
    return f"{one.state}: {parts} s"


def _render(
    runs: Sequence[Run], environment: Environment, args: argparse.Namespace, threads: int
) -> list[str]:
    rows = [
        [f"{part}: {meaning}", *(_spread(runs, state, part).text() for state in STATES)]
        for part, meaning in _MEANINGS.items()
    ]
    totals = [
        Spread.of(
            [
                sum(one.seconds.values()) - one.seconds["second answer"]
                for one in runs
                if one.state == state
            ]
        ).text()
        for state in STATES
    ]
    return [
        f"# From a command to its first answer, {args.model}, {args.ranks} ranks",
        "",
        *environment.lines(),
        f"* {args.ranks} local ranks of {threads} threads, device {args.device}, overrides "
        f"`{' '.join(args.override) or 'none'}`; median (smallest to largest) of {args.repeats} "
        "cold and as many warm starts in turn, each in fresh processes",
        "* all runs gave the same answer",
        "* before a cold start the files of the model, apb and its libraries were put out of the "
        "page cache, except for pages that other programs had mapped",
        "",
        *table(["seconds", *STATES], [*rows, ["**to the first answer**", *totals]]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
