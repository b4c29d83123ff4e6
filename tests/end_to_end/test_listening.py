"""Ranks of one machine listen on its loopback device and nowhere else, whoever starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from apb import LLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the loopback device has its name")
SCRIPT = """
import json, os, psutil
from apb import LLM
with LLM("tiny") as llm:
    found = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    path = f"rank{os.environ['RANK']}.json"
    open(path, "w").write(json.dumps(found))
"""


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


def test_torchrun_ranks_of_one_machine_listen_on_loopback(tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "ask.py"]
    subprocess.run(torchrun, cwd=tmp_path, check=True, timeout=110)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found
        assert set(found) == {"127.0.0.1"}
