"""The report of `benchmarks.attention`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from apb.markdown import table
from apb.plot import Interval
from benchmarks.attention_cases import Scene
from benchmarks.attention_runs import Time
from benchmarks.chart import Bars, Chart
from benchmarks.environment import ROOT, Environment
from benchmarks.report import Spread


def compile_table(processes: int) -> list[str]:
    """What the compiler makes of the shipped kernels; nothing where Triton is missing."""
    if not find_spec("triton"):
        return []
    command = [sys.executable, "-m", "apb_kernels.compiled", "--processes", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def render(
    times: Sequence[Time],
    checked: Sequence[str],
    compiled: Sequence[str],
    environment: Environment,
    scene: Scene,
) -> list[str]:
    heads = scene.heads
    lines = [
        f"# Attention over segments, {heads.query} heads, {heads.key} KV heads of {heads.dim}, "
        f"{str(scene.dtype).removeprefix('torch.')}",
        "",
        *environment.lines(),
        *(f"* before anything was timed: {sentence}" for sentence in checked),
        *_no_gpu(),
        "",
        "FLOPs are 4 x heads x head size x query-key pairs, so that a causal tile half above the "
        "diagonal counts half. Median (smallest to largest) of the repeats.",
        "",
        "## Plain causal attention",
        "",
        *_flop_table([t for t in times if t.kind == "plain"], best=0.0),
        "",
        "## Prefill: a block that sees an anchor, received passing blocks and itself",
        "",
        "As `apb` runs it: local keys first, then, when they have arrived, the others in a second "
        "call that continues the first. `ATen flash` and `cuDNN` here are one unmasked call with "
        "as many query-key pairs, `ATen flash, per segment` a causal and an unmasked call, not "
        "merged. `of best` compares with the best plain causal attention above.",
        "",
        *_flop_table([t for t in times if t.kind == "prefill"], best=_best_plain(times)),
        "",
        "## Decoding: new rows over a shard and themselves",
        "",
        *_byte_table(times),
    ]
    if compiled:
        lines += [
            "",
            "## What the compiler makes of the kernels",
            "",
            "Of the tile sizes that are shipped for a GPU that nobody has tuned.",
            "",
            *compiled,
        ]
    return lines


def _no_gpu() -> list[str]:
    if torch.cuda.is_available():
        return []
    return [
        "* **no GPU was at hand**: these are times of a CPU, and `fused`, `flash` and cuDNN, which "
        "need one, were not run"
    ]


def _best_plain(times: Sequence[Time]) -> float:
    """FLOP/s."""
    return max(t.flops / Spread.of(t.seconds).median for t in times if t.kind == "plain")


def chart(times: Sequence[Time]) -> Chart:
    """FLOP/s of plain attention and of prefill blocks."""
    groups: dict[str, dict[str, Interval | float]] = {}
    for time in times:
        if time.kind in ("plain", "prefill"):
            rates = Spread.of([time.flops / seconds / 1e12 for seconds in time.seconds])
            groups.setdefault(f"{time.kind} {time.case}", {})[time.name] = rates.interval()
    return Bars(title="Attention over segments", y_label="TFLOP/s", groups=groups)


def _flop_table(times: Sequence[Time], *, best: float) -> list[str]:
    header = ["case", "by", "ms", "TFLOP/s", *(["of best"] if best else [])]
    rows = []
    for time in times:
        spread = Spread.of([1e3 * s for s in time.seconds])
        rate = time.flops / (spread.median / 1e3)
        share = [f"{rate / best:.2f}"] if best else []
        rows.append([time.case, f"`{time.name}`", spread.text(), f"{rate / 1e12:.3f}", *share])
    return table(header, rows)


def _byte_table(times: Sequence[Time]) -> list[str]:
    copies = [t for t in times if t.kind == "copy"]
    peak = max(t.bytes / Spread.of(t.seconds).median for t in copies)
    rows = []
    for time in times:
        if time.kind not in ("decode", "copy"):
            continue
        spread = Spread.of([1e3 * s for s in time.seconds])
        rate = time.bytes / (spread.median / 1e3)
        rows.append(
            [
                time.case,
                f"`{time.name}`",
                spread.text(),
                f"{rate / 1e9:.1f}",
                f"{rate / peak:.2f}",
            ]
        )
    return table(["case", "by", "ms", "GB/s of KV", "of the copy"], rows)
