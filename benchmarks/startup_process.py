"""A program that uses apb once, and says when it got how far; `benchmarks.startup` starts it."""

from __future__ import annotations

import json
import sys
import time

_STARTED = time.monotonic()


def main(overrides: list[str]) -> None:
    """Import, start ranks, ask twice; one line of JSON on stdout."""
    from apb import LLM, SamplingParams
    from apb.trace.records import Phase

    imported = time.monotonic()
    overrides = [*overrides, "trace=true", "progress=false"]
    with LLM.from_overrides(overrides) as llm:
        llm.configure(overrides)  # the least that all ranks have to be up for
        ranks_up = time.monotonic()
        document = "The mill stood by the river, and the miller kept bees. " * 20
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        first = llm.ask(document, "Who kept bees?", params)
        answered = time.monotonic()
        again = llm.ask(document, "Who kept bees?", params)
        answered_again = time.monotonic()
    assert first.trace is not None
    spans = [span for part in first.trace.ranks for span in part.spans]
    load_s = max(span.seconds for span in spans if span.phase is Phase.LOAD)
    seconds = {
        "import": imported - _STARTED,
        "ranks": ranks_up - imported,
        "weights": load_s,
        "first answer": answered - ranks_up - load_s,
        "second answer": answered_again - answered,
    }
    told = {"started": _STARTED, "seconds": seconds, "answers": [first.token_ids, again.token_ids]}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
