"""Guarantees of frequency lists: what is kept, what comes back from a file, what is refused."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apb.errors import InputError
from apb.speculate.vocabulary import DraftVocabulary

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=30)
IDS = st.lists(st.integers(0, 40), min_size=1, max_size=20, unique=True)
quick = settings(deadline=None, max_examples=60)
FULL = DraftVocabulary(
    torch.tensor([7, 2, 9]), torch.tensor([5, 5, 1]), 13, "0123456789abcdef", "notes, ``a.jsonl``"
)


def listed(vocabulary: DraftVocabulary) -> list[int]:
    ids: list[int] = vocabulary.token_ids_C.tolist()
    return ids


def of_ids(ids: list[int]) -> DraftVocabulary:
    return DraftVocabulary(torch.tensor(ids))


def pt_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@quick
@given(counts=COUNTS, data=st.data())
def test_a_ranking_has_the_stop_tokens_and_the_most_frequent_others(
    counts: list[int], data: st.DataObject
) -> None:
    ids = st.integers(0, len(counts) - 1)
    stop_ids = data.draw(st.sets(ids, max_size=3))
    size = data.draw(st.integers(max(1, len(stop_ids)), len(counts)))
    vocabulary = DraftVocabulary.ranked(torch.tensor(counts), size, stop_ids=stop_ids)
    found = listed(vocabulary)
    by_count = sorted(range(len(counts)), key=lambda token_id: (-counts[token_id], token_id))
    others = [token_id for token_id in by_count if token_id not in stop_ids]
    expected = stop_ids | set(others[: size - len(stop_ids)])
    assert found == [token_id for token_id in by_count if token_id in expected]
    assert vocabulary.counts_C is not None
    assert vocabulary.counts_C.tolist() == [counts[token_id] for token_id in found]
    if sum(counts):
        assert vocabulary.coverage == sum(counts[i] for i in found) / sum(counts)


@quick
@given(counts=COUNTS, data=st.data())
def test_a_cut_is_the_ranking_of_that_size(counts: list[int], data: st.DataObject) -> None:
    stop_ids = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=3))
    smallest = max(1, len(stop_ids))
    size = data.draw(st.integers(smallest, len(counts)))
    smaller = data.draw(st.integers(smallest, size))
    long, short = (
        DraftVocabulary.ranked(torch.tensor(counts), n, stop_ids=stop_ids) for n in (size, smaller)
    )
    cut = long.first(smaller, stop_ids)
    assert listed(cut) == listed(short)
    assert cut.counts_C is not None
    assert short.counts_C is not None
    assert cut.counts_C.equal(short.counts_C)
    assert cut.coverage == short.coverage


@quick
@given(ids=IDS, stop_ids=st.sets(st.integers(0, 40), max_size=3), data=st.data())
def test_a_cut_of_any_list_has_its_size_and_all_stop_tokens(
    ids: list[int], stop_ids: set[int], data: st.DataObject
) -> None:
    smallest = max(1, len(stop_ids))
    size = data.draw(st.integers(smallest, max(smallest, len(ids))))
    found = listed(of_ids(ids).first(size, stop_ids))
    assert len(found) == len(set(found)) == size
    assert stop_ids <= set(found)
    others = [token_id for token_id in ids if token_id not in stop_ids]
    kept = [token_id for token_id in found if token_id not in stop_ids]
    assert kept == others[: size - len(stop_ids)]


@pytest.mark.parametrize(("size", "stop_ids"), [(0, []), (4, []), (1, [2, 9]), (-1, [2])])
def test_a_cut_that_does_not_fit_is_refused(size: int, stop_ids: list[int]) -> None:
    with pytest.raises(InputError, match=f"of 3 token ids cannot be cut to {size}: choose a size"):
        FULL.first(size, stop_ids)


@quick
@given(ids=IDS, more=st.lists(st.integers(0, 40), max_size=30))
def test_further_ids_stand_behind_in_order_and_once(ids: list[int], more: list[int]) -> None:
    before = of_ids(ids)
    after = before.with_ids(iter(more))
    assert listed(after)[: len(ids)] == ids == listed(before)
    new = listed(after)[len(ids) :]
    assert set(listed(after)) == {*ids, *more}
    assert new == sorted(new, key=more.index)


def test_counts_are_given_up_only_where_a_list_grows() -> None:
    assert FULL.with_ids([2, 7]) is FULL
    grown = FULL.with_ids([3])
    assert grown.counts_C is None
    assert grown.coverage is None
    assert grown.tokenizer_hash == FULL.tokenizer_hash


def test_safetensors_bring_everything_back(tmp_path: Path) -> None:
    path = tmp_path / "list.safetensors"
    for vocabulary in (of_ids([4]), FULL):  # the second replaces the first
        vocabulary.write(path)
        found = DraftVocabulary.read(path, vocab_size=10, tokenizer_hash="0123456789abcdef")
        assert listed(found) == listed(vocabulary)
        assert found.coverage == vocabulary.coverage
        assert found.tokenizer_hash == vocabulary.tokenizer_hash
        assert found.corpus == vocabulary.corpus
    assert found.counts_C is not None
    assert found.counts_C.tolist() == [5, 5, 1]
    assert found.corpus_tokens == 13
    assert os.listdir(tmp_path) == [path.name]


def test_a_pt_is_what_fr_spec_and_sglang_load(tmp_path: Path) -> None:
    FULL.write(tmp_path / "list.pt")
    loaded = torch.load(tmp_path / "list.pt", weights_only=True)
    assert loaded == [7, 2, 9]
    assert {type(token_id) for token_id in loaded} == {int}
    # SGLang makes int64 of it and FR-Spec int32.
    assert torch.tensor(loaded, dtype=torch.int64).equal(FULL.token_ids_C)
    assert torch.tensor(loaded, dtype=torch.int32).tolist() == loaded
    assert listed(DraftVocabulary.read(tmp_path / "list.pt", vocab_size=10)) == [7, 2, 9]


def test_an_id_listed_twice_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FR-Spec's script appends BOS and EOS to a list in which BOS stands already."""
    path = tmp_path / "freq_3.pt"
    torch.save([5, 1, 8, 1, 2], path)
    with caplog.at_level(logging.WARNING):
        assert listed(DraftVocabulary.read(path, vocab_size=10)) == [5, 1, 8, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 1 token ids are listed twice"
    ]


