"""The files in `launch/`: they parse, say what schedulers need, and start commands that compose.

Scripts run against stand-ins for torchrun and Slurm that print how they were called.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from apb.batch.__main__ import _parse
from apb.config import compose_config, normalised
from apb.launcher_config import RayLauncherConfig

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
SLURM = {
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "4242",
    "SLURM_CPUS_PER_TASK": "64",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}
STAND_INS = {
    "torchrun": 'printf "%s\\n" "$@"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'printf "10.0.0.1\\n10.0.0.2\\n"',
}


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def torchrun_words(
    stand_ins: Path, script: str, environment: Mapping[str, str], *arguments: str
) -> list[str]:
    """What torchrun is called with by a script, whose arguments follow."""
    done = subprocess.run(
        ["bash", "-c", script, "script", *arguments],
        env={"PATH": f"{stand_ins}:{os.environ['PATH']}", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def options(words: list[str]) -> dict[str, str]:
    """torchrun's own options, up to the module."""
    own = words[: words.index("-m")]
    pairs = [word.split("=", 1) if "=" in word else [word] for word in own]
    flat = [part for pair in pairs for part in pair]
    return {
        word: flat[idx + 1] if idx + 1 < len(flat) else ""
        for idx, word in enumerate(flat)
        if word.startswith("--")
    }


SCRIPTS = [("torchrun.sh", {}), ("torchrun_nodes.sh", NODES), ("slurm.sbatch", SLURM)]


@pytest.mark.parametrize(("name", "environment"), SCRIPTS)
def test_a_script_passes_settings_on_to_the_letter(
    stand_ins: Path, name: str, environment: dict[str, str]
) -> None:
    given = ["+model=tiny", "prompt=text", "prompt.query=Who signed it, and why?", "num_blocks=4"]
    words = torchrun_words(stand_ins, f'exec launch/{name} "$@"', environment, *given)
    assert words[words.index("-m") + 1 :] == ["apb.run", *given]
    assert compose_config(words[words.index("-m") + 2 :]).num_blocks == 4


@pytest.mark.parametrize(("name", "environment"), SCRIPTS)
def test_without_settings_a_script_runs_what_composes(
    stand_ins: Path, name: str, environment: dict[str, str]
) -> None:
    words = torchrun_words(stand_ins, f"exec launch/{name}", environment)
    assert compose_config(words[words.index("-m") + 2 :]).model.name == "llama3-8b"


@pytest.mark.parametrize(("name", "environment"), SCRIPTS)
def test_a_batch_starts_the_same_way(
    stand_ins: Path, name: str, environment: dict[str, str]
) -> None:
    words = torchrun_words(stand_ins, f"exec launch/{name}", {**environment, "MODULE": "apb.batch"})
    assert words[words.index("-m") + 1] == "apb.batch"


def test_every_machine_is_told_where_rank_0_is_and_which_it_is_itself(stand_ins: Path) -> None:
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for script, environment, ranks in (
        ("exec launch/torchrun_nodes.sh", {**NODES, "NPROC": "8"}, "8"),
        ("exec launch/slurm.sbatch", SLURM, "8"),
        (sky["run"], SKYPILOT, "8"),
    ):
        words = torchrun_words(stand_ins, script, environment)
        given = options(words)
        assert given["--nnodes"] == "2"
        assert given["--node-rank"] == "1"
        assert given["--master-addr"] == "10.0.0.1"
        assert 1024 < int(given["--master-port"]) < 32768
        assert given["--nproc-per-node"] == ranks
        compose_config(words[words.index("-m") + 2 :])


def test_srun_is_told_of_the_cores_that_it_does_not_take_over(stand_ins: Path) -> None:
    (stand_ins / "srun").write_text('#!/usr/bin/env bash\necho "${SRUN_CPUS_PER_TASK:-none}"\n')
    assert torchrun_words(stand_ins, "exec launch/slurm.sbatch", SLURM) == ["64"]
    unasked = {name: value for name, value in SLURM.items() if name != "SLURM_CPUS_PER_TASK"}
    assert torchrun_words(stand_ins, "exec launch/slurm.sbatch", unasked) == ["none"]


