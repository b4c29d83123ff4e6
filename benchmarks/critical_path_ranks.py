"""Several ranks as processes on the CPU, to compare replayed ranks with: real ones over gloo, or
replayed ones side by side, which share the machine as the real ones do but exchange nothing.

As a module, one rank: reads its job as JSON from stdin and writes its runs to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from apb.comm import Kind, Tag
from apb.cost import Rates
from apb.errors import ApbError
from apb.worker import join_group
from benchmarks.critical_path_runs import VARIANTS, Bench, RankRun, Scene, WorkDone
from benchmarks.environment import ROOT

_TOGETHER = Tag(0, 0, Kind.REPORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every rank of a gang does: `repeats` runs of each variant, after one that warms up."""

    scene: Scene
    variants: Sequence[str]
    context_len: int
    repeats: int
    replay: bool
    """With random messages instead of the other ranks'."""


def run_gang(job: Job, *, threads: int) -> list[RankRun]:
    """The runs of all ranks, each with so many threads.

    Raises:
        ApbError: a rank failed.
    """
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="apb-bench-") as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.critical_path_ranks"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=environment,
                text=True,
            )
            for _ in range(job.scene.ranks)
        ]
        init_method = (Path(folder) / "rendezvous").as_uri()
        requests = [
            json.dumps({"job": asdict(job), "rank": rank, "init_method": init_method})
            for rank in range(job.scene.ranks)
        ]
        outputs = _outputs(processes, requests)
    return [_to_run(fields) for output in outputs for fields in json.loads(output)]


def _outputs(processes: Sequence[subprocess.Popen[str]], requests: Sequence[str]) -> list[str]:
    """What the processes answer; once one has failed, the others are killed."""
    with ThreadPoolExecutor(len(processes)) as pool:
        answers = {
            pool.submit(process.communicate, request): process
            for process, request in zip(processes, requests, strict=True)
        }
        for answer in as_completed(answers):
            if code := answers[answer].returncode:
                for process in processes:
                    process.kill()
                raise ApbError(f"a rank of the benchmark ended with exit code {code}")
    return [answer.result()[0] for answer in answers]


def _to_run(fields: dict[str, Any]) -> RankRun:
    return RankRun(**{**fields, "work": WorkDone(**fields["work"])})


def _to_job(fields: dict[str, Any]) -> Job:
    scene = fields["scene"]
    rates, overrides = Rates(**scene["rates"]), tuple(scene["overrides"])
    return Job(**{**fields, "scene": Scene(**{**scene, "rates": rates, "overrides": overrides})})


def _runs(job: Job, rank: int, init_method: str) -> list[RankRun]:
    """One rank's runs; all ranks start each at the same time."""
    comm, leave = join_group(rank, job.scene.ranks, torch.device("cpu"), init_method=init_method)
    bench, runs = Bench(job.scene), list[RankRun]()
    cases = [bench.case(VARIANTS[name], job.context_len) for name in job.variants]
    for repeat in range(-1, job.repeats):
        for case in cases:
            comm.all_gather_json(None, _TOGETHER)
            if job.replay:
                run = bench.replay(case, rank, repeat=repeat)
            else:
                run = bench.run(case, comm, repeat=repeat)
            if repeat >= 0:
                runs.append(run)
    comm.all_gather_json(None, _TOGETHER)
    leave()
    return runs


def main() -> None:
    request = json.load(sys.stdin)
    runs = _runs(_to_job(request["job"]), request["rank"], request["init_method"])
    json.dump([asdict(run) for run in runs], sys.stdout)


if __name__ == "__main__":
    main()
