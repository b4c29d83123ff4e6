"""Guarantees of calibration: what is measured is found again, and mistakes are one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from apb import calibrate
from apb.calibration import keep_rates, known_rates, rates_file
from apb.comm import Communicator
from apb.cost import NOMINAL_CPU, NOMINAL_GPU, Rates
from apb.errors import InputError
from apb.link_bench import LinkRates, link_rates
from apb.rates_bench import RankBench, Sizes
from rank_pool import RankPool

CPU = torch.device("cpu")
RATES = Rates(
    linear_flops=1e11,
    attention_flops=2e11,
    memory_bytes=3e10,
    link_bytes=4e9,
    latency_s=5e-5,
    source="measured on a test",
)
TINY = Sizes(
    rows=96,
    hidden=64,
    intermediate=160,
    heads=4,
    kv_heads=2,
    head_dim=16,
    keys=200,
    weight_bytes=2**16,
    budget_s=0.02,
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APB_HOME", str(tmp_path))


def test_without_a_file_rates_are_nominal() -> None:
    assert known_rates(CPU, torch.float32) is NOMINAL_CPU


def test_kept_rates_are_found_for_that_dtype_and_number_of_threads() -> None:
    path = keep_rates(RATES, CPU, torch.bfloat16)
    assert path.is_file()
    assert known_rates(CPU, torch.bfloat16) == RATES
    assert known_rates(CPU, torch.float32) is NOMINAL_CPU
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert known_rates(CPU, torch.bfloat16) is NOMINAL_CPU
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"speed": 1}',
        json.dumps({**asdict(RATES), "linear_flops": "fast"}),
        json.dumps({**asdict(RATES), "link_bytes": 0}),
        json.dumps({**asdict(RATES), "latency_s": float("nan")}),
    ],
)
def test_a_broken_file_is_named(text: str) -> None:
    path = rates_file(CPU, torch.float32)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        known_rates(CPU, torch.float32)
    assert str(path) in str(caught.value)
    assert "apb.calibrate" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("devise=cpu", "unknown option devise=cpu: choose from device=, dtype=, threads="),
        ("cpu", "unknown option cpu"),
        ("device=tpu", "device=tpu must be one of auto, cpu, cuda"),
        ("dtype=int8", "dtype=int8 must be one of auto, float32, bfloat16, float16"),
        ("threads=0", "threads=0 must be a number from 1 to"),
        ("threads=two", "threads=two must be a number from 1 to"),
        ("threads=", "threads= must be a number from 1 to"),
        ("threads=9999", "threads=9999 must be a number from 1 to"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argument: str, sentence: str
) -> None:
    assert calibrate.main([argument]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"apb.calibrate: {sentence}")
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rank_measures_positive_rates(dtype: torch.dtype) -> None:
    bench = RankBench(CPU, dtype, TINY)
    for rate in (bench.linear_flops(), bench.attention_flops(), bench.memory_bytes()):
        assert math.isfinite(rate)
        assert rate > 0


def tiny_link_rates(comm: Communicator) -> LinkRates:
    return link_rates(comm, large_bytes=4096)


def test_two_ranks_measure_their_link(pool_of: Callable[[int], RankPool]) -> None:
    for rates in pool_of(2).run(tiny_link_rates):
        assert rates.link_bytes > 0
        assert 0 < rates.latency_s < math.inf


def measured_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sizes, "of", lambda _: TINY)
    monkeypatch.setattr(calibrate, "measure_link", lambda _: LinkRates(1e9, 1e-4))


def test_the_command_keeps_what_a_run_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_quickly(monkeypatch)
    assert calibrate.main(["device=cpu", "dtype=float32", "threads=1"]) == 0
    rates = known_rates(CPU, torch.float32)
    assert (rates.link_bytes, rates.latency_s) == (1e9, 1e-4)
    assert rates.source.startswith("measured on ")
    out = capsys.readouterr().out
    assert rates.source in out
    assert str(rates_file(CPU, torch.float32)) in out


def test_rates_that_cannot_be_stored_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured_quickly(monkeypatch)
    (tmp_path / "rates").write_text("a file where the folder should be")
    assert calibrate.main(["device=cpu", "dtype=float32", "threads=1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_one_gpu_has_no_link_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rates, remark = calibrate._link(torch.device("cuda"))
    assert rates == (NOMINAL_GPU.link_bytes, NOMINAL_GPU.latency_s)
    assert "nominal" in remark


def test_the_table_names_every_rate_and_its_source() -> None:
    lines = calibrate.rates_table(replace(RATES, latency_s=42e-6))
    assert lines[0] == RATES.source
    assert "100.0 GFLOP/s" in lines[1]
    assert "42 us" in lines[-1]
