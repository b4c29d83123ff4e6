"""How fast attention over segments is beside plain attention: ``python -m benchmarks.attention``.

Every backend that runs on the device is first held against the specification, then timed on APB's
prefill shapes and on decoding shapes, beside plain attention and a copy in the same run. Without a
GPU the report says so and carries what the compiler makes of the kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from apb.hf.model import DTYPES
from apb.metrics import usable_cores
from apb.worker import choose_device
from benchmarks.attention_cases import (
    Heads,
    Scene,
    backends,
    check_backends,
    decode_cases,
    plain_cases,
    prefill_cases,
)
from benchmarks.attention_report import chart, compile_table, render
from benchmarks.attention_runs import Stopwatch, run_decode, run_plain, run_prefill
from benchmarks.environment import REPORTS, Environment
from benchmarks.report import print_report, write_report


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("H", "K", "D"))
    parser.add_argument("--repeats", type=int, default=5, help="on a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compile table")
    parser.add_argument("--out", type=Path, default=REPORTS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Check, measure and report; returns the report."""
    environment = Environment.read("benchmarks.attention")
    device = choose_device(args.device, 0)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    scene = Scene(Heads(*args.heads), device, dtype)
    contestants = backends(scene)
    checked = list(check_backends(contestants, scene))
    print(*checked, sep="\n", file=sys.stderr)
    compiled = [] if args.no_compile else compile_table(usable_cores())
    watch = Stopwatch(device, args.repeats)
    is_small = device.type == "cpu"
    times = [
        *run_plain(plain_cases(small=is_small), scene, watch),
        *run_prefill(prefill_cases(small=is_small), contestants, scene, watch),
        *run_decode(decode_cases(small=is_small), contestants, scene, watch),
    ]
    data = {
        "environment": environment.to_json(),
        "settings": {**vars(args), "out": None, "device": device.type, "dtype": str(dtype)},
        "checked": checked,
        "times": [asdict(time) for time in times],
    }
    lines = render(times, checked, compiled, environment, scene)
    return write_report(args.out, "attention", scene.heads.name, lines, data, chart(times))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
