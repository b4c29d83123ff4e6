"""The configuration, one dataclass; `apb.plugins` lists what its groups can be."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from apb.attention.base import BackendConfig
from apb.config_errors import one_sentence
from apb.errors import InputError
from apb.launcher_config import LauncherConfig
from apb.methods.audit import AuditSample
from apb.methods.base import MethodConfig
from apb.methods.placement import Placement
from apb.model_config import ModelConfig, RuntimeConfig
from apb.paths import config_dir
from apb.plugins import PLUGINS
from apb.prompts.source import PromptConfig
from apb.sampling import SamplingParams
from apb.speculate.base import DrafterConfig
from apb.supervision import SupervisionConfig

APPEND_ONLY = ("model",)
"""Groups that are not in the defaults list, so that Hydra wants a plus: ``+model=x``."""
FREE_TEXT = (
    *("prompt.document", "prompt.query", "output"),
    *("model.name", "model.path", "model.revision", "model.sha256", "model.drafting"),
    *("drafter.head", "drafter.vocabulary", "drafter.model"),
    *("method.layer_budgets", "method.compressor.heads"),
)
"""Settings whose value is text to the letter: a comma in a question is no sweep."""
_LONGEST_S = 1e9
"""Whoever can wait for 30 years needs no limit."""


@dataclass(kw_only=True, slots=True)
class DecodeConfig:
    """Sampling, with vLLM's names (see `SamplingParams`), and where the KV is meanwhile.

    Attributes:
        placement: `sharded` (KV stays where prefill ran), `rank0` (it moves there) or `auto`.
    """

    placement: Placement = Placement.auto
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self.sampling_params(seed=0)

    def sampling_params(self, *, seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


@dataclass(kw_only=True, slots=True)
class AuditConfig:
    """What a request may be checked for while it runs; ``audit=true`` is short for `enabled`.

    Attributes:
        enabled: compare sampled rows of an approximate prefill with exact attention.
        rows: of the context, in all.
        heads: query heads of each row.
        layers: at most, evenly spread.
        max_error: output error in any layer above which the request is answered again exactly.
    """

    enabled: bool = False
    rows: int = 32
    heads: int = 4
    layers: int = 8
    max_error: float | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "heads", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"audit.{name}={getattr(self, name)} must be at least 1")
        if self.max_error is not None:
            if not 0 <= self.max_error < math.inf:
                raise InputError(f"audit.max_error={self.max_error} must be finite, from 0 on")
            self.enabled = True

    def sample(self) -> AuditSample:
        return AuditSample(rows=self.rows, heads=self.heads, layers=self.layers)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run can be told.

    Attributes:
        num_blocks: blocks of the context; None is one per rank.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu` or `cuda`.
        seed: of sampling, the random compressor and generated documents.
        allow_beyond_context: run documents longer than the model's positions.
        world_size: ranks that `launcher=local` and `launcher=ray` start; None is one per GPU.
        output: a file for the result as JSON.
        on_failure: of a rank: `restart` all ranks for the next request, or `stop`.
        on_rank_loss: while it reads a document: `fail` the request, or `degrade`: the other ranks
            read all blocks, for this request and the next ones.
        request_timeout_s: after which a request fails, counted from when the ranks take it.
        progress: draw a bar while a request runs, where stderr is a terminal.
        trace: record what every rank does and when, beside the result (see `RequestOutput.write`).
    """

    model: ModelConfig = MISSING
    method: MethodConfig = MISSING
    backend: BackendConfig = MISSING
    prompt: PromptConfig = MISSING
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    drafter: DrafterConfig = MISSING
    launcher: LauncherConfig = MISSING
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    num_blocks: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    allow_beyond_context: bool = False
    world_size: int | None = None
    output: str | None = None
    on_failure: str = "restart"
    on_rank_loss: str = "fail"
    request_timeout_s: float | None = None
    progress: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        _check_choice("on_failure", self.on_failure, ("restart", "stop"))
        _check_choice("on_rank_loss", self.on_rank_loss, ("fail", "degrade"))
        if self.on_rank_loss == "degrade" and self.on_failure == "stop":
            raise InputError("on_rank_loss=degrade needs on_failure=restart: ranks start again")
        if self.request_timeout_s is not None:
            check_timeout("request_timeout_s", self.request_timeout_s)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} must lie between 0 and 2**63 - 1")
        for name in ("num_blocks", "world_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")


