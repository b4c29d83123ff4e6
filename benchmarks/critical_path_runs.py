"""The measurements of `benchmarks.critical_path`: one prefill on one rank, real or replayed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch

from apb.attention.base import AttentionBackend
from apb.comm import Communicator
from apb.compress.base import CompressorTarget
from apb.config import compose_config
from apb.engine import Engine
from apb.hf.compressor_target import compressor_target
from apb.hf.model import DTYPES, CausalLM
from apb.methods.base import AttentionMethod
from apb.methods.plan import PlanRequest, PrefillPlan
from apb.model_config import ModelConfig
from apb.prompts.base import PromptTokens
from benchmarks.critical_path_probe import Clock, Phase, Probe, ProbedMethod, Recording, Transfer
from benchmarks.critical_path_replay import Messages, ReplayCommunicator, draw_messages
from benchmarks.critical_path_variants import Scene, Variant

_VOCAB = 256
"""Embedding rows of the models that run: a prefill reads one per token, however many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A variant's plan for a context."""

    variant: Variant
    prompt: PromptTokens
    method: AttentionMethod
    backend: AttentionBackend
    plan: PrefillPlan
    predicted_s: tuple[float, ...]
    """Of each rank's prefill, by the cost model."""

    def slowest(self) -> int:
        """The rank that should take longest."""
        return self.predicted_s.index(max(self.predicted_s))

    def ranks_worth_running(self) -> list[int]:
        """The slowest rank by prediction, the first and the last; none that has no work."""
        ranks = {self.slowest()}
        if not self.variant.alike:
            ranks |= {0, len(self.predicted_s) - 1}
        return sorted(rank for rank in ranks if self.plan.num_rows(rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDone:
    """What a rank did in one layer; the same whoever the other ranks were."""

    rows: int
    head_pairs: int
    """Query-key pairs, counted for every query head."""
    received_bytes: int
    sent_bytes: int
    exchanges: int

    @classmethod
    def of(cls, recording: Recording) -> WorkDone:
        exchanges, layers = recording.exchanges, recording.num_layers
        return cls(
            rows=recording.rows,
            head_pairs=recording.head_pairs // layers,
            received_bytes=sum(exchange.received_bytes for exchange in exchanges) // layers,
            sent_bytes=sum(exchange.sent_bytes for exchange in exchanges) // layers,
            exchanges=len(exchanges) // layers,
        )


class Way(Enum):
    """`real`: the ranks talk to each other. `alone`: one is replayed while the others do nothing.
    `together`: all are replayed at the same time.
    """

    real = "real"
    alone = "alone"
    together = "together"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One prefill on one rank; seconds are those of the model with all its layers."""

    variant: str
    way: Way
    context_len: int
    rank: int
    repeat: int
    work: WorkDone
    predicted_s: float
    phases_s: dict[str, float]
    transfer_s: float = 0.0
    """Modelled; 0 where messages really travelled."""
    exposed_s: float = 0.0
    """The part of it that is not hidden."""

    @property
    def total_s(self) -> float:
        return sum(self.phases_s.values()) + self.exposed_s

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "way": self.way.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RankRun:
        return cls(**{**fields, "way": Way(fields["way"]), "work": WorkDone(**fields["work"])})


class Bench:
    """Prefills of a model with random weights, of the shape and dtype asked for."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._device = torch.device(scene.device)
        shape = scene.shape
        architecture = {
            "model_type": "llama",
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": scene.layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": _VOCAB,
        }
        self._model_config = ModelConfig(name=scene.model, architecture=architecture)
        self._model = CausalLM.load(
            self._model_config,
            dtype=DTYPES[scene.dtype],
            device=self._device,
            chunk_len=compose_config(["model=tiny", *scene.overrides]).runtime.chunk_len,
        )
        self.messages: Messages = {}

    @property
    def target(self) -> CompressorTarget:
        """The model as compressors see it."""
        return compressor_target(
            self._model_config,
            self._model.hf.config,
            device=self._device,
            dtype=self._model.dtype,
        )

    def case(self, variant: Variant, context_len: int) -> Case:
        """The variant's plan, for random tokens.

        Raises:
            InputError: the settings do not fit the context, the model or the number of ranks.
        """
        scene, rng = self.scene, random.Random(context_len)
        config = compose_config(["model=tiny", *variant.overrides, *scene.overrides])
        prompt = PromptTokens(
            (),
            tuple(rng.choices(range(_VOCAB), k=context_len)),
            tuple(rng.choices(range(_VOCAB), k=scene.question_len)),
        )
        method = config.method.build(seed=config.seed)
        method.attach(self.target)
        plan = method.plan(
            PlanRequest.of(
                prompt, world_size=scene.ranks, num_blocks=config.num_blocks, costs=scene.costs
            )
        )
        works = [method.workload(plan, scene.shape, rank) for rank in range(scene.ranks)]
        return Case(
            variant=variant,
            prompt=prompt,
            method=method,
            backend=config.backend.build(self._model.attention_target),
            plan=plan,
            predicted_s=tuple(scene.costs.prefill_s([work]) for work in works),
        )

    def replay(self, case: Case, rank: int, *, repeat: int, way: Way = Way.alone) -> RankRun:
        """The rank alone, with random messages, and what a link would take for them."""
        comm = ReplayCommunicator(rank, self.scene.ranks, self._device, self.messages)
        draw_messages(comm, case.method, case.plan, self.scene.shape, self._model.dtype)
        recording = self._record(case, comm)
        transfer = recording.transfer(self.scene.rates, num_layers=self.scene.shape.num_layers)
        return self._run(case, comm, way, repeat, recording, transfer)

    def run(self, case: Case, comm: Communicator, *, repeat: int) -> RankRun:
        """One of several ranks that really talk to each other."""
        return self._run(case, comm, Way.real, repeat, self._record(case, comm), Transfer(0.0, 0.0))

    def _record(self, case: Case, comm: Communicator) -> Recording:
        probe = Probe(Clock(self._device))
        engine = Engine(
            model=self._model,
            method=ProbedMethod(case.method, probe),
            backend=case.backend,
            comm=comm,
        )
        probe.enter(Phase.linear)
        engine.prefill(case.prompt, case.plan, room=len(case.prompt.query_ids))
        return probe.finish()

    def _run(
        self,
        case: Case,
        comm: Communicator,
        way: Way,
        repeat: int,
        recording: Recording,
        transfer: Transfer,
    ) -> RankRun:
        phases_s = recording.phases_s(num_layers=self.scene.shape.num_layers)
        return RankRun(
            variant=case.variant.name,
            way=way,
            context_len=case.plan.layout.context_len,
            rank=comm.rank,
            repeat=repeat,
            work=WorkDone.of(recording),
            predicted_s=case.predicted_s[comm.rank],
            phases_s={phase.value: seconds for phase, seconds in phases_s.items()},
            transfer_s=transfer.seconds,
            exposed_s=transfer.exposed_s,
        )


def median_run(runs: Sequence[RankRun]) -> RankRun:
    """The run in the middle by its total, so that its phases add up to what is reported."""
    return sorted(runs, key=lambda run: run.total_s)[(len(runs) - 1) // 2]
