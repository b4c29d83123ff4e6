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


_WIDE = {
    # fp32 keys take twice the registers, and products of three tf32 parts more still.
    "segment": {64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
    "decode": {64: (16, 32, 4, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 1)},
}
_NARROW = {
    80: {
        "segment": {64: (128, 64, 8, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
        "decode": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    },
    86: {  # 99 KiB of shared memory instead of 163, as 89
        "segment": {64: (128, 64, 8, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "decode": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    },
    90: {
        "segment": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
        "decode": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
    },
    100: {
        "segment": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "decode": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
    },
    120: {  # 99 KiB again
        "segment": {64: (128, 64, 8, 2), 128: (64, 32, 4, 2), 256: (32, 16, 8, 2)},
        "decode": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 16, 4, 2)},
    },
}
"""Rows, keys, warps, stages by kernel and largest head size; 16-bit ones by compute capability."""


def default_config(kernel: str, capability: int, itemsize: int, head_dim: int) -> TileConfig:
    """What is shipped for a GPU that nobody has tuned: what compiles without spills."""
    sizes = _WIDE[kernel]
    if itemsize == 2:
        generation = max(known for known in _NARROW if known <= max(capability, 80))
        sizes = _NARROW[generation][kernel]
    rows, keys, warps, stages = sizes[min(size for size in sizes if head_dim <= size)]
    tma = capability >= 90 and itemsize == 2
    return TileConfig(rows=rows, keys=keys, warps=warps, stages=stages, tma=tma)


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
