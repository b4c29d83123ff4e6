"""Guarantees of `python -m apb.plan`: figures that fit, and one sentence about bad input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apb.config import compose_config, model_names
from apb.hf.model import load_config
from apb.hf.shape import model_shape
from apb.plan import Options, main, plan_lines

GIB_80GB = 80e9 / 2**30


def document(*overrides: str, context_len: int, **options: object) -> list[str]:
    words = {"context_len": str(context_len), **{k: str(v) for k, v in options.items()}}
    return plan_lines(list(overrides), Options.of(words))


def peaks(lines: list[str]) -> list[float]:
    """Peak memory of every rank, in GiB."""
    rows = [line for line in lines if re.match(r" *\d+  ", line)]
    return [float(row.split()[5]) for row in rows]


def methods(lines: list[str]) -> dict[str, float]:
    """Seconds of each method's prefill."""
    found = (re.match(r"(\w+) +([\d.,]+) s ", line) for line in lines)
    return {match[1]: float(match[2].replace(",", "")) for match in found if match}


@pytest.mark.parametrize("layout", ["even", "balanced", "zigzag"])
def test_a_million_tokens_of_llama3_8b_fit_8_ranks_of_80_gb(layout: str) -> None:
    overrides = ["model=llama3-8b", "world_size=8", f"method.layout={layout}"]
    lines = document(*overrides, context_len=1_000_000, hardware="h100")
    assert len(peaks(lines)) == 8
    assert 16 + 13 < max(peaks(lines)) < GIB_80GB, lines
    assert any(line.startswith("full") and "does not fit" in line for line in lines)
    assert not any(line.startswith("apb") and "does not fit" in line for line in lines)


def test_without_chunks_the_mlp_alone_takes_gigabytes() -> None:
    base = ["model=llama3-8b", "world_size=8", "dtype=bfloat16"]
    chunked = document(*base, context_len=1_000_000)
    whole = document(*base, "runtime.chunk_len=1000000", context_len=1_000_000)
    assert max(peaks(whole)) - max(peaks(chunked)) > 9


@pytest.mark.parametrize("name", [n for n in model_names() if n not in ("custom", "tiny")])
def test_every_named_model_can_be_planned_without_its_checkpoint(name: str) -> None:
    lines = document(f"model={name}", "world_size=2", context_len=4096)
    assert len(peaks(lines)) == 2


def test_a_slower_network_delays_only_what_uses_it() -> None:
    base = ("model=llama3-8b", "world_size=16")
    quick, slow, one_node = (
        methods(document(*base, context_len=131_072, hardware="h100", **options))
        for options in ({}, {"link": 10**9}, {"link": 10**9, "gpus_per_node": 16})
    )
    assert slow["ulysses"] > 1.5 * quick["ulysses"]
    assert slow["star"] == quick["star"]
    assert slow["full"] == quick["full"]
    assert one_node["ulysses"] <= quick["ulysses"]


def test_the_break_even_length_parts_apb_from_the_exact_methods() -> None:
    base = ("model=llama3-8b", "world_size=8")
    (line,) = (x for x in document(*base, context_len=9, hardware="a800") if "break-even" in x)
    length = int(line.split(" tokens on")[0].rpartition(" ")[2])
    for context_len, wins in ((length, True), (length * 3 // 4, False)):
        seconds = methods(document(*base, context_len=context_len, hardware="a800"))
        exact = min(seconds[name] for name in ("full", "ring", "zigzag", "ulysses"))
        # Printed to 10 ms.
        assert seconds["apb"] <= exact + 0.01 if wins else seconds["apb"] >= exact - 0.01


def test_the_break_even_length_is_that_of_the_table_whatever_the_number_of_blocks() -> None:
    base = ("model=llama3-8b", "world_size=8", "method.layout=even", "num_blocks=16")
    (line,) = (x for x in document(*base, context_len=9999, hardware="h100") if "break-even" in x)
    length = int(line.split(" tokens on")[0].rpartition(" ")[2])
    seconds = methods(document(*base, context_len=length * 3 // 4, hardware="h100"))
    exact = min(seconds[name] for name in ("full", "ring", "zigzag", "ulysses"))
    assert seconds["apb"] >= exact - 0.01


def test_the_overview_says_why_more_ranks_are_of_no_use() -> None:
    options = Options.of({"hardware": "h100"})
    lines = plan_lines(["model=llama3-8b", "world_size=8", "method=ulysses"], options)
    line = next(line for line in lines if "does not fit" in line)
    assert "32 query heads, which 64 ranks exceed" in line
    lines = plan_lines(["model=llama3-8b", "world_size=8", "num_blocks=8"], options)
    assert any(re.match(r" +128K +\d+ ", line) for line in lines)


def test_the_overview_reaches_ten_million_tokens_and_is_plotted(tmp_path: Path) -> None:
    plot = tmp_path / "plan.svg"
    options = Options.of({"hardware": "h200", "plot": str(plot)})
    lines = plan_lines(["model=llama3-8b", "world_size=64"], options)
    last = next(line for line in lines if line.startswith("     10M"))
    gain = float(last.split("   ")[-1].split("x")[0])
    assert gain > 1
    assert "no room" in last
    fewest = [line.split() for line in lines if re.match(r" +(\d+[KM]) +\d+ ", line)]
    ranks = [int(words[1]) for words in fewest]
    assert [words[0] for words in fewest] == ["8K", "32K", "128K", "512K", "1M", "4M", "10M"]
    assert ranks == sorted(ranks)
    assert ranks[0] == 1
    assert ranks[-1] > 8
    assert "seconds to the first token" in plot.read_text()


@pytest.mark.model
def test_the_shape_of_the_demo_model_is_its_checkpoint_s() -> None:
    config = compose_config(["model=smollm2-135m"]).model
    assert config.shape == model_shape(load_config(config))._asdict()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["context_len=99"], "no model given"),
        (["+model=llama3-8b", "context_len=0"], "context_len=0 must be a number from 1"),
        (["+model=nothing", "context_len=9"], "model=nothing does not exist"),
        (["+model=llama3-8b", "hardware=abacus"], "hardware=abacus must be one of"),
        (["+model=llama3-8b", "link=9"], "add hardware=NAME"),
        (["+model=llama3-8b", "plot=plan.png"], "must end in .svg"),
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
