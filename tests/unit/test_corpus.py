"""Guarantees of `apb.corpus`: text comes whole, in bounded pieces, and nothing else comes."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from apb.corpus import CorpusFile, find_records, find_texts, pieces

TEXTS = st.lists(st.text() | st.sampled_from(["\n", "\r\n", " ", "é\n", "a b\n"])).map("".join)


@settings(deadline=None)
@given(text=TEXTS, max_chars=st.integers(1, 12))
@example(text="a long line and\nanother", max_chars=8)
def test_pieces_are_the_text_and_end_at_line_ends(text: str, max_chars: int) -> None:
    cut = list(pieces(io.StringIO(text), max_chars))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= max_chars for piece in cut)
    assert all(piece.endswith("\n") or "\n" not in piece for piece in cut[:-1])


def test_a_long_line_is_cut_before_a_space_where_it_has_one() -> None:
    assert list(pieces(io.StringIO("one two three\nabcdefghij"), 8)) == [
        "one two",
        " three\n",
        "abcdefgh",
        "ij",
    ]


def test_a_large_file_takes_little_memory_and_the_bar_counts_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a line of text, and then some\n" * 2**19 + "x" * 2**22)
    tracemalloc.start()
    num_bytes = sum(passage.num_bytes for passage in CorpusFile(path).passages())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_bytes == path.stat().st_size > 19e6
    assert peak < 1e6


def mixed_folder(folder: Path) -> dict[str, str]:
    """A folder of what is text and what is not; returns the text that is to be read, in order."""
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / "b.md").write_bytes(b"\xef\xbb\xbfzz top\r\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (folder / "d.jsonl").write_text('{"text": "zero"}\n{"text": "one", "n": 2}\n')
    (folder / "sub" / "a.json").write_text('{"any": "json"}')
    (folder / "sub" / "latin.txt").write_bytes(b"zz\n" * 3000 + "caf\xe9\nzz\n".encode("cp1252"))
    skipped = {
        ".hidden": b"hidden",
        "sub/.git/config": b"hidden",
        "image.png": b"\x89PNG\0\0",
        "old.txt": "caf\xe9".encode("cp1252"),
        "empty.txt": b"",
        "broken.txt.gz": b"no gzip",
    }
    for name, data in skipped.items():
        (folder / name).write_bytes(data)
    (folder / "link.md").symlink_to(folder / "b.md")
    (folder / "loop").symlink_to(folder)
    return {
        "b.md": "zz top\r\n",
        "c.txt.gz": "zipped",
        "d.jsonl": "zeroone",
        "sub/a.json": '{"any": "json"}',
        "sub/latin.txt": "zz\n" * 3001,
    }


def test_text_that_no_tokenizer_accepts_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good\nlone \ud800 surrogate\nlines"}))
    (passage,) = CorpusFile(path, "text").passages()
    assert passage.content == "good\nlines"
    assert passage.left_out == 1


def test_a_folder_is_read_in_order_of_name_and_each_file_once(tmp_path: Path) -> None:
    expected = mixed_folder(tmp_path)
    read: dict[str, str] = {}
    left_out = 0
    for file in find_texts([str(tmp_path), str(tmp_path / "sub")], field="text", setting="data"):
        name = file.path.relative_to(tmp_path).as_posix()
        assert name not in read
        read[name] = ""
        for passage in file.passages():
            assert isinstance(passage.content, str)
            read[name] += passage.content
            left_out += passage.left_out
    assert list(read.items()) == list(expected.items())
    assert left_out == 1


def test_records_of_a_folder_are_in_its_json_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"ids": [1, 2]},\n{"ids": [3]}]')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"ids": [4]}\n{"ids": "text"}\n'))
    (tmp_path / "run.log").write_text("not a record")
    files = find_records([str(tmp_path)], field="ids", setting="data")
    found = [passage for file in files for passage in file.passages()]
    assert [passage.content for passage in found] == [[1, 2], [3], [4], "text"]
    assert [passage.where for passage in found] == [
        *[str(tmp_path / "a.json")] * 2,
        *(f"{tmp_path / 'b.jsonl.gz'}:{line}" for line in (1, 2)),
    ]
