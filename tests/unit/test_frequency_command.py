"""Guarantees of `python -m apb.frequency`: exact counts of any corpus, read as a stream."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from apb import frequency
from apb.arguments import parse_words
from apb.corpus import CorpusFile
from apb.frequency import Options, Target, TokenCounter, build, load_target, main
from apb.speculate.vocabulary import DraftVocabulary

EOS = 257
TEXTS = st.lists(st.text() | st.sampled_from(["\n", "\r\n", " ", "é\n", "<|eos|>", "a b\n"])).map(
    "".join
)
on_tmp_path = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@cache
def cached_target(overrides: tuple[str, ...]) -> Target:
    return load_target(overrides)


def tiny() -> Target:
    """Its tokens are bytes, so that everything can be counted by hand."""
    return cached_target(("model=tiny",))


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency, "load_target", lambda words: cached_target(tuple(words)))


def counted(target: Target, file: CorpusFile, max_chars: int) -> list[int]:
    counter = TokenCounter(target)
    for passage in file.passages(max_chars=max_chars):
        counter.add(passage)
    counts: list[int] = counter.counts_V().tolist()
    return counts


def expected_list(data: bytes, size: int, extra: Iterable[int] = ()) -> dict[int, int]:
    """Ids with their counts: EOS and the most frequent bytes, ties by the lower id."""
    counts = Counter([*data, *extra])
    ids = sorted(set(range(260)) - {EOS}, key=lambda token_id: (-counts[token_id], token_id))
    kept = sorted([EOS, *ids[: size - 1]], key=lambda token_id: (-counts[token_id], token_id))
    return {token_id: counts[token_id] for token_id in kept}


def run(tmp_path: Path, **values: object) -> DraftVocabulary:
    """The list that the command writes for the tiny model."""
    words = [f"{key}={value}" for key, value in values.items()]
    output = tmp_path / "list.safetensors"
    assert main(["build", "model=tiny", f"output={output}", *words]) == 0
    return DraftVocabulary.read(output, vocab_size=260)


def pairs(vocabulary: DraftVocabulary) -> dict[int, int]:
    assert vocabulary.counts_C is not None
    ids, counts = vocabulary.token_ids_C.tolist(), vocabulary.counts_C.tolist()
    return dict(zip(ids, counts, strict=True))


@on_tmp_path
@given(text=TEXTS, packed=st.booleans(), max_chars=st.integers(1, 20))
@example(text="\r\n<|eos|>é", packed=True, max_chars=1)
def test_every_token_of_a_text_is_counted_once_however_it_is_cut(
    tmp_path: Path, text: str, packed: bool, max_chars: int
) -> None:
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    data = text.encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    found = counted(tiny(), CorpusFile(path), max_chars)
    bom = 3 if text.startswith("\ufeff") else 0
    assert {i: n for i, n in enumerate(found) if n} == Counter(data[bom:])


@on_tmp_path
@given(texts=st.lists(TEXTS), ascii_only=st.booleans(), max_chars=st.integers(1, 20))
def test_every_token_of_a_record_is_counted_once(
    tmp_path: Path, texts: list[str], ascii_only: bool, max_chars: int
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_text("\n\n".join(lines), encoding="utf-8", newline="")
    found = counted(tiny(), CorpusFile(path, "body"), max_chars)
    assert {i: n for i, n in enumerate(found) if n} == Counter("".join(texts).encode())


def line_tokenizer(text: str) -> Target:
    """A BPE tokenizer with many merges, none of which reaches over a line end."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Split(Regex(r"[^\n]*\n"), "isolated")
    tokenizer.train_from_iterator([text], BpeTrainer(vocab_size=200, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return Target("lines", fast, len(fast), frozenset())


def test_counts_do_not_depend_on_cuts_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    target = line_tokenizer(path.read_text(encoding="utf-8"))
    whole = counted(target, CorpusFile(path), 10**6)
    assert sum(n > 0 for n in whole) > 150
    for max_chars in (101, 150, 999):
        assert counted(target, CorpusFile(path), max_chars) == whole


def test_a_folder_is_counted_and_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"zz top, zipped"))
    (folder / "b.jsonl").write_text('{"text": "zero"}\n{"text": "one"}\n')
    (folder / "sub" / "c.md").write_bytes(b"# z\n" * 2000 + b"caf\xe9\n")
    data = b"zz top, zippedzeroone" + b"# z\n" * 2000
    found = run(tmp_path, size=12, data=folder)
    expected = expected_list(data, 12)
    assert pairs(found) == expected
    assert list(pairs(found)) == list(expected)
    assert found.corpus_tokens == len(data)
    assert found.corpus == str(folder)
    assert found.tokenizer_hash is not None
    out, err = capsys.readouterr()
    share = sum(expected.values()) / len(data)
    first, *notes = out.splitlines()
    path = tmp_path / "list.safetensors"
    assert first == f"{path}: 12 ids cover {share:.2%} of {len(data)} tokens"
    assert notes == ["note: 1 lines that are not UTF-8 were left out"]
    assert err == ""  # no bar where there is no terminal


