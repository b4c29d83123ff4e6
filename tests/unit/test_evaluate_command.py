"""Guarantees of `python -m apb.evaluate` that need no model: its words, its folder, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apb.errors import ApbError, InputError
from apb.evaluate.__main__ import main
from apb.evaluate.cases import QuestionCase, Vocabulary, items
from apb.evaluate.evaluation import Baseline, _groups, evaluate
from apb.evaluate.journal import Journal, Row, read_evaluation
from apb.evaluate.records import read_records
from apb.evaluate.settings import Settings, parse_settings
from apb.evaluate.tasks import RULER
from no_space import room_for

SETTINGS = {"overrides": ["model=tiny"], "methods": {"full": ["method=full"]}}
ROW = Row(
    task="vt",
    length=64,
    sample=0,
    method="full",
    digest="0",
    tokens=60,
    score=0.2,
    text="naïve",
    answers=("A", "B"),
)
VOCABULARY = Vocabulary(lambda text: list(text.encode()), (256,))


def parsed(*words: str) -> Settings:
    return parse_settings(["+model=tiny", "methods=full", *words])


def test_defaults_are_ruler_by_three_methods_with_blocks_on_one_rank() -> None:
    found = parse_settings(["+model=tiny"])
    assert found.tasks == RULER
    assert {label: own[-1] for label, own in found.methods.items()} == {
        "full": "model=tiny",
        "star": "num_blocks=8",
        "apb": "num_blocks=8",
    }
    assert parsed("methods=apb", "world_size=4").methods["apb"][-1] == "world_size=4"
    assert found.output == parsed().output != parsed("seed=1").output


def test_settings_of_a_method_go_to_those_that_have_them() -> None:
    found = parsed(
        "methods=[full,apb,apb+method.wire=int8]", "method/compressor=query", "num_blocks=4"
    )
    assert found.methods == {
        "full": ("method=full", "model=tiny"),
        "apb": ("method=apb", "model=tiny", "method/compressor=query", "num_blocks=4"),
        "apb+method.wire=int8": (
            *("method=apb", "model=tiny", "method/compressor=query", "num_blocks=4"),
            "method.wire=int8",
        ),
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tasks=niah"], "tasks=niah is unknown: choose from ruler, all, niah_single_1"),
        (["methods=fast"], "methods=fast is unknown: choose from apb, star"),
        (["methods=[]"], "methods= names no method"),
        (["method=apb"], "method= has no place here: name one or more as methods="),
        (["lengths=4k"], "lengths=4k must be a number from 1"),
        (["lengths=[]"], "names no length"),
        (["samples=0"], "samples=0 must be a number from 1"),
        (["metric=bleu"], "metric=bleu must be one of part, all, f1"),
        (["--quick"], "--quick is no setting: write key=value"),
        (["methods=full", "method.anchor_len=64"], "applies to none of methods=full"),
        (["methods=apb", "method.anchor=twice"], "method.anchor"),
        (["lenghts=4096"], "lenghts"),
        (["data=/nowhere.jsonl"], "data=/nowhere.jsonl cannot be read"),
        (["data=/one/vt.jsonl"], "files need names of their own, and no task's"),
        (["data=/one/own.jsonl,/other/own.jsonl"], "files need names of their own"),
        (["lengths=65400"], "lengths=65400 is beyond tiny, which reads 65536 tokens"),
        (["lengths=300", "tasks=niah_single_1,vt"], "lengths=300 cannot hold vt, which needs"),
        (["lengths=60000", "tasks=prose", "samples=1", "baseline=/nowhere"], "baseline=/nowhere"),
        (["launcher=torchrun"], "an evaluation starts its ranks itself"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["+model=tiny", "methods=full", f"output={tmp_path / 'o'}", *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("apb.evaluate: ")
    assert sentence in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_journal_keeps_rows_and_drops_a_half_written_one(tmp_path: Path) -> None:
    first = Journal(tmp_path, SETTINGS)
    with pytest.raises(InputError, match="is being written by another evaluation"):
        Journal(tmp_path, SETTINGS)
    rows = [replace(ROW, sample=sample) for sample in range(3)]
    for row in rows:
        first.append(row)
    first.close()
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20):
        path.write_bytes(whole[:-cut])
        again = Journal(tmp_path, SETTINGS)
        assert list(again.rows.values()) == rows[:2]
        again.append(rows[2])
        again.close()
        assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.append(ROW)
    journal.close()
    for line in ("{}", "[1]", '{"task": 1', json.dumps({"answers": [], "notes": []})):
        (tmp_path / "samples.jsonl").write_text(f"{line}\n")
        with pytest.raises(InputError, match=r"samples\.jsonl:1 is no finished sample"):
            Journal(tmp_path, SETTINGS)


def test_a_folder_takes_more_methods_but_no_other_settings(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS).append(ROW)
    more = {**SETTINGS, "methods": {"apb": ["method=apb"]}}
    assert Journal(tmp_path, more).rows
    assert set(read_evaluation(tmp_path)[0]["methods"]) == {"full", "apb"}
    others = (
        {**SETTINGS, "overrides": ["model=tiny", "seed=1"]},
        {**SETTINGS, "methods": {"full": ["method=full", "dtype=bfloat16"]}},
    )
    for other in others:
        with pytest.raises(InputError, match="holds an evaluation with other settings"):
            Journal(tmp_path, other)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        Journal(tmp_path, SETTINGS)


def test_no_space_left_is_one_sentence_and_keeps_what_is_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.append(ROW)
    samples = tmp_path / "samples.jsonl"
    with (
        room_for(samples, 20),
        pytest.raises(ApbError, match=r"File too large\): 1 samples are kept"),
    ):
        journal.append(replace(ROW, sample=1))
    journal.close()
    assert Journal(tmp_path, SETTINGS).rows == {(ROW.place, "full"): ROW}
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"samples\.jsonl has no settings\.json beside it"):
        Journal(tmp_path, SETTINGS)


def test_records_of_longbench_and_infinitebench_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"context": "c", "input": "q", "answers": ["a", "b"], "length": 3, "dataset": "hotpotqa"},
        {"id": 0, "context": "c", "input": "q", "answer": ["x"], "options": ["x", "y"]},
        {"document": "c", "question": "q", "answer": "a"},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n\n" for line in lines))
    found = read_records(path, 9)
    assert [record.answers for record in found] == [("a", "b"), ("x",), ("a",)]
    assert found[1].question == "q\nA. x\nB. y"
    assert len(read_records(path, 2)) == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r":1 is not JSON"),
        ("[]", r":1 is no object"),
        ('{"input": "q", "answers": ["a"]}', r":1 has none of context, document"),
        ('{"context": "c", "input": "q"}', r":1 has none of answers"),
        ('{"context": 3, "input": "q", "answers": ["a"]}', r":1 has 3 where text belongs"),
        ('{"context": "c", "input": "q", "answers": [" "]}', r":1 has no right answer"),
        ("", "is empty"),
    ],
)
def test_a_wrong_record_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=sentence):
        read_records(path, 9)


def test_what_is_too_long_of_a_record_is_cut_out_of_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"context": "a" * 50 + "b" * 50, "input": "q", "answers": ["a"]}))
    [item] = items(parsed(f"data={path}", "lengths=11"), VOCABULARY, max_tokens=5)
    case = item.load()
    assert isinstance(case, QuestionCase)
    assert bytes(case.sample.document_ids) == b"aaaaabbbbbb"
    assert item.place == ("own", 11, 0)


def test_the_first_samples_are_a_sample_of_the_whole() -> None:
    found = items(
        parsed("tasks=vt,fwe,prose", "lengths=2048,4096", "samples=12"), VOCABULARY, max_tokens=5
    )
    places = [item.place for item in found]
    assert {place[:2] for place in places[:6]} == {
        (task, length) for task in ("vt", "fwe", "prose") for length in (2048, 4096)
    }
    assert len(places) == len(set(places)) == 2 * 2 * 12 + 2 * 10, "there are ten passages"


@pytest.mark.parametrize("limit", [1, 4096, 9000, 10**6])
def test_samples_are_made_together_up_to_a_number_of_tokens(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apb.evaluate.evaluation._TOGETHER", limit)
    found = items(parsed("tasks=vt,fwe", "lengths=2048,4096"), VOCABULARY, max_tokens=5)
    missing = [(item, ["full"]) for item in found]
    groups = [*_groups(missing)]
    assert [todo for group in groups for todo in group] == missing
    sizes = [sum(item.place.length for item, _ in group) for group in groups]
    assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert all(
        size + group[0][0].place.length > limit
        for size, group in zip(sizes, groups[1:], strict=False)
    ), "no group ends before it is full"


def test_prose_goes_on_where_its_document_ends() -> None:
    found = items(parsed("tasks=prose", "lengths=3000", "samples=2"), VOCABULARY, max_tokens=5)
    for item in found:
        case = item.load()
        assert not isinstance(case, QuestionCase)
        assert (len(case.document_ids), len(case.continuation_ids)) == (3000, 128)
        assert case.document_ids[0] == 256
        text = bytes([*case.document_ids[1:], *case.continuation_ids]).decode()
        assert text.count("\n") > 10
    assert found[0].load() != found[1].load()


def test_more_prose_than_there_is_is_refused() -> None:
    words = ("tasks=prose", "lengths=9000000", "samples=1", "allow_beyond_context=true")
    with pytest.raises(InputError, match="lengths=9000000 is more than the packaged prose has"):
        items(parsed(*words), VOCABULARY, max_tokens=5)


def test_a_baseline_with_another_metric_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (path := tmp_path / "own.jsonl").write_text('{"context": "a", "input": "b", "answers": ["c"]}')
    words = (f"data={path}", f"output={tmp_path / 'out'}", f"baseline={tmp_path / 'old'}")
    row = replace(ROW, task="own", length=4096)
    other = Baseline("old: full", {row.place: row}, "f1")
    with pytest.raises(InputError, match=r"scored answers by metric=f1, which is part here"):
        evaluate(parsed(*words), other)
    with pytest.raises(InputError, match=r"baseline=.* shares no sample with this evaluation"):
        evaluate(parsed(*words), other._replace(rows={ROW.place: ROW}))
    assert not (tmp_path / "out").exists()
