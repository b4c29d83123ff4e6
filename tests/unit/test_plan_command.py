"""Guarantees of `python -m apb.plan`: figures that fit, and one sentence about bad input."""

from __future__ import annotations

import re

import pytest

from apb.config import compose_config, model_names
from apb.hf.model import load_config
from apb.hf.shape import model_shape
from apb.plan import main, plan_table

GIB_80GB = 80e9 / 2**30


def peaks(lines: list[str]) -> list[float]:
    """Peak memory of every rank, in GiB."""
    rows = [line for line in lines if re.match(r" *\d+  ", line)]
    return [float(row.split()[5]) for row in rows]


@pytest.mark.parametrize("layout", ["even", "balanced", "zigzag"])
def test_a_million_tokens_of_llama3_8b_fit_8_ranks_of_80_gb(layout: str) -> None:
    overrides = ["model=llama3-8b", "world_size=8", "dtype=bfloat16", f"method.layout={layout}"]
    lines = plan_table(compose_config(overrides), 1_000_000)
    assert len(peaks(lines)) == 8
    assert 16 + 13 < max(peaks(lines)) < GIB_80GB, lines


def test_without_chunks_the_mlp_alone_takes_gigabytes() -> None:
    base = ["model=llama3-8b", "world_size=8", "dtype=bfloat16"]
    chunked = plan_table(compose_config(base), 1_000_000)
    whole = plan_table(compose_config([*base, "runtime.chunk_len=1000000"]), 1_000_000)
    assert max(peaks(whole)) - max(peaks(chunked)) > 9


@pytest.mark.parametrize("name", [n for n in model_names() if n not in ("custom", "tiny")])
def test_every_named_model_can_be_planned_without_its_checkpoint(name: str) -> None:
    lines = plan_table(compose_config([f"model={name}", "world_size=2"]), 4096)
    assert len(peaks(lines)) == 2


@pytest.mark.model
def test_the_shape_of_the_demo_model_is_its_checkpoint_s() -> None:
    config = compose_config(["model=smollm2-135m"]).model
    assert config.shape == model_shape(load_config(config))._asdict()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+model=llama3-8b"], "context_len=N is needed"),
        (["+model=llama3-8b", "context_len=0"], "context_len=N is needed"),
        (["+model=nothing", "context_len=9"], "model=nothing does not exist"),
        (
            ["+model=llama3-8b", "context_len=9999", "world_size=64", "method=ulysses"],
            "32 query heads",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
