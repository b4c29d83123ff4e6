"""The user's own questions: lines of JSON as LongBench and InfiniteBench write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import InputError
from apb.evaluate.match import lettered

_DOCUMENT = ("context", "document")
_QUESTION = ("input", "question", "query")
_ANSWERS = ("answers", "answer", "outputs")


class Record(NamedTuple):
    """A document, a question about it, and right answers."""

    document: str
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    """To choose from, where there are any; they are part of the question."""


def read_records(path: Path, limit: int) -> list[Record]:
    """The first `limit` questions of a file.

    Documents are read from `context`, questions from `input` or `question` (with the lettered
    `options`, where there are any), right answers from `answers` or `answer`.

    Raises:
        InputError: the file is missing, or a line is not such a record.
    """
    records: list[Record] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if len(records) == limit:
                    break
                if line.strip():
                    records.append(_record(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data={path} cannot be read ({error}): give a JSONL file") from error
    if not records:
        raise InputError(f"data={path} is empty: give a JSONL file with questions")
    return records


def _record(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}): repair it or take it out") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where} is no object with fields: repair it or take it out")
    document = _text(_field(fields, _DOCUMENT, where), where)
    question = _text(_field(fields, _QUESTION, where), where)
    answers = _field(fields, _ANSWERS, where)
    given = tuple(str(answer) for answer in (answers if isinstance(answers, list) else [answers]))
    if not all(answer.strip() for answer in given) or not given:
        raise InputError(f"{where} has no right answer: give one, or take the line out")
    options = tuple(str(option) for option in fields.get("options") or ())
    choices = (f"{letter}. {option}" for letter, option in lettered(options).items())
    return Record(document, "\n".join([question, *choices]), given, options)


def _field(fields: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if fields.get(name):
            return fields[name]
    raise InputError(f"{where} has none of {', '.join(names)}: name a field so, or take it out")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} has {value!r} where text belongs: repair it or take it out")
    return value
