"""How fast a prompt is read, and in how much memory: ``python -m benchmarks.prefill`` (CPU).

apb beside the Hugging Face model (`sdpa`) with the same number of threads in total. Every
measurement has fresh processes and the machine to itself; variants alternate within a repeat.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from apb.config import compose_config
from apb.errors import ApbError
from apb.hf.model import DTYPES, load_config
from apb.metrics import usable_cores
from apb.packed import has_fast_bf16
from benchmarks.environment import REPORTS, Environment
from benchmarks.memory import Sizes
from benchmarks.prefill_report import chart, render
from benchmarks.prefill_runs import Bench, Run, Variant, gate
from benchmarks.report import print_report, write_report

_GATE_LIMIT = 1e-3
_QUESTION_IDS = 8


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument(
        "--repeats", type=int, nargs="+", default=[3], help="one number, or one for each length"
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        choices=("hf-wide", "full", "apb-even"),
        help="variants to leave out",
    )
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument(
        "--override", action="append", default=[], help="for all variants, as model.path=/a/folder"
    )
    return parser.parse_args(argv)


def _variants(args: argparse.Namespace) -> list[Variant]:
    threads = usable_cores()
    blocks = f"num_blocks={args.blocks}"
    variants = [
        Variant("hf", "Hugging Face `sdpa`", ranks=1, threads=threads),
        Variant("hf-wide", "the same in apb's `WideLinears`", ranks=1, threads=threads),
        Variant("full", "apb, method=full", ("method=full",), ranks=1, threads=threads),
        *(
            Variant(
                name,
                f"apb, method=apb, {args.blocks} blocks, method.layout={layout}",
                ("method=apb", blocks, f"method.layout={layout}"),
                ranks=args.ranks,
                threads=max(1, threads // args.ranks),
            )
            for name, layout in (("apb-even", "even"), ("apb", "balanced"))
        ),
    ]
    if args.dtype == "float32" or has_fast_bf16(torch.device("cpu")):
        del variants[1]  # apb then multiplies as Hugging Face does
    return [variant for variant in variants if variant.name not in args.skip]


def run(args: argparse.Namespace) -> Path:
    """Check, measure length by length and report after each; returns the report.

    Raises:
        ApbError: apb and the Hugging Face model disagree, or a run failed.
    """
    environment = Environment.read("benchmarks.prefill")
    shared = ["device=cpu", "allow_beyond_context=true", *args.override]
    hf_config = load_config(compose_config([f"model={args.model}", *shared]).model)
    vocab_size = int(hf_config.vocab_size)
    error = gate(args.model, [*shared, "dtype=float32"], vocab_size=vocab_size)
    print(f"method=full against Hugging Face, fp32: {error:.1e}", file=sys.stderr)
    if error > _GATE_LIMIT:
        raise ApbError(
            f"method=full differs from the Hugging Face model by {error:.1e} in log-probability "
            f"(limit {_GATE_LIMIT}), so its speed means nothing"
        )
    variants = _variants(args)
    sizes = Sizes.of(hf_config, DTYPES[args.dtype].itemsize)
    bench = Bench(args.model, [*shared, f"dtype={args.dtype}"], sizes)
    runs: list[Run] = []
    path: Path = args.out
    repeats = args.repeats * len(args.lengths) if len(args.repeats) == 1 else args.repeats
    for length, times in zip(args.lengths, repeats, strict=True):
        for repeat in range(times):
            document, question = _prompt(vocab_size, length, seed=repeat)
            for variant in variants:
                runs.append(bench.run(variant, document, question, repeat=repeat))
                print(runs[-1].line(), file=sys.stderr)
        settings = {
            **{name: value for name, value in vars(args).items() if name != "out"},
            "gate": error,
            "max_positions": int(hf_config.max_position_embeddings),
        }
        data = {
            "environment": environment.to_json(),
            "settings": settings,
            "variants": [asdict(variant) for variant in variants],
            "runs": [asdict(run) for run in runs],
        }
        lines = render(runs, variants, environment, settings)
        drawn = chart(runs, variants, args.model)
        path = write_report(args.out, "prefill", args.model, lines, data, drawn)
    return path


def _prompt(vocab_size: int, length: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Fresh random tokens: speed does not depend on them, and nothing can have been kept."""
    rng = random.Random(f"{length}-{seed}")
    vocabulary = range(vocab_size)
    return rng.choices(vocabulary, k=length), rng.choices(vocabulary, k=_QUESTION_IDS)


def main(argv: Sequence[str] | None = None) -> int:
    return print_report(lambda: run(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
