"""`python -m benchmarks [NAME [options] | all --budget 60m [--gpu]]`

Without a name the benchmarks are listed. Each checks that what it times is right before it prints a
figure, and writes JSON, Markdown and a chart to benchmarks/reports/. `all` runs what fits into a
time, on one page; `NAME --help` lists the options.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.catalogue import BENCHMARKS

_ALL = "all"


def main(arguments: Sequence[str]) -> int:
    """Run what is named; returns the exit code."""
    name = arguments[0].replace("-", "_") if arguments else ""
    if name in ("", "__help", "_h"):
        print("\n".join(listing()))
        return 0
    if name != _ALL and name not in BENCHMARKS:
        known = ", ".join([*BENCHMARKS, _ALL])
        print(f"no benchmark {arguments[0]}: choose one of {known}", file=sys.stderr)
        return 2
    # A job that is told to end gives its ranks the chance to.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    module = import_module("benchmarks.suite" if name == _ALL else f"benchmarks.{name}")
    if name != _ALL:
        sys.argv[1:] = arguments[1:]  # as reports state it, behind the module's name
    try:
        code: int = module.main(arguments[1:])
    except KeyboardInterrupt:
        return 130
    return code


def listing() -> list[str]:
    """One line per benchmark."""
    wide = max(map(len, BENCHMARKS))
    lines = [f"{name:<{wide}}  {summary}" for name, summary in BENCHMARKS.items()]
    lines.append(f"{_ALL:<{wide}}  what fits into --budget 60m, on one page; --gpu for one GPU")
    return ["python -m benchmarks NAME [options]", "", *lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
