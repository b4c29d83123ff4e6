"""Text as a stream, from files and folders, in pieces of bounded size.

Files may be gzipped. Lines of a `.jsonl` are records, of which one field is read; every other file
is text. Bytes that are not UTF-8 leave out the lines they stand in, and nothing else.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from apb.errors import InputError

_PASSAGE_CHARS = 2**14
_PROBED_CHARS = 2**12
"""Of a file's beginning, which tells text from anything else."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""No tokenizer accepts a lone one; undecodable bytes come as such."""
_READ_ERRORS = (OSError, EOFError, zlib.error)


class Passage(NamedTuple):
    """A piece of text, or a list of token ids from a record that holds one."""

    content: str | list[Any]
    where: str
    """The file, and the line of a record in it."""
    num_bytes: int
    """How much of the file has been read since the last passage, as it lies on the disk."""
    left_out: int
    """Lines of this piece that were not UTF-8."""


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of a corpus.

    Attributes:
        path: ends in `.gz` where it is gzipped.
        field: of its records; None where it is text.
    """

    path: Path
    field: str | None = None

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def passages(self, *, max_chars: int = _PASSAGE_CHARS) -> Generator[Passage, None, None]:
        """The file piece by piece, see `pieces`; list fields of records come as they are.

        Raises:
            InputError: it cannot be read to its end, or a record is not as it should be.
        """
        seen = 0
        try:
            with _opened(self.path) as (raw, text):
                for where, content in self._contents(text, max_chars):
                    left_out = 0
                    if isinstance(content, str):
                        content, left_out = _without_bad_lines(content)
                    now = raw.tell()
                    yield Passage(content, where, now - seen, left_out)
                    seen = now
        except _READ_ERRORS as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error

    def records(self) -> Generator[tuple[str, Any], None, None]:
        """The records of a `.json` or `.jsonl`, each with its place.

        Raises:
            InputError: it cannot be read to its end, or a line is not JSON.
        """
        try:
            with _opened(self.path) as (_, text):
                yield from self._records(text)
        except _READ_ERRORS as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error

    def _contents(self, text: TextIO, max_chars: int) -> Iterator[tuple[str, str | list[Any]]]:
        if self.field is None:
            for piece in pieces(text, max_chars):
                yield str(self.path), piece
            return
        for where, record in self._records(text):
            content = self._read_field(record, where)
            if isinstance(content, list):
                yield where, content
                continue
            for piece in pieces(io.StringIO(content), max_chars):
                yield where, piece

    def _records(self, text: TextIO) -> Iterator[tuple[str, Any]]:
        """With the place of each; a `.json` is one record or a list of them."""
        if _name(self.path).endswith(".json"):
            value = _parsed(text.read(), str(self.path))
            for record in value if isinstance(value, list) else [value]:
                yield str(self.path), record
            return
        for number, line in enumerate(text, start=1):
            if line.strip():
                where = f"{self.path}:{number}"
                yield where, _parsed(line, where)

    def _read_field(self, record: Any, where: str) -> str | list[Any]:
        fields = record if isinstance(record, dict) else {}
        if self.field not in fields:
            raise InputError(
                f"{where} has no field {self.field!r} (its fields: {list(fields)[:8]}): name the "
                "field to read, or give another file"
            )
        content = fields[self.field]
        if not isinstance(content, str | list):
            raise InputError(
                f"{where} has neither text nor token ids in {self.field!r}: name another field, or "
                "give another file"
            )
        return content


def pieces(text: TextIO, max_chars: int) -> Iterator[str]:
    """A text, cut behind line ends where it can be; the pieces joined are the text.

    A tokenizer whose tokens do not reach over line ends yields the same tokens for the pieces as
    for the whole. Longer lines are cut before a space, or anywhere.
    """
    rest = ""
    while block := text.read(max_chars - len(rest)):
        rest += block
        if len(rest) == max_chars:
            end = rest.rfind("\n") + 1 or max(0, rest.rfind(" ")) or max_chars
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _without_bad_lines(text: str) -> tuple[str, int]:
    """And how many there were."""
    if not _SURROGATE.search(text):
        return text, 0
    lines = text.split("\n")
    good = [line for line in lines if not _SURROGATE.search(line)]
    return "\n".join(good), len(lines) - len(good)


def find_texts(names: Sequence[str], *, field: str, setting: str) -> list[CorpusFile]:
    """The files of a corpus: those named, and all text below the folders named, in order of name.

    `setting` is what errors call `names`. Hidden files and links in folders are passed over, and so
    is what does not begin as text; a file that is named has to.

    Raises:
        InputError: one of them does not exist or has no text, or the first record not that field.
    """
    return _checked(find_files(names, field=field, setting=setting))


def find_files(names: Sequence[str], *, field: str, setting: str) -> list[CorpusFile]:
    """As `find_texts`, but without a look into records, which may have other fields."""
    files = []
    for name in names:
        folder, paths = _named(name, setting)
        faults = {path: _fault(path) for path in paths}
        if not folder and faults[paths[0]] is not None:
            raise InputError(f"{setting}={name} {faults[paths[0]]}: give a UTF-8 text file")
        found = [path for path in paths if faults[path] is None]
        if not found:
            raise InputError(f"{setting}={name} holds no UTF-8 text file: give another folder")
        files += [CorpusFile(path, field if _is_jsonl(path) else None) for path in found]
    return list(dict.fromkeys(files))


def find_records(names: Sequence[str], *, field: str, setting: str) -> list[CorpusFile]:
    """Files of records: those named, and all `.json` and `.jsonl` below the folders named.

    Raises:
        InputError: one of them does not exist, or its first record does not have that field.
    """
    files = []
    for name in names:
        folder, paths = _named(name, setting)
        if folder:
            paths = [path for path in paths if _name(path).endswith((".json", ".jsonl"))]
        if not paths:
            raise InputError(f"{setting}={name} holds no .json or .jsonl: give another folder")
        files += [CorpusFile(path, field) for path in paths]
    return _checked(files)


def _checked(files: Sequence[CorpusFile]) -> list[CorpusFile]:
    """Each file once; the first record of each is looked at, so that mistakes are found at once."""
    distinct = list(dict.fromkeys(files))
    for file in distinct:
        if file.field is not None:
            with closing(file.passages()) as passages:
                next(passages, None)
    return distinct


def _named(name: str, setting: str) -> tuple[bool, list[Path]]:
    """Whether it is a folder, and its files."""
    path = Path(name).expanduser()
    if path.is_dir():
        return True, list(_files_below(path))
    if not path.is_file():
        raise InputError(f"{setting}={name} does not exist: give a file or a folder")
    return False, [path]


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            # Links would be counted twice, or lead in circles.
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def _fault(path: Path) -> str | None:
    """Why it is no text, judged by its beginning."""
    try:
        with _opened(path) as (_, text):
            begin = text.read(_PROBED_CHARS)
    except _READ_ERRORS as error:
        return f"cannot be read ({error})"
    if not begin:
        return "is empty"
    if "\0" in begin or _SURROGATE.search(begin):
        return "is not UTF-8 text"
    return None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, TextIO]]:
    """The file as it lies on the disk, and its text."""
    with path.open("rb") as raw:
        packed = path.suffix == ".gz"
        data: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        text = io.TextIOWrapper(data, "utf-8-sig", errors="surrogateescape", newline="\n")
        yield raw, text


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): repair it or take it out") from error


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz")


def _is_jsonl(path: Path) -> bool:
    return _name(path).endswith(".jsonl")
