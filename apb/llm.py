"""The Python interface: ask questions about long documents."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self, TypeVar

from apb.config import RunConfig, compose_config, model_names, plugin_name, quoted
from apb.errors import InputError, RequestError
from apb.launchers.base import Session
from apb.launchers.local import LocalSession
from apb.output import RequestOutput
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
            `num_blocks`, `seed`, `allow_beyond_context`.

    Raises:
        InputError: a wrong setting or model, before weights are read.
        EngineDeadError: a rank did not come up.
    """

    def __init__(
        self,
        model: str,
        *,
        world_size: int | None = None,
        launcher: str = "auto",
        overrides: Sequence[str] = (),
        **settings: str | int | bool,
    ) -> None:
        named = {"launcher": launcher, "world_size": world_size, **settings}
        shorthand = [
            f"{name}={_override_value(value)}" for name, value in named.items() if value is not None
        ]
        self._start([*_model_overrides(model), *shorthand, *overrides])
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

    @property
    def _session(self) -> Session:
        """The ranks, started by the first request."""
        if self._opened is None:
            self._opened = _open_session(self.config, self._overrides)
        return self._opened

    def ask(
        self, document: Tokens, question: Tokens, params: SamplingParams | None = None
    ) -> RequestOutput:
        """The answer to a question about a document.

        Raises:
            InputError: an empty or too long document or question; the LLM stays usable.
            RequestError: the request failed while it ran; the LLM stays usable.
            EngineDeadError: the ranks are gone.
        """
        with self._request():
            replies = self._session.call("ask", **_ask_arguments(document, question, params))
            return RequestOutput.from_json(_result(replies))

    def stream(
        self, document: Tokens, question: Tokens, params: SamplingParams | None = None
    ) -> Generator[str, None, None]:
        """The answer's text in pieces as they become certain. Closing the iterator cancels it."""
        with self._request():
            arguments = _ask_arguments(document, question, params)
            with closing(self._session.call("ask", **arguments)) as replies:
                for reply in replies:
                    if reply.get("piece"):
                        yield reply["piece"]

    def logprobs(
        self, document: Tokens, continuation: Tokens, query: Tokens | None = None
    ) -> list[float]:
        """Log-probability of each continuation token after the document, without any template.

        `query` only steers what is compressed; it is not part of the text.
        """
        with self._request():
            arguments = {
                "document": _plain(document),
                "continuation": _plain(continuation),
                "query": None if query is None else _plain(query),
            }
            values: list[float] = _result(self._session.call("logprobs", **arguments))
            return values

    def make_needle(self, **arguments: Any) -> dict[str, str]:
        """A generated document around a fact, in this model's tokens (see `make_needle`)."""
        with self._request():
            case: dict[str, str] = _result(self._session.call("needle", **arguments))
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


def _open_session(config: RunConfig, overrides: Sequence[str]) -> Session:
    launcher = plugin_name("launcher", config.launcher)
    if launcher == "ray":
        if find_spec("ray") is None:
            raise InputError("launcher=ray needs one more package: pip install 'apb[ray]'")
        from apb.launchers.ray import RaySession

        return RaySession(config, overrides)
    if launcher == "torchrun" or (launcher == "auto" and _inside_torchrun()):
        # Here, as it imports transformers, which the driver of a local gang does without.
        from apb.launchers.torchrun import TorchrunSession

        return TorchrunSession(config)
    return LocalSession(overrides, world_size=config.world_size or _default_world_size(config))


def _inside_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _default_world_size(config: RunConfig) -> int:
    import torch

    return 1 if config.device == "cpu" else max(1, torch.cuda.device_count())


def _model_overrides(model: str) -> list[str]:
    if model in model_names():
        return [f"model={model}"]
    if not model.strip():
        raise InputError(
            f"model is empty: give a name ({', '.join(model_names())}), a path or a Hub id"
        )
    path = os.path.abspath(model) if os.path.exists(model) else model
    return [
        "model=custom",
        f"model.path={quoted(path)}",
        f"model.name={quoted(os.path.basename(path))}",
    ]


def _override_value(value: str | int | bool) -> str:
    return quoted(value) if isinstance(value, str) else str(value).lower()


def _ask_arguments(
    document: Tokens, question: Tokens, params: SamplingParams | None
) -> dict[str, Any]:
    return {
        "document": _plain(document),
        "question": _plain(question),
        "params": asdict(params or SamplingParams()),
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
