"""Several ranks as processes on the CPU, which run for real, over gloo, and are replayed.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apb.comm import Communicator, Kind, Tag
from apb.cost import Rates
from apb.errors import ApbError
from apb.worker import join_group
from benchmarks.critical_path_runs import Bench, Case, RankRun, Way
from benchmarks.critical_path_variants import VARIANTS, Scene
from benchmarks.environment import ROOT

_MEETING = Tag(0, 0, Kind.REPORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every rank of a gang does: `repeats` runs of each variant in each way, alternating."""

    scene: Scene
    variants: Sequence[str]
    ways: Sequence[str]
    """Some of `Way`."""
    context_len: int
    repeats: int
    warm_ups: int


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
    return [RankRun.from_json(fields) for output in outputs for fields in json.loads(output)]


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


def _to_job(fields: dict[str, Any]) -> Job:
    scene = fields["scene"]
    rates, overrides = Rates(**scene["rates"]), tuple(scene["overrides"])
    return Job(**{**fields, "scene": Scene(**{**scene, "rates": rates, "overrides": overrides})})


class _Rank:
    """One rank of a gang."""

    def __init__(self, job: Job, comm: Communicator) -> None:
        self._job, self._comm = job, comm
        self._bench = Bench(job.scene)
        self._whole = Bench(replace(job.scene, layers=job.scene.shape.num_layers))

    def runs(self) -> list[RankRun]:
        """All that count."""
        job, runs = self._job, list[RankRun]()
        cases = [self._bench.case(VARIANTS[name], job.context_len) for name in job.variants]
        for repeat in range(-job.warm_ups, job.repeats):
            for case in cases:
                runs += [self._run(case, Way(way), repeat) for way in job.ways]
        self._meet()
        return [run for run in runs if run.repeat >= 0]

    def _run(self, case: Case, way: Way, repeat: int) -> RankRun:
        self._meet()
        rank = self._comm.rank
        if way is Way.real:
            return self._whole.run(case, self._comm, repeat=repeat)
        if way is Way.together:
            return self._bench.replay(case, rank, way=way, repeat=repeat)
        for _ in range(rank):
            self._meet()
        run = self._bench.replay(case, rank, way=way, repeat=repeat)
        for _ in range(rank, self._comm.world_size):
            self._meet()
        return run

    def _meet(self) -> None:
        """Wait until all ranks are here."""
        self._comm.all_gather_json(None, _MEETING)


def main() -> None:
    request = json.load(sys.stdin)
    job = _to_job(request["job"])
    comm, leave = join_group(
        request["rank"], job.scene.ranks, torch.device("cpu"), init_method=request["init_method"]
    )
    runs = _Rank(job, comm).runs()
    leave()
    json.dump([run.to_json() for run in runs], sys.stdout)


if __name__ == "__main__":
    main()