def test_a_tensor_of_ids_is_a_list_too(tmp_path: Path) -> None:
    torch.save(torch.tensor([3, 1], dtype=torch.int32), tmp_path / "ids.pt")
    assert listed(DraftVocabulary.read(tmp_path / "ids.pt", vocab_size=4)) == [3, 1]


class _Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self._path),)


def refused(path: Path, **settings: Any) -> str:
    """What the user is told: one sentence that begins with the file."""
    with pytest.raises(InputError) as caught:
        DraftVocabulary.read(path, **{"vocab_size": 10, **settings})
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", ["zip", 0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, protocol: str | int, recwarn: pytest.WarningsRecorder
) -> None:
    bomb = [1, _Bomb(tmp_path / "gone off")]
    data = pt_bytes(bomb) if isinstance(protocol, str) else pickle.dumps(bomb, protocol)
    (tmp_path / "list.pt").write_bytes(data)
    assert "could run code" in refused(tmp_path / "list.pt")
    assert not (tmp_path / "gone off").exists()
    assert not recwarn.list  # of the pickle's version, beside the one sentence


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "lists no token ids"),
        (torch.tensor([], dtype=torch.int64), "lists no token ids"),
        ([1, 10], "lists token id 10, outside 0 to 9"),
        ([1, -1], "lists token id -1, outside 0 to 9"),
        ([1, 2**70], f"lists token id {2**70}, outside"),
        ([1, 2.0], "other than a list of token ids"),
        ([1, True], "other than a list of token ids"),
        ([[1]], "other than a list of token ids"),
        ({"ids": [1]}, "other than a list of token ids"),
        (torch.tensor(1), "other than a list of token ids"),
        (torch.tensor([1.0]), "other than a list of token ids"),
    ],
)
def test_a_pt_of_something_else_is_refused(tmp_path: Path, value: object, words: str) -> None:
    torch.save(value, tmp_path / "list.pt")
    assert words in refused(tmp_path / "list.pt")