def test_answers_of_the_model_are_counted_with_their_control_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    result = {"text": "ab", "token_ids": [97, 98, 98, EOS], "metrics": {}}
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    (folder / "answers.jsonl").write_text('{"prompt_ids": [5], "token_ids": [97, 257]}\n')
    (folder / "run.log").write_text("not json")
    (tmp_path / "a.txt").write_text("b<|eos|>")
    found = run(tmp_path, size=4, data=tmp_path / "a.txt", generations=folder)
    expected = expected_list(b"b<|eos|>", 4, [97, 98, 98, EOS, 97, EOS])
    assert pairs(found) == expected
    assert expected[EOS] == 2


def test_a_few_answers_weigh_as_much_as_many_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(600 * "a" + 300 * "b" + 100 * "c")
    (tmp_path / "a.jsonl").write_text(json.dumps({"token_ids": list(b"cccb")}) + "\n")
    found = run(tmp_path, size=4, data=tmp_path / "a.txt", generations=tmp_path / "a.jsonl")
    # Shares: a 0.6, b 0.3 + 0.25, c 0.1 + 0.75.
    assert list(pairs(found).items()) == [(99, 103), (97, 600), (98, 301), (EOS, 0)]


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 11, 12])
def test_no_more_tokens_are_counted_than_asked_for(tmp_path: Path, max_tokens: int) -> None:
    (tmp_path / "1.txt").write_text("abcd")
    (tmp_path / "2.txt").write_text("bbbbbbbb")
    names = f"{tmp_path / '1.txt'},{tmp_path / '2.txt'}"
    found = run(tmp_path, size=260, data=names, max_tokens=max_tokens)
    assert found.corpus_tokens == max_tokens
    assert {i: n for i, n in pairs(found).items() if n} == Counter(b"abcdbbbbbbbb"[:max_tokens])


def test_a_small_corpus_is_filled_up_with_the_lowest_ids_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("ba\x01b")
    found = run(tmp_path, size=7, data=tmp_path / "a.txt")
    assert list(pairs(found)) == [98, 1, 97, 0, 2, 3, EOS]
    note = "note: the corpus has only 3 distinct tokens, so 3 others with the lowest ids fill the"
    assert note in capsys.readouterr().out


def test_a_pt_holds_the_same_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    found = run(tmp_path, size=5, data=tmp_path / "a.txt")
    words = ["size=5", f"data={tmp_path / 'a.txt'}", f"output={tmp_path / 'list.pt'}"]
    assert main(["build", "+model=tiny", *words]) == 0
    assert torch.load(tmp_path / "list.pt", weights_only=True) == found.token_ids_C.tolist()


def test_ids_beyond_the_head_are_neither_counted_nor_listed(tmp_path: Path) -> None:
    small = tiny()._replace(vocab_size=100, stop_ids=frozenset({99}))
    (tmp_path / "a.txt").write_text("azzzzz")
    options = Options(tmp_path / "list.pt", 3, (str(tmp_path / "a.txt"),))
    vocabulary, _ = build(options, small)
    assert pairs(vocabulary) == {97: 1, 0: 0, 99: 0}


