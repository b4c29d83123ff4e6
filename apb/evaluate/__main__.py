"""`python -m apb.evaluate +model=NAME [tasks=ruler] [methods=full,star,apb] [lengths=4096] [more]`

How good answers are, by method and length, with intervals and paired differences. An interrupted
evaluation goes on where it stopped when the same command is given again.

tasks=NAME,...        ruler (its thirteen tasks), all (with kv_retrieval and prose), or single ones
methods=NAME,...      the first is the baseline; apb+method.wire=int8 has a setting of its own
lengths=N,...         of documents, in the model's tokens
samples=N             of each task at each length (20)
output=FOLDER         for samples.jsonl, summary.json, report.md and, if matplotlib is installed,
                      scores.svg
baseline=FOLDER       compare with the first method of another evaluation instead
data=FILE.jsonl,...   questions of your own, as LongBench and InfiniteBench write them
metric=part|all|f1    how their answers are scored (part: any right answer occurs)

Every other word is a setting of apb, such as world_size=4 or method/compressor=query. Methods that
are not exact cut documents into 8 blocks on one rank alone, unless num_blocks says otherwise.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from apb.errors import ApbError
from apb.evaluate.evaluation import evaluate, first_method, other_evaluation
from apb.evaluate.plot import plot_scores
from apb.evaluate.report import render
from apb.evaluate.settings import Settings, parse_settings
from apb.evaluate.summary import summarise
from apb.output import write_json

_PLOT = "scores.svg"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)  # noqa: T201
        return 0
    logging.basicConfig(level=logging.WARNING)
    try:
        settings = parse_settings(arguments)
        lines = _report(settings)
    except ApbError as error:
        print(f"apb.evaluate: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return 130
    print("\n".join(lines))  # noqa: T201
    print(f"report: {settings.output / 'report.md'}", file=sys.stderr)  # noqa: T201
    return 0


def _report(settings: Settings) -> list[str]:
    other = None if settings.baseline is None else other_evaluation(settings.baseline)
    rows = evaluate(settings, other)
    baseline = other or first_method(settings, rows)
    summary = summarise(rows, baseline.name, baseline.rows)
    lines = render(summary, settings, rows)
    model = settings.config.model.name
    try:
        if plot_scores(summary, settings.output / _PLOT, title=model):
            lines += ["", f"![Scores by length]({_PLOT})"]
    except ApbError as error:
        print(error, file=sys.stderr)  # noqa: T201
    data = {
        **settings.identity(),
        "model": model,
        "baseline": baseline.name,
        "summary": [entry.to_json() for entry in summary.entries],
    }
    write_json(settings.output / "summary.json", data)
    path = settings.output / "report.md"
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ApbError(f"{path} cannot be written: {error.strerror}") from error
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