def safetensors_bytes(metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> bytes:
    known = {"kind": "apb frequency list", "version": "1"}
    return bytes(safetensors.torch.save(tensors, known | (metadata or {})))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (safetensors_bytes(token_ids=torch.tensor([1, 10])), "lists token id 10, outside 0 to 9"),
        (safetensors_bytes(token_ids=torch.tensor([-1])), "lists token id -1"),
        (safetensors_bytes(token_ids=torch.zeros(0, dtype=torch.int64)), "lists no token ids"),
        (safetensors_bytes(token_ids=torch.tensor([1, 1])), "is damaged"),
        (safetensors_bytes(token_ids=torch.tensor([1.0])), "is damaged"),
        (safetensors_bytes(token_ids=torch.tensor([[1]])), "is damaged"),
        (safetensors_bytes(counts=torch.tensor([1])), "is damaged"),
        (
            safetensors_bytes(token_ids=torch.tensor([1, 2]), counts=torch.tensor([1])),
            "is damaged",
        ),
        (safetensors_bytes(token_ids=torch.tensor([1]), counts=torch.tensor([-1])), "is damaged"),
        (
            safetensors_bytes({"corpus_tokens": "many"}, token_ids=torch.tensor([1])),
            "is damaged",
        ),
        (safetensors_bytes({"version": "2"}, token_ids=torch.tensor([1])), "not a frequency list"),
        (safetensors_bytes({"kind": "a model"}, token_ids=torch.tensor([1])), "not a frequency"),
        (safetensors.torch.save({"weight": torch.tensor([1.0])}), "not a frequency list"),
        (b"", "truncated or no safetensors file"),
        (b"not a tensor in sight", "truncated or no safetensors file"),
    ],
)
def test_safetensors_of_something_else_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "list.safetensors").write_bytes(data)
    assert words in refused(tmp_path / "list.safetensors")


@pytest.mark.parametrize("name", ["list.pt", "list.safetensors"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    FULL.write(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / name).write_bytes(data[:length])
        assert "truncated" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["list.pt", "list.safetensors"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_a_list(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    FULL.write(tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(content)
    try:
        found = listed(DraftVocabulary.read(tmp_path / name, vocab_size=10))
    except InputError:
        return
    assert found
    assert len(set(found)) == len(found)
    assert all(0 <= token_id < 10 for token_id in found)


def test_a_list_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.safetensors"
    FULL.write(path)
    assert "another tokenizer (hash 0123456789ab, " in refused(path, tokenizer_hash="f" * 64)
    torch.save([1], tmp_path / "list.pt")  # has no hash to compare
    DraftVocabulary.read(tmp_path / "list.pt", vocab_size=10, tokenizer_hash="f" * 64)


def test_a_file_that_is_not_there_or_has_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    for name in ("nothing.pt", "folder.pt"):
        assert "is no readable file" in refused(tmp_path / name)
    assert "has to end in .safetensors or .pt" in refused(tmp_path / "list.pkl")


def test_what_cannot_be_written_is_one_sentence_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.pt"
    path.write_bytes(b"old")
    (tmp_path / "folder.pt").mkdir()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for target, words in (
        (path, "cannot be written: No space left on device"),
        (tmp_path / "folder.pt", "cannot be written: give a file in a folder"),
        (tmp_path / "nowhere" / "list.pt", "cannot be written: give a file in a folder"),
        (tmp_path / "list.txt", "has to end in .safetensors or .pt"),
    ):
        with pytest.raises(InputError) as caught:
            FULL.write(target)
        assert str(caught.value).startswith(str(target))
        assert words in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *_: full(tmp_path / "moved", b""))
    with pytest.raises(InputError, match="No space left on device"):
        FULL.write(path)
    (tmp_path / "moved").unlink()
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["folder.pt", "list.pt"]
