"""Which method reads a prompt fastest at which length: ``python -m benchmarks.break_even``.

All methods run on the same ranks, loaded once, alternating within a repeat; `auto` runs beside them
so that its choice can be judged by what the others took.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from apb import LLM, SamplingParams
from apb.config import compose_config
from apb.errors import ApbError
from apb.hf.model import DTYPES, load_config
from apb.markdown import table
from apb.metrics import threads_per_rank
from apb.plot import plot_lines
from benchmarks.environment import REPORTS, Environment
from benchmarks.report import Spread, print_report, report_stem, write_report

EXACT: Mapping[str, tuple[str, ...]] = {
    "full": ("method=full",),
    "ring": ("method=ring",),
    "zigzag": ("method=zigzag",),
    "ulysses": ("method=ulysses",),
}
METHODS: Mapping[str, tuple[str, ...]] = {
    **EXACT,
    "star": ("method=star",),
    "apb-paper": ("method=apb", "method.anchor=replicated", "method.layout=even"),
    "apb": ("method=apb", "method.layout=balanced"),
    "auto": ("method=auto", "method.layout=balanced"),
}
_GATE_LIMIT = 1e-3
_WORTHWHILE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prefill."""

    method: str
    ran: str
    """What `auto` chose; the method itself otherwise."""
    length: int
    repeat: int
    prefill_s: float
    notes: list[str]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.break_even", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument("--override", action="append", default=[], help="for all methods")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Check, measure and report; returns the report.

    Raises:
        ApbError: exact methods disagree, or a run failed.
    """
    environment = Environment.read("benchmarks.break_even")
    threads = threads_per_rank(args.ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    shared = [f"dtype={args.dtype}", "allow_beyond_context=true", *args.override]
    config = compose_config([f"model={args.model}", *shared])
    vocab_size = int(load_config(config.model).vocab_size)
    runs: list[Run] = []
    with ExitStack() as stack:
        llms = {
            name: stack.enter_context(
                LLM(
                    args.model,
                    launcher="local",
                    world_size=args.ranks,
                    overrides=[*shared, *METHODS[name]],
                )
            )
            for name in args.methods
        }
        gate = _gate(llms, vocab_size)
        for length in args.lengths:
            for repeat in range(args.repeats):
                rng = random.Random(f"{length}-{repeat}")
                document = rng.choices(range(vocab_size), k=length)
                for name, llm in llms.items():
                    metrics = llm.ask(document, document[:8], SamplingParams(max_tokens=1)).metrics
                    found = Run(
                        method=name,
                        ran=metrics.method,
                        length=length,
                        repeat=repeat,
                        prefill_s=metrics.prefill_s,
                        notes=metrics.notes,
                    )
                    runs.append(found)
                    print(f"{name:>10} {length:>6} {found.prefill_s:.2f} s", file=sys.stderr)
    settings = {**vars(args), "out": None, "threads": threads, "gate": gate}
    data = {
        "environment": environment.to_json(),
        "settings": settings,
        "runs": [asdict(run) for run in runs],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    plot = plot_lines(
        args.out / f"{report_stem('break-even', args.model)}.svg",
        {
            name: [(length, _prefill(runs, name, length).median) for length in args.lengths]
            for name in args.methods
            if name != "auto"
        },
        title=f"Prefill of {args.model} on {args.ranks} ranks, {args.dtype}",
        x_label="document tokens",
        y_label="seconds",
    )
    lines = _render(runs, args, environment, gate, threads, plot)
    return write_report(args.out, "break-even", args.model, lines, data)


def _gate(llms: Mapping[str, LLM], vocab_size: int) -> float:
    """The largest difference in log-probability between exact methods."""
    document = random.Random(0).choices(range(vocab_size), k=300)
    exact = [
        llm.logprobs(document[:260], document[260:]) for name, llm in llms.items() if name in EXACT
    ]
    difference = max(
        abs(ours - theirs) for found in exact for ours, theirs in zip(found, exact[0], strict=True)
    )
    if difference > _GATE_LIMIT:
        raise ApbError(f"exact methods differ by {difference:.1e} in log-probability")
    return difference


def _prefill(runs: Sequence[Run], method: str, length: int) -> Spread:
    return Spread.of(
        [run.prefill_s for run in runs if run.method == method and run.length == length]
    )


def _render(
    runs: Sequence[Run],
    args: argparse.Namespace,
    environment: Environment,
    gate: float,
    threads: int,
    plot: Path,
) -> list[str]:
    measured = [name for name in args.methods if name != "auto"]
    rows = [
        [str(length), *(_prefill(runs, name, length).text() for name in args.methods)]
        for length in args.lengths
    ]
    lines = [
        f"# Which method when: prefill of {args.model} on {args.ranks} ranks, {args.dtype}",
        "",
        *environment.lines(),
        f"* {args.ranks} ranks of {threads} threads, random tokens, {args.repeats} repeats: median "
        "(smallest to largest) of prefill seconds; exact methods agreed to "
        f"{gate:.1e} in log-probability before",
        "",
        *table(["tokens", *(f"`{name}`" for name in args.methods)], rows),
        "",
        f"![prefill seconds by length]({plot.name})",
        "",
        _break_even(runs, args.lengths, measured),
    ]
    if "auto" in args.methods:
        lines += ["", *table(["tokens", "`auto` ran", "seconds over `full`", "over the best"], [
            _judged(runs, length, measured) for length in args.lengths
        ])]  # fmt: skip
        lines += ["", *dict.fromkeys(note for run in runs for note in run.notes if "auto" in note)]
    return lines


def _break_even(runs: Sequence[Run], lengths: Sequence[int], measured: Sequence[str]) -> str:
    """From which measured length on `apb` saves at least 5 % over every exact method."""
    exact = [name for name in measured if name in EXACT]

    def worthwhile(length: int) -> bool:
        best = min(_prefill(runs, name, length).median for name in exact)
        return _prefill(runs, "apb", length).median < _WORTHWHILE * best

    first = next(
        (length for index, length in enumerate(lengths) if all(map(worthwhile, lengths[index:]))),
        None,
    )
    if first is None:
        return "At none of these lengths does `apb` save 5 % over the best exact method."
    return f"From {first} tokens on `apb` saves at least 5 % over the best exact method."


def _judged(runs: Sequence[Run], length: int, measured: Sequence[str]) -> list[str]:
    ran = {run.ran for run in runs if run.method == "auto" and run.length == length}
    auto = _prefill(runs, "auto", length).median
    full = _prefill(runs, "full", length).median
    best = min(_prefill(runs, name, length).median for name in measured if name in (*EXACT, "apb"))
    return [
        str(length),
        " ".join(sorted(ran)),
        f"{auto / full - 1:+.0%}",
        f"{auto / best - 1:+.0%}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return print_report(lambda: run(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
