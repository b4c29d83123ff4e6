"""Tile sizes: measured ones for GPUs that were tuned, conservative ones for all others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).with_name("tuned.json")
"""By GPU name, then kernel and shape as `table_key` writes them. `python -m apb_kernels.tune`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """How a kernel is cut up."""

    rows: int
    """Packed query rows of a program (see `apb_kernels.segments`)."""
    keys: int
    """Keys of one step of its loop."""
    warps: int
    stages: int
    """Steps whose loads are under way at once."""
    tma: bool = False
    """Load keys and values through tensor descriptors (Hopper and later)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_config(kernel: str, capability: int, itemsize: int, head_dim: int) -> TileConfig:
    """What is shipped for a GPU that nobody has tuned: compiled without spills (see `compile`)."""
    wide = head_dim > 128
    if kernel == "decode":
        rows = 16 if itemsize == 4 else 64
        return TileConfig(rows=rows, keys=32 if wide or itemsize == 4 else 64, warps=4, stages=2)
    if itemsize == 4:
        return TileConfig(rows=32, keys=32, warps=4 if not wide else 8, stages=1)
    if capability >= 90:
        return TileConfig(rows=128, keys=64 if wide else 128, warps=8, stages=2, tma=True)
    return TileConfig(rows=128, keys=32 if wide else 64, warps=8, stages=2)


def table_key(kernel: str, dtype: torch.dtype, head_dim: int) -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')} {head_dim}"


@cache
def tuned_table() -> dict[str, dict[str, dict[str, Any]]]:
    table: dict[str, dict[str, dict[str, Any]]] = json.loads(TUNED.read_text())
    return table


def tile_config(kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> TileConfig:
    """The measured configuration for this GPU, or the default one."""
    if device.type != "cuda":
        return TileConfig(rows=32, keys=32, warps=4, stages=1)
    name = torch.cuda.get_device_name(device)
    measured = tuned_table().get(name, {}).get(table_key(kernel, dtype, head_dim))
    if measured is not None:
        return TileConfig(**measured)
    major, minor = torch.cuda.get_device_capability(device)
    return default_config(kernel, major * 10 + minor, dtype.itemsize, head_dim)
