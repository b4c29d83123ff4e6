"""One rank's executor of requests: checks them, loads the model when first needed, runs the engine.

Requests and replies are JSON values, so that any launcher can carry them. Every rank of a gang gets
the same requests in the same order and yields the same replies.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from apb.comm import Communicator, Kind, Tag
from apb.config import RunConfig, plugin_name
from apb.engine import Engine, Step
from apb.errors import InputError
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.tokenizer import load_tokenizer, stop_ids
from apb.methods.decode import OWNER
from apb.methods.plan import PrefillPlan
from apb.output import RequestOutput
from apb.progress import Progress
from apb.prompts.answer import AnswerText
from apb.prompts.base import PromptTokens
from apb.prompts.encode import checked_ids, control_tokens, encode_plain, start_ids
from apb.prompts.needle import make_needle
from apb.prompts.template import build_prompt
from apb.report import RequestMeter
from apb.sampling import SamplingParams

Reply = dict[str, Any]
T = TypeVar("T")


class _Ask(NamedTuple):
    """A question that has passed its checks, and the seconds they took."""

    engine: Engine
    prompt: PromptTokens
    plan: PrefillPlan
    sampling: SamplingParams
    prepared_s: float


class RequestRunner:
    """Answers requests on one rank. The first request that passes its checks loads the weights."""

    def __init__(self, config: RunConfig, comm: Communicator) -> None:
        """Read configuration and tokenizer.

        Raises:
            InputError: the model is not there or not supported.
        """
        self._config, self._comm = config, comm
        self._hf_config = load_config(config.model)
        self._tokenizer = load_tokenizer(config.model)
        self._max_positions: int = self._hf_config.max_position_embeddings
        self._eos_ids = stop_ids(config.model, self._hf_config, self._tokenizer)
        self._method = config.method.build(seed=config.seed)
        self._dtype = choose_dtype(config.dtype, comm.device)
        self._progress = Progress(enabled=comm.rank == OWNER)
        self._engine: Engine | None = None

    def handle(
        self, op: str, arguments: dict[str, Any], is_cancelled: Callable[[], bool] = lambda: False
    ) -> Generator[Reply, None, None]:
        """Replies to one request: ``{"piece": text}`` as text arrives, then ``{"result": value}``.

        Raises:
            InputError: a bad request, the same on every rank and before any rank communicates.
            RequestError: the request failed while it ran, on every rank.
        """
        if op == "load":
            self._together(op, self._load)
            yield {"result": None}
        elif op == "needle":
            case = make_needle(self._count_tokens, **arguments)
            fields = {"document": case.document, "question": case.question, "answer": case.answer}
            yield {"result": fields}
        elif op == "ask":
            yield from self._ask(**arguments, is_cancelled=is_cancelled)
        elif op == "logprobs":
            yield {"result": self._logprobs(**arguments)}
        else:
            raise InputError(f"unknown request {op!r}")

    @property
    def is_owner(self) -> bool:
        """Whether this rank's replies are the ones to pass on."""
        return self._comm.rank == OWNER

    def _together(self, request: object, prepare: Callable[[], T]) -> T:
        """`prepare` on every rank; all ranks raise unless all succeed, and on the same request.

        What can fail on one rank alone, such as reading weights, belongs in `prepare`: a rank that
        failed later would leave the others waiting for it.
        """
        result, cause = None, None
        try:
            result = prepare()
        except InputError as error:
            cause = str(error)
        digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()
        tag = Tag(0, 0, Kind.REPORT)
        for rank, (theirs, failure) in enumerate(self._comm.all_gather_json([digest, cause], tag)):
            if failure is not None:
                raise InputError(failure if cause == failure else f"rank {rank}: {failure}")
            if theirs != digest:
                raise InputError(f"rank {rank} was given another request than this rank")
        return cast(T, result)

    def _load(self) -> Engine:
        """The engine; the first call loads the weights."""
        if self._engine is None:
            model = CausalLM.load(
                self._config.model,
                dtype=self._dtype,
                device=self._comm.device,
                chunk_len=self._config.runtime.chunk_len,
            )
            self._engine = Engine(
                model=model,
                method=self._method,
                backend=self._config.backend.build(),
                comm=self._comm,
                on_layer=self._progress.advance,
            )
        return self._engine

    def _ask(
        self,
        *,
        document: str | list[int],
        question: str | list[int],
        params: dict[str, Any],
        is_cancelled: Callable[[], bool],
    ) -> Generator[Reply, None, None]:
        prepare = partial(self._prepare_ask, document, question, params)
        ask = self._together([document, question, params], prepare)
        engine, room = ask.engine, len(ask.prompt.query_ids) + ask.sampling.max_tokens
        meter = RequestMeter(self._comm, prepared_s=ask.prepared_s)
        try:
            self._progress.begin("reading, layers", self._hf_config.num_hidden_layers)
            with meter.timeline.phase("prefill"):
                engine.prefill(ask.prompt, ask.plan, room=room)
            self._progress.begin("answering, tokens", ask.sampling.max_tokens)
            output = yield from self._answer(ask, meter, is_cancelled)
        finally:
            self._progress.close()
            engine.release()
        yield {"result": output.to_json()}

    def _prepare_ask(
        self, document: str | list[int], question: str | list[int], params: dict[str, Any]
    ) -> _Ask:
        begin = time.perf_counter()
        prompt = build_prompt(
            self._tokenizer,
            document,
            question,
            template=self._config.model.template,
            user_template=self._config.model.user_template,
        )
        sampling = SamplingParams(**params)
        sampling = replace(sampling, max_tokens=self._room(prompt, sampling.max_tokens))
        plan = self._plan(prompt)
        prepared_s = time.perf_counter() - begin
        return _Ask(self._load(), prompt, plan, sampling, prepared_s)

    def _answer(
        self, ask: _Ask, meter: RequestMeter, is_cancelled: Callable[[], bool]
    ) -> Generator[Reply, None, RequestOutput]:
        """Decode after a prefill: yields the pieces of the text, returns the whole."""
        sampling = ask.sampling
        eos_ids = () if sampling.ignore_eos else tuple(self._eos_ids)
        answer = AnswerText(
            self._tokenizer, stop=sampling.stop, stop_ids=(*eos_ids, *sampling.stop_token_ids)
        )
        piece, steps = "", list[Step]()

        def is_last(token_id: int) -> bool:
            nonlocal piece
            piece = answer.push(token_id)
            return answer.stopped

        for step in ask.engine.generate(
            ask.prompt.query_ids,
            sampling,
            timeline=meter.timeline,
            is_last=is_last,
            is_cancelled=is_cancelled,
        ):
            meter.first_token()
            if not self.is_owner:  # the owner's engine has asked already
                is_last(step.token_id)
            steps.append(step)
            self._progress.advance()
            yield {"piece": piece}
        yield {"piece": answer.finish()}
        finish_reason = "stop" if answer.stopped else steps[-1].finish_reason or ""
        metrics = meter.metrics(
            ask.prompt,
            ask.plan,
            ask.engine.report(meter.local()),
            method=plugin_name("method", self._config.method),
            dtype=self._dtype,
            generated=len(steps),
        )
        return RequestOutput(
            text=answer.text,
            token_ids=[step.token_id for step in steps],
            finish_reason=finish_reason,
            metrics=metrics,
        )

    def _logprobs(
        self,
        *,
        document: str | list[int],
        continuation: str | list[int],
        query: str | list[int] | None,
    ) -> list[float]:
        def prepare() -> tuple[Engine, PromptTokens, PrefillPlan, list[int], list[int]]:
            document_ids = self._raw_ids(document, "document", at_start=True)
            targets = self._raw_ids(continuation, "continuation")
            steer = [] if query is None else self._raw_ids(query, "query")
            if len(document_ids) < 2:
                raise InputError("the document has one token and logprobs needs at least two")
            length = len(document_ids) + len(targets) - 1
            self._check_length(length, len(targets) - 1, "continuation")
            # The last document token is the first row that predicts; the context precedes it.
            prompt = PromptTokens((), tuple(document_ids[:-1]), tuple(steer))
            rows = [document_ids[-1], *targets[:-1]]
            return self._load(), prompt, self._plan(prompt), rows, targets

        request = [document, continuation, query]
        engine, prompt, plan, rows, targets = self._together(request, prepare)
        try:
            engine.prefill(prompt, plan, room=len(rows))
            return engine.logprobs(rows, targets)
        finally:
            engine.release()

    def _raw_ids(self, part: str | list[int], name: str, *, at_start: bool = False) -> list[int]:
        """Token ids without a template; text at the start gets what the tokenizer begins with."""
        if isinstance(part, str):
            controls = control_tokens(self._tokenizer, "")
            ids = start_ids(self._tokenizer) if at_start else []
            ids += encode_plain(self._tokenizer, part, controls=controls, name=name)
        else:
            ids = checked_ids(part, vocab_size=len(self._tokenizer), name=name)
        if not ids:
            raise InputError(f"the {name} is empty; give at least one token")
        return ids

    def _plan(self, prompt: PromptTokens) -> PrefillPlan:
        return self._method.plan(
            prompt, world_size=self._comm.world_size, num_blocks=self._config.num_blocks
        )

    def _room(self, prompt: PromptTokens, max_tokens: int) -> int:
        """How many tokens can be generated: `max_tokens`, or what the model's positions leave."""
        used = len(prompt.context_ids) + len(prompt.query_ids)
        self._check_length(used + 1, used - len(prompt.document_ids) + 1, "question and template")
        if self._config.allow_beyond_context:
            return max_tokens
        return min(max_tokens, self._max_positions - used)

    def _check_length(self, length: int, reserved: int, what: str) -> None:
        limit = self._max_positions
        if length > limit and not self._config.allow_beyond_context:
            raise InputError(
                f"the prompt has {length} tokens and the model reads at most {limit}: shorten the "
                f"document to {max(0, limit - reserved)} tokens ({what} need {reserved}) or set "
                "allow_beyond_context=true"
            )

    def _count_tokens(self, text: str) -> int:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return len(list(ids))
