"""Replayed ranks beside real ones: they have to do the same, and to take as long."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apb.cost import NOMINAL_CPU
from apb.errors import ApbError
from benchmarks.critical_path_ranks import Job, run_gang
from benchmarks.critical_path_runs import Bench, RankRun, Way
from benchmarks.critical_path_variants import VARIANTS, Scene

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
        scene=GATE_SCENE,
        variants=variants,
        ways=[Way.real.value, Way.alone.value],
        context_len=_GATE_CONTEXT,
        repeats=1,
        warm_ups=0,
    )
    bench = Bench(GATE_SCENE)
    cases = {name: bench.case(VARIANTS[name], _GATE_CONTEXT) for name in variants}
    runs = run_gang(job, threads=1)
    _check_same_work(runs)
    for run in runs:
        case = cases[run.variant]
        planned = case.method.workload(case.plan, GATE_SCENE.shape, run.rank)
        if (planned.rows, planned.head_pairs) != (run.work.rows, run.work.head_pairs):
            raise ApbError(f"{_who(run)} does {run.work} and its plan says {planned}")
    return (
        f"on a tiny model with {_GATE_CONTEXT} tokens and {_GATE_RANKS} gloo ranks, every replayed "
        "rank had the rows, query-key pairs, exchanges and bytes of the real one under "
        + ", ".join(variants)
    )


def validate(
    scene: Scene, variants: Sequence[str], context_len: int, *, repeats: int, warm_ups: int
) -> list[RankRun]:
    """All ranks in all ways, each with as many threads as this process has.

    Raises:
        ApbError: a replayed rank does something else than the real one.
    """
    job = Job(
        scene=scene,
        variants=variants,
        ways=[way.value for way in Way],
        context_len=context_len,
        repeats=repeats,
        warm_ups=warm_ups,
    )
    runs = run_gang(job, threads=torch.get_num_threads())
    _check_same_work(runs)
    return runs


def _check_same_work(runs: Sequence[RankRun]) -> None:
    """Whatever the way, a variant's rank has to do the same."""
    real = {(run.variant, run.rank): run.work for run in runs if run.way is Way.real}
    for run in runs:
        if run.work != (work := real[run.variant, run.rank]):
            raise ApbError(f"{_who(run)} does {work} for real and {run.work} in the replay")


def _who(run: RankRun) -> str:
    return f"rank {run.rank} under {run.variant}"