def test_show_tells_what_a_list_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("aab\n")
    found = run(tmp_path, size=3, data=tmp_path / "a.txt")
    torch.save([98, 97], tmp_path / "list.pt")
    DraftVocabulary(found.token_ids_C, tokenizer_hash="f" * 64).write(tmp_path / "b.safetensors")
    shown = {}
    for name in ("list.safetensors", "list.pt", "b.safetensors"):
        capsys.readouterr()
        assert main(["show", "model=tiny", f"path={tmp_path / name}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown[name] = [line[15:] for line in lines]
    own, foreign, other = shown.values()
    assert own == [
        "3 of 260",
        str(tmp_path / "a.txt"),
        "75.00% of 4 tokens",
        "that of tiny",
        "all listed",
        r"'a' '\n' '<|eos|>'",
    ]
    assert foreign[1:5] == ["not recorded"] * 3 + ["not listed: [257]"]
    assert other[3] == "not that of tiny"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "say `build` or `show` first"),
        (["make"], "say `build` or `show` first"),
        (["build"], "output= is needed"),
        (["build", "output=a.pt"], "size= is needed"),
        (["build", "output=a.pt", "size=9"], "data= or generations= is needed"),
        (["build", "output=a.pt", "size=9", "data=,"], "data= or generations= is needed"),
        (["build", "out=a.pt"], "unknown option out=a.pt: give values to model=, output=, size="),
        (["build", "output="], "unknown option output=: give values to"),
        (["build", "a.txt"], "unknown option a.txt"),
        (["build", "output=a.bin", "size=9", "data=a.txt"], "a.bin is no name of a frequency"),
        (["build", "output=no/a.pt", "size=9", "data=a.txt"], "no/a.pt cannot be written"),
        (["build", "output=a.pt", "size=0", "data=a.txt"], "size=0 must be a number from 1"),
        (["build", "output=a.pt", "size=9k", "data=a.txt"], "size=9k must be a number from 1"),
        (
            ["build", "output=a.pt", "size=9", "data=a.txt", "max_tokens=0"],
            "max_tokens=0 must be a number from 1",
        ),
        (["build", "output=a.pt", "size=9", "data=a.txt"], "no model given"),
        (["build", "model=none", "output=a.pt", "size=9", "data=a.txt"], "model=none does not"),
        (["show", "model=tiny"], "path= is needed"),
        (["show", "model=tiny", "path=a.pt"], "a.pt is no readable file"),
        (["show", "model=tiny", "size=2"], "unknown option size=2: give values to model=, path="),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert_refused(words, sentence, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def assert_refused(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"apb.frequency: {sentence}"), err
    assert err.count("\n") == 1
    assert out == ""


GOOD_RECORD = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("option", "files", "sentence"),
    [
        ("data=nowhere", {}, "data=nowhere does not exist"),
        ("data=a", {"a": b""}, "data=a is empty"),
        ("data=a", {"a": b"\0\1"}, "data=a is not UTF-8 text"),
        ("data=a", {"a": b"caf\xe9"}, "data=a is not UTF-8 text"),
        ("data=a.gz", {"a.gz": b"no gzip"}, "data=a.gz cannot be read (Not a gzipped file"),
        ("data=.", {"a.png": b"\0"}, "data=. holds no UTF-8 text file"),
        ("data=a.jsonl", {"a.jsonl": b"{"}, "a.jsonl:1 is not JSON"),
        ("data=a.jsonl", {"a.jsonl": b"[" * 10**5}, "a.jsonl:1 is not JSON"),
        ("data=a.jsonl", {"a.jsonl": GOOD_RECORD + b"\n{\n"}, "a.jsonl:3 is not JSON"),
        (
            "data=.",
            {"a.jsonl": b'\n{"body": "x", "id": 1}\n'},
            "a.jsonl:2 has no field 'text' (its fields: ['body', 'id'])",
        ),
        (
            "data=a.jsonl",
            {"a.jsonl": GOOD_RECORD + b"[1]\n"},
            "a.jsonl:2 has no field 'text' (its fields: [])",
        ),
        ("data=a.jsonl", {"a.jsonl": b'{"text": 5}'}, "a.jsonl:1 has neither text nor token ids"),
        ("data=a.jsonl", {"a.jsonl": b'{"text": ["x"]}'}, "the record a.jsonl:1 is neither text"),
        ("data=a.jsonl", {"a.jsonl": b'{"text": ""}'}, "there are no tokens in the files given"),
        ("generations=.", {"a.txt": b"x"}, "generations=. holds no .json or .jsonl"),
        ("generations=a", {"a": b'{"text": "x"}'}, "a:1 has no field 'token_ids' (its fields: ['t"),
        (
            "generations=a.json",
            {"a.json": b'{"token_ids": [1, 260]}'},
            "token id 260 at position 1 of the record a.json is outside 0 to 259",
        ),
        (
            "data=a.gz",
            {"a.gz": gzip.compress(b"text, zipped and cut short", mtime=0)[:-9]},
            "data=a.gz cannot be read (Compressed file ended",
        ),
        ("data=a,a", {"a": b"x"}, "size=261 must lie between 1, which holds the stop tokens, and"),
    ],
)
def test_a_corpus_that_cannot_be_counted_is_one_sentence(
    option: str,
    files: dict[str, bytes],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    size = 261 if "size=261" in sentence else 2
    words = ["build", "model=tiny", "output=list.pt", f"size={size}", option]
    assert_refused(words, sentence, capsys)
    assert not (tmp_path / "list.pt").exists()


def test_mistakes_are_found_before_anything_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("something was counted")

    monkeypatch.setattr(TokenCounter, "add", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    base = ["build", "model=tiny", "output=list.pt", "size=9"]
    assert_refused([*base, "data=a.txt,nowhere"], "data=nowhere does not exist", capsys)
    assert_refused([*base, "data=a.txt,b.jsonl"], "b.jsonl:1 has no field 'text'", capsys)
    assert_refused([*base, "size=999", "data=a.txt"], "size=999 must lie between", capsys)


def test_words_about_the_model_are_passed_on() -> None:
    words = ["+model=custom", "model.path=/m", "size=3"]
    assert parse_words(words, ("size",)) == ({"size": "3"}, ["+model=custom", "model.path=/m"])
