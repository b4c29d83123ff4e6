"""A rank of `benchmarks.launchers` under torchrun: answers the questions that rank 0 reads."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from apb import LLM, SamplingParams


def _requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    overrides = json.loads(sys.argv[1])
    with closing(LLM.from_overrides([*overrides, "launcher=torchrun"])) as llm:
        # On the other ranks standard input is not read: they hear of a request from rank 0.
        for request in llm.shared(_requests()):
            params = SamplingParams(max_tokens=request["max_tokens"], ignore_eos=True)
            begin = time.perf_counter()
            output = llm.ask(request["document"], request["question"], params)
            seconds = time.perf_counter() - begin
            if os.environ["RANK"] == "0":
                print(json.dumps({"output": output.to_json(), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
