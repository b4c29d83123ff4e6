"""Guarantees of files of JSON lines: what is finished stays, and one process writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apb.errors import InputError
from apb.json_lines import JsonLines, encode_line
from no_space import room_for

NAMES = st.binary(max_size=4).map(os.fsdecode)
"""Of files; bytes that are not UTF-8 are lone surrogates."""
VALUES = st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9) | NAMES), max_size=4)


def opened(path: Path) -> JsonLines:
    return JsonLines(path, output=path, writer="test")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=VALUES, cut=st.integers(0, 200))
def test_a_file_cut_anywhere_goes_on_behind_its_last_whole_line(
    tmp_path: Path, values: list[dict[str, str]], cut: int
) -> None:
    path = tmp_path / "lines"
    whole = b"".join(map(encode_line, values))
    path.write_bytes(whole[:cut])
    file = opened(path)
    lines = file.read()
    done = len(lines.whole)
    assert [line + b"\n" for line in lines.whole] == [*map(encode_line, values[:done])]
    assert [json.loads(line) for line in lines.whole] == values[:done]
    assert encode_line(values[done]).startswith(lines.begun) if done < len(values) else True
    file.drop_begun()
    file.append(*values[done:])
    file.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_leaves_the_lines_there_were(tmp_path: Path, room: int) -> None:
    path = tmp_path / "lines"
    file = opened(path)
    file.append({"a": 1}, {"b": 2})
    before = path.read_bytes()
    with room_for(path, room), pytest.raises(OSError, match="too large"):
        file.append({"c": 3}, {"d": "x" * 40})
    assert path.read_bytes() == before
    file.append({"c": 3})
    assert path.read_bytes() == before + b'{"c": 3}\n'


def test_nobody_else_writes_meanwhile(tmp_path: Path) -> None:
    file = opened(tmp_path / "lines")
    with pytest.raises(InputError, match="is being written by another test"):
        opened(tmp_path / "lines")
    file.close()
    opened(tmp_path / "lines").close()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone/lines cannot be written: No such file"):
        opened(tmp_path / "gone" / "lines")
