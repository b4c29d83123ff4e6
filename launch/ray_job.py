"""The driver of a Ray job; it needs no GPU, the ranks take theirs where the cluster has them.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python launch/ray_job.py +model=llama3-8b world_size=16 [settings of apb.run or apb.batch]

With `input=` it is a batch (`python -m apb.batch --help`), without one request (`apb.run`).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the command line on the cluster; returns the exit code."""
    # `ray job stop` asks with SIGTERM and kills 3 seconds later: then the ranks go before the
    # driver does, and a request is given up where `supervision.drain_s` is not longer than that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if any(argument.startswith("input=") for argument in arguments):
        from apb.batch.__main__ import main as answer
    else:
        from apb.run import main as answer
    return answer(["launcher=ray", "supervision.drain_s=1", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
