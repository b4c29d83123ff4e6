"""Guarantees of budgets per layer: the sum stays, no layer passes on more than a block has, and
audits say where tokens are needed.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.config import compose_config
from apb.errors import InputError
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig
from apb.methods.budgets import layer_budgets, spread
from apb.methods.plan import PrefillPlan
from apb.prompts.base import PromptTokens
from plans import make_plan

WEIGHTS = st.lists(st.floats(0.01, 50), min_size=1, max_size=40)


@given(WEIGHTS, st.integers(0, 500), st.integers(0, 500))
def test_the_mean_over_layers_is_the_length_asked_for(
    weights: list[float], length: int, spare: int
) -> None:
    lengths = spread(length, weights, length + spare)
    assert sum(lengths) == length * len(weights)
    assert all(0 <= of_layer <= length + spare for of_layer in lengths)
    for mine, my_weight in zip(lengths, weights, strict=True):
        for other, other_weight in zip(lengths, weights, strict=True):
            assert my_weight < other_weight or mine >= other - 1


@pytest.mark.parametrize("num_layers", [1, 2, 30])
def test_pyramid_falls_evenly_to_a_twentieth_of_the_mean(num_layers: int) -> None:
    weights = layer_budgets("pyramid").weights(num_layers)
    falls = [above - below for above, below in pairwise(weights)]
    assert all(fall == pytest.approx(falls[0]) and fall > 0 for fall in falls)
    if num_layers > 1:
        assert sum(weights) / num_layers == pytest.approx(1)
        assert weights[-1] == pytest.approx(1 / 20)


def write_audit(path: Path, lost: dict[int, float]) -> str:
    findings = [
        {"layer": layer, "recovered_mass": 1 - mass, "output_error": 0.1}
        for layer, mass in lost.items()
    ]
    path.write_text(json.dumps({"text": "", "metrics": {"audit": findings}}))
    return str(path)


def test_layers_that_lost_more_get_more_and_those_between_are_in_line(tmp_path: Path) -> None:
    budgets = layer_budgets(write_audit(tmp_path / "a.json", {4: 0.4, 1: 0.1}))
    mean = (0.1 + 0.1 + 0.2 + 0.3 + 0.4 + 0.4) / 6
    expected = [0.5 + 0.5 * lost / mean for lost in (0.1, 0.1, 0.2, 0.3, 0.4, 0.4)]
    assert budgets.weights(6) == pytest.approx(expected)
    nothing_lost = layer_budgets(write_audit(tmp_path / "b.json", {0: 0.0, 2: -1e-9}))
    assert nothing_lost.weights(5) == (1.0,) * 5


def test_budgets_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text(json.dumps({"metrics": {}}))
    for name in (str(tmp_path / "none.json"), "pyramids"):
        with pytest.raises(InputError, match="is neither uniform nor pyramid nor a result with"):
            layer_budgets(name)
    with pytest.raises(InputError, match="is a result without an audit"):
        layer_budgets(write_audit(tmp_path / "a.json", {}))
    with pytest.raises(InputError, match="audits layer 7 of a model with more than the 7 layers"):
        layer_budgets(write_audit(tmp_path / "a.json", {7: 0.5})).weights(7)


def plan_of(*overrides: str) -> PrefillPlan:
    config = compose_config(["model=tiny", "method.min_block_len=1", *overrides])
    prompt = PromptTokens((), tuple(range(1003)), (1, 2, 3))
    return make_plan(config.method, prompt, world_size=4)


@pytest.mark.parametrize("policy", LayoutPolicy, ids=lambda policy: policy.name)
@pytest.mark.parametrize("passing_len", [0.0, 0.125, 0.7, 1.0])
def test_plan_spreads_each_block_over_layers(policy: LayoutPolicy, passing_len: float) -> None:
    settings = (f"method.layout={policy.name}", f"method.passing_len={passing_len}")
    plan = plan_of(*settings, "method.layer_budgets=pyramid")
    uniform = plan_of(*settings)
    assert uniform.layer_passing_lens == ()
    assert plan.passing_lens == uniform.passing_lens
    layers = [plan.in_layer(index) for index in range(len(plan.layer_passing_lens))]
    assert len(layers) > 1
    for block in plan.layout.blocks:
        lengths = [layer.passing_lens[block.index] for layer in layers]
        assert sum(lengths) == len(layers) * plan.passing_lens[block.index]
        assert plan.most_passed(block) == max(lengths)
        assert max(lengths) + plan.excluded(block) <= len(block)
        assert lengths == sorted(lengths, reverse=True)
    differs = any(layer.passing_lens != plan.passing_lens for layer in layers)
    assert differs == (0 < passing_len < 1)


def test_setting_reaches_the_dataclass_to_the_letter(tmp_path: Path) -> None:
    path = write_audit(tmp_path / "it,is=odd.json", {0: 0.1})
    config = compose_config(["model=tiny", f"method.layer_budgets={path}"]).method
    assert isinstance(config, ApbConfig)
    assert config.layer_budgets == path
