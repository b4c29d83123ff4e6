"""A file of JSON lines that grows one by one and keeps what is finished, whatever stops it."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import InputError


class Lines(NamedTuple):
    """What a file holds.

    Attributes:
        whole: lines without their ends.
        begun: what follows them, of a line whose writer was stopped.
    """

    whole: list[bytes]
    begun: bytes

    @classmethod
    def of(cls, data: bytes) -> Lines:
        *whole, begun = data.split(b"\n")
        return cls(whole, begun)


def encode_line(value: Any) -> bytes:
    return escaped(json.dumps(value, ensure_ascii=False)).encode() + b"\n"


def escaped(text: str) -> str:
    """Text with JSON's escapes for lone surrogates, as in a file's name that is not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


class JsonLines:
    """A file that this process alone writes, until it is closed."""

    def __init__(self, path: Path, *, output: Path, writer: str) -> None:
        """Open or make it; errors name the setting `output`, and `writer` as who else may write.

        Raises:
            InputError: it cannot be written, or someone else does so.
        """
        with ExitStack() as opened:
            try:
                self._file = opened.enter_context(path.open("ab+", buffering=0))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"output={output} is being written by another {writer}") from None
            except OSError as error:
                raise InputError(f"output={output} cannot be written: {error.strerror}") from None
            opened.pop_all()

    def read(self) -> Lines:
        self._file.seek(0)
        return Lines.of(self._file.read())

    def drop_begun(self) -> None:
        """Take out what `Lines.begun` is: nothing may be added before."""
        lines = self.read()
        self._file.truncate(self._file.tell() - len(lines.begun))

    def append(self, *values: Any) -> None:
        """Leaves the values on disk, one per line.

        Raises:
            OSError: no space is left, for example; the file is what it was before.
        """
        data = b"".join(map(encode_line, values))
        end = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()
