"""What a launcher adds to a request: ``python -m benchmarks.launchers``.

The same ranks on this machine under torchrun, as local processes and as Ray actors; all gangs are
up, one of them is asked at a time, in turn. Ray may add 5 % to a prefill and 20 ms to a request.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from apb import LLM, RequestOutput, SamplingParams
from apb.errors import ApbError
from apb.markdown import table
from benchmarks.chart import Bars
from benchmarks.environment import REPORTS, ROOT, Environment
from benchmarks.report import Spread, print_report, write_report

LAUNCHERS = ("torchrun", "local", "ray")
_MAX_PREFILL = 1.05
_MAX_REQUEST_S = 0.020
_QUESTION = "Who kept bees?"

Ask = Callable[[str], tuple[RequestOutput, float]]
"""A document in; the answer and the seconds that the caller waited out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request: its prefill, and what its caller waited beyond prefill and decoding."""

    launcher: str
    context_tokens: int
    prefill_s: float
    around_s: float
    token_ids: list[int]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launchers", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--chars", type=int, nargs="+", default=[2000, 16000], help="of documents")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--launchers", nargs="+", default=[*LAUNCHERS], choices=LAUNCHERS)
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument("--override", action="append", default=[])
    return parser.parse_args(argv)


class TorchrunGang:
    """Ranks of torchrun that read requests from a pipe."""

    def __init__(self, overrides: Sequence[str], *, ranks: int, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "benchmarks.launchers_rank"]
        self._process = subprocess.Popen(
            [*command, json.dumps(list(overrides))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, document: str) -> tuple[RequestOutput, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"document": document, "question": _QUESTION, "max_tokens": self._max_tokens}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ApbError(f"torchrun ended with exit code {self._process.wait()}; see above")
        answer = json.loads(line)
        return RequestOutput.from_json(answer["output"]), answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _open(stack: ExitStack, launcher: str, overrides: list[str], args: argparse.Namespace) -> Ask:
    if launcher == "torchrun":
        gang = TorchrunGang(overrides, ranks=args.ranks, max_tokens=args.max_tokens)
        stack.callback(gang.close)
        return gang.ask
    chosen = [*overrides, f"launcher={launcher}", f"world_size={args.ranks}"]
    if launcher == "ray":
        chosen += ["launcher.address=local", f"launcher.cpus_per_rank={args.threads}"]
    llm = LLM.from_overrides(chosen)
    stack.callback(llm.close)
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True)

    def ask(document: str) -> tuple[RequestOutput, float]:
        begin = time.perf_counter()
        output = llm.ask(document, _QUESTION, params)
        return output, time.perf_counter() - begin

    return ask


def run(args: argparse.Namespace) -> Path:
    """Measure and report; returns the report.

    Raises:
        ApbError: launchers disagree about an answer, or one does not start.
    """
    environment = Environment.read("benchmarks.launchers")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the ranks', whoever starts them
    overrides = [f"model={args.model}", "progress=false", "drafter=none", *args.override]
    runs: list[Run] = []
    with ExitStack() as stack:
        gangs = {name: _open(stack, name, overrides, args) for name in args.launchers}
        for chars in args.chars:
            document = ("The mill stood by the river, and the miller kept bees. " * chars)[:chars]
            for ask in gangs.values():  # loads weights, warms up
                ask(document)
            for repeat in range(args.repeats):
                turn = repeat % len(gangs)  # so that a drift of the machine favours none
                for name in args.launchers[turn:] + args.launchers[:turn]:
                    output, seconds = gangs[name](document)
                    runs.append(_run(name, output, seconds))
            _check_same(runs)
    settings = {**vars(args), "out": None}
    data = {
        "environment": environment.to_json(),
        "settings": settings,
        "runs": [asdict(one) for one in runs],
    }
    lines = _render(runs, environment, args)
    return write_report(args.out, "launchers", args.model, lines, data, _chart(runs, args.model))


def _chart(runs: Sequence[Run], model: str) -> Bars:
    around: dict[str, dict[str, list[float]]] = {}
    for one in runs:
        by_launcher = around.setdefault(f"{one.context_tokens} tokens", {})
        by_launcher.setdefault(one.launcher, []).append(one.around_s)
    return Bars(
        title=f"Requests to {model} beyond prefill and decoding",
        y_label="ms",
        groups={
            tokens: {name: Spread.of(values).interval(1e3) for name, values in launchers.items()}
            for tokens, launchers in around.items()
        },
    )


def _run(launcher: str, output: RequestOutput, seconds: float) -> Run:
    metrics = output.metrics
    return Run(
        launcher=launcher,
        context_tokens=metrics.context_tokens,
        prefill_s=metrics.prefill_s,
        around_s=seconds - metrics.prefill_s - metrics.decode_s,
        token_ids=output.token_ids,
    )


def _check_same(runs: Sequence[Run]) -> None:
    answers: dict[int, list[int]] = {}
    for one in runs:
        if answers.setdefault(one.context_tokens, one.token_ids) != one.token_ids:
            raise ApbError(f"{one.launcher} gives another answer, so that its speed means nothing")


def _render(runs: Sequence[Run], environment: Environment, args: argparse.Namespace) -> list[str]:
    lines = [
        f"# Launchers on one machine, {args.model}, {args.ranks} ranks of {args.threads} threads",
        "",
        "Median (smallest to largest) over the repeats. `around` is what the caller waited beyond",
        "prefill and decoding: checks, the question's pass, and the launcher's own messages.",
        "",
        *environment.lines(),
        "",
    ]
    rows, verdicts = [], []
    for tokens in sorted({one.context_tokens for one in runs}):
        found = {
            name: [one for one in runs if (one.launcher, one.context_tokens) == (name, tokens)]
            for name in args.launchers
        }
        prefill = {name: Spread.of([one.prefill_s for one in of]) for name, of in found.items()}
        around = {name: Spread.of([one.around_s * 1e3 for one in of]) for name, of in found.items()}
        rows += [
            [name, str(tokens), prefill[name].text(), around[name].text()]
            for name in args.launchers
        ]
        if {"torchrun", "ray"} <= found.keys():
            verdicts += _verdicts(tokens, prefill, around)
    header = ["launcher", "tokens", "prefill, s", "around, ms"]
    return [*lines, *table(header, rows), "", *verdicts]


def _verdicts(tokens: int, prefill: dict[str, Spread], around: dict[str, Spread]) -> list[str]:
    share = prefill["ray"].median / prefill["torchrun"].median
    added_s = (around["ray"].median - around["torchrun"].median) / 1e3
    return [
        f"* {tokens} tokens: Ray's prefill takes {share:.3f} of torchrun's "
        f"({'within' if share <= _MAX_PREFILL else 'above'} {_MAX_PREFILL}), a request "
        f"{added_s * 1e3:+.1f} ms ({'within' if added_s <= _MAX_REQUEST_S else 'above'} "
        f"{_MAX_REQUEST_S * 1e3:.0f} ms)"
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
