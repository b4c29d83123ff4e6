"""The exchange of anchor and passing blocks on its own: ``python -m benchmarks.exchange``.

Real ranks of this machine send one layer's messages of real prefill plans, over gloo on the CPU and
over NCCL on GPUs, and each compares what has arrived with what was sent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from apb.comm import Communicator
from apb.errors import InputError
from apb.hf.model import DTYPES
from apb.link_bench import run_ranks
from apb.markdown import table
from apb.methods.wire import WireFormat
from benchmarks.chart import Lines
from benchmarks.critical_path_variants import SHAPES
from benchmarks.environment import REPORTS, Environment
from benchmarks.exchange_rank import Case, Seconds, run_exchanges, run_small
from benchmarks.report import Spread, print_report, write_report

_SMALL_REPEATS = 50
_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One case on one number of ranks; lists have one entry per repeat, of the slowest rank."""

    ranks: int
    context_len: int
    anchor_len: int
    passing_len: int
    """Of a block, the longest."""
    received_bytes: list[int]
    """By each rank."""
    transfer_s: list[float]
    unpack_s: list[float]

    @property
    def busiest_bytes(self) -> int:
        return max(self.received_bytes)

    @property
    def rate(self) -> float:
        """Bytes per second into the rank that receives most."""
        return self.busiest_bytes / Spread.of(self.transfer_s).median


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.add_argument("--model", default="llama3-8b", choices=SHAPES, help="whose shape")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--question", type=int, default=32, help="tokens in the anchor")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--wire", default="auto", choices=[form.name for form in WireFormat])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--override", action="append", default=[], help="as method.passing_len=0.1")
    parser.add_argument("--out", type=Path, default=REPORTS)
    args = parser.parse_args(argv)
    if min(args.ranks) < 2 or args.repeats < 1:
        parser.error("--ranks must be at least 2 and --repeats at least 1")
    return args


def run(args: argparse.Namespace) -> Path:
    """Measure and report; returns the report.

    Raises:
        InputError: settings that do not fit, or fewer GPUs than ranks.
        ApbError: a rank failed, or received something else than was sent.
    """
    environment = Environment.read("benchmarks.exchange")
    device = _device(args)
    cases = [
        Case(
            model=args.model,
            context_len=context_len,
            question_len=args.question,
            dtype=args.dtype,
            device=device,
            wire=args.wire,
            overrides=tuple(args.override),
            repeats=args.repeats,
        )
        for context_len in args.contexts
    ]
    for ranks in args.ranks:
        for case in cases:
            case.plan(ranks)
    exchanges, latencies = [], {}
    for ranks in args.ranks:
        found = run_ranks(ranks, device, partial(_on_rank, cases=cases), timeout_s=_TIMEOUT_S)
        small = [max(seconds) for seconds in zip(*(one for one, _ in found), strict=True)]
        latencies[ranks] = Spread.of(small)
        for index, case in enumerate(cases):
            exchanges.append(_exchange(case, ranks, [results[index] for _, results in found]))
            print(_line(exchanges[-1]), file=sys.stderr)
    data = {
        "environment": environment.to_json(),
        "settings": {**vars(args), "out": None, "device": device},
        "latency_s": {ranks: spread._asdict() for ranks, spread in latencies.items()},
        "exchanges": [asdict(exchange) for exchange in exchanges],
    }
    lines = _render(exchanges, latencies, environment, args, device)
    chart = Lines(
        title=f"Exchange of one layer, {args.model}, {_TRANSPORT[device]}",
        x_label="MiB into the rank that receives most",
        y_label="GB/s into it",
        series=_series(exchanges),
    )
    return write_report(args.out, "exchange", args.model, lines, data, chart)


_TRANSPORT = {"cpu": "gloo", "cuda": "NCCL"}


def _device(args: argparse.Namespace) -> str:
    """Raises InputError where there are fewer GPUs than ranks."""
    gpus, most = torch.cuda.device_count(), max(args.ranks)
    if args.device == "cuda" and gpus < most:
        raise InputError(f"--ranks {most} need as many GPUs and there are {gpus}: lower --ranks")
    return str(args.device) if args.device != "auto" else "cuda" if gpus >= most else "cpu"


def _on_rank(comm: Communicator, cases: Sequence[Case]) -> tuple[list[float], list[Seconds]]:
    return run_small(comm, _SMALL_REPEATS), run_exchanges(comm, cases)


def _exchange(case: Case, ranks: int, seconds: Sequence[Seconds]) -> Exchange:
    plan = case.plan(ranks)
    return Exchange(
        ranks=ranks,
        context_len=case.context_len,
        anchor_len=len(plan.anchor),
        passing_len=max(plan.passing_lens),
        received_bytes=[one.received_bytes for one in seconds],
        transfer_s=[max(times) for times in zip(*(one.transfer for one in seconds), strict=True)],
        unpack_s=[max(times) for times in zip(*(one.unpack for one in seconds), strict=True)],
    )


def _line(exchange: Exchange) -> str:
    milliseconds = 1e3 * Spread.of(exchange.transfer_s).median
    return (
        f"{exchange.ranks} ranks {exchange.context_len:>7} tokens: {milliseconds:.2f} ms, "
        f"{exchange.rate / 1e9:.2f} GB/s"
    )


def _series(exchanges: Sequence[Exchange]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for one in exchanges:
        point = float(f"{one.busiest_bytes / 2**20:.3g}"), one.rate / 1e9
        series.setdefault(f"{one.ranks} ranks", []).append(point)
    return series


def _render(
    exchanges: Sequence[Exchange],
    latencies: dict[int, Spread],
    environment: Environment,
    args: argparse.Namespace,
    device: str,
) -> list[str]:
    rows = []
    for one in exchanges:
        transfer, unpack = (
            Spread.of([1e3 * s for s in times]) for times in (one.transfer_s, one.unpack_s)
        )
        rows.append(
            [
                f"{one.ranks} ranks, {one.context_len} tokens",
                str(one.anchor_len),
                str(one.passing_len),
                f"{one.busiest_bytes / 2**20:.1f}",
                f"{sum(one.received_bytes) / 2**20:.1f}",
                transfer.text(),
                f"{one.rate / 1e9:.2f}",
                unpack.text(),
            ]
        )
    small = [
        [f"{ranks} ranks", Spread(*(1e3 * value for value in spread)).text()]
        for ranks, spread in latencies.items()
    ]
    header = ["case", "anchor", "passing", "MiB, busiest", "MiB, all", "ms", "GB/s", "unpack ms"]
    return [
        f"# The exchange of one layer, {args.model}, {args.dtype}, {_TRANSPORT[device]}",
        "",
        *environment.lines(),
        f"* wire `{args.wire}`, overrides `{' '.join(args.override) or 'none'}`; {args.repeats} "
        "repeats after one to warm up, ranks beginning together; median (smallest to largest) of "
        "the slowest rank",
        "* every rank compared the keys and values of the first and the last exchange with those "
        "that were sent: equal bit by bit",
        "",
        "`ms` is from asking until what was asked for is there, `GB/s` what comes into the rank "
        "that receives most, `unpack ms` until attention can use it. Ranks of one machine share "
        "its processors and memory: their rates are not those of a network.",
        "",
        *table(header, rows),
        "",
        "One number from every rank to all later ones:",
        "",
        *table(["ranks", "ms"], small),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
