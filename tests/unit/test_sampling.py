"""Guarantees of sampling: the distribution is the filtered softmax, exactly, and seeds repeat."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from apb.errors import InputError
from apb.sampling import Sampler, SamplingParams, filtered_probs, tempered

LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=9, unique=True)
NUM_DRAWS = 4_000


def expected_probs(logits: list[float], params: SamplingParams) -> list[float]:
    """The distribution, enumerated token by token in double precision."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[: params.top_k] if params.top_k else order
    weights = {i: math.exp(logits[i] / params.temperature) for i in kept}
    total = sum(weights.values())
    nucleus: dict[int, float] = {}
    mass = 0.0
    for i in kept:
        if mass / total >= params.top_p:
            break
        nucleus[i] = weights[i]
        mass += weights[i]
    return [nucleus.get(i, 0.0) / mass for i in range(len(logits))]


@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, 10),
    # No sum of a few softmax weights comes close enough to these for fp32 to round the other way.
    top_p=st.sampled_from([0.0101, 0.3117, 0.5023, 0.7919, 0.9483, 1.0]),
)
def test_probabilities_are_temperature_then_top_k_then_top_p(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    found_V = filtered_probs(torch.tensor(logits), params)
    expected_V = torch.tensor(expected_probs(logits, params))
    torch.testing.assert_close(found_V, expected_V, atol=1e-5, rtol=1e-4)


def test_top_p_stops_once_the_mass_is_reached_and_keeps_at_least_one() -> None:
    logits_V = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, expected in [
        (1e-6, [1, 0, 0, 0]),
        (0.4999, [1, 0, 0, 0]),
        (0.6, [2 / 3, 1 / 3, 0, 0]),
        (0.8, [4 / 7, 2 / 7, 1 / 7, 0]),
        (1.0, [0.5, 0.25, 0.125, 0.125]),
    ]:
        params = SamplingParams(temperature=1.0, top_p=top_p)
        torch.testing.assert_close(
            filtered_probs(logits_V, params), torch.tensor(expected, dtype=torch.float32)
        )


@pytest.mark.parametrize("sharpness", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.9), (0, 0.9999), (700, 0.9), (50, 1)])
def test_a_large_vocabulary_is_filtered_as_a_small_one(
    top_k: int, top_p: float, sharpness: float
) -> None:
    """Also where hundreds of tokens are kept, and where many are equally likely."""
    logits = (sharpness * torch.randn(5000)).mul(8).round().div(8).tolist()
    params = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p)
    expected_V = torch.tensor(expected_probs(logits, params))
    found_V = filtered_probs(torch.tensor(logits), params)
    both_V = (found_V > 0) & (expected_V > 0)
    different = int(((found_V > 0) != (expected_V > 0)).sum())
    assert different <= 1, "rounding decides of the last token alone"
    torch.testing.assert_close(found_V[both_V], expected_V[both_V], atol=0.0, rtol=2e-3)


def test_top_k_among_equals_keeps_exactly_k() -> None:
    params = SamplingParams(temperature=1.0, top_k=2)
    assert filtered_probs(torch.zeros(5), params).tolist() == [0.5, 0.5, 0, 0, 0]


def test_extreme_temperatures_stay_finite() -> None:
    logits_V = torch.tensor([300.0, -300.0, 299.0])
    for temperature, expected in [(1e-3, [1.0, 0.0, 0.0]), (1e6, [1 / 3, 1 / 3, 1 / 3])]:
        probs_V = filtered_probs(logits_V, SamplingParams(temperature=temperature))
        torch.testing.assert_close(probs_V, torch.tensor(expected), atol=1e-3, rtol=0)


@given(
    logits=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=9),
    temperature=st.floats(0.0, math.inf, exclude_min=True, exclude_max=True),
    top_k=st.integers(0, 3),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
)
@example(logits=[0.0, 1.0], temperature=1e-40, top_k=0, top_p=1.0)
@example(logits=[0.0, 1.0], temperature=5e-324, top_k=0, top_p=1.0)
@example(logits=[0.0, 1.0], temperature=1.0, top_k=0, top_p=1e-46)
@example(logits=[0.0, 1.0], temperature=1e300, top_k=2, top_p=5e-324)
def test_whatever_is_asked_for_the_likeliest_token_can_be_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=0))
    logits_V = torch.tensor(logits)
    probs_V = sampler.probs(logits_V)
    assert math.isclose(float(probs_V.sum()), 1.0, rel_tol=1e-5)
    best_V = tempered(logits_V, temperature) > -1e-6  # heat makes many equal
    assert best_V[logits_V.argmax()]
    assert probs_V[best_V].max() == probs_V.max()
    assert float(probs_V[sampler(logits_V)]) > 0.0


def test_draws_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.9, seed=1)
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, -3.0]
    sampler, logits_V = Sampler(params), torch.tensor(logits)
    drawn = torch.tensor([sampler(logits_V) for _ in range(NUM_DRAWS)]).bincount(minlength=6)
    for count, p in zip(drawn.tolist(), expected_probs(logits, params), strict=True):
        assert abs(count - NUM_DRAWS * p) <= 5 * math.sqrt(NUM_DRAWS * p * (1 - p))


@given(logits=st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=9))
def test_greedy_takes_the_first_of_the_most_likely(logits: list[float]) -> None:
    sampler = Sampler(SamplingParams(top_k=1, top_p=0.1, seed=0))
    assert sampler(torch.tensor(logits)) == logits.index(max(logits))


def draw(seed: int | None, num_tokens: int = 40) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
    return [sampler(torch.zeros(50)) for _ in range(num_tokens)]


def test_seed_repeats_whatever_is_drawn_elsewhere() -> None:
    first = draw(7)
    torch.randn(3)
    assert draw(7) == first
    assert draw(8) != first


def test_draws_without_a_seed_differ() -> None:
    assert draw(None) != draw(None)


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw(None)
    draw(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("max_tokens", value) for value in (0, -1)),
        *(("temperature", value) for value in (-0.1, math.inf, math.nan)),
        *(("top_p", value) for value in (0.0, -0.5, 1.01, math.nan)),
        ("top_k", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{setting}={value} must"):
        SamplingParams(**{setting: value})  # type: ignore[arg-type]


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="empty string"):
        SamplingParams(stop=("a", ""))


@pytest.mark.parametrize(
    ("given", "kept"), [("ab", ("ab",)), (["a", "b"], ("a", "b")), (None, ()), ((), ())]
)
def test_stop_takes_what_vllm_takes(given: Any, kept: tuple[str, ...]) -> None:
    assert SamplingParams(stop=given).stop == kept
