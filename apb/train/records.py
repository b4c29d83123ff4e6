"""Questions and answers in records, in the layouts of the data sets that heads are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apb.train.questions import Pair

_DOCUMENTS = ("document", "context")


def record_pairs(record: Any) -> list[Pair] | None:
    """The pairs of a record of a known layout, None for another record.

    Known are ``{"document" (or "context"), "question", "answer"}``, where question and answer may
    be lists of the same length; ``{"messages": [{"role", "content"}, ...]}`` with the document in
    the user's first turn (LongAlign); ``{"instruction", "output"}`` (LongAlpaca). In the latter two
    the question is the turn's last paragraph, and a turn of one paragraph gives no pair.
    """
    if not isinstance(record, dict):
        return None
    document = next((record[name] for name in _DOCUMENTS if name in record), None)
    if document is not None and {"question", "answer"} <= set(record):
        questions, answers = (_as_list(record[name]) for name in ("question", "answer"))
        if len(questions) != len(answers):
            return None
        return [
            Pair(document, question, answer)
            for question, answer in zip(questions, answers, strict=True)
            if all(isinstance(text, str) and text.strip() for text in (document, question, answer))
        ]
    if {"instruction", "output"} <= set(record):
        return list(_of_turns(record["instruction"], record["output"]))
    turns = record.get("messages")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        said = [turn.get("content") for turn in turns if turn.get("role") in ("user", "assistant")]
        return list(_of_turns(*said[:2])) if len(said) > 1 else []
    return None


def _of_turns(asked: object, answer: object) -> Iterator[Pair]:
    if not isinstance(asked, str) or not isinstance(answer, str) or not answer.strip():
        return
    document, _, question = asked.rstrip().rpartition("\n")
    if document.strip() and question.strip():
        yield Pair(document.rstrip(), question.strip(), answer)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]
