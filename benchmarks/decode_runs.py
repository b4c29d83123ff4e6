"""Decoding with apb's drafters and with Hugging Face `generate`, in one process, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from apb.comm import Communicator
from apb.config import compose_config, named_model
from apb.cost import NOMINAL_CPU, CostModel
from apb.engine import Engine
from apb.generation import generate
from apb.hf.model import DTYPES, CausalLM, load_config
from apb.hf.target import HfTarget
from apb.hf.tokenizer import load_tokenizer, stop_ids
from apb.methods.full import FullConfig
from apb.methods.plan import PlanRequest
from apb.metrics import Timeline
from apb.prompts.base import PromptTokens
from apb.sampling import SamplingParams
from apb.speculate.speculator import Speculator
from apb.worker import choose_device
from benchmarks.decode_tasks import Task

HF_LOOKUP_TOKENS = 10
_NEAR_TIE = 1e-3
_TIE_ULPS = 4
"""Logits closer than this, or than so many of their dtype's roundings, may fall either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One answer. Seconds and tokens are those behind the first token, or the first few."""

    variant: str
    category: str
    task: str
    seconds: float
    token_ids: list[int]
    steps: int | None = None
    nodes: int | None = None
    draft_s: float | None = None
    with_first: int = 1
    """Tokens that came with the first."""

    @property
    def tokens(self) -> int:
        return len(self.token_ids) - self.with_first

    @property
    def rate(self) -> float:
        """Tokens per second; 0 where the answer ended with its first tokens."""
        return self.tokens / self.seconds if self.seconds else 0.0


class ApbLab:
    """One model; each task is read once and answered with every drafter.

    Drafters are kept from task to task, as they are from request to request.
    """

    def __init__(self, overrides: Sequence[str], *, dtype: str, max_tokens: int) -> None:
        config = compose_config(overrides)
        device = choose_device(config.device, 0)
        self.model = CausalLM.load(config.model, dtype=DTYPES[dtype], device=device)
        tokenizer = load_tokenizer(config.model)
        stops = stop_ids(config.model, load_config(config.model), tokenizer)
        self._target = HfTarget(
            self.model, tokenizer, stops, config.model.drafting_folder, named_model
        )
        self._params = SamplingParams(max_tokens=max_tokens)
        self._overrides = list(overrides)
        self._stops = stops
        self._speculators: dict[str, Speculator] = {}
        self._engine = Engine(
            model=self.model,
            method=FullConfig().build(seed=0),
            backend=config.backend.build(self.model.attention_target),
            comm=Communicator(0, 1, self.model.device),
        )

    def read(self, task: Task) -> None:
        """Prefill, with room for the answer and the largest tree."""
        prompt = PromptTokens((), task.context_ids, task.query_ids)
        costs = CostModel(
            shape=self.model.shape, rates=NOMINAL_CPU, itemsize=self.model.dtype.itemsize
        )
        request = PlanRequest.of(prompt, world_size=1, num_blocks=None, costs=costs)
        plan = FullConfig().build(seed=0).plan(request)
        room = len(task.query_ids) + self._params.max_tokens + 64
        self._engine.prefill(prompt, plan, room=room)

    def answer(self, task: Task, drafter: str) -> Run:
        """Decode greedily, then forget the answer."""
        config = compose_config([*self._overrides, f"drafter={drafter}"]).drafter
        speculator = self._speculators.get(drafter)
        if speculator is None:
            speculator = self._speculators[drafter] = Speculator(config, self._target)
        speculator.begin([*task.context_ids, *task.query_ids], self._params)
        timeline = Timeline(self.model.device)
        token_ids = [
            step.token_id
            for step in generate(
                self._engine,
                task.query_ids,
                self._params,
                timeline=timeline,
                is_last=self._stops.__contains__,
                speculator=speculator,
                max_nodes=config.max_nodes,
            )
        ]
        self._engine.rewind(self._engine.next_position - len(task.context_ids))
        stats = speculator.stats
        return Run(
            variant=drafter,
            category=task.category,
            task=task.name,
            seconds=timeline.phases_s["decode"],
            token_ids=token_ids,
            steps=stats.steps,
            nodes=stats.nodes,
            draft_s=stats.draft_s,
        )

    def gap(self, task: Task, token_ids: Sequence[int]) -> tuple[float, float]:
        """How far the two likeliest tokens behind those are apart, in logits, and what is a tie:
        the rounding of sums depends on the rows of a pass.
        """
        hidden_TM = self._engine.extend([*task.query_ids, *token_ids])
        best = self.model.logits(hidden_TM[-1:])[0].topk(2).values.float()
        self._engine.rewind(len(task.query_ids) + len(token_ids))
        rounded = _TIE_ULPS * torch.finfo(self.model.dtype).eps * float(best[0].abs())
        return float(best[0] - best[1]), max(_NEAR_TIE, rounded)

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer."""
        return sorted(self._stops)


class _Watch(BaseStreamer):
    """Notes when the first new tokens came, and how many those were."""

    def __init__(self) -> None:
        self._puts, self.first, self.with_first = 0, 0.0, 1

    def put(self, value: Tensor) -> None:
        self._puts += 1
        if self._puts == 2:  # the prompt comes first
            self.first, self.with_first = time.perf_counter(), value.numel()

    def end(self) -> None:
        """Nothing to do."""


def hf_answer(
    model: Any, task: Task, *, lookup: bool, max_tokens: int, stop_ids: Sequence[int]
) -> Run:
    """Hugging Face `generate`, plain or with its prompt lookup."""
    options: dict[str, Any] = {"prompt_lookup_num_tokens": HF_LOOKUP_TOKENS} if lookup else {}
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(stop_ids),
        **options,
    )
    prompt_ids = [*task.context_ids, *task.query_ids]
    watch = _Watch()
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([prompt_ids], device=model.device),
            generation_config=config,
            streamer=watch,
        )
    return Run(
        variant="hf-lookup" if lookup else "hf",
        category=task.category,
        task=task.name,
        seconds=time.perf_counter() - watch.first,
        token_ids=output[0, len(prompt_ids) :].tolist(),
        with_first=watch.with_first,
    )
