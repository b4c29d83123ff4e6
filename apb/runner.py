"""One rank's executor of requests: checks them, loads the model when first needed, runs the engine.

Requests and replies are JSON values, so that any launcher can carry them. Every rank of a gang gets
the same requests in the same order and yields the same replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from apb.agreement import together
from apb.attention.base import AttentionTarget
from apb.comm import Communicator
from apb.config import RunConfig, plugin_name
from apb.engine import Engine
from apb.errors import InputError
from apb.generation import Step, generate, logprobs
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.shape import model_shape
from apb.hf.target import HfTarget
from apb.hf.tokenizer import stop_ids
from apb.methods.decode import OWNER
from apb.methods.placement import Placement
from apb.methods.plan import PrefillPlan, RankRows
from apb.output import LayerFinding, RequestOutput
from apb.planning import Planner
from apb.progress import Progress
from apb.prompts.answer import AnswerText
from apb.prompts.needle import make_needle
from apb.report import RequestMeter
from apb.requests import Continuation, Given, Question, RequestReader
from apb.speculate.speculator import Speculator

Reply = dict[str, Any]
R = TypeVar("R", Question, Continuation)


class _Ready(NamedTuple):
    """A request that every rank has checked, with the engine to run it."""

    engine: Engine
    plan: PrefillPlan
    placement: Placement
    prepared_s: float
    """How long the checks took; loading is not among them."""
    findings: list[LayerFinding]
    """Of the audit, once the prefill has run."""
    rows: RankRows | None = None
    """What this rank has run, then."""


class RequestRunner:
    """Answers requests on one rank. The first request that passes its checks loads the weights."""

    def __init__(self, config: RunConfig, comm: Communicator) -> None:
        """Read configuration and tokenizer.

        Raises:
            InputError: the model is not there or not supported.
        """
        self._config, self._comm = config, comm
        self._hf_config = load_config(config.model)
        max_positions: int = self._hf_config.max_position_embeddings
        self._reader = RequestReader(config, max_positions=max_positions)
        self._eos_ids = stop_ids(config.model, self._hf_config, self._reader.tokenizer)
        self._dtype = choose_dtype(config.dtype, comm.device)
        self._method = config.method.build(seed=config.seed)
        shape = model_shape(self._hf_config)
        self._backend = config.backend.build(
            AttentionTarget(comm.device, self._dtype, shape.head_dim)
        )
        self._planner = Planner(config, comm, self._method, shape=shape, dtype=self._dtype)
        self._progress = Progress(enabled=config.progress and comm.rank == OWNER)
        self._engine: Engine | None = None
        self._speculator: Speculator | None = None

    def handle(
        self, op: str, arguments: dict[str, Any], is_cancelled: Callable[[], bool] = lambda: False
    ) -> Generator[Reply, None, None]:
        """Replies to one request: ``{"piece": text}`` as text arrives, then ``{"result": value}``.

        Raises:
            InputError: a bad request, the same on every rank.
            RequestError: the request failed while it ran, on every rank.
        """
        if op == "load":
            self._planner.agree_on_costs()
            together(self._comm, op, self._check_and_load)
            yield {"result": None}
        elif op == "needle":
            case = make_needle(self._reader.count_tokens, **arguments)
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

    def _check_and_load(self) -> Engine:
        if not self._config.allow_beyond_context:
            self._planner.check(self._hf_config.max_position_embeddings)
        return self._load()

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
                backend=self._backend,
                comm=self._comm,
                on_layer=self._progress.advance,
            )
            if self.is_owner:
                target = HfTarget(
                    model, self._reader.tokenizer, self._eos_ids, self._config.model.drafting_folder
                )
                self._speculator = Speculator(self._config.drafter, target)
        return self._engine

    def _prepare(self, arguments: object, read: Callable[[], R]) -> tuple[R, _Ready]:
        """Check and plan a request on all ranks, and load the model where that is still to do."""
        self._planner.agree_on_costs()

        def prepare() -> tuple[R, _Ready]:
            begin = time.perf_counter()
            request = read()
            plan = self._planner.plan(request.prompt)
            placement = self._planner.propose_placement(
                plan, room=request.room, weights_loaded=self._engine is not None
            )
            prepared_s = time.perf_counter() - begin
            return request, _Ready(self._load(), plan, placement, prepared_s, [])

        request, ready = together(self._comm, arguments, prepare)
        placement = self._planner.agree_on_placement(ready.placement)
        return request, ready._replace(placement=placement)

    def _ask(
        self,
        *,
        document: Given,
        question: Given,
        params: dict[str, Any],
        is_cancelled: Callable[[], bool],
    ) -> Generator[Reply, None, None]:
        request, ready = self._prepare(
            [document, question, params],
            partial(self._reader.question, document, question, params),
        )
        meter = RequestMeter(self._comm, prepared_s=ready.prepared_s)
        if self._speculator is not None:
            prompt_ids = [*request.prompt.context_ids, *request.prompt.query_ids]
            self._speculator.begin(prompt_ids, request.sampling)
        try:
            self._progress.begin("reading, layers", self._hf_config.num_hidden_layers)
            with meter.timeline.phase("prefill"):
                ready = self._read(request, ready)
            if self._speculator is not None and ready.rows is not None:
                self._speculator.read(ready.rows.positions, ready.rows.local)
            self._progress.begin("answering, tokens", request.sampling.max_tokens)
            output = yield from self._answer(request, ready, meter, is_cancelled)
        finally:
            self._progress.close()
            ready.engine.release()
        yield {"result": output.to_json()}

    def _read(self, request: Question | Continuation, ready: _Ready) -> _Ready:
        """Prefill; once more and exactly where the audit finds too large an error."""
        prefill = partial(
            ready.engine.prefill, request.prompt, room=request.room, placement=ready.placement
        )
        auditor = self._planner.auditor(ready.plan)
        rows = prefill(ready.plan, auditor=auditor)
        findings = [] if auditor is None else auditor.findings()
        limit = self._config.audit.max_error
        worst = max(findings, key=lambda finding: finding.output_error, default=None)
        if worst is None or limit is None or worst.output_error <= limit:
            return ready._replace(findings=findings, rows=rows)
        method, plan = self._planner.exact(request.prompt)
        self._progress.begin("reading exactly, layers", self._hf_config.num_hidden_layers)
        rows = prefill(plan, method=method)
        note = (
            f"the audit found an output error of {worst.output_error:.3f} in layer {worst.layer}, "
            f"above audit.max_error={limit}, so the document was read again with {plan.method}"
        )
        plan = replace(plan, notes=(*plan.notes, note))
        return ready._replace(findings=findings, plan=plan, rows=rows)

    def _answer(
        self,
        request: Question,
        ready: _Ready,
        meter: RequestMeter,
        is_cancelled: Callable[[], bool],
    ) -> Generator[Reply, None, RequestOutput]:
        """Decode after a prefill: yields the pieces of the text, returns the whole."""
        sampling = request.sampling
        eos_ids = () if sampling.ignore_eos else tuple(self._eos_ids)
        answer = AnswerText(
            self._reader.tokenizer,
            stop=sampling.stop,
            stop_ids=(*eos_ids, *sampling.stop_token_ids),
        )
        pieces, steps = list[str](), list[Step]()

        def is_last(token_id: int) -> bool:
            pieces.append(answer.push(token_id))
            return answer.stopped

        for step in generate(
            ready.engine,
            request.prompt.query_ids,
            sampling,
            timeline=meter.timeline,
            is_last=is_last,
            is_cancelled=is_cancelled,
            speculator=self._speculator,
            max_nodes=self._config.drafter.max_nodes,
        ):
            meter.first_token()
            if not self.is_owner:  # the owner's engine has asked already
                is_last(step.token_id)
            steps.append(step)
            self._progress.advance()
            yield {"piece": pieces.pop(0)}
        yield {"piece": answer.finish()}
        finish_reason = "stop" if answer.stopped else steps[-1].finish_reason or ""
        metrics = meter.metrics(
            request.prompt,
            ready.plan,
            ready.engine.report(meter.local(self._speculator)),
            method=plugin_name("method", self._config.method),
            backend=self._backend.name,
            drafter=plugin_name("drafter", self._config.drafter),
            placement=ready.placement,
            audit=ready.findings,
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
        self, *, document: Given, continuation: Given, query: Given | None
    ) -> list[float]:
        request, ready = self._prepare(
            [document, continuation, query],
            partial(self._reader.continuation, document, continuation, query),
        )
        try:
            self._read(request, ready)
            return logprobs(ready.engine, request.rows, request.targets)
        finally:
            ready.engine.release()
