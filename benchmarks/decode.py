"""Tokens a second of decoding with every drafter: ``python -m benchmarks.decode``.

Greedy, on one rank, beside Hugging Face `generate` on the same prompts in the same process. All of
apb's variants have to give the same tokens, but for near ties of logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apb.config import compose_config
from apb.errors import ApbError
from apb.hf.checkpoint import Checkpoint
from apb.hf.model import DTYPES
from apb.plugins import PLUGINS
from benchmarks.decode_ranks import render_spread, spread_runs
from benchmarks.decode_report import chart, render
from benchmarks.decode_runs import ApbLab, Run, hf_answer
from benchmarks.decode_tasks import Task, read_tasks
from benchmarks.environment import REPORTS, ROOT, Environment
from benchmarks.report import print_report, write_report

SPEC_BENCH = ROOT.parent / "shared" / "data" / "spec_bench.jsonl"
_PLAIN, _DEFAULT = "none", "hybrid"
_HF = ("hf", "hf-lookup")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--samples", type=int, default=8, help="of each Spec-Bench category")
    parser.add_argument("--quoting", type=int, default=12, help="questions that ask for a quote")
    parser.add_argument("--document-chars", type=int, default=12000, help="of those")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--drafters", nargs="+", default=[*PLUGINS["drafter"]], choices=PLUGINS["drafter"]
    )
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--no-ranks", action="store_true", help="leave several ranks out")
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument("--override", action="append", default=[], help="for all of apb")
    args = parser.parse_args(argv)
    if _PLAIN not in args.drafters:
        parser.error(f"--drafters needs {_PLAIN}, to which the others are compared")
    return args


def run(args: argparse.Namespace) -> Path:
    """Measure and report; returns the report.

    Raises:
        ApbError: drafters disagree about an answer, or an input is missing.
    """
    environment = Environment.read("benchmarks.decode")
    overrides = [f"model={args.model}", *args.override]
    location = Checkpoint.find(compose_config(overrides).model).location
    tasks = read_tasks(
        args.spec_bench,
        AutoTokenizer.from_pretrained(location),
        samples=args.samples,
        quoting=args.quoting,
        document_chars=args.document_chars,
    )
    lab = ApbLab(overrides, dtype=args.dtype, max_tokens=args.max_tokens)
    hf_model = None
    if not args.no_hf:
        hf_model = AutoModelForCausalLM.from_pretrained(location, dtype=DTYPES[args.dtype]).eval()
        hf_model.to(lab.model.device)
    runs: list[Run] = []
    variants = [*args.drafters, *([] if args.no_hf else _HF)]
    for number, task in enumerate(tasks):
        lab.read(task)
        found = []
        # The order turns, so that a drift of the machine favours no variant.
        turn = number % len(variants)
        for name in variants[turn:] + variants[:turn]:
            if name in _HF:
                one = hf_answer(
                    hf_model,
                    task,
                    lookup=name == _HF[1],
                    max_tokens=args.max_tokens,
                    stop_ids=lab.stop_ids,
                )
            else:
                one = lab.answer(task, name)
            found.append(one)
        _check_same(lab, task, [one for one in found if one.variant not in _HF])
        for one in found:
            print(f"{task.name:>28} {one.variant:>10} {one.rate:6.1f} tokens/s"
                  f"  {one.steps or 0:4} steps", file=sys.stderr)  # fmt: skip
        runs += found
    compared = [name for name in (_PLAIN, _DEFAULT) if name in args.drafters]
    spread = (
        []
        if args.no_ranks
        else [
            *spread_runs(
                [*overrides, f"dtype={args.dtype}"], tasks, compared, max_tokens=args.max_tokens
            )
        ]
    )
    settings = {**vars(args), "out": None, "spec_bench": args.spec_bench.name}
    settings["threads"] = torch.get_num_threads()
    data = {
        "environment": environment.to_json(),
        "settings": settings,
        "runs": [asdict(one) for one in runs],
        "over_ranks": [asdict(one) for one in spread],
    }
    lines = render(runs, environment, settings, plain=_PLAIN)
    lines += ["", *render_spread(spread)] if spread else []
    drawn = chart(runs, args.model, plain=_PLAIN)
    return write_report(args.out, "decode", args.model, lines, data, drawn)


def _check_same(lab: ApbLab, task: Task, runs: Sequence[Run]) -> None:
    """Raises ApbError where answers differ by more than a near tie."""
    first = runs[0].token_ids
    for run in runs[1:]:
        pairs = zip(first, run.token_ids, strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if same is None:
            continue
        gap, tie = lab.gap(task, first[:same])
        if gap > tie:
            raise ApbError(
                f"{task.name}: {run.variant} changes the answer at token {same}, where the best "
                f"logits are {gap:.4f} apart, so that speed means nothing"
            )


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
