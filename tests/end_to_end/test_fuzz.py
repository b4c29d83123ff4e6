"""Whatever is asked for ends in an answer or in a sentence, on one rank in this process.

`make faults` tries 2,200 cases; every test run tries some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apb import LLM, ApbError, EngineDeadError, SamplingParams
from apb.config import RunConfig
from apb.plugins import PLUGINS
from apb.run import main

HERE = {"RANK": "0", "WORLD_SIZE": "1", "HF_HUB_OFFLINE": "1"}
"""A gang of one rank is this process."""
SMALL = ["model=tiny", "launcher=torchrun", "device=cpu", "progress=false", "request_timeout_s=2"]
CHEAP = ["prompt.context_len=600", "decode.max_tokens=2"]


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in HERE.items():
            patch.setenv(name, value)
        yield


def ends_well(act: Callable[[], object]) -> None:
    """The gang survives, and an error is one line of words."""
    try:
        act()
    except EngineDeadError:
        raise
    except ApbError as error:
        text = str(error)
        assert text.strip(), "an error without a word"
        assert len(text.splitlines()) == 1, text
        assert "Traceback" not in text


def tries(cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    once = settings(max_examples=cases, deadline=None, suppress_health_check=quiet)
    once(given(strategy)(check))()


def few_and_many(few: int, many: int) -> pytest.MarkDecorator:
    long = pytest.param(many, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])
    return pytest.mark.parametrize("cases", [few, long])


TEXT = st.text(st.characters(exclude_categories=()), max_size=80)
SPECIAL = st.sampled_from(["", " ", "\n", "\0", "\ud800", "<|eos|>", "a" * 3000, "\u202e", "🏖️"])
INTEGER = st.integers(-2, 400) | st.integers()
IDS = st.lists(INTEGER, max_size=40)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.binary(max_size=8),
    st.lists(st.lists(st.integers(), max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
TOKENS = TEXT | SPECIAL | IDS | ODD
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(-1, 5) | ODD,
        "temperature": st.floats() | st.floats(0, 2) | ODD,
        "top_p": st.floats() | st.floats(0, 1) | ODD,
        "top_k": st.integers(-1, 500) | ODD,
        "seed": st.integers() | ODD,
        "stop": st.lists(TEXT, max_size=3) | TEXT | ODD,
        "stop_token_ids": IDS | ODD,
        "ignore_eos": st.booleans() | ODD,
    },
)
LIMIT = st.none() | st.floats(0.5, 2) | st.floats()
REQUESTS = st.one_of(
    st.tuples(st.just("ask"), TOKENS, TOKENS, PARAMS, LIMIT),
    st.tuples(st.just("stream"), TOKENS, TOKENS, PARAMS, LIMIT),
    st.tuples(st.just("logprobs"), TOKENS, TOKENS, st.none() | TOKENS),
    st.tuples(st.just("divergence"), TOKENS, TOKENS, st.none() | TOKENS),
)


def request(llm: LLM, op: str, *given: Any) -> object:
    if op in ("logprobs", "divergence"):
        return getattr(llm, op)(*given)
    document, question, params, timeout_s = given
    params = {"max_tokens": 2, **params}
    if op == "ask":
        return llm.ask(document, question, SamplingParams(**params), timeout_s=timeout_s)
    with closing(
        llm.stream(document, question, SamplingParams(**params), timeout_s=timeout_s)
    ) as pieces:
        return next(pieces, None)


@few_and_many(60, 1500)
def test_requests_end_in_an_answer_or_a_sentence(cases: int) -> None:
    with LLM.from_overrides([*SMALL, "method.min_block_len=16", "num_blocks=3"]) as llm:

        def answered() -> list[int]:
            return llm.ask("The mill stood. " * 9, "Who?", SamplingParams(max_tokens=3)).token_ids

        expected = answered()
        tries(cases, REQUESTS, lambda it: ends_well(lambda: request(llm, *it)))
        assert answered() == expected, "what was asked before leaves no trace"


def leaves(config: object, prefix: str = "") -> Iterator[str]:
    """Keys of settings, as dataclasses declare them."""
    for field in fields(config):  # type: ignore[arg-type]
        yield f"{prefix}{field.name}"
        default = getattr(config, field.name, None)
        if is_dataclass(default):
            yield from leaves(default, f"{prefix}{field.name}.")


def _keys() -> list[str]:
    found = set(leaves(RunConfig)) | {"runtime.chunk_len", "audit.rows", "audit.max_error"}
    found |= {f"decode.{name}" for name in ("placement", "top_p", "top_k", "stop", "temperature")}
    for group, plugins in PLUGINS.items():
        found |= {group}
        for schema in plugins.values():
            found |= {f"{group.replace('/', '.')}.{field.name}" for field in fields(schema)}
    return sorted(found - {"launcher", "output", "allow_beyond_context", "request_timeout_s"})


NAMES = sorted({name for plugins in PLUGINS.values() for name in plugins} - {"local", "ray"})
VALUE = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(["null", "true", "''", "[]", "{}", "[1,x]", "${seed}", "???", "nan", "1e400"]),
    st.integers(-2, 300).map(str),
    st.integers().map(str),
    st.floats(-0.5, 1.5).map(str),
    st.text(max_size=10),
)
PLAIN = st.tuples(st.sampled_from(_keys()), VALUE).map("=".join)
MISSPELT = st.builds(
    lambda key, at, value: f"{key[:at]}{key[at + 1 :]}={value}", PLAIN, st.integers(0, 6), VALUE
)
OVERRIDE = st.one_of(
    PLAIN,
    PLAIN,
    PLAIN,
    PLAIN.map("+".__add__),
    PLAIN.map("~".__add__),
    MISSPELT,
    st.text(max_size=8),
)
OVERRIDES = st.lists(OVERRIDE, min_size=1, max_size=3)


def answer(overrides: list[str]) -> None:
    """As the command line does it, without its folder of outputs."""
    with closing(LLM.from_overrides([*SMALL, *CHEAP, *overrides])) as llm:
        config = llm.config
        prompt = config.prompt.load(llm.make_needle, seed=config.seed)
        params = config.decode.sampling_params(seed=config.seed)
        llm.ask(prompt.document, prompt.question, params)


@few_and_many(12, 600)
def test_settings_end_in_an_answer_or_a_sentence(cases: int) -> None:
    tries(cases, OVERRIDES, lambda overrides: ends_well(lambda: answer(overrides)))


@few_and_many(4, 100)
def test_command_lines_end_in_an_answer_or_a_sentence(
    cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def check(overrides: list[str]) -> None:
        words = [word for word in overrides if not word.startswith("-")]  # those are Hydra's own
        code = main([*SMALL, *CHEAP, *words])
        said = capfd.readouterr().err
        assert code in (0, 1, 2), said
        assert "Traceback" not in said
        assert sum(line.startswith("apb: ") for line in said.splitlines()) == (code > 0), said

    tries(cases, OVERRIDES, check)
