"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from apb.errors import InputError
from apb.files import written_whole
from apb.output import check_output, write_json


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def write() -> None:
        with written_whole(path) as scratch:
            scratch.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("real/result.json")
    for text in ("first", "second"):
        check_output(link)
        write_json(link, {"text": text})
        assert link.is_symlink()
        assert text in (tmp_path / "real/result.json").read_text()
        assert [path.name for path in (tmp_path / "real").iterdir()] == ["result.json"]


def test_what_is_no_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(InputError, match="is a device or a pipe"):
            check_output(path)
        with pytest.raises(InputError, match="it is there and no file"):
            write_json(path, {})
    assert pipe.is_fifo()
    assert {*tmp_path.iterdir()} == {pipe, link}
    for name in (".", "no/file"):
        with pytest.raises(InputError, match="is no file in an existing folder"):
            check_output(tmp_path / name)


def test_a_folder_that_may_not_be_written_to_is_known_before(tmp_path: Path) -> None:
    check_output(tmp_path / "result.json")
    tmp_path.chmod(0o555)
    user = os.getuid()
    if user == 0:  # who may do anything
        os.setresuid(65534, 0, 0)
    try:
        with pytest.raises(InputError, match="may not be written to"):
            check_output(tmp_path / "result.json")
    finally:
        os.setresuid(user, -1, -1)
        tmp_path.chmod(0o755)


def test_a_result_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_json(tmp_path / "result.json", {"text": "é"})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
    assert "é" in (tmp_path / "result.json").read_text()
