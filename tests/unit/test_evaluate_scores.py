"""Scorers against cases made by hand, and intervals against plain statements of what they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.errors import ApbError
from apb.evaluate.intervals import bootstrap, matched, paired, sign_test, wilson
from apb.evaluate.journal import Place, Row
from apb.evaluate.match import match_all, match_option, match_part, word_f1
from apb.evaluate.plot import plot_scores
from apb.evaluate.summary import summarise

scores = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("text", "answers", "all_of", "any_of"),
    [
        ("The numbers are 1234567 and 7654321.", ["1234567", "7654321"], 1.0, 1.0),
        ("It is 1234567.", ["1234567", "7654321"], 0.5, 1.0),
        ("I do not know.", ["1234567", "7654321"], 0.0, 0.0),
        ("LAKE NASSER", ["Lake Nasser"], 1.0, 1.0),
        ("the Nasser lake", ["Lake Nasser"], 0.0, 0.0),
        ("", ["x"], 0.0, 0.0),
        ("abcde fghij", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], 0.5, 1.0),
    ],
)
def test_string_match(text: str, answers: Sequence[str], all_of: float, any_of: float) -> None:
    assert match_all(text, answers) == all_of
    assert match_part(text, answers) == any_of


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Robert FitzRoy", ["Robert FitzRoy"], 1.0),
        ("The captain was FitzRoy.", ["Robert FitzRoy"], 0.4),  # 1 of 3 words, 1 of 2
        ("an answer", ["the answer"], 1.0),
        ("no no no", ["no"], 0.5),
        ("nothing", ["something", "else"], 0.0),
        ("nothing", ["something", "nothing at all"], 0.5),
        ("", ["something"], 0.0),
    ],
)
def test_word_f1(text: str, answers: Sequence[str], expected: float) -> None:
    assert word_f1(text, answers) == pytest.approx(expected)


@given(count=st.integers(1, 200), share=st.floats(0, 1))
def test_wilson_bounds_are_where_the_mean_lies_one_normal_quantile_away(
    count: int, share: float
) -> None:
    """The interval's definition: all p for which |mean - p| is within 1.96 standard errors at p."""
    right = round(share * count)
    found = wilson([1.0] * right + [0.0] * (count - right))
    assert (found.samples, found.mean) == (count, right / count)
    for bound in (found.low, found.high):
        if 1e-6 < bound < 1 - 1e-6:
            error = math.sqrt(bound * (1 - bound) / count)
            assert abs(found.mean - bound) == pytest.approx(1.959964 * error, rel=1e-4)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_bootstrap_is_the_distribution_of_means_of_all_resamples() -> None:
    values = [0.0, 0.13, 0.41, 0.75, 0.99, 1.3]
    means = [math.fsum(chosen) / 6 for chosen in product(values, repeat=6)]
    found = bootstrap(values)
    assert found.mean == pytest.approx(sum(values) / 6)
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert bootstrap(values) == found


@pytest.mark.parametrize("answers", [["B"], ["b"], ["the grey cat"]])
@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("B", 1),
        (" (B) the grey cat", 1),
        ("B. It was seen.", 1),
        ("It was the grey cat.", 1),
        ("A good question: the grey cat", 1),
        ("A", 0),
        ("A. not the grey cat", 0),
        ("Because of the dog", 0),
        ("F", 0),
        ("", 0),
    ],
)
def test_a_choice_is_its_letter_or_its_words(text: str, score: int, answers: list[str]) -> None:
    assert match_option(text, answers, options=["a dog", "the grey cat", "none"]) == score


def test_a_bootstrap_in_parts_is_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.1 * value**2 for value in range(37)]
    whole = bootstrap(values)
    monkeypatch.setattr("apb.evaluate.intervals._DRAWS", 1000)
    assert bootstrap(values) == whole


