"""Reads the text of a document from a file: UTF-8 text or PDF."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apb.errors import InputError

MAX_BYTES = 256 * 2**20
"""Of a file, and of the text in it."""
MAX_PAGES = 20_000
"""Of a PDF."""


def read_document(
    path: str | Path, *, max_bytes: int = MAX_BYTES, max_pages: int = MAX_PAGES
) -> str:
    """Return the text of the file at `path`, which holds more than white space.

    A file is a PDF if its name ends in `.pdf` or its content starts like one, else UTF-8 text,
    with or without a byte order mark. Line ends are kept; an empty line joins the pages of a PDF.

    Raises:
        InputError: the file is missing, a folder, unreadable, empty, encrypted, damaged, not UTF-8,
            or it or its text is longer than the limits.
    """
    data = _read_bytes(Path(path), max_bytes)
    is_pdf = Path(path).suffix.lower() == ".pdf" or data.lstrip().startswith(b"%PDF-")
    text = _pdf_text(data, path, max_bytes, max_pages) if is_pdf else _utf8_text(data, path)
    if not text.strip():
        raise InputError(
            f"{path} holds no text (scanned pages need OCR first); "
            "set prompt.document to a file with text in it"
        )
    return text


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # no further: a device or a pipe may have no end
        if len(data) <= max_bytes:
            return data
        reason = f"is larger than prompt.max_bytes={max_bytes}"
    except FileNotFoundError:
        reason = "does not exist"
    except IsADirectoryError:
        reason = "is a folder"
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error})"
    raise InputError(f"{path} {reason}; set prompt.document to a readable text or PDF file")


def _utf8_text(data: bytes, path: str | Path) -> str:
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    try:
        return data.removeprefix(mark).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(mark)
        raise InputError(
            f"{path} is not UTF-8 text: byte 0x{data[offset]:02x} at offset {offset}; "
            "convert it to UTF-8 or set prompt.document to another file"
        ) from error


def _pdf_text(data: bytes, path: str | Path, max_bytes: int, max_pages: int) -> str:
    import pypdf  # slow to import, and most documents are text
    from pypdf.errors import DependencyError, FileNotDecryptedError

    try:
        pages = pypdf.PdfReader(io.BytesIO(data)).pages
        if len(pages) > max_pages:
            raise InputError(
                f"{path} has {len(pages)} pages, more than prompt.max_pages={max_pages}; "
                "set prompt.document to a part of it or raise the limit"
            )
        text = _joined(pages, path, max_bytes)
    except InputError:
        raise
    except (FileNotDecryptedError, DependencyError) as error:
        raise InputError(
            f"{path} is encrypted ({error}); set prompt.document to a copy without a password"
        ) from error
    except Exception as error:  # pypdf meets damage with any exception, not only its own
        raise InputError(
            f"{path} is damaged or no PDF ({type(error).__name__}: {error}); "
            "set prompt.document to another file"
        ) from error
    # Broken font tables yield lone surrogates, which are not text.
    return text.encode("utf-8", "replace").decode("utf-8")


def _joined(pages: Iterable[Any], path: str | Path, max_bytes: int) -> str:
    """The text of a PDF; a small file can unfold to any length, so it is watched on the way."""
    texts, length = [], 0
    for page in pages:
        texts.append(page.extract_text())
        length += len(texts[-1])
        if length > max_bytes:
            raise InputError(
                f"{path} holds more text than prompt.max_bytes={max_bytes}; "
                "set prompt.document to a part of it or raise the limit"
            )
    return "\n\n".join(texts)
