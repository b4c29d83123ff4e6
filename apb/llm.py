"""The Python interface: ask questions about long documents."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self, TypeVar

from apb.config import check_timeout, compose_config, model_names, quoted
from apb.errors import InputError, RequestError
from apb.launchers.base import Session
from apb.launchers.opening import open_session
from apb.output import Divergence, Likelihood, RequestOutput
from apb.sampling import SamplingParams

T = TypeVar("T")
Tokens = str | Sequence[int]
"""Text, or token ids of the model's tokenizer."""


class LLM:
    """A model spread over ranks that stay up between requests. One request runs at a time.

    Args:
        model: a name in `conf/model/`, a local folder, a GGUF file or a Hub id.
        world_size: ranks that `launcher="local"` and `"ray"` start; by default one per GPU, or one.
        launcher: `local` (processes of this machine), `ray` (actors of a cluster), `torchrun`
            (inside one: every rank calls and every rank gets the result) or `auto`.
        overrides: any Hydra override, such as ``"method.anchor_len=256"``.
        settings: shorthand for the common ones: `method`, `backend`, `drafter`, `dtype`, `device`,
            `num_blocks`, `seed`, `allow_beyond_context`, `on_failure`, `on_rank_loss`,
            `request_timeout_s`.

    Raises:
        InputError: a wrong setting or model, before weights are read.
        EngineDeadError: a rank did not come up.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        world_size: int | None = None,
        launcher: str = "auto",
        overrides: Sequence[str] = (),
        **settings: str | float | bool,
    ) -> None:
        named = {"launcher": launcher, "world_size": world_size, **settings}
        shorthand = [
            f"{name}={_override_value(value)}" for name, value in named.items() if value is not None
        ]
        self._start([*_model_overrides(os.fspath(model)), *shorthand, *overrides])
        try:
            _result(self._session.call("load"))
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_overrides(cls, overrides: Sequence[str]) -> LLM:
        """An LLM from Hydra overrides alone; its first request starts ranks and loads weights."""
        llm = cls.__new__(cls)
        llm._start(overrides)
        return llm

    def _start(self, overrides: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._overrides = tuple(overrides)
        self._opened: Session | None = None
        self.config = compose_config(overrides)

    def start(self) -> None:
        """Start the ranks if they are not there yet, as the first request would."""
        if self._opened is None:
            self._opened = open_session(self.config, lambda: self._overrides)

    @property
    def is_dead(self) -> bool:
        """Whether the ranks are gone and no others have been started in their place."""
        return self._opened is not None and self._opened.failure() is not None

    @property
    def world_size(self) -> int:
        """How many ranks there are, or were before the first was lost."""
        return self.config.world_size or self._session.world_size

    @property
    def _session(self) -> Session:
        self.start()
        assert self._opened is not None
        return self._opened

    def configure(self, overrides: Sequence[str]) -> None:
        """Take other settings from the next request on; ranks and weights stay.

        `overrides` are all of them, as `from_overrides` takes them.

        Raises:
            InputError: they are wrong, or need other ranks or weights; nothing has changed then.
        """
        config = compose_config(overrides)
        with self._request():
            _result(self._session.call("configure", overrides=list(overrides)))
            self.config, self._overrides = config, tuple(overrides)

    def ask(
        self,
        document: Tokens,
        question: Tokens,
        params: SamplingParams | None = None,
        *,
        answer_start: str = "",
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """The answer to a question about a document; it goes on from `answer_start`, if given.

        `params` are by default those of the settings `decode` and `seed`.
        `timeout_s`, by default the setting `request_timeout_s`, counts from when the ranks take the
        request; it ends within two layers or a token after that.

        Raises:
            InputError: an empty or too long document or question; the LLM stays usable.
            RequestError: the request failed while it ran, or took too long; the LLM stays usable.
            EngineDeadError: the ranks are gone; others follow unless ``on_failure=stop``.
        """
        with self._request():
            replies = self._asked(document, question, params, answer_start, timeout_s)
            return RequestOutput.from_json(_result(replies))

    def stream(
        self,
        document: Tokens,
        question: Tokens,
        params: SamplingParams | None = None,
        *,
        answer_start: str = "",
        timeout_s: float | None = None,
    ) -> Generator[str, None, RequestOutput]:
        """As `ask`, the text in pieces as they become certain. Closing the iterator cancels it.

        The whole is the generator's value: ``output = yield from llm.stream(...)``.
        """
        with self._request():
            reply: dict[str, Any] = {}
            replies = self._asked(document, question, params, answer_start, timeout_s)
            with closing(replies):
                for reply in replies:
                    if reply.get("piece"):
                        yield reply["piece"]
            return RequestOutput.from_json(reply["result"])

    def logprobs(
        self, document: Tokens, continuation: Tokens, query: Tokens | None = None
    ) -> list[float]:
        """Log-probability of each continuation token after the document, without any template.

        `query` only steers what is compressed; it is not part of the text.
        """
        return self.likelihood(document, continuation, query).logprobs

    def likelihood(
        self, document: Tokens, continuation: Tokens, query: Tokens | None = None
    ) -> Likelihood:
        """As `logprobs`, and whether each token is the one that greedy decoding would take."""
        with self._request():
            arguments = _continuation_arguments(document, continuation, query)
            replies = self._session.call("likelihood", **arguments, **self._limits(None))
            return Likelihood(**_result(replies))

    def divergence(
        self, document: Tokens, continuation: Tokens, query: Tokens | None = None
    ) -> Divergence:
        """As `logprobs`, beside exact attention over the same document, which is read twice."""
        with self._request():
            arguments = _continuation_arguments(document, continuation, query)
            replies = self._session.call("divergence", **arguments, **self._limits(None))
            return Divergence(**_result(replies))

    def make_needle(
        self, *, context_len: int, seed: int = 0, depth: float | None = None, kind: str = "single"
    ) -> dict[str, str]:
        """A generated document around a fact, in this model's tokens (see `make_needle`)."""
        with self._request():
            replies = self._session.call(
                "needle", context_len=context_len, seed=seed, depth=depth, kind=kind
            )
            case: dict[str, str] = _result(replies)
            return case

    def shared(self, values: Iterator[T]) -> Iterator[T]:
        """JSON values other than null, inside torchrun those of rank 0 on every rank.

        Requests made from them are the same on all ranks, as they have to be.
        """
        return self._session.shared(values)

    def close(self) -> None:
        """End the ranks; repeating it does no harm."""
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _asked(
        self,
        document: Tokens,
        question: Tokens,
        params: SamplingParams | None,
        answer_start: str,
        timeout_s: float | None,
    ) -> Generator[dict[str, Any], None, None]:
        """The ranks' replies to a question."""
        if params is None:
            params = self.config.decode.sampling_params(seed=self.config.seed)
        return self._session.call(
            "ask",
            document=_plain(document),
            question=_plain(question),
            answer_start=answer_start,
            params=asdict(params),
            **self._limits(timeout_s),
        )

    def _limits(self, timeout_s: float | None) -> dict[str, float]:
        timeout_s = self.config.request_timeout_s if timeout_s is None else timeout_s
        if timeout_s is None:
            return {}
        check_timeout("timeout_s", timeout_s)
        return {"timeout_s": timeout_s}

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Other threads wait their turn; the same thread would wait for itself."""
        if self._holder == threading.get_ident():
            raise RequestError(
                "a stream of this thread is still open: read it to its end or close it"
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None


def _model_overrides(model: str) -> list[str]:
    if model in model_names():
        return [f"model={model}"]
    if not model.strip():
        raise InputError(
            f"model is empty: give a name ({', '.join(model_names())}), a path or a Hub id"
        )
    path = os.path.abspath(model) if os.path.exists(model) else model
    return ["model=custom", f"model.path={path}", f"model.name={os.path.basename(path)}"]


def _override_value(value: str | float | bool) -> str:
    return quoted(value) if isinstance(value, str) else str(value).lower()


def _continuation_arguments(
    document: Tokens, continuation: Tokens, query: Tokens | None
) -> dict[str, Any]:
    return {
        "document": _plain(document),
        "continuation": _plain(continuation),
        "query": None if query is None else _plain(query),
    }


def _plain(tokens: Tokens) -> str | list[int]:
    if isinstance(tokens, str):
        return tokens
    try:
        if isinstance(tokens, bytes | bytearray):
            raise TypeError("bytes have to be decoded to str first")
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise InputError(f"neither text nor a flat list of token ids: {error}") from error


def _result(replies: Iterator[dict[str, Any]]) -> Any:
    """The value of the last reply."""
    *_, last = replies
    return last["result"]
