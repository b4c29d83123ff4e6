"""One rank of `benchmarks.overlap`: it runs and times what the driver asks for, line by line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from apb.comm import Communicator, Kind, Pending, Tag
from apb.config import compose_config
from apb.cost import NOMINAL_CPU, CostModel
from apb.engine import Engine
from apb.errors import ApbError
from apb.hf.compressor_target import compressor_target
from apb.hf.model import DTYPES, CausalLM
from apb.methods.plan import PlanRequest, PrefillPlan
from apb.prompts.base import PromptTokens
from apb.worker import join_group

_QUERY_IDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all prefills of a run have in common."""

    overrides: list[str]
    dtype: str
    tokens: int
    num_blocks: int


@dataclass(slots=True, kw_only=True)
class LayerTimes:
    """Points in time of a layer's exchange, in seconds: from being asked for to being used."""

    asked: float
    cpu: float
    """What the rank's main thread had had of a processor when it asked."""
    posted: float = 0.0
    awaited: float = 0.0
    """For the first time: after local attention where the exchange runs beside it."""
    arrived: float = 0.0
    used: float = 0.0
    """Both it and local attention are there."""


class TimedPending(Pending[dict[int, Tensor]]):
    """Notes when a message is awaited, is there and is used."""

    def __init__(self, pending: Pending[dict[int, Tensor]], times: LayerTimes) -> None:
        super().__init__(pending.wait)
        self._times = times

    def wait(self) -> dict[int, Tensor]:
        begin = time.perf_counter()
        received = super().wait()
        self._times.used = time.perf_counter()
        if not self._times.awaited:
            self._times.awaited, self._times.arrived = begin, self._times.used
        return received


class TimedCommunicator(Communicator):
    """Notes the times of the exchange of each layer, and the shapes of what it moves."""

    def __init__(self, comm: Communicator) -> None:
        Communicator.__init__(self, comm.rank, comm.world_size, comm.device)
        self.layers: list[LayerTimes] = []
        self.outgoing: dict[int, Tensor] = {}
        self.incoming: dict[int, Tensor] = {}

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], tag: Tag
    ) -> Pending[dict[int, Tensor]]:
        times = LayerTimes(asked=time.perf_counter(), cpu=time.thread_time())
        pending = Communicator.exchange(self, outgoing, incoming, tag)
        times.posted = time.perf_counter()
        self.layers.append(times)
        self.outgoing, self.incoming = dict(outgoing), dict(incoming)
        return TimedPending(pending, times)

    def exchange_again(self, repeats: int) -> list[float]:
        """Seconds of the last exchange on its own, ranks in step."""
        seconds = []
        for repeat in range(repeats):
            tag = Tag(0, repeat, Kind.UPSTREAM)
            self.meet()
            begin = time.perf_counter()
            Communicator.exchange(self, self.outgoing, self.incoming, tag).wait()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def meet(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1), Tag(0, 0, Kind.CONTROL)).wait()


class Rank:
    """The model with one engine that overlaps and one that does not."""

    def __init__(self, job: Job, comm: Communicator) -> None:
        self._comm = TimedCommunicator(comm)
        config = compose_config(job.overrides)
        model = CausalLM.load(config.model, dtype=DTYPES[job.dtype], device=comm.device)
        vocabulary = range(model.shape.vocab_size)
        rng = random.Random(0)
        self._prompt = PromptTokens(
            prefix_ids=(),
            document_ids=tuple(rng.choices(vocabulary, k=job.tokens)),
            query_ids=tuple(rng.choices(vocabulary, k=_QUERY_IDS)),
        )
        self._engines: dict[bool, Engine] = {}
        for overlap in (True, False):
            config = compose_config([*job.overrides, f"method.overlap={str(overlap).lower()}"])
            method = config.method.build(seed=config.seed)
            method.attach(
                compressor_target(
                    config.model, model.hf.config, device=comm.device, dtype=model.dtype
                )
            )
            self._engines[overlap] = Engine(
                model=model,
                method=method,
                backend=config.backend.build(model.attention_target),
                comm=self._comm,
            )
        costs = CostModel(shape=model.shape, rates=NOMINAL_CPU, itemsize=DTYPES[job.dtype].itemsize)
        self._plan: PrefillPlan = method.plan(
            PlanRequest.of(
                self._prompt,
                world_size=comm.world_size,
                num_blocks=job.num_blocks,
                costs=costs,
            )
        )

    def prefill(self, *, overlap: bool) -> dict[str, Any]:
        """One prefill: seconds, each layer's times, and the owner's digest of the answer."""
        engine = self._engines[overlap]
        self._comm.layers.clear()
        self._comm.meet()
        begin = time.perf_counter()
        engine.prefill(self._prompt, self._plan, room=_QUERY_IDS)
        seconds = time.perf_counter() - begin
        layers = [asdict(times) for times in self._comm.layers]
        hidden_TM = engine.extend(self._prompt.query_ids)
        digest = ""
        if engine.is_owner:
            logits_V = engine.model.logits(hidden_TM[-1:])[0]
            digest = hashlib.sha256(logits_V.numpy().tobytes()).hexdigest()
        engine.release()
        return {"seconds": seconds, "layers": layers, "digest": digest}

    def exchange(self, *, repeats: int) -> dict[str, Any]:
        """The exchange of one layer without any compute beside it."""
        received = sum(x.numel() * x.element_size() for x in self._comm.incoming.values())
        return {"seconds": self._comm.exchange_again(repeats), "received_bytes": received}


def main() -> int:
    try:
        _serve()
    except ApbError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _serve() -> None:
    """Do what each line of the standard input says, until it ends."""
    job = Job(**json.loads(sys.argv[1]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    comm, leave = join_group(rank, world_size, torch.device("cpu"))
    runner = Rank(job, comm)
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "prefill": runner.prefill,
        "exchange": runner.exchange,
    }
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        print(json.dumps(operations[request.pop("op")](**request)), flush=True)
    leave()


if __name__ == "__main__":
    sys.exit(main())