def test_a_multi_node_script_says_what_is_missing(stand_ins: Path) -> None:
    done = subprocess.run(
        ["bash", "launch/torchrun_nodes.sh"], cwd=ROOT, capture_output=True, text=True, env=NODES
    )
    assert done.returncode != 0  # without PATH there is no torchrun
    partial = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "NNODES": "2", "NODE_RANK": "0"}
    done = subprocess.run(
        ["bash", "launch/torchrun_nodes.sh"], cwd=ROOT, capture_output=True, text=True, env=partial
    )
    assert done.returncode != 0
    assert "MASTER_ADDR: address of machine 0" in done.stderr


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert "set -euo pipefail" in path.read_text().splitlines()
    assert os.access(path, os.X_OK)


def test_sbatch_asks_for_one_task_per_node_before_any_command() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    headers = [line for line in lines if line.startswith("#SBATCH ")]
    asked = {name: value for name, _, value in (line[10:].partition("=") for line in headers)}
    assert asked["ntasks-per-node"] == "1"
    assert {"nodes", "gpus-per-node", "time", "output"} <= asked.keys()
    first_command = next(idx for idx, line in enumerate(lines) if line and line[0] != "#")
    assert all(lines.index(header) < first_command for header in headers)  # Slurm reads no further


def ray_job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    return job


def test_the_ray_job_starts_a_batch_that_composes() -> None:
    words = shlex.split(ray_job()["spec"]["entrypoint"])
    assert words[:2] == ["python", "launch/ray_job.py"]
    values, overrides = _parse(["launcher=ray", *words[2:]])
    config = compose_config(normalised(overrides))
    assert isinstance(config.launcher, RayLauncherConfig)
    assert values["question"] == "Who signed it?"
    spec = ray_job()["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert config.world_size == group["replicas"] * int(
        worker["resources"]["limits"]["nvidia.com/gpu"]
    )


def test_the_ray_cluster_wants_a_token_and_goes_away_with_the_job() -> None:
    job = ray_job()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    pins = (ROOT / ".ci/constraints.txt").read_text().split()
    assert f"ray=={cluster['rayVersion']}" in pins
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}
        # Both need the same apb; the documents and the output have to be on both.
        assert spec["containers"][0]["image"].endswith(":0.1.0")
        assert "data" in mounts


def dockerfile() -> list[tuple[str, str]]:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_pinned_unprivileged_and_without_secrets() -> None:
    steps = dockerfile()
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in steps} <= known
    (base,) = (rest for word, rest in steps if word == "FROM")
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base)  # a version, not `latest`
    users = [rest for word, rest in steps if word == "USER"]
    assert users == ["apb"]
    assert any("useradd" in rest and rest.endswith(users[0]) for _, rest in steps)
    last_run = max(idx for idx, (word, _) in enumerate(steps) if word == "RUN")
    assert steps.index(("USER", "apb")) > last_run
    (folder,) = (rest for word, rest in steps if word == "WORKDIR")
    owned = steps.index(("RUN", f"chown {users[0]} ."))  # runs write to where they start
    assert steps.index(("WORKDIR", folder)) < owned
    assert not any(re.search("token|secret|password|key=", rest, re.I) for _, rest in steps)
    for _, rest in steps:
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
        if "pip install" in rest:
            assert "--no-cache-dir" in rest
            assert "-c .ci/constraints.txt" in rest


def test_the_image_gets_files_that_exist_and_are_not_ignored() -> None:
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = [shlex.split(rest)[:-1] for word, rest in dockerfile() if word == "COPY"]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored
    (command,) = (rest for word, rest in dockerfile() if word == "CMD")
    words = yaml.safe_load(command)
    assert words[:3] == ["python", "-m", "apb.run"]
    compose_config(words[3:])
