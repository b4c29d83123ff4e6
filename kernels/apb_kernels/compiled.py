"""What the compiler makes of the kernels, without a GPU: ``python -m apb_kernels.compiled``.

Compiles the shipped tile sizes for several GPUs and prints registers, spills, shared memory and the
instructions used as a table. Unset TRITON_INTERPRET for it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from apb_kernels.decode_attention import decode_attention_kernel
from apb_kernels.segment_attention import padded_head_dim, segment_attention_fwd_kernel
from apb_kernels.segments import SEGMENT_FIELDS, TILE_FIELDS
from apb_kernels.tiles import TileConfig, default_config

SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
"""Bytes of shared memory that one block may use (CUDA C++ Programming Guide, table 30)."""
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
_GROUP_SIZE = 4
_UNALIGNED = ("stride_lt", "stride_lh", "stride_pn", "stride_pt", "stride_ph")
"""Of log-sum-exps and packed partials: no multiples of 16 elements."""
_KERNELS = {"segment": segment_attention_fwd_kernel, "decode": decode_attention_kernel}


class Build(NamedTuple):
    """A kernel for a GPU generation."""

    kernel: str
    capability: int
    dtype: str
    head_dim: int

    @property
    def config(self) -> TileConfig:
        return default_config(self.kernel, self.capability, DTYPES[self.dtype], self.head_dim)


class Resources(NamedTuple):
    """What a compiled kernel takes, per thread or per block, and which units it uses."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: bool
    tma: bool
    async_copies: bool
    """Keys are loaded 16 bytes at once, past the registers; not so, alignment was lost."""


def shipped(
    kernels: Sequence[str] = tuple(_KERNELS),
    capabilities: Sequence[int] = tuple(SHARED_LIMIT),
    dtypes: Sequence[str] = tuple(DTYPES),
    head_dims: Sequence[int] = HEAD_DIMS,
) -> Iterator[Build]:
    for kernel in kernels:
        for capability in capabilities:
            for dtype in dtypes:
                for head_dim in head_dims:
                    yield Build(kernel, capability, dtype, head_dim)


def build_all(builds: Sequence[Build], *, processes: int) -> list[Resources]:
    """Compile several kernels at once."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(resources, builds))


def resources(build: Build, config: TileConfig | None = None) -> Resources:
    """Compile one kernel, with its shipped tile sizes unless others are given."""
    config = config or build.config
    constants = _constants(build, config)
    function = _KERNELS[build.kernel]
    names = [name for name in function.arg_names if name not in constants]
    signature = {name: _argument_type(name, build.dtype) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name.startswith(("p_", "stride_")) and name not in _UNALIGNED
    }
    source = ASTSource(
        function,
        {name: signature[name] for name in function.arg_names},
        constexprs=constants,
        attrs=aligned,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", build.capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    registers, spilled = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
        async_copies="cp.async.cg" in ptx or "cp.async.bulk.tensor" in ptx,
    )


def _constants(build: Build, config: TileConfig) -> dict[str, Any]:
    common = {
        "G": _GROUP_SIZE,
        "D": build.head_dim,
        "BLOCK_M": config.rows,
        "BLOCK_N": config.keys,
        "BLOCK_D": padded_head_dim(build.head_dim),
        "TMA": config.tma,
    }
    if build.kernel == "segment":
        fields = {"TILE_FIELDS": TILE_FIELDS, "SEGMENT_FIELDS": SEGMENT_FIELDS}
        return common | fields | {"ALIGNED": 16 // DTYPES[build.dtype], "CARRY": True}
    return common | {"BLOCK_TAIL": 64, "HAS_TAIL": True, "HAS_TREE": True}


def _argument_type(name: str, dtype: str) -> str:
    types = {
        "p_lse": "*fp32",
        "p_tiles": "*i32",
        "p_segments": "*i64",
        "p_length": "*i32",
        "p_visible": "*u8",
        "p_packed": "*fp32",
        "scale_log2": "fp32",
    }
    return types.get(name, f"*{dtype}" if name.startswith("p_") else "i32")


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, where spilled registers go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, "-res-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report)
    assert found, f"cuobjdump prints something else: {report}"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def render(builds: Sequence[Build], found: Sequence[Resources]) -> list[str]:
    """A table in Markdown, a line per kernel."""
    lines = [
        "| kernel | GPU | dtype | head size | rows x keys | warps, stages | registers "
        "| spilled bytes | shared KiB | wgmma | TMA | async copies |",
        "| --- | --- | --- | ---: | --- | --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for build, used in zip(builds, found, strict=True):
        config = build.config
        lines.append(
            f"| {build.kernel} | sm_{build.capability} | {build.dtype} | {build.head_dim} "
            f"| {config.rows} x {config.keys} | {config.warps}, {config.stages} "
            f"| {used.registers} | {used.spilled_bytes} | {used.shared_bytes / 1024:.0f} "
            f"| {_yes(used.wgmma)} | {_yes(used.tma)} | {_yes(used.async_copies)} |"
        )
    return lines


def _yes(value: bool) -> str:
    return "yes" if value else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="+", default=[*_KERNELS], choices=_KERNELS)
    parser.add_argument(
        "--capabilities", nargs="+", type=int, default=[*SHARED_LIMIT], choices=SHARED_LIMIT
    )
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=DTYPES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[*HEAD_DIMS])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of Triton's own, about its defaults
    builds = list(shipped(args.kernels, args.capabilities, args.dtypes, args.head_dims))
    for line in render(builds, build_all(builds, processes=args.processes)):
        print(line)


if __name__ == "__main__":
    main()
