"""Measure tile sizes on this machine's GPU: ``python -m apb_kernels.tune``.

Writes the fastest of each kernel, dtype and head size into the table that ships with the package,
under the GPU's name. Nothing is tuned while a user waits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
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

_GROUP_SIZE, _NEW_ROWS = 4, 32
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


class Sizes(NamedTuple):
    """Of a block with upstream keys, or of a shard that 128 packed rows attend to."""

    kv_heads: int
    local: int
    upstream: int
    shard: int


TIMED = Sizes(kv_heads=8, local=16384, upstream=12288, shard=65536)
CHECKED = Sizes(kv_heads=2, local=333, upstream=277, shard=777)
"""Few keys, and scores so far apart that a row's result is that of its best few keys."""
_CHECKED_SHARPNESS = 4.0


class Workload:
    """What one kernel does, in any tiles."""

    def __init__(
        self,
        kernel: str,
        sizes: Sizes,
        *,
        dtype: torch.dtype,
        head_dim: int,
        device: str = "cuda",
        sharpness: float = 1.0,
    ) -> None:
        """`sharpness` is the standard deviation of the scores."""

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, head_dim, device=device)

        self._is_decode = kernel == "decode"
        self._scale = head_dim**-0.5
        rows = _NEW_ROWS if self._is_decode else sizes.local
        self._q_HTD = (sharpness * draw(sizes.kv_heads * _GROUP_SIZE, rows)).to(dtype)
        lengths = (sizes.shard,) if self._is_decode else (sizes.local, sizes.upstream)
        self._kvs = [draw(2, sizes.kv_heads, length).to(dtype) for length in lengths]
        self._shard_len = torch.tensor([sizes.shard], dtype=torch.int32, device=device)

    def run(self, config: TileConfig) -> Partial:
        if self._is_decode:
            [(k_KSD, v_KSD)] = self._kvs
            return decode_attention(
                self._q_HTD, k_KSD, v_KSD, self._shard_len, scale=self._scale, config=config
            )
        rows = self._q_HTD.shape[1]
        (local_k_KSD, local_v_KSD), (k_KSD, v_KSD) = self._kvs
        segments = [
            Segment(0, rows, local_k_KSD, local_v_KSD, True),
            Segment(0, rows, k_KSD, v_KSD, False),
        ]
        return segment_attention(self._q_HTD, segments, scale=self._scale, config=config)

    @cached_property
    def exact(self) -> Partial:
        """Attention in fp64, once for all tiles."""
        k_KSD, v_KSD = torch.cat(self._kvs, dim=2).double()
        q_KGTD = self._q_HTD.double().unflatten(0, (-1, _GROUP_SIZE))
        scores_KGTS = q_KGTD @ k_KSD[:, None].mT * self._scale
        if not self._is_decode:
            rows = q_KGTD.shape[2]
            later_TS = torch.ones(rows, rows, dtype=torch.bool, device=q_KGTD.device).triu(1)
            scores_KGTS[..., :rows].masked_fill_(later_TS, -math.inf)
        out_HTD = (scores_KGTS.softmax(dim=-1) @ v_KSD[:, None]).flatten(0, 1)
        return Partial(out_HTD.transpose(0, 1), scores_KGTS.logsumexp(dim=-1).flatten(0, 1).mT)

    def is_exact(self, found: Partial) -> bool:
        """Whether that is `exact`, up to the rounding of the weights and the result."""
        largest = max(float(v_KSD.abs().max()) for _, v_KSD in self._kvs)
        rounding = max(torch.finfo(self._q_HTD.dtype).eps * largest, 2e-5)
        return all(
            torch.allclose(x.double(), truth, atol=limit, rtol=0)
            for x, truth, limit in zip(found, self.exact, (rounding, 1e-3), strict=True)
        )


def fastest(kernel: str, dtype: torch.dtype, head_dim: int) -> TileConfig:
    """Time every candidate and print it."""
    major, minor = torch.cuda.get_device_capability()
    capability = major * 10 + minor
    timed = Workload(kernel, TIMED, dtype=dtype, head_dim=head_dim)
    checked = Workload(
        kernel, CHECKED, dtype=dtype, head_dim=head_dim, sharpness=_CHECKED_SHARPNESS
    )
    default = default_config(kernel, capability, dtype.itemsize, head_dim)
    found: list[tuple[float, TileConfig]] = []
    for config in dict.fromkeys([default, *candidates(kernel, capability, dtype)]):
        try:
            if not checked.is_exact(checked.run(config)):
                print(f"  {config}: a wrong result")
                continue
            milliseconds = do_bench(lambda config=config: timed.run(config), warmup=10, rep=60)
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
