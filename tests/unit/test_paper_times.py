"""The cost model against times measured on 8 A800s (APB, arXiv 2502.12085, tables 14 and 16).

Llama-3.1-8B in bf16, random tokens. The model knows the data sheet and what shares of it linear
maps and attention reach, nothing of these times.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from apb.config import compose_config
from apb.cost import CostModel
from apb.hardware import HARDWARE
from apb.methods.plan import PlanRequest
from pages import ROOT, code_spans, table_rows
from plans import LLAMA_8B

K = 1024
PAPER = ("method=apb", "method.anchor=replicated", "method.layout=even")
PREFILL_S: Mapping[str, Mapping[int, float]] = {
    "full": {32: 3.46, 64: 9.51, 128: 30.01},
    "ulysses": {32: 0.50, 64: 1.30, 128: 3.95, 256: 13.49, 512: 49.55},
    "ring": {32: 0.72, 64: 2.00, 128: 6.34, 256: 21.80, 512: 81.62},
    "star": {32: 0.67, 64: 1.43, 128: 3.50, 256: 9.63, 512: 30.43},
    "apb": {32: 0.49, 64: 1.09, 128: 2.79, 256: 5.53, 512: 13.39, 1024: 37.60},
}
"""Table 14, by thousands of tokens."""
ANCHOR_AND_PASSING = {32: (1024, 512), 64: (2048, 1024)}
"""Of the same table; (4096, 2048) for longer contexts."""
LAYER_MS = {"full": 940.86, "ulysses": 124.51, "ring": 205.19, "star": 111.37, "apb": 80.18}
"""Table 16: one layer at 128K."""
WITHIN = 0.15
SLOWER_THAN_THE_MODEL = {("ring", 32), ("apb", 32)}
"""Layers of 15 to 22 ms, in which the paper's code starts some 60 kernels and the model none."""


def predicted_s(name: str, thousands: int) -> float:
    overrides = [f"method={name}"]
    if name == "apb":
        anchor, passing = ANCHOR_AND_PASSING.get(thousands, (4096, 2048))
        overrides = [*PAPER, f"method.anchor_len={anchor}", f"method.passing_len={passing}"]
    elif name == "star":
        overrides.append("method.anchor=replicated")
    world_size = 1 if name == "full" else 8
    costs = CostModel(shape=LLAMA_8B, rates=HARDWARE["a800"].rates("a800", world_size), itemsize=2)
    method = compose_config(["model=llama3-8b", *overrides]).method.build(seed=0)
    plan = method.plan(
        PlanRequest(context_len=thousands * K, world_size=world_size, query_len=32, costs=costs)
    )
    return costs.prefill_s(method.workloads(plan, LLAMA_8B))


@pytest.mark.parametrize(
    ("name", "thousands"), [(name, n) for name, times in PREFILL_S.items() for n in times]
)
def test_prefill_times_are_the_paper_s(name: str, thousands: int) -> None:
    ratio = predicted_s(name, thousands) / PREFILL_S[name][thousands]
    if (name, thousands) in SLOWER_THAN_THE_MODEL:
        assert 0.75 < ratio < 1 - WITHIN
    else:
        assert abs(ratio - 1) <= WITHIN


@pytest.mark.parametrize("name", LAYER_MS)
def test_a_layer_takes_as_long_as_the_paper_s(name: str) -> None:
    ratio = 1e3 * predicted_s(name, 128) / LLAMA_8B.num_layers / LAYER_MS[name]
    assert abs(ratio - 1) <= WITHIN


def test_the_table_of_the_documents_is_this_comparison() -> None:
    rows = table_rows(ROOT / "docs/planning.md", "Will it fit, and how long will it take")
    assert {code_spans(row[0])[0] for row in rows} == PREFILL_S.keys()
    for label, *cells in rows:
        (name,) = code_spans(label)
        shown = [cell for cell in cells if cell]
        for (thousands, paper_s), cell in zip(PREFILL_S[name].items(), shown, strict=True):
            ours, theirs = cell.strip("*").split(" / ")
            assert is_rounded(ours, predicted_s(name, thousands))
            assert is_rounded(theirs, paper_s)
            assert cell.startswith("**") == ((name, thousands) in SLOWER_THAN_THE_MODEL)


def is_rounded(shown: str, value: float) -> bool:
    unit: float = 10.0 ** -len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.501 * unit