@pytest.mark.parametrize("count", [10, 30])
@pytest.mark.parametrize(("better", "worse"), [(0.0, 0.0), (0.02, 0.0), (0.1, 0.05), (0.4, 0.4)])
def test_the_interval_of_matched_scores_holds_the_truth_in_95_percent(
    count: int, better: float, worse: float
) -> None:
    held = 0.0
    for wins in range(count + 1):
        for losses in range(count + 1 - wins):
            ways = math.comb(count, wins) * math.comb(count - wins, losses)
            rest = count - wins - losses
            chance = ways * better**wins * worse**losses * (1 - better - worse) ** rest
            found = matched([1.0] * wins + [-1.0] * losses + [0.0] * rest)
            assert -1 <= found.low <= found.mean <= found.high <= 1
            assert found.low < found.high
            held += chance * (found.low <= better - worse <= found.high)
    assert held > 0.92, "its authors found a little below 95 % where nearly all of few pairs differ"


@settings(deadline=None, max_examples=10)
@given(baseline=scores, shift=st.floats(-0.5, 0.5))
def test_a_constant_difference_is_found_without_doubt(baseline: list[float], shift: float) -> None:
    shifted = [value + shift for value in baseline]
    found = paired(shifted, baseline, interval=bootstrap)
    for value in (found.mean, found.low, found.high):
        assert value == pytest.approx(shift, abs=1e-9)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 0), (0, 5), (4, 2), (3, 3), (1, 7)])
def test_the_sign_test_counts_throws_of_a_fair_coin(wins: int, losses: int) -> None:
    throws = wins + losses
    uneven = [
        sum(throw)
        for throw in product([0, 1], repeat=throws)
        if abs(sum(throw) - throws / 2) >= abs(wins - throws / 2)
    ]
    assert sign_test(wins, losses) == pytest.approx(len(uneven) / 2**throws)


def row(method: str, task: str, sample: int, score: float | None, kl: float | None = None) -> Row:
    return Row(
        task=task,
        length=64,
        sample=sample,
        method=method,
        digest="d",
        tokens=64,
        score=score,
        kl=kl,
    )


def test_a_summary_pairs_samples_by_place_and_not_by_order() -> None:
    base = [row("full", "a", 0, 1.0), row("full", "a", 1, 0.0), row("full", "b", 0, 0.5)]
    own = [row("apb", "b", 0, 1.0), row("apb", "a", 1, 0.0), row("apb", "a", 0, 0.0)]
    others = {found.place: found for found in base}
    summary = summarise([*base, *own], "full", others)
    overall = summary.find("score", "apb")
    assert overall is not None
    assert overall.difference is not None
    assert overall.difference.mean == pytest.approx((-1 + 0 + 0.5) / 3)
    assert (overall.difference.wins, overall.difference.losses) == (1, 1)
    of_a = summary.find("score", "apb", task="a")
    assert of_a is not None
    assert (of_a.value.samples, of_a.value.mean) == (2, 0.0)
    first = summary.find("score", "full")
    assert first is not None
    assert first.difference is None
    assert summary.find("kl", "apb") is None


def test_a_sample_that_only_one_of_two_has_is_in_no_difference() -> None:
    rows = [row("apb", "a", 0, 1.0), row("apb", "a", 1, 1.0)]
    others = {Place("a", 64, 1): row("full", "a", 1, 0.0)}
    found = summarise(rows, "other: full", others).find("score", "apb")
    assert found is not None
    assert found.difference is not None
    assert (found.value.samples, found.difference.samples) == (2, 1)


def test_the_plot_shows_every_method_with_scores(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row("full", "a", 0, 1.0),
        row("apb+num_blocks=4", "a", 0, 0.0),
        row("zigzag", "p", 0, None),
    ]
    path = tmp_path / "scores.svg"
    assert plot_scores(summarise(rows, "full", {}), path, title="tiny")
    drawn = path.read_text()
    assert all(text in drawn for text in ("tiny", "full", "apb+num_blocks=4", "score, %"))
    assert "zigzag" not in drawn
    assert not plot_scores(summarise(rows[2:], "full", {}), path, title="tiny")
    with pytest.raises(ApbError, match=r"gone/scores\.svg cannot be written: No such file"):
        plot_scores(summarise(rows, "full", {}), tmp_path / "gone" / "scores.svg", title="tiny")
