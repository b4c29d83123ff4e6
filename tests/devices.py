"""Where kernels are tested: interpreted on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import pytest

at_home = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
