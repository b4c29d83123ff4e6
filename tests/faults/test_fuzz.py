"""Whatever is asked for ends in an answer or in a sentence, on one rank in this process.

`make faults` tries 2,200 cases; every test run tries some of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apb import LLM, ApbError, EngineDeadError, SamplingParams
from apb.config import RunConfig, quoted
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
    once = settings(max_examples=cases, suppress_health_check=quiet)
    once(given(strategy)(check))()


def few_and_many(few: int, many: int) -> pytest.MarkDecorator:
    long = pytest.param(many, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])
    return pytest.mark.parametrize("cases", [few, long])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80)
IDS = st.lists(st.integers(0, 255), min_size=1, max_size=40)
TOKENS = TEXT | IDS | st.sampled_from(["a " * 300, "<|eos|>", "\u202e", "\0"])
SEED = st.none() | st.integers(0, 2**63 - 1)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.binary(max_size=8),
    st.sampled_from(["", " ", "\n", "\ud800", "a\udfff", 10**400]),
    st.lists(st.integers() | st.text(max_size=2), max_size=3),
    st.lists(st.lists(st.integers(), max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@st.composite
def mostly(draw: st.DrawFn, *parts: st.SearchStrategy[Any]) -> list[Any]:
    """One value of each, and often one of them is odd."""
    odd = draw(st.none() | st.integers(0, len(parts) - 1))
    return [draw(ODD if index == odd else part) for index, part in enumerate(parts)]


NAMES = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids")
PARAMS = mostly(
    st.integers(1, 5),
    st.just(0.0) | st.floats(1e-3, 5),
    st.floats(0.01, 1),
    st.integers(0, 500),
    SEED,
    st.lists(TEXT, max_size=3) | TEXT,
    IDS,
).map(lambda values: dict(zip(NAMES, values, strict=True)))
SCORES = ["logprobs", "divergence"]
LIMIT = st.none() | st.floats(0.5, 2)
REQUESTS = st.one_of(
    st.tuples(st.sampled_from(["ask", "stream"]), mostly(TOKENS, TOKENS, PARAMS, LIMIT)),
    st.tuples(
        st.sampled_from(["logprobs", "divergence"]), mostly(TOKENS, TOKENS, st.none() | TEXT)
    ),
).map(lambda it: (it[0], *it[1]))


def request(llm: LLM, op: str, *given: Any) -> object:
    if op in SCORES:
        return getattr(llm, op)(*given)
    document, question, fields, timeout_s = given
    known = isinstance(fields, dict) and fields.keys() <= set(NAMES)
    params = SamplingParams(**(fields if known else {"max_tokens": 1}))
    if op == "ask":
        return llm.ask(document, question, params, timeout_s=timeout_s)
    with closing(llm.stream(document, question, params, timeout_s=timeout_s)) as pieces:
        return next(pieces, None)


@few_and_many(60, 1500)
def test_requests_end_in_an_answer_or_a_sentence(cases: int) -> None:
    with LLM.from_overrides([*SMALL, "method.min_block_len=16", "num_blocks=3"]) as llm:

        def answered() -> list[int]:
            return llm.ask("The mill stood. " * 9, "Who?", SamplingParams(max_tokens=3)).token_ids

        expected = answered()
        tries(cases, REQUESTS, lambda it: ends_well(lambda: request(llm, *it)))
        assert answered() == expected, "what was asked before leaves no trace"


def values(default: object) -> st.SearchStrategy[str]:
    """What somebody might give for a setting that has this default."""
    match default:
        case bool():
            return st.sampled_from(["true", "false"])
        case Enum():
            return st.sampled_from([*type(default).__members__])
        case int():
            return st.integers(-1, 70).map(str)
        case float():
            return st.floats(0, 1.5).map(str) | st.integers(0, 3).map(str)
        case None:
            return st.sampled_from(["null", "1", "3", "64", "0.5"])
        case _:
            return st.sampled_from(["''", "[]", "[a]", "auto", *PLUGIN_NAMES])


def defaults(schema: type, prefix: str) -> dict[str, object]:
    """The settings below a prefix, with their defaults."""
    found: dict[str, object] = {}
    for field in fields(schema):
        nested = field.default_factory() if field.default_factory is not MISSING else field.default
        if is_dataclass(nested):
            found |= defaults(type(nested), f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = nested
    return found


PLUGIN_NAMES = sorted({name for plugins in PLUGINS.values() for name in plugins})
KEPT = ("output", "launcher", "allow_beyond_context", "request_timeout_s", "progress", "model")
"""Not drawn: what has effects elsewhere, and what bounds a case."""
GENERAL = {key: it for key, it in defaults(RunConfig, "").items() if key not in (*KEPT, *PLUGINS)}
ODD_VALUE = st.one_of(
    st.sampled_from(["null", "''", "[]", "{}", "[1,x]", "${seed}", "???", "nan", "1e400", "-1"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=10).map(quoted),
    st.text(max_size=10),
)


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """A plug-in with some of its settings and some general ones, and often something odd."""
    group = draw(st.sampled_from([group for group in PLUGINS if group != "launcher"]))
    name = draw(st.sampled_from([*PLUGINS[group]]))
    chosen = [f"{group}={name}"]
    own = defaults(PLUGINS[group][name], f"{group.replace('/', '.')}.")
    for settings_ in (own, GENERAL):
        for key in draw(
            st.lists(st.sampled_from([*settings_]), max_size=2) if settings_ else st.just([])
        ):
            chosen.append(f"{key}={draw(values(settings_[key]))}")
    odd = draw(st.integers(0, 5))
    if odd == 1:
        key = draw(st.sampled_from([*own, *GENERAL]))
        chosen.append(f"{key}={draw(ODD_VALUE)}")
    elif odd == 2:
        key = draw(st.sampled_from([*own, *GENERAL]))
        chosen.append(draw(st.sampled_from(["+", "~", "++"])) + key + "=" + draw(ODD_VALUE))
    elif odd == 3:
        at = draw(st.integers(0, 8))
        chosen.append(chosen[-1][:at] + chosen[-1][at + 1 :])
    elif odd == 4:
        chosen.append(draw(st.text(max_size=8)))
    return chosen


def answer(drawn: list[str]) -> None:
    """As the command line does it, without its folder of outputs."""
    with closing(LLM.from_overrides([*SMALL, *CHEAP, *drawn])) as llm:
        config = llm.config
        prompt = config.prompt.load(llm.make_needle, seed=config.seed)
        params = config.decode.sampling_params(seed=config.seed)
        llm.ask(prompt.document, prompt.question, params)


@few_and_many(12, 600)
def test_settings_end_in_an_answer_or_a_sentence(cases: int) -> None:
    tries(cases, overrides(), lambda drawn: ends_well(lambda: answer(drawn)))


@few_and_many(4, 100)
def test_command_lines_end_in_an_answer_or_a_sentence(
    cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("apb"), "handlers", [logging.NullHandler()])

    def check(drawn: list[str]) -> None:
        words = [word for word in drawn if not word.startswith("-")]  # those are Hydra's own
        code = main([*SMALL, *CHEAP, *words])
        said = capfd.readouterr().err
        assert code in (0, 1, 2), said
        assert "Traceback" not in said
        assert sum(line.startswith("apb: ") for line in said.splitlines()) == (code > 0), said

    tries(cases, overrides(), check)
