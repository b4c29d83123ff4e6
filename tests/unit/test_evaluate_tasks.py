"""Guarantees of generated tasks: their definitions, their length, and that a seed decides them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.errors import InputError
from apb.evaluate.draft import Sample
from apb.evaluate.fit import Encode, fit
from apb.evaluate.needles import HUNTS
from apb.evaluate.questions import library
from apb.evaluate.tasks import GROUPS, RULER, TASKS

FACT = re.compile(r"special magic (number|uuid)s? for (\S+) is (\S+)\.")
ASSIGNMENT = re.compile(r"VAR (\w+) = (?:VAR )?(\w+)\.")
ITEM = re.compile(r"^(\d+)\. (\w+)$", re.MULTILINE)
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def encode_words(text: str) -> list[int]:
    """Tokens begin at spaces, as those of real tokenizers do, and long words are several."""
    return [len(token) for token in re.findall(r" ?[^\W\d]{1,6}|\d|\s|[^\w\s]+| ?_", text)]


ENCODERS = {"bytes": encode_bytes, "words": encode_words}
LENGTHS = {"bytes": (12_000, 30_000), "words": (2048, 9000)}
seeds = st.integers(0, 2**32)


def sample(
    task: str, length: int = 9000, *, seed: int = 0, index: int = 0, encode: Encode = encode_bytes
) -> Sample:
    return TASKS[task].sample(task, length, seed=seed, index=index, encode=encode)


def test_there_are_thirteen_of_ruler_and_one_of_infinitebench() -> None:
    assert len(RULER) == 13
    assert set(GROUPS["all"]) == {*RULER, "kv_retrieval", "prose"}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=6, deadline=None)
@given(data=st.data(), seed=seeds)
def test_length_is_at_most_one_percent_below_and_never_above(
    task: str, encoder: str, data: st.DataObject, seed: int
) -> None:
    low, high = LENGTHS[encoder]
    length = data.draw(st.integers(low, high))
    made = sample(task, length, seed=seed, encode=ENCODERS[encoder])
    assert 0.99 * length <= len(made.document_ids) <= length
    assert made.document_ids == ENCODERS[encoder](made.document)


@pytest.mark.parametrize("task", TASKS)
def test_below_its_fixed_parts_a_task_is_refused_by_number(task: str) -> None:
    with pytest.raises(InputError, match=rf"lengths=10 cannot hold {task}, which needs") as caught:
        sample(task, 10)
    needed = int(re.findall(r"needs (\d+)", str(caught.value))[0])
    draft = TASKS[task].sample(task, max(needed + 400, 600), seed=0, index=0, encode=encode_bytes)
    assert len(draft.document_ids) >= needed


@pytest.mark.parametrize("task", TASKS)
def test_a_long_document_is_tokenised_little_more_than_once(task: str) -> None:
    read = 0

    def encode(text: str) -> list[int]:
        nonlocal read
        read += len(text)
        return encode_bytes(text)

    made = sample(task, 400_000, encode=encode)
    assert read < 2 * len(made.document)


@pytest.mark.parametrize("task", TASKS)
def test_the_arguments_decide_everything(task: str) -> None:
    first, again = sample(task, seed=3, index=1), sample(task, seed=3, index=1)
    assert first == again
    for other in (sample(task, seed=4, index=1), sample(task, seed=3, index=2)):
        assert other.document != first.document
        assert task.startswith("qa") or other.answers != first.answers


def facts(made: Sample) -> list[tuple[str, str]]:
    """Key and value of every needle, those of the hay included."""
    return [(key, value) for _, key, value in FACT.findall(made.document)]


@pytest.mark.parametrize("task", HUNTS)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_needles_are_as_many_as_defined_and_each_value_occurs_once(task: str, seed: int) -> None:
    made = sample(task, seed=seed)
    found = facts(made)
    keys = Counter(key for key, _ in found)
    if task in ("niah_multikey_2", "niah_multikey_3"):
        assert len(found) > 50
    else:
        assert len(found) == (4 if "multi" in task else 1)
    assert set(keys.values()) == {4 if task == "niah_multivalue" else 1}
    assert all(made.document.count(value) == 1 for _, value in found)
    asked = {key for key in keys if f"{key}" in made.question}
    assert sorted(made.answers) == sorted(value for key, value in found if key in asked)
    assert len(asked) == (4 if task == "niah_multiquery" else 1)
    assert made.answer_start.endswith(("is", "are"))


@pytest.mark.parametrize(
    ("task", "key", "value"),
    [
        ("niah_single_1", r"[a-z]+(-[a-z]+)+", r"\d{7}"),
        ("niah_single_3", r"[a-z]+(-[a-z]+)+", UUID),
        ("niah_multikey_2", r"[a-z]+(-[a-z]+)+", r"\d{7}"),
        ("niah_multikey_3", UUID, UUID),
    ],
)
def test_keys_and_values_are_of_the_defined_kind(task: str, key: str, value: str) -> None:
    assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in facts(sample(task)))


def test_the_hay_of_the_first_needle_repeats_and_of_the_second_does_not() -> None:
    repeated = Counter(sample("niah_single_1").document.splitlines()[1:-1])
    assert max(repeated.values()) > 50
    essay = Counter(sample("niah_single_2").document.split(". "))
    assert max(essay.values()) == 1


def test_needles_lie_at_all_depths() -> None:
    depths = []
    for index in range(60):
        made = sample("niah_single_2", 4000, index=index)
        depths.append(made.document.index(made.answers[0]) / len(made.document))
    assert min(depths) < 0.15
    assert max(depths) > 0.85


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_keys_of_a_json_object_are_distinct_and_the_asked_one_has_the_answer(seed: int) -> None:
    made = sample("kv_retrieval", seed=seed)
    text = made.document
    pairs = json.loads(text[text.index("{") : text.index("}") + 1], object_pairs_hook=list)
    table = dict(pairs)
    assert len(table) == len(pairs) > 50
    assert all(re.fullmatch(UUID, part) for pair in pairs for part in pair)
    [key] = re.findall(UUID, made.question)
    assert (table[key],) == made.answers


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_variables_of_the_asked_value_are_a_chain_in_reading_order(seed: int) -> None:
    made = sample("vt", seed=seed)
    values: dict[str, str] = {}
    for name, source in ASSIGNMENT.findall(made.document):
        assert name not in values
        values[name] = source if source.isdigit() else values[source]
    [asked] = re.findall(r"\d+", made.question)
    assert made.answers == tuple(name for name, value in values.items() if value == asked)
    assert len(made.answers) == 5
    example = [name for name, value in values.items() if value != asked]
    assert len(example) == 5
    assert " ".join(example) in made.document


@pytest.mark.parametrize(
    ("length", "common", "other", "example"),
    [(4095, 6, 1, {3: 10, 1: 10}), (4096, 30, 3, {10: 10, 3: 30})],
)
@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_common_words_are_repeated_as_defined(
    length: int, common: int, other: int, example: dict[int, int], seed: int
) -> None:
    made = sample("cwe", length, seed=seed, encode=encode_words)
    items = ITEM.findall(made.document)
    last = [at for at, (number, _) in enumerate(items) if number == "1"][-1]
    assert Counter(Counter(word for _, word in items[:last]).values()) == example
    listed = items[last:]
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, count in counts.items() if count == common} == set(made.answers)
    assert len(made.answers) == 10
    assert set(counts.values()) == {common, other}


@settings(max_examples=10, deadline=None)
@given(seed=seeds, length=st.integers(1500, 20_000))
def test_frequent_words_follow_the_zeta_distribution(seed: int, length: int) -> None:
    made = sample("fwe", length, seed=seed)
    text = made.document.split("\n\n")[1]
    counts = Counter(text.split())
    (noise, most), *others = counts.most_common()
    assert noise == "..."
    assert tuple(word for word, _ in others[:3]) == made.answers
    assert others[2][1] > others[3][1]
    for rank, (_, count) in enumerate(others[:8], start=2):
        assert count == pytest.approx(most / rank**2, abs=2)


def pages(made: Sample) -> dict[str, str]:
    found = re.findall(r"Document (\d+): (.*)\n(.*)", made.document)
    assert [int(number) for number, _, _ in found] == list(range(1, len(found) + 1))
    assert len({title for _, title, _ in found}) == len(found)
    return {title: text for _, title, text in found}


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_passages_with_the_answer_are_among_the_documents(task: str, seed: int) -> None:
    made = sample(task, 30_000, seed=seed)
    questions = library().single if task == "qa_1" else library().double
    [asked] = [question for question in questions if made.question.endswith(question.text)]
    found = pages(made)
    assert len(asked.titles) == (1 if task == "qa_1" else 2)
    for title in asked.titles:
        assert found[title] == library().passages[title]
    holder = library().passages[asked.titles[-1]].lower()
    assert any(answer.lower() in holder for answer in made.answers)
    assert len(found) > 40, "distractors beyond the packaged passages"


@pytest.mark.parametrize(("task", "number"), [("qa_1", 72), ("qa_2", 17)])
def test_all_questions_are_asked_before_any_is_asked_again(task: str, number: int) -> None:
    asked = [sample(task, 9000, index=index).question for index in range(2 * number)]
    assert len(set(asked[:number])) == len(set(asked[number:])) == number
    assert asked[:number] != asked[number:]


def test_numbers_that_are_answers_do_not_occur_inside_of_others() -> None:
    for question in library().single:
        text = library().passages[question.titles[0]]
        for answer in filter(str.isdigit, question.answers):
            assert len(answer) > 1
            assert text.count(answer) == len(re.findall(rf"(?<!\d){answer}(?!\d)", text))


def test_every_packaged_question_is_answered_where_it_says_and_not_by_its_own_words() -> None:
    texts = library().passages
    for question in (*library().single, *library().double):
        assert any(
            answer.lower() in texts[question.titles[-1]].lower() for answer in question.answers
        )
        assert not any(answer.lower() in question.text.lower() for answer in question.answers)
    assert len({question.text for question in library().single}) == len(library().single)


@settings(max_examples=60, deadline=None)
@given(
    head=st.text(alphabet="ab \n", max_size=40),
    unit=st.integers(1, 700),
    length=st.integers(60, 20_000),
    word=st.integers(1, 30),
)
def test_fit_holds_for_units_of_any_size(head: str, unit: int, length: int, word: int) -> None:
    filler = "\n" + ("x" * word + " ") * (unit // word + 1)
    build: Callable[[int], str] = lambda units: head + filler * units  # noqa: E731
    text, ids = fit(build, encode_bytes, length, what="it")
    assert text.startswith(head)
    assert ids == encode_bytes(text)
    assert 0.99 * length <= len(ids) <= length
