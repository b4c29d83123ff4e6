"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end of the block.

    If the block raises, `path` is as it was. Nobody ever reads half of what is written. A link
    stays: what it names is replaced.

    Raises:
        OSError: it cannot be written, or is there and no file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and no file", str(path))
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
