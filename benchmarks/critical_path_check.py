"""Replayed ranks beside real ones: they have to do the same, and to take as long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from apb.cost import NOMINAL_CPU
from apb.errors import ApbError
from benchmarks.critical_path_ranks import Job, run_gang
from benchmarks.critical_path_runs import VARIANTS, Bench, RankRun, Scene

_GATE_RANKS, _GATE_CONTEXT = 3, 1200
GATE_SCENE = Scene(
    model="tiny",
    layers=2,
    ranks=_GATE_RANKS,
    question_len=8,
    dtype="float32",
    device="cpu",
    overrides=(),
    rates=NOMINAL_CPU,
)


def gate(variants: Sequence[str]) -> str:
    """Compare replayed ranks with real ones on a tiny model; returns what was found equal.

    Raises:
        ApbError: a replayed rank does something else than the real one or than the plan says.
    """
    job = Job(
        scene=GATE_SCENE, variants=variants, context_len=_GATE_CONTEXT, repeats=1, replay=False
    )
    bench = Bench(GATE_SCENE)
    cases = {name: bench.case(VARIANTS[name], _GATE_CONTEXT) for name in variants}
    for real in run_gang(job, threads=1):
        case = cases[real.variant]
        _compare(real, bench.replay(case, real.rank, repeat=0))
        planned = case.method.workload(case.plan, GATE_SCENE.shape, real.rank)
        if (planned.rows, planned.head_pairs) != (real.work.rows, real.work.head_pairs):
            raise ApbError(f"{_who(real)} does {real.work} and its plan says {planned}")
    return (
        f"on a tiny model with {_GATE_CONTEXT} tokens and {_GATE_RANKS} gloo ranks, every replayed "
        "rank had the rows, query-key pairs, exchanges and bytes of the real one under "
        + ", ".join(variants)
    )


def validate(
    scene: Scene, variants: Sequence[str], context_len: int, *, repeats: int
) -> dict[str, list[RankRun]]:
    """The same ranks by gloo with all layers (`real`), replayed one by one (`alone`) and replayed
    side by side (`together`), each with as many threads as this process has.

    Raises:
        ApbError: a replayed rank does something else than the real one.
    """
    threads, bench = torch.get_num_threads(), Bench(scene)
    cases = [bench.case(VARIANTS[name], context_len) for name in variants]
    alone = [
        bench.replay(case, rank, repeat=repeat)
        for repeat in range(-1, repeats)
        for case in cases
        for rank in range(scene.ranks)
    ]
    job = Job(scene=scene, variants=variants, context_len=context_len, repeats=repeats, replay=True)
    whole = replace(scene, layers=scene.shape.num_layers)
    real = run_gang(replace(job, scene=whole, replay=False), threads=threads)
    replayed = {(run.variant, run.rank): run for run in alone}
    for run in real:
        _compare(run, replayed[run.variant, run.rank])
    return {
        "real": real,
        "alone": [run for run in alone if run.repeat >= 0],
        "together": run_gang(job, threads=threads),
    }


def _compare(real: RankRun, replayed: RankRun) -> None:
    if replayed.work != real.work:
        raise ApbError(f"{_who(real)} does {real.work} for real and {replayed.work} in the replay")


def _who(run: RankRun) -> str:
    return f"rank {run.rank} under {run.variant}"
