"""One model with an engine per method, and what a quality benchmark does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from apb.comm import Communicator
from apb.config import compose_config
from apb.cost import NOMINAL_CPU, CostModel
from apb.engine import Engine
from apb.generation import generate
from apb.hf.compressor_target import compressor_target
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.tokenizer import load_tokenizer, stop_ids
from apb.layout import SequenceLayout
from apb.methods.plan import PlanRequest
from apb.metrics import Timeline
from apb.plugins import PLUGINS
from apb.prompts.answer import AnswerText
from apb.prompts.base import PromptTokens
from apb.prompts.encode import control_tokens, encode_plain, start_ids
from apb.prompts.needle import NeedleCase
from apb.prompts.template import build_prompt
from apb.sampling import SamplingParams
from apb.scoring import logprobs
from apb.trace.records import Phase
from apb.worker import choose_device

REFERENCE = "full"
_APB = ("method=apb", "method.anchor=shared", "method.layout=balanced")
_PAPER = ("method=apb", "method.anchor=replicated", "method.layout=even")
METHODS: Mapping[str, tuple[str, ...]] = {
    REFERENCE: ("method=full",),
    "star": ("method=star",),
    **{
        f"apb-{name}": (*_APB, f"method/compressor={name}") for name in PLUGINS["method/compressor"]
    },
    **{
        f"apb-{name}-unpooled": (*_APB, f"method/compressor={name}", "method.compressor.kernel=1")
        for name in ("window", "query", "retaining_head")
    },
    "apb-window-paper": (*_PAPER, "method/compressor=window"),
    "apb-query-paper": (*_PAPER, "method/compressor=query"),
    "apb-window-int8": (*_APB, "method/compressor=window", "method.wire=int8"),
}
"""Name in the report to Hydra overrides. The first is what the others are compared with."""


def variants(names: Sequence[str], passing: Sequence[float]) -> dict[str, tuple[str, ...]]:
    """The methods named, `full` first, and those that pass blocks on once for each length."""
    chosen = {name: METHODS[name] for name in METHODS if name in {REFERENCE, *names}}
    found = {}
    for name, overrides in chosen.items():
        if not passing or "method=apb" not in overrides:
            found[name] = overrides
            continue
        for share in passing:
            found[f"{name}@{share:g}"] = (*overrides, f"method.passing_len={share}")
    return found


class Lab:
    """Runs one document at a time with any of the methods, on one rank.

    Plans are those of one rank per block; what is computed does not depend on where blocks run.
    """

    def __init__(
        self, overrides: Sequence[str], methods: Mapping[str, Sequence[str]], *, num_blocks: int
    ) -> None:
        """Load the model.

        Raises:
            InputError: a wrong setting, or the model is not there.
        """
        self._configs = {name: compose_config([*overrides, *own]) for name, own in methods.items()}
        config = self._config = self._configs[REFERENCE]
        self.device = choose_device(config.device, 0)
        hf_config = load_config(config.model)
        self.max_positions = int(hf_config.max_position_embeddings)
        dtype = choose_dtype(config.dtype, self.device)
        target = compressor_target(config.model, hf_config, device=self.device, dtype=dtype)
        self._methods = {
            name: settings.method.build(seed=config.seed)
            for name, settings in self._configs.items()
        }
        for method in self._methods.values():
            method.attach(target)
        self._tokenizer = load_tokenizer(config.model)
        self._stop_ids = tuple(stop_ids(config.model, hf_config, self._tokenizer))
        self._model = CausalLM.load(config.model, dtype=dtype, device=self.device)
        self._num_blocks = num_blocks
        self._engine: Engine | None = None

    def describe(self) -> dict[str, str]:
        """Each method with its settings."""
        return {name: repr(config.method) for name, config in self._configs.items()}

    def prompt(self, case: NeedleCase) -> PromptTokens:
        model = self._config.model
        return build_prompt(
            self._tokenizer,
            case.document,
            case.question,
            **model.prompt_settings,
        )

    def encode(self, text: str, *, at_start: bool = False) -> list[int]:
        """Token ids without a template; at the start with what the tokenizer begins with."""
        ids = start_ids(self._tokenizer) if at_start else []
        controls = control_tokens(self._tokenizer, "")
        return ids + encode_plain(self._tokenizer, text, controls=controls, name="text")

    def count_tokens(self, text: str) -> int:
        return len(self.encode(text))

    def prefill(self, method: str, prompt: PromptTokens, *, room: int) -> float:
        """Read the context with `method`; returns the seconds that took."""
        num_blocks = None if method == REFERENCE else self._num_blocks
        costs = CostModel(
            shape=self._model.shape, rates=NOMINAL_CPU, itemsize=self._model.dtype.itemsize
        )
        plan = self._methods[method].plan(
            PlanRequest.of(prompt, world_size=num_blocks or 1, num_blocks=num_blocks, costs=costs)
        )
        lengths = [len(block) for block in plan.layout.blocks]
        here = SequenceLayout.from_lengths(lengths, [0] * len(lengths), world_size=1)
        self._engine = Engine(
            model=self._model,
            method=self._methods[method],
            backend=self._config.backend.build(self._model.attention_target),
            comm=Communicator(0, 1, self.device),
        )
        timeline = Timeline(self.device)
        with timeline.phase(Phase.PREFILL):
            self._engine.prefill(prompt, replace(plan, layout=here), room=room)
        return timeline.phases_s[Phase.PREFILL]

    def answer_logprob(self, query_ids: Sequence[int], answer_ids: Sequence[int]) -> float:
        """Log-probability per token of an answer after context and query, which stays unread."""
        assert self._engine is not None, "answer_logprob before prefill"
        rows = [*query_ids, *answer_ids[:-1]]
        values = logprobs(self._engine, rows, [*query_ids[1:], *answer_ids])[-len(answer_ids) :]
        self._engine.rewind(len(rows))
        return sum(values) / len(values)

    def answer(self, query_ids: Sequence[int], *, max_tokens: int) -> str:
        """The model's own answer, greedy."""
        assert self._engine is not None, "answer before prefill"
        text = AnswerText(self._tokenizer, stop_ids=self._stop_ids)

        def is_last(token_id: int) -> bool:
            text.push(token_id)
            return text.stopped

        steps = generate(
            self._engine,
            query_ids,
            SamplingParams(max_tokens=max_tokens),
            timeline=Timeline(self.device),
            is_last=is_last,
        )
        for _ in steps:
            pass
        text.finish()
        return text.text

    def continuation_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """Log-probabilities ``[T, V]`` of whatever follows each token after the context."""
        assert self._engine is not None, "continuation_logprobs before prefill"
        with torch.inference_mode():
            return self._model.logits(self._engine.extend(token_ids)).log_softmax(dim=-1)
