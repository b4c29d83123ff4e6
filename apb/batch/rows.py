"""The rows of a batch: documents in a folder, lines of JSON, Parquet, or a Ray dataset elsewhere.

A row of a file has the columns `document` (text) or `path` (a file, from the folder of the input
on), and optionally `question` and `id`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import InputError
from apb.json_lines import escaped

DOCUMENT_SUFFIXES = (".txt", ".md", ".pdf")
COLUMNS = ("id", "question", "document", "path")
_ROWS_AT_ONCE = 16
"""Documents are long: a few of them are in memory at a time."""


class Row(NamedTuple):
    """One question about one document, which is text or a file.

    Attributes:
        source: what tells the document from others: its path in the input, or its text's digest.
        error: what is wrong with the row.
    """

    id: str
    question: str | None = None
    document: str | None = None
    path: Path | None = None
    source: str | None = None
    error: str | None = None


class Rows(NamedTuple):
    """A batch: its rows, read anew by each call, and how many there are where that is known."""

    read: Callable[[], Iterator[Row]]
    total: int | None


def open_rows(source: str) -> Rows:
    """The rows of ``input=``.

    Raises:
        InputError: nothing there, or nothing that holds rows.
    """
    if "://" in source:
        return _remote(source)
    path = Path(source)
    if path.is_dir():
        tables = sorted(path.glob("*.parquet"))
        return _parquet(path, tables) if tables else _folder(path)
    if not path.is_file():
        raise InputError(f"input={source} does not exist: give a folder, a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return _parquet(path.parent, [path])
    if path.suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    raise InputError(f"input={source} is neither a folder nor a .jsonl or .parquet file")


def _folder(folder: Path) -> Rows:
    files = [path for path in folder.rglob("*") if path.suffix.lower() in DOCUMENT_SUFFIXES]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if not names:
        raise InputError(f"input={folder} holds no {', '.join(DOCUMENT_SUFFIXES)} files")

    def read() -> Iterator[Row]:
        for name in names:
            yield Row(escaped(name), path=folder / name, source=escaped(name))

    return Rows(read, len(names))


def _json_lines(path: Path) -> Rows:
    def read() -> Iterator[Row]:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield _line(line, number, path.parent)

    with path.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    return Rows(read, total)


def _line(line: bytes, number: int, folder: Path) -> Row:
    try:
        columns = json.loads(line)
        if not isinstance(columns, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        return Row(str(number), error=f"line {number + 1} of the input is no JSON object: {error}")
    return _row(columns, number, folder)


def _parquet(folder: Path, files: list[Path]) -> Rows:
    if find_spec("pyarrow") is None:
        raise InputError("Parquet needs one more package: pip install 'apb[parquet]'")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        total = sum(pq.read_metadata(file).num_rows for file in files)
    except pa.ArrowException as error:
        raise InputError(f"{folder} holds a damaged Parquet file: {error}") from error

    def read() -> Iterator[Row]:
        number = 0
        for file in files:
            table = pq.ParquetFile(file)
            names = [name for name in COLUMNS if name in table.schema_arrow.names]
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=names):
                for columns in batch.to_pylist():
                    yield _row(columns, number, folder)
                    number += 1

    return Rows(read, total)


def _remote(source: str) -> Rows:
    if any(find_spec(name) is None for name in ("ray", "pandas", "pyarrow")):
        raise InputError(f"input={source} needs Ray Data: pip install 'apb[ray]'")
    from apb.batch.ray_rows import read_columns

    def read() -> Iterator[Row]:
        for number, columns in enumerate(read_columns(source)):
            yield _row(columns, number, Path())

    return Rows(read, None)


def _row(columns: Mapping[str, Any], number: int, folder: Path) -> Row:
    """A row from its columns; without an `id` its number, from 0, names it."""
    given = {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
    row = Row(escaped(str(given.get("id", number))))
    for name in ("question", "document", "path"):
        if not isinstance(given.get(name, ""), str):
            return row._replace(error=f"column {name} is no text")
    if ("document" in given) == ("path" in given):
        return row._replace(error="a row needs one of the columns document and path")
    row = row._replace(question=given.get("question"))
    if "path" in given:
        return row._replace(path=folder / given["path"], source=escaped(given["path"]))
    document = given["document"]
    digest = hashlib.sha256(escaped(document).encode()).hexdigest()[:16]
    return row._replace(document=document, source=f"sha256:{digest}")