def register_configs() -> None:
    """Make the schemas known to Hydra; repeating it does no harm."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="model", name="model_schema", node=ModelConfig)
    for group, plugins in PLUGINS.items():
        for name, schema in plugins.items():
            store.store(group=group, name=f"{name}_schema", node=schema)


_FIXED = (
    *("model", "dtype", "device", "runtime", "allow_beyond_context", "world_size"),
    *("launcher", "supervision", "on_failure", "on_rank_loss", "progress"),
)
"""What ranks are started with and keep."""


def recompose_config(old: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Another configuration for ranks and weights that serve `old`.

    Raises:
        InputError: as `compose_config`, or it needs other ranks or weights.
    """
    new = compose_config(overrides)
    for name in _FIXED:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise InputError(
                f"{name} cannot change from {before} to {after} between requests: make another LLM"
            )
    return new


def plugin_name(group: str, config: object) -> str:
    """The name under which a plug-in's config stands in `PLUGINS`."""
    return next(name for name, schema in PLUGINS[group].items() if type(config) is schema)


def model_names() -> list[str]:
    return sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def normalised(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra's grammar wants them: ``model=x`` becomes ``+model=x``, text is quoted.

    A plus before the key says so: whatever has one stays as it is, also what this has returned.
    """
    result = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == "audit" and equals:
            override = f"audit.enabled={value}"
        if key in FREE_TEXT and equals:
            override = f"{_IN_GRAMMAR}{key}={quoted(value)}"
        result.append(f"+{override}" if key in APPEND_ONLY else override)
    return result


_IN_GRAMMAR = "++"
"""Marks text that is quoted. Hydra reads it as "whether the setting is there or not"."""


def quoted(text: str) -> str:
    """A string to the letter in Hydra's override grammar, also after OmegaConf has resolved it."""
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(literal, Quote.single).with_quotes()


_COMPOSE_LOCK = threading.Lock()
"""Hydra keeps the configuration search path in a process-wide singleton."""


def compose_config(overrides: Sequence[str]) -> RunConfig:
    """The configuration that `overrides` describe, as users write them or `normalised`.

    Raises:
        InputError: an unknown key, a wrong type, a value out of range, or no model.
    """
    register_configs()
    # Without the plusses a text that does not apply is refused with the settings that do.
    words = [override.removeprefix(_IN_GRAMMAR) for override in normalised(overrides)]
    with _COMPOSE_LOCK, _own_hydra():
        try:
            config = compose("run", words)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise InputError(one_sentence(error)) from error
    return to_run_config(config)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Compose even within a Hydra application, ours or the caller's, and leave it as it was."""
    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = theirs


def named_model(name: str) -> ModelConfig:
    """The model of that name in `conf/model/`, or else the one whose place the name is."""
    if name in model_names():
        return compose_config([f"model={name}"]).model
    return ModelConfig(name=name, path=name)


def to_run_config(config: DictConfig) -> RunConfig:
    """The dataclasses behind a composed configuration, validated."""
    if OmegaConf.is_missing(config, "model"):
        raise InputError(f"no model given: add +model=NAME with one of {', '.join(model_names())}")
    try:
        return cast(RunConfig, OmegaConf.to_object(config))
    except (OmegaConfBaseException, AttributeError) as error:
        raise InputError(one_sentence(error)) from error


def check_timeout(name: str, value: object) -> None:
    """Raises InputError unless that is a positive number of seconds. NaN is none."""
    if not isinstance(value, int | float) or not 0 < value < _LONGEST_S:
        raise InputError(f"{name}={value!r} must be a positive number of seconds")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value} must be one of {', '.join(choices)}")
