"""Batch mode without a model: what rows are read, and that what was written stays written."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apb.batch.__main__ import _Batch, fingerprint, main
from apb.batch.journal import TYPES, Journal
from apb.batch.rows import Row, open_rows
from apb.config import compose_config
from apb.errors import InputError

IDS = ["a", "b", "c"]


def answer(row_id: str, error: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"id": row_id, "question": "Q?", "source": f"{row_id}.txt", "error": error, **fields}


def write_answers(output: Path, *answers: dict[str, Any]) -> None:
    journal = Journal(output, "s")
    for one in answers:
        journal.add(one)
    journal.close()


def rows(source: Path) -> list[Row]:
    opened = open_rows(str(source))
    found = list(opened.read())
    assert opened.total == len(found)
    assert list(opened.read()) == found
    return found


def test_a_folder_gives_a_row_per_document_named_after_it(tmp_path: Path) -> None:
    for name in ("b.txt", "a/x.PDF", "notes.docx", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert rows(tmp_path) == [
        Row(name, path=tmp_path / name, source=name) for name in ("a/x.PDF", "b.txt", "c.md")
    ]


def test_lines_of_json_give_rows_and_a_bad_line_only_an_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"id": 7, "document": "text", "question": "Why?", "other": 1}\n'
        "\n"
        '{"path": "x.txt"}\n'
        "{oops\n"
        "[1]\n"
        '{"id": "none"}\n'
        '{"document": "a", "path": "b"}\n'
        '{"document": 5}\n'
        '{"document": "' + "[" * 5 + '"}'
    )
    good, path, *bad, last = rows(tmp_path / "in.jsonl")
    digest = "sha256:982d9e3eb996f559"
    assert good == Row("7", "Why?", "text", source=digest)
    assert path == Row("2", path=tmp_path / "x.txt", source="x.txt")
    assert [row.id for row in bad] == ["3", "4", "none", "6", "7"]
    assert all(row.error for row in bad)
    assert (last.id, last.document) == ("8", "[" * 5)
    assert last.source != digest


def test_parquet_gives_the_rows_of_json_lines_also_from_a_folder(tmp_path: Path) -> None:
    table = [{"id": name, "document": f"text {name}", "question": None} for name in IDS * 20]
    pq.write_table(pa.Table.from_pylist(table[:31]), tmp_path / "0.parquet")
    pq.write_table(pa.Table.from_pylist(table[31:]), tmp_path / "1.parquet")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    assert rows(tmp_path) == rows(tmp_path / "in.jsonl")
    assert len(rows(tmp_path)) == 60


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing", "does not exist"), (".", "holds no .txt"), ("x.csv", "neither a folder nor")],
)
def test_input_without_rows_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "x.csv").touch()
    with pytest.raises(InputError, match=words):
        open_rows(str(tmp_path / name))


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 2**16), texts=st.lists(st.text(), min_size=1, max_size=4))
def test_a_crash_at_any_byte_loses_only_the_row_being_written(
    tmp_path: Path, cut: int, texts: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.unlink(missing_ok=True)
    write_answers(output, *(answer(str(idx), text=text) for idx, text in enumerate(texts)))
    data = output.read_bytes()
    cut %= len(data) + 1
    output.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    journal = Journal(output, "s")
    assert [journal.is_answered(answer(str(idx))) for idx in range(len(texts))] == [
        idx < whole for idx in range(len(texts))
    ]
    for idx in range(whole, len(texts)):
        journal.add(answer(str(idx), text=texts[idx]))
    journal.close()
    assert output.read_bytes() == data


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_failed_row_is_open_and_its_later_answer_takes_its_place(
    tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"out.{suffix}"
    write_answers(output, answer("b"), answer("a", error="lost"))
    journal = Journal(output, "s")
    assert journal.is_answered(answer("b"))
    assert not journal.is_answered(answer("a"))
    journal.add(answer("a", text="now", notes="n", context_tokens=5, prefill_s=0.5))
    journal.finish(["a", "b"])
    journal.close()
    again = Journal(output, "s")
    assert all(again.is_answered(answer(name)) for name in "ab")
    again.finish(["b"])  # a row that is no longer asked for keeps its answer
    again.close()
    if suffix == "parquet":
        found = pq.read_table(output).to_pylist()
    else:
        found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in found] == ["b", "a"]
    assert found[1]["text"] == "now"
    assert all(list(row) == list(TYPES) for row in found)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_names_and_questions_that_are_no_text_are_written_and_known_again(
    tmp_path: Path, suffix: str
) -> None:
    folder, output = tmp_path / "in", tmp_path / f"out.{suffix}"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).touch()
    (row,) = rows(folder)
    question = "lone \ud800"
    write_answers(output, answer(row.id), answer("other", question=question, error=question))
    for _ in range(2):
        journal = Journal(output, "s")
        assert journal.is_answered(answer(row.id))
        journal.finish([])
        journal.close()


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b'{"id": 1}\n', b'{"id": "a", "text": "x"}\n', b"\x00", b"[]\n"],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    with pytest.raises(InputError, match="something else"):
        Journal(output, "s")
    assert output.read_bytes() == content


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_only_the_same_question_about_the_same_document_is_answered(
    tmp_path: Path, suffix: str
) -> None:
    table, output = tmp_path / "in.jsonl", tmp_path / f"out.{suffix}"
    config = compose_config(["model=tiny", "prompt=file"])
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text(f"text of {name}")

    def ask(*columns: dict[str, str], question: str = "Q?") -> list[str]:
        """The documents that such a batch reads."""
        table.write_text("".join(json.dumps(row) + "\n" for row in columns))
        with closing(Journal(output, "s")) as journal:
            batch = _Batch(config, open_rows(str(table)), journal, question)
            read = []
            for row in batch.pending(bool):
                read.append(row["document"])
                batch.record({**row["asked"], "text": "A.", "error": None})
            assert batch.finish() == 0
        return read

    document, path, other = {"document": "abc"}, {"path": "x.txt"}, {"path": "y.txt"}
    assert ask(document, path) == ["abc", "text of x.txt"]
    assert ask(document, path) == []
    assert ask(document, other) == ["text of y.txt"]
    assert ask(other, document) == ["text of y.txt", "abc"]
    assert ask(other, {**document, "question": "R?"}) == ["abc"]
    assert ask(other, document, question="R?") == ["text of y.txt"]


def test_answers_under_other_settings_are_not_mixed(tmp_path: Path) -> None:
    write_answers(tmp_path / "out.jsonl", answer("a"))
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(InputError, match="another model or other settings"):
        Journal(tmp_path / "out.jsonl", "other")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_only_one_batch_writes_a_file(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out.jsonl", "s")
    with pytest.raises(InputError, match="written by another batch"):
        Journal(tmp_path / "out.jsonl", "s")
    first.close()
    Journal(tmp_path / "out.jsonl", "s").close()


def test_settings_that_change_answers_change_the_fingerprint() -> None:
    def of(*overrides: str) -> str:
        config = compose_config(["model=tiny", "prompt=file", *overrides])
        return fingerprint(config, config.world_size or 1)

    assert of() == of("launcher=ray", "runtime.chunk_len=64", "prompt.max_pages=9")
    assert of("num_blocks=4") == of("num_blocks=4", "world_size=4")
    changed = ["model.weights_seed=1", "method=star", "method.anchor_len=64", "seed=1"]
    changed += ["decode.max_tokens=9", "drafter=none", "method/compressor=knorm", "world_size=4"]
    assert len({of(), *(of(one) for one in changed)}) == len(changed) + 1


def test_what_cannot_be_read_is_that_rows_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"id": "a", "document": "x"}\n'
        '{"id": "b", "path": "missing.txt"}\n'
        '{"id": "a", "document": "y"}\n'
        '{"id": "c", "path": "long.txt", "question": "Own?"}\n'
        '{"id": "d", "path": "fits.txt", "question": "Own?"}\n'
    )
    (tmp_path / "long.txt").write_text("x" * 11)
    (tmp_path / "fits.txt").write_text("x" * 10)
    config = compose_config(["model=tiny", "prompt=file", "prompt.max_bytes=10"])
    journal = Journal(tmp_path / "out.jsonl", "s")
    batch = _Batch(config, open_rows(str(tmp_path / "in.jsonl")), journal, "Which?")
    asked = list(batch.pending(bool))
    assert [(row["asked"]["id"], row["asked"]["question"]) for row in asked] == [
        ("a", "Which?"),
        ("d", "Own?"),
    ]
    assert batch.finish() == 3
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    errors = {line["id"]: line["error"] for line in lines}
    assert "does not exist" in errors["b"]
    assert "occurs twice" in errors["a (again)"]
    assert "prompt.max_bytes=10" in errors["c"]


def test_rows_that_failed_before_come_last_and_the_output_keeps_the_order(tmp_path: Path) -> None:
    table, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    table.write_text("".join(json.dumps({"id": row, "document": row}) + "\n" for row in "abcda"))
    config = compose_config(["model=tiny", "prompt=file"])
    write_answers(output, answer("a", error="lost"), answer("c", error="lost"))
    with closing(Journal(output, "s")) as journal:
        batch = _Batch(config, open_rows(str(table)), journal, "Which?")
        asked = []
        for row in batch.pending(bool):
            asked.append(row["document"])
            batch.record({**row["asked"], "error": "lost" if row["document"] == "c" else None})
        assert asked == ["b", "d", "a", "c"]
        assert batch.finish() == 2
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c", "d", "a (again)"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["input=x"], "output= missing"),
        (["input=nowhere", "output=x.jsonl"], "input=nowhere does not exist"),
        (["input=.", "output=x.txt"], "must end in .jsonl or .parquet"),
        (["input=.", "output=no/x.jsonl"], "no file in an existing folder"),
        (["input=.", "output=x.jsonl", "prompt=needle"], "drop prompt="),
        (["input=.", "output=x.jsonl", "trace=true"], "trace=true traces one answer"),
        (["input=.", "output=x.jsonl", "wrold_size=2"], "unknown setting wrold_size"),
    ],
)
def test_bad_input_is_one_sentence_before_any_rank_starts(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("apb.llm.open_session", lambda *_: pytest.fail("ranks were started"))
    (tmp_path / "a.txt").write_text("x")
    assert main(["+model=tiny", *arguments]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
