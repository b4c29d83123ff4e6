"""The folder of an evaluation: what it was run with, and one line per finished sample."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import ApbError, InputError
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
    notes: tuple[str, ...] = ()

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
            InputError: it belongs to an evaluation with other settings, or holds a damaged line.
            ApbError: it cannot be written.
        """
        self.folder = folder
        self.rows: Rows = {}
        if (folder / _SETTINGS).is_file():
            settings = _merged(folder, settings)
            self.rows = _read(folder)
        elif (folder / _SAMPLES).exists():
            raise InputError(f"{folder / _SAMPLES} has no {_SETTINGS} beside it: give a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _SETTINGS, dict(settings))
            self._file = (folder / _SAMPLES).open("a", encoding="utf-8")
        except OSError as error:
            raise ApbError(f"output={folder} cannot be written ({error})") from error

    def append(self, row: Row) -> None:
        """Keep a row, on disk at once.

        Raises:
            ApbError: there is no space left, or the folder has gone.
        """
        try:
            self._file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ApbError(
                f"{self.folder / _SAMPLES} cannot be written ({error.strerror}): {len(self.rows)} "
                "samples are kept, and the same command goes on from there"
            ) from error
        self.rows[row.place, row.method] = row

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:  # what `append` could not write, it could not either
            return


def read_evaluation(folder: Path) -> tuple[dict[str, Any], Rows]:
    """Settings and rows of another evaluation, which stays as it is.

    Raises:
        InputError: it is none.
    """
    if not (folder / _SETTINGS).is_file():
        raise InputError(f"baseline={folder} is no folder of an evaluation: it has no {_SETTINGS}")
    return _read_settings(folder), {(row.place, row.method): row for row in _rows(folder)}


def _read(folder: Path) -> Rows:
    """Rows so far; what follows the last whole line was being written when the run was stopped."""
    rows = {(row.place, row.method): row for row in _rows(folder)}
    path = folder / _SAMPLES
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
    return rows


def _rows(folder: Path) -> Iterable[Row]:
    path = folder / _SAMPLES
    if not path.is_file():
        return
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    for number, line in enumerate(lines, start=1):
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
