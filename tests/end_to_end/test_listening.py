"""Ranks of one machine listen on its loopback device and nowhere else, whoever starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from apb import LLM
from apb.launchers.processes import start_rank
from apb.listening import listen_on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the loopback device has its name")
SCRIPT = """
import json, os, psutil
from apb import LLM
with LLM("tiny") as llm:
    found = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    path = f"rank{os.environ['RANK']}.json"
    open(path, "w").write(json.dumps([found, os.environ["NCCL_SOCKET_IFNAME"]]))
"""


def test_an_interface_that_the_user_names_is_kept() -> None:
    environment = {"NCCL_SOCKET_IFNAME": "eth1"}
    listen_on("lo", environment)
    assert environment == {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "lo"}


def test_local_ranks_listen_on_loopback() -> None:
    before = set(psutil.Process().children(recursive=True))
    with LLM("tiny", world_size=2):
        ranks = set(psutil.Process().children(recursive=True)) - before
        found = [
            connection.laddr.ip
            for rank in ranks
            for connection in rank.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
    assert len(found) >= 2
    assert set(found) == {"127.0.0.1"}


def test_local_ranks_are_told_to_use_loopback_whatever_their_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[dict[str, str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: told.append(env))
    start_rank(0, 2, 0).connection.close()
    assert told[0]["GLOO_SOCKET_IFNAME"] == "lo"
    assert told[0]["NCCL_SOCKET_IFNAME"] == "=lo", "which NCCL avoids unless told"


def test_torchrun_ranks_of_one_machine_listen_on_loopback(tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "ask.py"]
    subprocess.run(torchrun, cwd=tmp_path, check=True, timeout=110)
    for rank in range(2):
        found, of_nccl = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert of_nccl == "=lo"
        assert found
        assert set(found) == {"127.0.0.1"}
