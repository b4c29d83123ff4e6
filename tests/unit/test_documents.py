"""Guarantees of `read_document`: text comes back to the letter, other files are refused."""

from __future__ import annotations

import io
from pathlib import Path

import pypdf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from apb.errors import InputError
from apb.prompts.document import read_document

TEXT = st.text().filter(lambda text: bool(text.strip()) and not text.startswith("\ufeff"))


def pdf_bytes(*pages: str, user_password: str | None = None) -> bytes:
    """A PDF with one line of text per page."""
    font = DictionaryObject()
    for key, value in (("/Type", "/Font"), ("/Subtype", "/Type1"), ("/BaseFont", "/Helvetica")):
        font[NameObject(key)] = NameObject(value)
    writer = pypdf.PdfWriter()
    for text in pages:
        page = writer.add_blank_page(width=300, height=300)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if user_password is not None:
        writer.encrypt(user_password, owner_password="owner", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_document(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "set prompt.document to" in message
    return message


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, mark=st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_text_comes_back_exactly_without_its_byte_order_mark(
    tmp_path: Path, text: str, mark: bytes
) -> None:
    path = tmp_path / "document.txt"
    path.write_bytes(mark + text.encode())
    assert read_document(path) == text


def test_line_ends_are_kept_and_a_str_path_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"a\r\nb\rc\n")
    assert read_document(str(tmp_path / "a.md")) == "a\r\nb\rc\n"


@pytest.mark.parametrize("name", ["report.pdf", "report.PDF", "report", "report.txt"])
def test_pdf_is_known_by_its_name_or_its_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pdf_bytes("first page", "second page"))
    assert read_document(path) == "first page\n\nsecond page"


def test_pdf_that_opens_without_a_password_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf_bytes("no printing", user_password=""))
    assert read_document(path) == "no printing"


def test_encrypted_pdf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.pdf"
    path.write_bytes(pdf_bytes("secret", user_password="password"))
    assert "is encrypted" in error_of(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.txt", b"%PDF-1.7\nrubbish"), ("a.pdf", b"plain text"), ("a.PDF", b"plain text")],
)
def test_damaged_pdf_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert "is damaged or no PDF" in error_of(path)


def test_pdf_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.pdf"
    path.write_bytes(pdf_bytes(""))
    assert "holds no text" in error_of(path)


def test_surrogates_from_a_pdf_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fonts.pdf"
    path.write_bytes(pdf_bytes("text"))
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda page: "a\ud800b")
    assert read_document(path) == "a?b"


@pytest.mark.parametrize("data", [b"", b" \n\t", b"\xef\xbb\xbf"])
def test_empty_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(data)
    assert "holds no text" in error_of(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_first_byte_that_is_not_utf8_is_named(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(mark + b"caf\xe9 \xff")
    assert f"is not UTF-8 text: byte 0xe9 at offset {len(mark) + 3};" in error_of(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "nowhere.txt")
    assert "is a folder" in error_of(tmp_path)


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read ([Errno 13] Permission denied)" in error_of(tmp_path / "secret.txt")
    monkeypatch.undo()
    assert "cannot be read" in error_of(Path("nul\0byte"))


def test_a_file_at_the_limit_is_read_and_one_byte_more_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 10)
    assert read_document(path, max_bytes=10) == "x" * 10
    with pytest.raises(InputError, match=r"a\.txt is larger than prompt\.max_bytes=9;"):
        read_document(path, max_bytes=9)


def test_a_device_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match=r"larger than prompt\.max_bytes=1000"):
        read_document("/dev/zero", max_bytes=1000)


def test_a_pdf_keeps_the_limits_of_pages_and_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    data = pdf_bytes(*["word"] * 3)
    path.write_bytes(data)
    assert read_document(path, max_pages=3).count("word") == 3
    with pytest.raises(InputError, match=r"has 3 pages, more than prompt\.max_pages=2;"):
        read_document(path, max_pages=2)
    # A packed page is a small file with a long text.
    writer = pypdf.PdfWriter(io.BytesIO(pdf_bytes("word" * 5000)))
    for page in writer.pages:
        page.compress_content_streams()
    writer.write(path)
    limit = 10_000
    assert path.stat().st_size < limit
    with pytest.raises(InputError, match=rf"holds more text than prompt\.max_bytes={limit};"):
        read_document(path, max_bytes=limit)
