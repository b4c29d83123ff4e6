"""The slowest rank of a distributed prefill, on one device: ``python -m benchmarks.critical_path``.

Every rank is run on its own, through the real engine, with random tensors in place of what other
ranks would send. Its seconds are those of the machine at hand; transfers are modelled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from apb.calibration import known_rates
from apb.cost import Rates
from apb.errors import ApbError, InputError
from apb.hf.model import DTYPES
from apb.metrics import threads_per_rank
from apb.report import rank_layout
from apb.worker import choose_device
from benchmarks.critical_path_check import gate, validate
from benchmarks.critical_path_report import (
    MAX_DEVIATION,
    chart,
    deviations,
    render,
    render_validation,
)
from benchmarks.critical_path_runs import Bench, Case, RankRun
from benchmarks.critical_path_variants import SHAPES, VARIANTS, Scene
from benchmarks.environment import REPORTS, Environment
from benchmarks.report import print_report, write_report

_VALIDATION = {"model": "smollm2-135m", "context": [8192], "ranks": 2, "methods": ["apb"]}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.critical_path", description=__doc__)
    parser.add_argument("--model", default="llama3-8b", choices=SHAPES, help="whose shape")
    parser.add_argument("--layers", type=int, default=2, help="how many of its layers are run")
    parser.add_argument("--context", type=int, nargs="+", default=[131072])
    parser.add_argument("--question", type=int, default=32, help="tokens that steer the anchor")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument(
        "--only-ranks",
        nargs="+",
        default=["slowest"],
        help="ranks to run; `all`; or `slowest`, the slowest by prediction, the first and the last",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1, help="runs before those that count")
    parser.add_argument("--link-gbit", type=float, help="to and from a rank; as calibrated")
    parser.add_argument("--latency-us", type=float, help="of an exchange; as calibrated")
    parser.add_argument(
        "--validate", action="store_true", help="compare replayed ranks with real ones on the CPU"
    )
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument(
        "--override", action="append", default=[], help="for all variants, as backend=reference"
    )
    if parser.parse_args(argv).validate:
        parser.set_defaults(**_VALIDATION, device="cpu")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Check, then measure context by context and report after each; returns the report.

    Raises:
        ApbError: a setting does not fit, or a replayed rank differs from a real one.
    """
    environment = Environment.read("benchmarks.critical_path")
    scene = _scene(args, choose_device(args.device, 0))
    print(found := gate(args.methods), file=sys.stderr)
    settings = {**_settings(args), "gate": found}
    bench, runs, plans = Bench(scene), list[RankRun](), list[dict[str, Any]]()
    path: Path = args.out
    for context_len in args.context:
        cases = [bench.case(VARIANTS[name], context_len) for name in args.methods]
        plans += [_plan(case) for case in cases]
        for repeat in range(-args.warm_ups, args.repeats):
            for case in cases:
                for rank in _ranks(args.only_ranks, case):
                    measured = bench.replay(case, rank, repeat=repeat)
                    if repeat >= 0:
                        runs.append(measured)
                        print(_line(measured), file=sys.stderr)
        bench.messages.clear()
        lines = render(runs, environment, scene, settings)
        data = _data(environment, scene, settings, plans=plans, runs=_rows(runs))
        path = write_report(args.out, "critical-path", scene.model, lines, data, chart(runs))
    return path


def run_validation(args: argparse.Namespace) -> Path:
    """Compare and report; returns the report.

    Raises:
        ApbError: the slowest rank's replay takes longer or shorter than the real one.
    """
    environment = Environment.read("benchmarks.critical_path")
    torch.set_num_threads(threads_per_rank(args.ranks))
    scene = _scene(args, torch.device("cpu"))
    settings = _settings(args)
    runs = validate(
        scene, args.methods, args.context[0], repeats=args.repeats, warm_ups=args.warm_ups
    )
    lines = render_validation(runs, environment, scene, settings)
    data = _data(environment, scene, settings, runs=_rows(runs))
    path = write_report(args.out, "critical-path-validation", scene.model, lines, data)
    outside = {
        name: ratio for name, ratio in deviations(runs).items() if abs(ratio - 1) > MAX_DEVIATION
    }
    if outside:
        found = ", ".join(f"{ratio:.2f} under {name}" for name, ratio in outside.items())
        raise ApbError(f"seconds of the slowest rank, replayed over real: {found}; see {path}")
    return path


def _scene(args: argparse.Namespace, device: torch.device) -> Scene:
    shape = SHAPES[args.model]
    if args.layers < 2:
        raise InputError(f"--layers {args.layers}: a layer's time takes at least two layers")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return Scene(
        model=args.model,
        layers=min(args.layers, shape.num_layers),
        ranks=args.ranks,
        question_len=args.question,
        dtype=dtype,
        device=str(device),
        overrides=tuple(args.override),
        rates=_rates(args, device, DTYPES[dtype]),
    )


def _rates(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Rates:
    """The machine's rates, with the link asked for."""
    rates = known_rates(device, dtype)
    if args.link_gbit is not None:
        rates = replace(rates, link_bytes=args.link_gbit * 1e9 / 8)
    if args.latency_us is not None:
        rates = replace(rates, latency_s=args.latency_us / 1e6)
    return rates


def _ranks(wanted: Sequence[str], case: Case) -> list[int]:
    """The ranks to run.

    Raises:
        InputError: no such rank.
    """
    world_size = len(case.predicted_s)
    known = {
        "slowest": case.ranks_worth_running(),
        "all": [*range(world_size)],
        **{str(rank): [rank] for rank in range(world_size)},
    }
    unknown = [word for word in wanted if word not in known]
    if unknown:
        raise InputError(
            f"--only-ranks {unknown[0]}: give numbers below {world_size}, `all` or `slowest`"
        )
    return sorted({rank for word in wanted for rank in known[word]})


def _line(run: RankRun) -> str:
    return (
        f"{run.variant:>9} {run.context_len:>7} rank {run.rank} #{run.repeat}  "
        f"{run.total_s:.3f} s  "
        + " ".join(f"{name} {seconds:.3f}" for name, seconds in run.phases_s.items())
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    named = {name: value for name, value in vars(args).items() if name != "out"}
    return {**named, "threads": torch.get_num_threads()}


def _plan(case: Case) -> dict[str, Any]:
    """What the ranks were to do."""
    plan = case.plan
    return {
        "variant": case.variant.name,
        "context_len": plan.layout.context_len,
        "anchor_len": len(plan.anchor),
        "passing_lens": plan.passing_lens,
        "layout": [asdict(rank_layout(plan, rank)) for rank in range(plan.layout.world_size)],
        "predicted_s": case.predicted_s,
        "notes": plan.notes,
    }


def _rows(runs: Sequence[RankRun]) -> list[dict[str, Any]]:
    return [{**run.to_json(), "total_s": run.total_s} for run in runs]


def _data(
    environment: Environment, scene: Scene, settings: Mapping[str, Any], **measured: Any
) -> dict[str, Any]:
    return {
        "environment": environment.to_json(),
        "scene": asdict(scene),
        "settings": settings,
        **measured,
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run_validation(args) if args.validate else run(args))


if __name__ == "__main__":
    sys.exit(main())
