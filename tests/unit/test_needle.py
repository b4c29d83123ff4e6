"""Guarantees of `make_needle`: the right length, each needle once and in place, seeded."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.errors import InputError
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.prompts import haystack
from apb.prompts.haystack import chronicle
from apb.prompts.needle import NeedleCase, is_correct, make_needle

TOKENIZER = byte_tokenizer()
KINDS = ("single", "multi_key", "variable_tracing")
LONGEST_SENTENCE = 200
FACT = re.compile(r"The special magic number for (\w+) is (\d{7})\.")
ASSIGNMENT = re.compile(r"VAR (\w+) = (?:VAR )?(\w+)\.")


def count_bytes(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def count_words(text: str) -> int:
    """Counts a sentence alone as one more than in its place, as tokenizers that add a BOS do."""
    return 1 + len(text.split())


def count_fewer_alone(text: str) -> int:
    """Counts a whole document as more than the sum of its sentences."""
    return len(text.split()) + text.count(". ")


@settings(deadline=None, max_examples=40)
@given(
    context_len=st.integers(400, 6000),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    count=st.sampled_from([count_bytes, count_words, count_fewer_alone]),
)
def test_document_fills_the_length_and_never_more(
    context_len: int, seed: int, kind: str, count: Callable[[str], int]
) -> None:
    case = make_needle(count, context_len=context_len, seed=seed, kind=kind)
    assert context_len - LONGEST_SENTENCE <= count(case.document) <= context_len


def test_long_document_is_within_one_percent() -> None:
    case = make_needle(count_words, context_len=50_000)
    assert 49_500 <= count_words(case.document) <= 50_000


@given(seed=st.integers(0, 2**32), depth=st.none() | st.floats(0, 1))
def test_the_fact_asked_for_occurs_once(seed: int, depth: float | None) -> None:
    case = make_needle(count_words, context_len=400, seed=seed, depth=depth)
    [(key, number)] = FACT.findall(case.document)
    assert number == case.answer
    assert case.document.count(number) == case.document.count(key) == 1
    assert f"What is the special magic number for {key}?" in case.question
    assert number not in case.question


@pytest.mark.parametrize("kind", ["single", "multi_key"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_fact_asked_for_is_at_its_depth(depth: float, kind: str) -> None:
    document = (case := make_needle(len, context_len=20_000, depth=depth, kind=kind)).document
    found = document.index(case.answer) / len(document)
    assert found == pytest.approx(depth, abs=0.03)
    if depth in (0.0, 1.0):
        edge = document.split(". ")[0 if depth == 0 else -1]
        assert case.answer in edge


@given(seed=st.integers(0, 2**32))
def test_multi_key_distractors_have_other_keys_and_numbers(seed: int) -> None:
    case = make_needle(count_words, context_len=400, seed=seed, kind="multi_key")
    facts = dict(FACT.findall(case.document))
    [asked] = [key for key in facts if key in case.question]
    assert facts.pop(asked) == case.answer
    assert len(facts) == 3
    assert sorted(facts.values()) == sorted(case.distractors)
    assert case.answer not in case.distractors


@given(seed=st.integers(0, 2**32))
def test_variables_reach_the_value_in_reading_order(seed: int) -> None:
    case = make_needle(count_words, context_len=400, seed=seed, kind="variable_tracing")
    values: dict[str, str] = {}
    for name, source in ASSIGNMENT.findall(case.document):
        values[name] = source if source.isdigit() else values[source]
    [asked] = re.findall(r"\d+", case.question)
    reached = [name for name, value in values.items() if value == asked]
    others = [name for name, value in values.items() if value != asked]
    assert reached == case.answer.split(", ")
    assert len(reached) == len(others) == 4
    assert {*others, *values.values()} - {asked} == set(case.distractors)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(kind: str) -> None:
    cases = [make_needle(count_words, context_len=900, seed=seed, kind=kind) for seed in (5, 5, 6)]
    assert cases[0] == cases[1]
    assert cases[0].document != cases[2].document
    assert cases[0].answer != cases[2].answer


def test_the_same_seed_gives_the_same_text_on_every_version() -> None:
    assert next(chronicle(random.Random(0))) == (
        "At first light, a new church bell was found behind the fish market, "
        "and Nora asked Petra to take it home."
    )


def test_prose_repeats_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haystack, "_FORMS", ("{trade} {time}.",))
    sentences = list(islice(chronicle(random.Random(1)), 300))
    assert len(set(sentences)) == len(sentences)


def test_prose_is_short_sentences_that_resemble_no_needle() -> None:
    sentences = list(islice(chronicle(random.Random(1)), 20_000))
    assert max(map(len, sentences)) < LONGEST_SENTENCE
    assert not re.search(r"\d|magic|VAR", " ".join(sentences))


def test_counting_is_linear_in_the_document() -> None:
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(text)

    make_needle(count, context_len=100_000)
    assert sum(counted) < 20 * 100_000


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("4829173", True),
        ("It is 4,829,173.", True),
        ("**4829173**", True),
        ("14829173", False),
        ("48291730", False),
        ("4829173,1111111", False),
        ("4829173 or 1111111", False),
        ("4829173,1234567", True),
        ("", False),
    ],
)
def test_numbers_are_right_alone_and_whole(text: str, right: bool) -> None:
    case = NeedleCase("", "", answer="4829173", distractors=("1111111",))
    assert is_correct(case, text) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [("ABCDE and FGHIJ hold 12345", True), ("ABCDE", False), ("ABCDE, FGHIJ, XXXXX", False)],
)
def test_names_are_right_if_complete_and_without_others(text: str, right: bool) -> None:
    case = NeedleCase("", "", answer="ABCDE, FGHIJ", distractors=("XXXXX",))
    assert is_correct(case, text) is right


@pytest.mark.parametrize("kind", KINDS)
def test_shortest_document_is_the_needles_alone(kind: str) -> None:
    with pytest.raises(InputError, match=r"context_len=1 is below the \d+ tokens") as caught:
        make_needle(count_words, context_len=1, kind=kind)
    needed = int(re.findall(r"the (\d+) tokens", str(caught.value))[0])
    case = make_needle(count_words, context_len=needed, kind=kind)
    assert count_words(case.document) == needed
    with pytest.raises(InputError, match=r"raise prompt\.context_len"):
        make_needle(count_words, context_len=needed - 1, kind=kind)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"depth=1\.5 is outside 0 to 1; change prompt"):
        make_needle(count_words, context_len=400, depth=1.5)
    with pytest.raises(InputError, match="kind='hard' is none of single, multi_key, variable_t"):
        make_needle(count_words, context_len=400, kind="hard")
    with pytest.raises(InputError, match=r"depth=0\.5 has no meaning for kind='variable_tracing'"):
        make_needle(count_words, context_len=400, depth=0.5, kind="variable_tracing")
