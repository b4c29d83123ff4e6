"""Measure tile sizes on this machine's GPU: ``python -m apb_kernels.tune``.

Writes the fastest of each kernel, dtype and head size into the table that ships with the package,
under the GPU's name. Nothing is tuned while a user waits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from apb_kernels.decode_attention import decode_attention
from apb_kernels.segment_attention import Partial, segment_attention
from apb_kernels.tiles import TUNED, TileConfig, default_config, table_key, tuned_table

_KV_HEADS, _GROUP_SIZE = 8, 4
_LOCAL, _UPSTREAM = 16384, 12288
_SHARD, _NEW_ROWS = 65536, 32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Segment(NamedTuple):
    """One of `apb_kernels.segments.KeySegment`."""

    start: int
    stop: int
    k_KSD: Tensor
    v_KSD: Tensor
    causal: bool


def candidates(kernel: str, capability: int, dtype: torch.dtype) -> Iterator[TileConfig]:
    """Tile sizes worth trying; those that do not fit are left out when they fail to compile."""
    rows = (16, 32, 64, 128) if kernel == "decode" else (64, 128, 256)
    keys = (32, 64, 128)
    tma = (False, True) if capability >= 90 else (False,)
    for m, n, warps, stages, descriptors in product(rows, keys, (4, 8), (2, 3, 4), tma):
        if dtype is not torch.float32 or m * n <= 64 * 64:
            yield TileConfig(rows=m, keys=n, warps=warps, stages=stages, tma=descriptors)


def workload(kernel: str, dtype: torch.dtype, head_dim: int) -> Callable[[TileConfig], Partial]:
    """What is timed: a block with upstream keys, or 128 packed rows over a long shard."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, head_dim, device="cuda", dtype=dtype)

    scale = head_dim**-0.5
    heads = _KV_HEADS * _GROUP_SIZE
    if kernel == "decode":
        q_HTD, kv = draw(heads, _NEW_ROWS), draw(2, _KV_HEADS, _SHARD)
        length = torch.tensor([_SHARD], dtype=torch.int32, device="cuda")
        return lambda config: decode_attention(
            q_HTD, kv[0], kv[1], length, scale=scale, config=config
        )
    q_HTD = draw(heads, _LOCAL)
    local, upstream = draw(2, _KV_HEADS, _LOCAL), draw(2, _KV_HEADS, _UPSTREAM)
    segments = [
        Segment(0, _LOCAL, local[0], local[1], True),
        Segment(0, _LOCAL, upstream[0], upstream[1], False),
    ]
    return lambda config: segment_attention(q_HTD, segments, scale=scale, config=config)


def _agree(found: Partial, expected: Partial) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(x.float(), y.float(), atol=2e-2, rtol=2e-2) for x, y in pairs)


def fastest(kernel: str, dtype: torch.dtype, head_dim: int) -> TileConfig:
    """Time every candidate and print it."""
    major, minor = torch.cuda.get_device_capability()
    capability = major * 10 + minor
    run = workload(kernel, dtype, head_dim)
    default = default_config(kernel, capability, dtype.itemsize, head_dim)
    expected = run(default)
    found: list[tuple[float, TileConfig]] = []
    for config in dict.fromkeys([default, *candidates(kernel, capability, dtype)]):
        try:
            milliseconds = do_bench(lambda config=config: run(config), warmup=10, rep=60)
            if not _agree(run(config), expected):
                print(f"  {config}: another result than the default's")
                continue
        except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:
            print(f"  {config}: {type(error).__name__}")
            continue
        found.append((milliseconds, config))
        print(f"  {milliseconds:9.3f} ms {config}")
    best_ms, best = min(found, key=lambda pair: pair[0])
    print(f"{table_key(kernel, dtype, head_dim)}: {best_ms:.3f} ms with {best}")
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kernels = ("segment", "decode")
    parser.add_argument("--kernels", nargs="+", default=kernels, choices=kernels)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--out", type=Path, default=TUNED)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning needs a GPU", file=sys.stderr)
        return 2
    table = {name: dict(entries) for name, entries in tuned_table().items()}
    entries = table.setdefault(torch.cuda.get_device_name(), {})
    for kernel, dtype, head_dim in product(args.kernels, args.dtypes, args.head_dims):
        best = fastest(kernel, DTYPES[dtype], head_dim)
        entries[table_key(kernel, DTYPES[dtype], head_dim)] = best.to_json()
        # After each, so that a run that is cut short keeps what it found.
        args.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
