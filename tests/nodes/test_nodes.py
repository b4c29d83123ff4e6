"""Several machines: the tokens of one process, over any wire, and an error when the wire is cut.

``make nodes``; the machines are network namespaces of this one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from apb.paths import model_home
from nodes.network import ADDRESSES, DEVICE, ROOT, Nodes, why_not

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]
RUN = [sys.executable, "-m", "apb.run"]
SETTINGS = [
    *("prompt.context_len=3000", "decode.max_tokens=8", "decode.ignore_eos=true", "num_blocks=4"),
    *("method.layout=even", "dtype=float32", "device=cpu"),
]
TINY = ["+model=tiny", *SETTINGS]
DEMO = ["+model=smollm2-135m", *SETTINGS]
LONG = [
    *("+model=tiny", "model.architecture.num_hidden_layers=200", "prompt.context_len=6000"),
    *("device=cpu", "dtype=float32", "drafter=none"),
]
"""Some seconds of prefill, and 40 MB from node to node."""
_RAY_PORT = 6379
_START_S = 240.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if reason := why_not():
        pytest.skip(reason)
    nodes = Nodes()
    yield nodes
    nodes.close()


@cache
def expected(*settings: str) -> list[int]:
    """What one process answers."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*RUN, *settings, "world_size=1", "output=one.json"]
        subprocess.run(command, cwd=folder, check=True, timeout=300)
        token_ids: list[int] = answer(Path(folder) / "one.json")["token_ids"]
        return token_ids


def answer(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def output_of(process: subprocess.Popen[str], timeout: float = 300) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"no end after {timeout} s: {process.communicate()[0]}")


class Torchrun:
    """Two ranks on each node, by `launch/torchrun_nodes.sh`."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def start(self, folder: Path, *settings: str) -> subprocess.Popen[str]:
        """The run; what is returned is node 0's part, with rank 0."""
        shared = {"NNODES": "2", "NPROC": "2", "MASTER_ADDR": ADDRESSES[0]}
        shared["GLOO_SOCKET_IFNAME"] = DEVICE  # the nodes' host name leads nowhere
        shared["PATH"] = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin"
        command = ["bash", str(ROOT / "launch/torchrun_nodes.sh"), *settings]
        second, first = (
            self._nodes.start(node, command, folder, {**shared, "NODE_RANK": str(node)})
            for node in (1, 0)
        )
        assert second.stdout is not None
        second.stdout.close()
        return first

    def close(self) -> None:
        self._nodes.clear()


class RayCluster:
    """A head on node 0, which runs the driver, and a worker on node 1."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._folder = Path(tempfile.mkdtemp(prefix="apb-ray-", dir="/tmp"))  # short, for sockets
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
        shared = [
            *("--block", "--disable-usage-stats", "--num-cpus=2", "--num-gpus=0"),
            *("--object-store-memory=80000000", "--include-dashboard=false"),
        ]
        head = ["--head", f"--port={_RAY_PORT}", f"--temp-dir={self._folder}"]
        worker = [f"--address={ADDRESSES[0]}:{_RAY_PORT}"]
        for node, options in ((0, head), (1, worker)):
            command = [str(Path(sys.executable).parent / "ray"), "start", *options, *shared]
            if node:
                command.remove("--include-dashboard=false")
            command.append(f"--node-ip-address={ADDRESSES[node]}")
            process = nodes.start(node, command, self._folder, self.environment)
            self._wait(process)

    def _wait(self, process: subprocess.Popen[str]) -> None:
        """Until a node says that it runs."""
        lines, give_up = [], time.monotonic() + _START_S
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                return
            assert time.monotonic() < give_up
        pytest.fail("".join(lines))

    def start(self, folder: Path, *settings: str) -> subprocess.Popen[str]:
        cluster = [f"launcher.address={ADDRESSES[0]}:{_RAY_PORT}", "launcher=ray", "world_size=4"]
        return self._nodes.start(0, [*RUN, *settings, *cluster], folder, self.environment)

    def close(self) -> None:
        self._nodes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


Gang = Torchrun | RayCluster


@pytest.fixture(scope="module", params=[Torchrun, RayCluster], ids=["torchrun", "ray"])
def gang(request: pytest.FixtureRequest, nodes: Nodes) -> Iterator[Gang]:
    if request.param is RayCluster:
        pytest.importorskip("ray", reason="needs ray")
    nodes.mend()
    gang = request.param(nodes)
    yield gang
    gang.close()


def check(gang: Gang, folder: Path, settings: list[str]) -> None:
    process = gang.start(folder, *settings, "output=nodes.json")
    text = output_of(process)
    assert process.returncode == 0, text
    result = answer(folder / "nodes.json")
    assert result["token_ids"] == expected(*settings)
    assert len(result["token_ids"]) == 8
    assert [len(rank["blocks"]) for rank in result["metrics"]["layout"]] == [1] * 4


WIRES: dict[str, Callable[[Nodes], None]] = {
    "fast": lambda nodes: None,
    "100 Mbit/s": lambda nodes: nodes.limit(100),
    "50 ms there and back": lambda nodes: setattr(nodes, "delay_s", 0.025),
    "1 % loss": lambda nodes: setattr(nodes, "loss", 0.01),
}


@pytest.mark.parametrize("wire", WIRES)
def test_two_nodes_give_the_tokens_of_one_process(
    nodes: Nodes, gang: Gang, wire: str, tmp_path: Path
) -> None:
    nodes.mend()
    WIRES[wire](nodes)
    before = nodes.bytes_carried
    check(gang, tmp_path, TINY)
    assert nodes.bytes_carried - before > 200_000  # passing KV did cross


@pytest.mark.model
@pytest.mark.skipif(not (model_home() / "smollm2-135m").is_dir(), reason="needs `make model`")
def test_two_nodes_give_the_demo_models_tokens(nodes: Nodes, gang: Gang, tmp_path: Path) -> None:
    nodes.mend()
    check(gang, tmp_path, DEMO)


def test_a_wire_cut_in_the_middle_of_a_prefill_is_an_error_that_names_the_other_node(
    nodes: Nodes, gang: Gang, tmp_path: Path
) -> None:
    """Last of all, as a cluster does not survive it."""
    nodes.mend()
    before = nodes.bytes_carried
    process = gang.start(tmp_path, *LONG)
    give_up = time.monotonic() + _START_S
    while nodes.bytes_carried - before < 12e6:  # a third of what the layers exchange
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.01)
    nodes.is_cut = True
    cut = time.monotonic()
    text = output_of(process, timeout=150)
    took = time.monotonic() - cut
    assert process.returncode == 1, text
    (said,) = [line for line in text.splitlines() if line.startswith("apb: ")]
    print(said, f"({took:.0f} s after the cut)")  # noqa: T201
    assert re.match(r"apb: rank [23] on ", said), text
    assert "has not been heard of for" in said
    assert took < 60, text
    if isinstance(gang, Torchrun):  # the other node has lost the store
        while nodes.processes():
            assert time.monotonic() - cut < 120
            time.sleep(0.5)
