"""Guarantees of the shipped tile sizes, which need no GPU: nothing spills, everything fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = """
import json, sys
from apb_kernels.compiled import build_all, shipped
every = shipped(capabilities=[int(sys.argv[1])], dtypes=["bf16", "fp32"], head_dims=[64, 128, 256])
builds = [build for build in every if (build.dtype, build.head_dim) != ("fp32", 256)]
print(json.dumps([(*build, *used) for build, used in zip(builds, build_all(builds, processes=2))]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("capability", "shared_limit"),
    [
        (80, 163 * 1024),
        pytest.param(86, 99 * 1024, marks=pytest.mark.long),
        (90, 227 * 1024),
        (100, 227 * 1024),
        pytest.param(120, 99 * 1024, marks=pytest.mark.long),
    ],
)
def test_no_kernel_spills_and_all_fit(capability: int, shared_limit: int) -> None:
    """In a process of its own: here, the kernels are interpreted.

    fp32 heads of 256 are left out: no tile is small enough for them (kernels/README.md).
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    for kernel, _, dtype, head_dim, _, spilled, shared, wgmma, tma, async_copies in found:
        assert spilled == 0, (kernel, dtype, head_dim)
        assert shared <= shared_limit, (kernel, dtype, head_dim)
        if dtype == "bf16":
            assert async_copies, (kernel, head_dim)
            assert tma == (capability >= 90), (kernel, head_dim)
            assert wgmma == (capability == 90), (kernel, head_dim)
