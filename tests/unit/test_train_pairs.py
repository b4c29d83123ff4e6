"""Guarantees of what heads are trained on: readings are spliced as documented, generated questions
are answered by their documents, and data without usable pairs is refused.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from apb.corpus import find_files
from apb.errors import InputError
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.prompts.template import USER_TEMPLATE, build_prompt
from apb.train import pairs, questions
from apb.train.pairs import Reader, Reading, collect
from apb.train.questions import Pair, make_pair
from apb.train.records import record_pairs

TOKENIZER = byte_tokenizer()
TEMPLATE: dict[str, Any] = {"template": "chat", "user_template": USER_TEMPLATE}
PAIR = Pair("A document. " * 20, "Who?", "Nobody.")
RECORD = {"document": PAIR.document, "question": "Who?", "answer": "Nobody."}
TEXT = " ".join(
    f"The {name} was a remarkable thing, and nobody in the valley had seen such a one before."
    for name in ("barometer", "chandelier", "gramophone", "hourglass", "microscope", "pendulum")
)


def reader(*, length: int = 2000, query_aware: bool = True) -> Reader:
    return Reader(TOKENIZER, TEMPLATE, length=length, query_aware=query_aware)


def text_of(reading: Reading, part: slice) -> str:
    return str(TOKENIZER.decode(reading.ids_T[part].tolist()))


@pytest.mark.parametrize("query_aware", [True, False])
def test_readings_are_spliced_as_the_anchor_is(query_aware: bool) -> None:
    reading = reader(query_aware=query_aware).reading(PAIR)
    assert reading is not None
    prompt = build_prompt(TOKENIZER, PAIR.document, PAIR.question, **TEMPLATE)
    before = prompt.query_ids if query_aware else ()
    answer_ids = tuple(PAIR.answer.encode())
    expected = [*prompt.prefix_ids, *before, *prompt.document_ids, *prompt.query_ids, *answer_ids]
    assert reading.ids_T.tolist() == expected
    assert text_of(reading, reading.document) == PAIR.document
    assert text_of(reading, reading.answer) == PAIR.answer
    assert tuple(reading.ids_T[reading.query].tolist()) == prompt.query_ids
    assert (reading.query.start < reading.document.start) == query_aware


def test_what_is_too_long_or_too_short_is_no_reading() -> None:
    whole = reader().reading(PAIR)
    assert whole is not None
    assert reader(length=len(whole.ids_T)).reading(PAIR) is not None
    assert reader(length=len(whole.ids_T) - 1).reading(PAIR) is None
    assert reader().reading(PAIR._replace(document="x" * 63)) is None
    assert reader().reading(PAIR._replace(document="x" * 64)) is not None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (RECORD, [PAIR]),
        ({"context": PAIR.document, "question": ["Who?"], "answer": ["Nobody."]}, [PAIR]),
        (
            {**RECORD, "question": ["Who?", "What?"], "answer": ["Nobody.", "No."]},
            [PAIR, Pair(PAIR.document, "What?", "No.")],
        ),
        ({**RECORD, "question": ["Who?", "What?"]}, None),
        ({**RECORD, "answer": " "}, []),
        ({"instruction": "Doc.\n\nWho?", "output": "No."}, [Pair("Doc.", "Who?", "No.")]),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "One.\nTwo.\n\nWho?\n"},
                    {"role": "assistant", "content": "No."},
                ]
            },
            [Pair("One.\nTwo.", "Who?", "No.")],
        ),
        ({"messages": [{"role": "user", "content": "Who?"}]}, []),
        ({"instruction": "Who?", "output": "No."}, []),
        ({"text": "Doc."}, None),
        ([1], None),
    ],
)
def test_records_of_known_layouts_are_read(record: Any, expected: list[Pair] | None) -> None:
    assert record_pairs(record) == expected


@pytest.mark.parametrize("kind", sorted(questions._MAKERS))
@pytest.mark.parametrize("seed", range(4))
def test_a_generated_question_is_answered_by_its_document(kind: str, seed: int) -> None:
    pair = questions._MAKERS[kind](TEXT, random.Random(seed))
    assert pair is not None
    if kind == "continuation":
        assert TEXT.startswith(pair.document)
        assert TEXT[len(pair.document) :].strip().startswith(pair.answer)
    elif kind == "tracing":
        assert all(f"VAR {name} = " in pair.document for name in pair.answer.split(", "))
    else:
        assert pair.answer in pair.document
        assert pair.answer not in pair.question
    if kind in ("needle", "tracing"):
        kept = [part for part in pair.document.split(". ") if part.rstrip(".") in TEXT]
        assert ". ".join(kept) == TEXT


def test_a_quoted_word_stands_in_one_sentence_alone() -> None:
    for seed in range(5):
        pair = questions._quote(TEXT, random.Random(seed))
        assert pair is not None
        word = pair.question.split('"')[1]
        assert pair.document.count(word) == 1
        assert word in pair.answer


def test_questions_are_of_all_kinds_and_the_same_for_the_same_seed() -> None:
    made = [make_pair(TEXT, random.Random(seed)) for seed in range(40)]
    assert made == [make_pair(TEXT, random.Random(seed)) for seed in range(40)]
    beginnings = {pair.question[:12] for pair in made if pair is not None}
    assert len(beginnings) >= 6


def write_data(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join([TEXT] * 80))
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write(TEXT.upper() * 12)
    records = [RECORD, {"text": TEXT}, {"instruction": f"{TEXT}\n\nWho?", "output": "No."}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_readings_come_from_all_files_and_are_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_SPARE_TOKENS", 1000)  # as the tokens of this test are bytes
    write_data(tmp_path)
    files = find_files((str(tmp_path),), field="text", setting="data")
    taken = [collect(files, reader(), needed=7, seed=3) for _ in range(2)]
    assert len(taken[0]) == 7
    for mine, theirs in zip(*taken, strict=True):
        assert mine.ids_T.tolist() == theirs.ids_T.tolist()
    texts = [text_of(reading, reading.document) for reading in taken[0]]
    assert any("BAROMETER" in text for text in texts)
    assert any(text.startswith("A document.") for text in texts)
    assert all(len(reading.ids_T) <= 2000 for reading in taken[0])
    other = collect(files, reader(), needed=7, seed=4)
    assert [r.ids_T.tolist() for r in other] != [r.ids_T.tolist() for r in taken[0]]


def test_all_that_data_has_is_taken_once(tmp_path: Path) -> None:
    """Twenty records, of which each is told by its question."""
    lines = [json.dumps({**RECORD, "question": f"Who {number}?"}) for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:18]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[18:]))
    files = find_files((str(tmp_path),), field="text", setting="data")
    readings = collect(files, reader(), needed=100, seed=0)
    found = sorted(text_of(reading, reading.query) for reading in readings)
    assert len(found) == len(set(found)) == 20
    few = collect(files, reader(), needed=5, seed=0)
    assert len(few) == 5


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", json.dumps({"title": "x"}), "has neither a document with question and answer"),
        ("a.jsonl", "{", "is not JSON"),
        ("a.jsonl", json.dumps({**RECORD, "document": "short"}), "holds no usable pair"),
        ("a.jsonl", json.dumps({"instruction": "x", "output": "y"}), "holds no usable pair"),
        ("a.txt", "Too short.", "holds no usable pair"),
    ],
)
def test_data_without_usable_pairs_is_one_sentence(
    name: str, content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    files = find_files((str(tmp_path),), field="text", setting="data")
    with pytest.raises(InputError, match=words) as caught:
        collect(files, reader(), needed=2, seed=0)
    assert "\n" not in str(caught.value)
