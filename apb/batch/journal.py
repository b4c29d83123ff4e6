"""Answers on disk: one line of JSON each, synced one by one, so that what is finished stays so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from apb.errors import InputError
from apb.files import written_whole
from apb.json_lines import JsonLines, encode_line, escaped
from apb.output import check_output

Answer = dict[str, Any]
"""A row of output, with the fields of `TYPES`; an error and an answer exclude each other."""
TYPES = {
    "id": "string",
    "question": "string",
    "source": "string",
    "text": "string",
    "finish_reason": "string",
    "method": "string",
    "context_tokens": "int64",
    "generated_tokens": "int64",
    "prefill_s": "float64",
    "ttft_s": "float64",
    "decode_s": "float64",
    "notes": "string",
    "error": "string",
    "settings": "string",
}
_ASKED = ("question", "source")
_BEGIN = b'{"id": '


class Journal:
    """The output of a batch. Of several lines with one `id` the last counts.

    Parquet cannot grow row by row: its lines are kept beside it until the batch is over.
    """

    def __init__(self, output: Path, settings: str) -> None:
        """Open it, with what an earlier run has finished.

        Args:
            output: a `.jsonl` or `.parquet` file.
            settings: of the answers to come, see `apb.batch.__main__.fingerprint`.

        Raises:
            InputError: it cannot be written, is no output of a batch or of another one's settings,
                or is being written by someone else.
        """
        self._output, self._settings = output, settings
        self._lines = output if output.suffix == ".jsonl" else Path(f"{output}.jsonl")
        check_answers(output)
        self._file = JsonLines(self._lines, output=output, writer="batch")
        try:
            self._answers = self._recover()
        except BaseException:
            self._file.close()
            raise

    def is_answered(self, asked: Answer) -> bool:
        """Whether there is an answer with that `id`, and it is to that `question` and `source`.

        A row that failed has none, and is tried again.
        """
        answer = self._answers.get(asked["id"])
        if answer is None or answer["error"] is not None:
            return False
        return all(answer[name] == asked[name] for name in _ASKED)

    def failed(self) -> frozenset[str]:
        """The ids of rows that have an error and no answer."""
        return frozenset(name for name, row in self._answers.items() if row["error"] is not None)

    def add(self, answer: Answer) -> None:
        """Leaves the row on disk; fields that it has not got are null."""
        answer = {name: answer.get(name) for name in TYPES} | {"settings": self._settings}
        self._file.append(answer)
        self._answers[answer["id"]] = answer

    def finish(self, order: Iterable[str]) -> None:
        """Leaves one row per id, in the order given and then as they came; the batch is over."""
        ids = dict.fromkeys([*(name for name in order if name in self._answers), *self._answers])
        answers = [self._answers[row_id] for row_id in ids]
        with written_whole(self._output) as scratch:
            with scratch.open("wb") as file:
                if self._lines == self._output:
                    file.writelines(map(encode_line, answers))
                else:
                    _write_parquet(file, answers)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self._lines, scratch)
        if self._lines != self._output:
            self._lines.unlink()

    def close(self) -> None:
        self._file.close()

    def _recover(self) -> dict[str, Answer]:
        lines, begun = self._file.read()
        answers = [self._parse(line, number) for number, line in enumerate(lines, 1)]
        if not _BEGIN.startswith(begun[: len(_BEGIN)]):
            self._parse(begun, len(lines) + 1)  # not what a crash leaves of a line
        is_over = not answers and self._lines != self._output and self._output.exists()
        if is_over:  # an earlier batch, whose lines have become this file
            answers = _read_parquet(self._output)
        if any(answer["settings"] != self._settings for answer in answers):
            raise InputError(
                f"output={self._output} holds answers given with another model or other settings "
                "(such as the number of blocks, by default one per rank): choose another file or "
                "remove it"
            )
        self._file.drop_begun()
        if is_over:
            self._file.append(*answers)
        return {answer["id"]: answer for answer in answers}

    def _parse(self, line: bytes, number: int) -> Answer:
        try:
            answer: Answer = json.loads(line)
            if answer.keys() != TYPES.keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise InputError(
                f"output={self._lines} holds something else in line {number}: choose another file"
            ) from None
        return answer


def check_answers(output: Path) -> None:
    """Raises InputError unless a batch can write there."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"output={output} must end in .jsonl or .parquet")
    check_output(output)
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError("Parquet needs one more package: pip install 'apb[parquet]'")


def _write_parquet(file: IO[bytes], answers: list[Answer]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(list(TYPES.items()))
    rows = [
        {name: escaped(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in answers
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


def _read_parquet(path: Path) -> list[Answer]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        answers: list[Answer] = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"output={path} is no Parquet file: choose another one") from error
    if any(answer.keys() != TYPES.keys() for answer in answers):
        raise InputError(f"output={path} holds something else: choose another file")
    return answers
