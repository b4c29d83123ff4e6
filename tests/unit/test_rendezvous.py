"""Gangs one after the other on one store: each agrees on a name that is new, whoever is late."""

from __future__ import annotations

import threading
import time

import pytest

from apb.errors import EngineDeadError
from apb.launchers.rendezvous import fresh_prefix


class DictStore:
    """torch's store, as far as it is used, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self.values[key].encode() for key in keys]

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        return self.values.setdefault(key, desired).encode()

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)


def meet(store: DictStore, order: list[int], *, delay_s: float = 0.0) -> list[str]:
    """The prefixes of a gang whose ranks come up in that order."""
    found: dict[int, str] = {}

    def join(rank: int) -> None:
        found[rank] = fresh_prefix(store, rank, len(order), timeout_s=20.0)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(delay_s)
    for thread in threads:
        thread.join()
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_every_gang_gets_one_new_name(order: list[int]) -> None:
    store, names = DictStore(), set[str]()
    for _ in range(3):
        prefixes = meet(store, order, delay_s=0.1)
        assert len(prefixes) == 3
        assert len(set(prefixes)) == 1
        assert prefixes[0] not in names
        names.add(prefixes[0])


def give_up(store: DictStore, rank: int, sentences: list[str]) -> None:
    with pytest.raises(EngineDeadError) as error:
        fresh_prefix(store, rank, 3, timeout_s=0.5)
    sentences.append(str(error.value))


@pytest.mark.parametrize(("ranks", "missing"), [([0, 1], "rank 2"), ([0], "rank 1, 2")])
def test_a_gang_that_never_was_complete_says_who_is_missing_and_disturbs_no_later_one(
    ranks: list[int], missing: str
) -> None:
    store, sentences = DictStore(), list[str]()
    threads = [threading.Thread(target=give_up, args=(store, it, sentences)) for it in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sentences) == len(ranks)
    assert f"{missing} has not come up within supervision.start_s=0.5" in sentences
    assert len(set(meet(store, [1, 0, 2]))) == 1
