"""What ``trace=true`` adds to a request: ``python -m benchmarks.tracing``.

The same ranks answer the same request with and without a trace, in turn. Tracing may add 3 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from apb import LLM, SamplingParams
from apb.errors import ApbError
from apb.markdown import table
from apb.metrics import threads_per_rank
from benchmarks.chart import Bars
from benchmarks.environment import REPORTS, Environment
from benchmarks.report import Estimate, Spread, print_report, write_report

_BAR_PERCENT = 3.0
_MODES = {"without": "trace=false", "with": "trace=true"}
_PARTS = ("prefill", "decode", "request")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request; the whole of it is what its caller waited."""

    repeat: int
    mode: str
    seconds: dict[str, float]
    token_ids: list[int]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--tokens", type=int, default=4096, help="of the document")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10, help="of each kind")
    parser.add_argument("--override", action="append", default=[], help="as decode.placement=rank0")
    parser.add_argument("--out", type=Path, default=REPORTS)
    args = parser.parse_args(argv)
    if args.ranks < 1 or args.repeats < 2:
        parser.error("--ranks must be at least 1 and --repeats at least 2")
    return args


def run(args: argparse.Namespace) -> Path:
    """Measure and report; returns the report.

    Raises:
        InputError: a wrong setting.
        ApbError: a trace changes the answer, or a rank failed.
    """
    environment = Environment.read("benchmarks.tracing")
    threads = threads_per_rank(args.ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Without drafts, whose number follows measured times, all requests are the same work.
    overrides = [f"model={args.model}", f"world_size={args.ranks}", "launcher=local"]
    overrides += ["drafter=none", "progress=false", *args.override]
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True)
    runs: list[Run] = []
    with LLM.from_overrides(overrides) as llm:
        case = llm.make_needle(context_len=args.tokens)
        for repeat in range(-1, args.repeats):
            modes = list(_MODES)
            for mode in modes if repeat % 2 else modes[::-1]:  # a drift favours none
                llm.configure([*overrides, _MODES[mode]])
                begin = time.perf_counter()
                output = llm.ask(case["document"], case["question"], params)
                whole_s = time.perf_counter() - begin
                metrics = output.metrics
                parts_s = (metrics.prefill_s, metrics.decode_s, whole_s)
                seconds = dict(zip(_PARTS, parts_s, strict=True))
                one = Run(repeat=repeat, mode=mode, seconds=seconds, token_ids=output.token_ids)
                print(f"#{repeat:>2} {mode:>7} {seconds}", file=sys.stderr)
                runs += [one] if repeat >= 0 else []  # the first of each warms up
    if any(one.token_ids != runs[0].token_ids for one in runs):
        raise ApbError("a trace changes the answer, so that its cost means nothing")
    added = {part: added_shares(runs, part) for part in _PARTS}
    data = {
        "environment": environment.to_json(),
        "settings": {**vars(args), "out": None, "threads": threads},
        "runs": [asdict(one) for one in runs],
    }
    groups = {
        part: {mode: _spread(runs, mode, part).interval() for mode in _MODES} for part in _PARTS
    }
    chart = Bars(title=f"Requests to {args.model}", y_label="seconds", groups=groups)
    lines = _render(runs, added, environment, args, threads)
    return write_report(args.out, "tracing", args.model, lines, data, chart)


def added_shares(runs: Sequence[Run], part: str) -> Estimate:
    """What a trace adds, in percent of the same request without one, over the repeats."""
    seconds = {(one.repeat, one.mode): one.seconds[part] for one in runs}
    repeats = sorted({one.repeat for one in runs})
    return Estimate.of([100 * (seconds[at, "with"] / seconds[at, "without"] - 1) for at in repeats])


def _spread(runs: Sequence[Run], mode: str, part: str) -> Spread:
    return Spread.of([one.seconds[part] for one in runs if one.mode == mode])


def _render(
    runs: Sequence[Run],
    added: Mapping[str, Estimate],
    environment: Environment,
    args: argparse.Namespace,
    threads: int,
) -> list[str]:
    rows = [
        [
            part,
            *(_spread(runs, mode, part).text() for mode in _MODES),
            added[part].text(2, signed=True),
        ]
        for part in _PARTS
    ]
    whole = added["request"]
    verdict = "within" if whole.mean <= _BAR_PERCENT else "above"
    return [
        f"# What a trace adds to a request, {args.model}, {args.ranks} ranks",
        "",
        *environment.lines(),
        f"* a generated document of {args.tokens} tokens, {args.max_tokens} generated; "
        f"{args.ranks} local ranks of {threads} threads, overrides "
        f"`{' '.join(args.override) or 'none'}`; {args.repeats} requests of each kind in turn "
        "after one of each to warm up",
        "* answers with and without a trace were the same tokens",
        "",
        "Seconds, median (smallest to largest); what a trace adds is the mean over pairs ± its "
        "standard error. A request is all that its caller waits for, the gathering of the trace "
        "included.",
        "",
        *table(["part", *(f"{mode} a trace" for mode in _MODES), "added, %"], rows),
        "",
        f"The whole request: {whole.text(2, signed=True)} %, {verdict} the bar of "
        f"{_BAR_PERCENT:g} %.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
