"""The folder of an evaluation: what it was run with, and one line per finished sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import ApbError, InputError
from apb.json_lines import JsonLines, Lines
from apb.output import write_json

_SETTINGS = "settings.json"
_SAMPLES = "samples.jsonl"


class Place(NamedTuple):
    """Which sample of an evaluation."""

    task: str
    length: int
    sample: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one method did with one sample.

    Attributes:
        digest: of document and question, the same for all methods.
        tokens: of the document.
        score: from 0 to 1, of an answer.
        logprob: of a given continuation, per token; `kl` is that to exact attention, in nats.
        seconds: from the request to the score.
        ran: in which dtype, where and by which attention.
        source: the commit of apb.
    """

    task: str
    length: int
    sample: int
    method: str
    digest: str
    tokens: int
    score: float | None = None
    text: str | None = None
    answers: tuple[str, ...] = ()
    logprob: float | None = None
    kl: float | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    ran: str | None = None
    source: str | None = None

    @property
    def place(self) -> Place:
        return Place(self.task, self.length, self.sample)


Rows = dict[tuple[Place, str], Row]
"""By place and method."""


class Journal:
    """Reads what there is, and takes rows as they come."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Go on in `folder`, or begin there.

        Raises:
            InputError: it belongs to an evaluation with other settings, holds a damaged line or is
                being written by another evaluation.
            ApbError: it cannot be written.
        """
        self.folder = folder
        if (folder / _SETTINGS).is_file():
            settings = _merged(folder, settings)
        elif (folder / _SAMPLES).is_file() and (folder / _SAMPLES).stat().st_size:
            raise InputError(f"{folder / _SAMPLES} has no {_SETTINGS} beside it: give a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ApbError(f"output={folder} cannot be written ({error})") from error
        self._file = JsonLines(folder / _SAMPLES, output=folder, writer="evaluation")
        try:
            self.rows = _rows_of(self._file.read(), folder / _SAMPLES)
            self._file.drop_begun()
            write_json(folder / _SETTINGS, dict(settings))
        except BaseException:
            self.close()
            raise

    def append(self, row: Row) -> None:
        """Keep a row, on disk at once.

        Raises:
            ApbError: there is no space left, or the folder has gone.
        """
        try:
            self._file.append(asdict(row))
        except OSError as error:
            raise ApbError(
                f"{self.folder / _SAMPLES} cannot be written ({error.strerror}): {len(self.rows)} "
                "samples are kept, and the same command goes on from there"
            ) from error
        self.rows[row.place, row.method] = row

    def close(self) -> None:
        self._file.close()


def read_evaluation(folder: Path) -> tuple[dict[str, Any], Rows]:
    """Settings and rows of another evaluation, which stays as it is.

    Raises:
        InputError: it is none.
    """
    if not (folder / _SETTINGS).is_file():
        raise InputError(f"baseline={folder} is no folder of an evaluation: it has no {_SETTINGS}")
    path = folder / _SAMPLES
    data = path.read_bytes() if path.is_file() else b""
    return _read_settings(folder), _rows_of(Lines.of(data), path)


def _rows_of(lines: Lines, path: Path) -> Rows:
    return {(row.place, row.method): row for row in _parsed(lines, path)}


def _parsed(lines: Lines, path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines.whole, start=1):
        try:
            fields = json.loads(line)
            lists = {name: tuple(fields[name]) for name in ("answers", "notes")}
            yield Row(**{**fields, **lists})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}:{number} is no finished sample ({error}): take the line out, and it runs "
                "again"
            ) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        dict(settings["methods"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): give another folder") from error
    return settings


def _merged(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a folder with those of a further run, which may only add methods."""
    there = _read_settings(folder)
    methods = {**there["methods"], **settings["methods"]}
    for name, here in {**settings, "methods": methods}.items():
        before = there.get(name)
        if name == "methods":
            changed = {label: own for label, own in there[name].items() if own != methods[label]}
            if not changed:
                continue
            before, here = changed, {label: methods[label] for label in changed}
        if before != here:
            raise InputError(
                f"output={folder} holds an evaluation with other settings ({name} was {before} and "
                f"is {here} now): give another folder, or the settings of that one"
            )
    return {**settings, "methods": methods}
