"""How much of the exchange shows on a slow link: ``python -m benchmarks.overlap`` (Linux, root).

Prefills by `apb` on CPU ranks that a switch of limited speed joins, with and without the exchange
of passing blocks running beside local attention, and on the same switch without a limit. Variants
alternate within a repeat, in the same processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apb.config import compose_config
from apb.errors import ApbError, InputError
from apb.hf.model import DTYPES
from benchmarks.chart import Bars
from benchmarks.environment import REPORTS, Environment
from benchmarks.overlap_link import OWNER_ADDRESS, Switch, switch
from benchmarks.overlap_rank import Job
from benchmarks.overlap_report import Exchange, Prefill, link_name, render
from benchmarks.report import Spread, print_report, write_report

_PORT = "29500"
_EXCHANGES = 100


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4, help="of each rank")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--gbit", type=float, default=1.0, help="Gbit/s of the slow link")
    parser.add_argument("--anchor-len", default="0.25")
    parser.add_argument("--passing-len", default="0.5")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument("--override", action="append", default=[], help="as method.wire=int8")
    args = parser.parse_args(argv)
    least = {"ranks": 2, "blocks": 1, "threads": 1, "repeats": 1, "gbit": 0.001}
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f"--{name} must be at least {value}")
    return args


class Gang:
    """The ranks of a benchmark, told one thing at a time."""

    def __init__(self, network: Switch, job: Job, *, ranks: int, threads: int) -> None:
        shared = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": OWNER_ADDRESS,
            "MASTER_PORT": _PORT,
            "OMP_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "benchmarks.overlap_rank", json.dumps(asdict(job))]
        self._ranks: list[subprocess.Popen[str]] = [
            network.start(rank, command, {**shared, "RANK": str(rank), "LOCAL_RANK": "0"})
            for rank in range(ranks)
        ]

    def ask(self, **request: Any) -> list[dict[str, Any]]:
        """Every rank's answer, in rank order; raises ApbError where one has ended."""
        for process in self._ranks:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                continue  # it shows when its answer is read
        return [self._answer(rank) for rank in range(len(self._ranks))]

    def _answer(self, rank: int) -> dict[str, Any]:
        process = self._ranks[rank]
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ApbError(
                f"rank {rank} ended with exit code {process.wait()}; see its error above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def run(args: argparse.Namespace) -> Path:
    """Measure and report; returns the report.

    Raises:
        InputError: no namespaces here, or lengths that do not fit.
        ApbError: a rank failed, or answers differ.
    """
    environment = Environment.read("benchmarks.overlap")
    overrides = [
        f"model={args.model}",
        "method=apb",
        f"method.anchor_len={args.anchor_len}",
        f"method.passing_len={args.passing_len}",
        "allow_beyond_context=true",
        *args.override,
    ]
    compose_config(overrides)
    num_blocks = args.ranks * args.blocks
    if args.tokens < num_blocks:
        raise InputError(f"--tokens {args.tokens} are fewer than the {num_blocks} blocks")
    job = Job(overrides=overrides, dtype=args.dtype, tokens=args.tokens, num_blocks=num_blocks)
    with switch(args.ranks) as network:
        gang = Gang(network, job, ranks=args.ranks, threads=args.threads)
        prefills, exchanges = _measure(gang, network, gbit=args.gbit, repeats=args.repeats)
    settings = {
        **{name: value for name, value in vars(args).items() if name != "out"},
        "link": network.description,
    }
    data = {
        "environment": environment.to_json(),
        "settings": settings,
        "prefills": [asdict(prefill) for prefill in prefills],
        "exchanges": [asdict(exchange) for exchange in exchanges],
    }
    lines = render(prefills, exchanges, environment, settings)
    return write_report(args.out, "overlap", args.model, lines, data, _chart(prefills, args.model))


def _chart(prefills: Sequence[Prefill], model: str) -> Bars:
    groups: dict[str, dict[str, list[float]]] = {}
    for prefill in prefills:
        name = "beside local attention" if prefill.overlap else "in turn"
        groups.setdefault(link_name(prefill.gbit), {}).setdefault(name, []).append(prefill.seconds)
    return Bars(
        title=f"Prefill of {model}, exchange beside local attention or in turn",
        y_label="seconds",
        groups={
            link: {name: Spread.of(values).interval() for name, values in modes.items()}
            for link, modes in groups.items()
        },
    )


def _measure(
    gang: Gang, network: Switch, *, gbit: float, repeats: int
) -> tuple[list[Prefill], list[Exchange]]:
    """All prefills and exchanges; the first prefill of each kind warms up and is left out."""
    prefills, exchanges = [], []
    for repeat in range(-1, repeats):
        # The order turns from repeat to repeat, so that a drift of the machine favours no variant.
        links = (None, gbit) if repeat % 2 else (gbit, None)
        for link in links if repeat >= 0 else (None,):
            network.limit(link)
            for overlap in (True, False) if repeat // 2 % 2 else (False, True):
                answers = gang.ask(op="prefill", overlap=overlap)
                prefill = Prefill(gbit=link, overlap=overlap, repeat=repeat, ranks=answers)
                print(prefill.line(), file=sys.stderr)
                if repeat >= 0:
                    prefills.append(prefill)
            if repeat >= 0:
                before_s = _busy_s()
                answers = gang.ask(op="exchange", repeats=_EXCHANGES)
                busy_s = (_busy_s() - before_s) / _EXCHANGES
                exchanges.append(Exchange(gbit=link, repeat=repeat, ranks=answers, busy_s=busy_s))
    _check_same({prefill.ranks[0]["digest"] for prefill in prefills})
    return prefills, exchanges


def _busy_s() -> float:
    """Processor seconds of this machine since it started, in programs and in the kernel."""
    fields = Path("/proc/stat").read_text().split()[1:9]
    user, nice, system, _, _, irq, softirq, _ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _check_same(digests: set[str]) -> None:
    if len(digests) != 1 or "" in digests:
        raise ApbError(
            f"{len(digests)} different first-token logits with and without overlap: a speed "
            "means nothing while answers depend on it"
        )


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return print_report(lambda: run(_parse(argv)))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
