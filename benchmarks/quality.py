"""How much the approximate methods lose: ``python -m benchmarks.quality``.

An interrupted run goes on where it stopped when the same command is given again: every finished row
is in a journal, whose name depends on the source and on all settings that change a row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from apb.errors import InputError
from apb.evaluate.prose import PASSAGES
from apb.prompts.needle_kinds import KINDS
from benchmarks.environment import REPORTS, ROOT, Environment
from benchmarks.quality_lab import METHODS, Lab, variants
from benchmarks.quality_pairs import render_pairs
from benchmarks.quality_report import chart, render, summarise
from benchmarks.quality_tasks import NeedleTask, ProseTask, Row, Task
from benchmarks.report import print_report, write_report

_QUESTION_ROOM = 512
"""Positions kept free for template, question and answer."""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name in conf/model/")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 7168])
    parser.add_argument(
        "--samples", type=int, nargs="*", default=[16, 2, 2], help="per kind, one for each length"
    )
    parser.add_argument("--passages", type=int, default=8, help=f"at most {len(PASSAGES)}")
    parser.add_argument("--prose-context", type=int, default=2048, help="tokens, at most")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--passing", type=float, nargs="*", default=[], help="method.passing_len, several in turn"
    )
    parser.add_argument(
        "--share",
        type=_share,
        default=(0, 1),
        metavar="I/N",
        help="every N-th task from I on, and no report: processes can share a journal",
    )
    parser.add_argument("--out", type=Path, default=REPORTS)
    parser.add_argument(
        "--override", action="append", default=[], help="for all methods, as model.path=/a/folder"
    )
    return parser.parse_args(argv)


def _share(text: str) -> tuple[int, int]:
    part, total = (int(number) for number in text.split("/"))
    if not 0 <= part < total:
        raise ValueError(text)
    return part, total


def run(args: argparse.Namespace) -> Path | None:
    """Run what the journal does not hold yet; returns the report, if the share is all tasks."""
    environment = Environment.read("benchmarks.quality")
    methods = variants(args.methods, args.passing)
    overrides = [f"model={args.model}", f"dtype={args.dtype}", *args.override]
    lab = Lab(overrides, methods, num_blocks=args.blocks)
    part, total = args.share
    tasks = _tasks(lab, args)[part::total]
    settings = {
        "model": args.model,
        "blocks": args.blocks,
        "overrides": overrides,
        "device": str(lab.device),
        "threads": torch.get_num_threads(),
        "methods": lab.describe(),
    }
    identity = json.dumps([environment.revision, environment.versions, settings, methods])
    journal = (
        ROOT / "outputs" / f"quality_{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
    )
    rows = _run_missing(lab, tasks, list(methods), journal)
    if total > 1:
        return None
    summary = summarise(rows, list(methods))
    data = {
        "environment": environment.to_json(),
        "settings": settings,
        "summary": summary.to_json(),
        "rows": [asdict(row) for row in rows],
    }
    lines = [*render(summary, environment, settings), *render_pairs(rows, list(methods))]
    drawn = chart(summary, args.model)
    return write_report(args.out, "quality", args.model, lines, data, drawn)


def _tasks(lab: Lab, args: argparse.Namespace) -> list[Task]:
    """Prose and needles, so ordered that a part of the run is a sample of the whole."""
    longest = lab.max_positions - _QUESTION_ROOM
    if too_long := [length for length in args.lengths if length > longest]:
        raise InputError(
            f"--lengths {too_long[0]}: {args.model} reads at most {longest} tokens here"
        )
    if len(args.samples) != len(args.lengths):
        raise InputError(
            f"--samples has {len(args.samples)} numbers for {len(args.lengths)} --lengths"
        )
    max_context = min(args.prose_context, longest)
    prose = [
        ProseTask.load(lab, name, max_context=max_context)
        for name in list(PASSAGES)[: args.passages]
    ]
    needles = [
        NeedleTask(kind, length, sample)
        for sample, (length, samples), kind in product(
            range(max(args.samples, default=0)), zip(args.lengths, args.samples, strict=True), KINDS
        )
        if sample < samples
    ]
    return [*prose, *needles]


def _run_missing(
    lab: Lab, tasks: Sequence[Task], methods: Sequence[str], journal: Path
) -> list[Row]:
    """Rows of all tasks in order; new ones are written to the journal as they come."""
    journal.parent.mkdir(exist_ok=True)
    print(f"journal: {journal}", file=sys.stderr)
    done = {(row.task, row.method): row for row in _read(journal)}
    missing = {
        task: todo
        for task in tasks
        if (todo := [method for method in methods if (task.name, method) not in done])
    }
    total = sum(task.length * len(todo) for task, todo in missing.items())
    with (
        journal.open("a", encoding="utf-8") as file,
        tqdm(total=total, unit="tok", unit_scale=True, mininterval=5) as bar,
    ):
        for task, todo in missing.items():
            bar.set_description(task.name)
            for row in task.run(lab, todo):
                _append(file, row)
                done[row.task, row.method] = row
                bar.update(task.length)
    return [done[task.name, method] for task in tasks for method in methods]


def _read(journal: Path) -> list[Row]:
    if not journal.is_file():
        return []
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    # A last line without its end was being written when the run was stopped.
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        journal.write_text("".join(whole), encoding="utf-8")
    return [Row(**json.loads(line)) for line in whole]


def _append(file: TextIO, row: Row) -> None:
    file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    file.flush()


def main(argv: Sequence[str] | None = None) -> int:
    return print_report(lambda: run(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
