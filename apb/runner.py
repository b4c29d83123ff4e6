"""One rank's executor of requests: checks them, loads the model when first needed, runs the engine.

Requests and replies are JSON values, so that any launcher can carry them. Every rank of a gang gets
the same requests in the same order and yields the same replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

from apb.agreement import together
from apb.attention.base import AttentionBackend, AttentionTarget
from apb.comm import Communicator
from apb.config import RunConfig, named_model, plugin_name, recompose_config
from apb.engine import Engine
from apb.errors import InputError, NotFiniteError, RequestError
from apb.generation import Step, generate
from apb.heartbeat import Pulse, Stage
from apb.hf.compressor_target import compressor_target
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.shape import model_shape
from apb.hf.target import HfTarget
from apb.hf.tokenizer import stop_ids
from apb.interrupt import Interrupt
from apb.methods.audit import Auditor
from apb.methods.base import AttentionMethod
from apb.methods.decode import OWNER
from apb.methods.plan import Reduced
from apb.output import RequestOutput
from apb.planning import Planner, Ready
from apb.progress import Progress
from apb.report import RequestMeter, new_trace
from apb.requests import Continuation, Question, RequestReader
from apb.scoring import divergence, likelihood
from apb.speculate.speculator import Speculator
from apb.trace.records import Phase

Reply = dict[str, Any]
R = TypeVar("R", Question, Continuation)
_Parts = tuple[AttentionMethod, AttentionBackend]


class RequestRunner:
    """Answers requests on one rank. The first request that passes its checks loads the weights."""

    def __init__(
        self,
        config: RunConfig,
        comm: Communicator,
        pulse: Pulse | None = None,
        reduced: Reduced | None = None,
    ) -> None:
        """Read configuration and tokenizer. `pulse` is told what the rank is busy with.

        Raises:
            InputError: the model is not there or not supported, or does not fit the compressor.
        """
        self._config, self._comm, self._pulse = config, comm, pulse or Pulse()
        self._interrupt = Interrupt(comm)
        self._hf_config = load_config(config.model)
        self._shape = model_shape(self._hf_config)
        self._reader = RequestReader(config, max_positions=self._hf_config.max_position_embeddings)
        self._eos_ids = stop_ids(config.model, self._hf_config, self._reader.tokenizer)
        self._dtype = choose_dtype(config.dtype, comm.device)
        self._planner_of = partial(
            Planner, comm=comm, shape=self._shape, dtype=self._dtype, reduced=reduced
        )
        self._progress = Progress(enabled=config.progress and comm.rank == OWNER)
        self._model: CausalLM | None = None
        self._speculator: Speculator | None = None
        self._configure(config, self._parts(config))

    def _parts(self, config: RunConfig) -> _Parts:
        device, dtype = self._comm.device, self._dtype
        method = config.method.build(seed=config.seed)
        method.attach(compressor_target(config.model, self._hf_config, device=device, dtype=dtype))
        return method, config.backend.build(AttentionTarget(device, dtype, self._shape.head_dim))

    def _configure(self, config: RunConfig, parts: _Parts) -> None:
        """Take settings under which loaded weights stay as they are."""
        if self._model is not None and config.drafter != self._config.drafter:
            self._speculator = None
        self._config, (self._method, self._backend) = config, parts
        self._trace = self._comm.trace = new_trace(self._comm, enabled=config.trace)
        self._planner = self._planner_of(config, method=self._method)
        self._engine: Engine | None = None

    def handle(
        self, op: str, arguments: dict[str, Any], is_cancelled: Callable[[], bool] = lambda: False
    ) -> Generator[Reply, None, None]:
        """Replies to one request: ``{"piece": text}`` as text arrives, then ``{"result": value}``.

        Raises:
            InputError: a bad request, the same on every rank.
            RequestError: the request failed while it ran, on every rank.
        """
        arguments = dict(arguments)
        timeout_s = arguments.pop("timeout_s", None)
        self._interrupt = Interrupt(self._comm, is_cancelled=is_cancelled, timeout_s=timeout_s)
        self._pulse.take_request()
        self._trace.begin()
        try:
            self._pulse.enter(Stage.LOAD)
            yield from self._replies(op, arguments)
        except (InputError, RequestError, GeneratorExit):
            self._pulse.enter(Stage.IDLE)
            raise
        self._pulse.enter(Stage.IDLE)  # what else is raised leaves the place where it happened

    def _replies(self, op: str, arguments: dict[str, Any]) -> Generator[Reply, None, None]:
        if op == "load":
            self._planner.agree_on_costs()
            together(self._comm, op, self._check_and_load)
            yield {"result": None}
        elif op == "needle":
            yield {"result": self._reader.needle(**arguments)}
        elif op == "configure":
            config = recompose_config(self._config, arguments["overrides"])
            self._configure(config, together(self._comm, arguments, partial(self._parts, config)))
            yield {"result": None}
        elif op == "ask":
            yield from self._ask(arguments)
        elif op in ("likelihood", "divergence"):
            yield {"result": self._score(op, arguments)}
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
        model = self._model = self._model or CausalLM.load(
            self._config.model,
            dtype=self._dtype,
            device=self._comm.device,
            chunk_len=self._config.runtime.chunk_len,
        )
        self._engine = self._engine or Engine(
            model=model,
            method=self._method,
            backend=self._backend,
            comm=self._comm,
            on_layer=self._after_layer,
            interrupt=lambda is_last: self._interrupt.after_layer(is_last),
            trace=self._trace,
        )
        if self.is_owner and self._speculator is None:
            drafting = self._config.model.drafting_folder
            target = HfTarget(model, self._reader.tokenizer, self._eos_ids, drafting, named_model)
            self._speculator = Speculator(self._config.drafter, target)
        return self._engine

    def _after_layer(self, layer_idx: int) -> None:
        self._progress.advance()
        self._pulse.reach(layer_idx + 1)

    def _prepare(self, arguments: object, read: Callable[[], R]) -> tuple[R, Ready]:
        """Check and plan a request on all ranks, and load the model where that is still to do."""
        self._planner.agree_on_costs()

        def prepare() -> tuple[R, Ready]:
            begin = time.perf_counter()
            with self._trace.span(Phase.PLAN):
                request = read()
                plan = self._planner.plan(request.prompt)
                placement = self._planner.propose_placement(
                    plan, room=request.room, weights_loaded=self._model is not None
                )
            prepared_s = time.perf_counter() - begin
            with self._trace.span(Phase.LOAD):
                return request, Ready(self._load(), plan, placement, prepared_s, [])

        request, ready = together(self._comm, arguments, prepare)
        placement = self._planner.agree_on_placement(ready.placement)
        return request, ready._replace(placement=placement)

    def _ask(self, arguments: dict[str, Any]) -> Generator[Reply, None, None]:
        read = partial(self._reader.question, **arguments)
        request, ready = self._prepare(arguments, read)
        meter = RequestMeter(self._comm, prepared_s=ready.prepared_s, trace=self._trace)
        if self._speculator is not None:
            prompt_ids = [*request.prompt.context_ids, *request.prompt.query_ids]
            self._speculator.begin(prompt_ids, request.sampling)
        try:
            self._progress.begin("reading, layers", self._hf_config.num_hidden_layers)
            with meter.timeline.phase(Phase.PREFILL):
                ready = self._read(request, ready)
            if self._speculator is not None and ready.rows is not None:
                self._speculator.read(ready.rows.positions, ready.rows.local)
            self._progress.begin("answering, tokens", request.sampling.max_tokens)
            output = yield from self._answer(request, ready, meter)
        except NotFiniteError as error:
            raise RequestError(f"{error}; {ready.engine.where_not_finite()}") from error
        finally:
            self._progress.close()
            ready.engine.release()
        yield {"result": output.to_json()}

    def _read(self, request: Question | Continuation, ready: Ready) -> Ready:
        """Prefill; once more and exactly where the audit finds too large an error."""
        auditor = self._planner.auditor(ready.plan)
        ready = self._prefill(request, ready, auditor)
        findings = [] if auditor is None else auditor.findings()
        limit = self._config.audit.max_error
        worst = max(findings, key=lambda finding: finding.output_error, default=None)
        if worst is not None and limit is not None and worst.output_error > limit:
            method, plan = self._planner.exact_instead(request.prompt, worst)
            self._progress.begin("reading exactly, layers", self._hf_config.num_hidden_layers)
            ready = self._prefill(request, ready._replace(plan=plan, method=method))
        return ready._replace(findings=findings)

    def _prefill(
        self, request: Question | Continuation, ready: Ready, auditor: Auditor | None = None
    ) -> Ready:
        self._pulse.enter(Stage.PREFILL, expected_s=self._planner.layer_s(ready.plan, ready.method))
        return ready.prefilled(request.prompt, room=request.room, auditor=auditor)

    def _answer(
        self, request: Question, ready: Ready, meter: RequestMeter
    ) -> Generator[Reply, None, RequestOutput]:
        """Decode after a prefill: yields the pieces of the text, returns the whole."""
        sampling = request.sampling
        answer = self._reader.answer(sampling, self._eos_ids)
        pieces, steps = list[str](), list[Step]()
        query_len = len(request.prompt.query_ids)
        step_s = self._planner.step_s(ready.plan, query_len=query_len)
        self._pulse.enter(Stage.DECODE, expected_s=step_s)

        def is_last(token_id: int) -> bool:
            pieces.append(answer.push(token_id))
            return answer.stopped

        for step in generate(
            ready.engine,
            request.prompt.query_ids,
            sampling,
            timeline=meter.timeline,
            is_last=is_last,
            is_cancelled=self._interrupt.is_due,
            speculator=self._speculator,
            max_nodes=self._config.drafter.max_nodes,
        ):
            meter.first_token()
            if not self.is_owner:  # the owner's engine has asked already
                is_last(step.token_id)
            steps.append(step)
            self._progress.advance()
            self._pulse.reach(len(steps))
            yield {"piece": pieces.pop(0)}
        yield {"piece": answer.finish()}
        finish_reason = "stop" if answer.stopped else steps[-1].finish_reason or ""
        if finish_reason == "cancelled":
            self._interrupt.check_deadline()
        metrics = meter.metrics(
            request.prompt,
            ready.plan,
            ready.engine.report(meter.local(self._speculator)),
            model=self._config.model.name,
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
            trace=meter.run_trace(ready.engine.attended(), answer.token_texts()),
        )

    def _score(self, op: str, arguments: dict[str, Any]) -> dict[str, list[float]]:
        read = partial(self._reader.continuation, **arguments)
        request, ready = self._prepare([op, arguments], read)
        rows_of = partial(Ready.scored_rows, rows=request.rows, reread=request.reread)
        try:
            ready = self._read(request, ready)
            self._pulse.enter(Stage.DECODE, expected_s=self._planner.prefill_s(ready.plan))
            own_TM = rows_of(ready).clone()
            if op == "likelihood":
                return likelihood(ready.engine, own_TM, request.targets)._asdict()
            method, plan = self._planner.exact(request.prompt)
            ready = self._prefill(request, ready._replace(plan=plan, method=method))
            return divergence(ready.engine, own_TM, rows_of(ready), request.targets)._asdict()
        finally:
            ready.engine.release()
