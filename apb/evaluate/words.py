"""Made-up keys, values and words, none of them twice in one document."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

_ADJECTIVES = (
    "able", "amber", "ancient", "brave", "brief", "bright", "brisk", "broad", "calm", "careful",
    "cheerful", "clear", "clever", "cold", "cosy", "crisp", "curious", "dark", "deep", "distant",
    "dusty", "eager", "early", "elegant", "faint", "fancy", "fast", "fine", "firm", "foggy",
    "fresh", "gentle", "giant", "glad", "golden", "grand", "green", "happy", "heavy", "honest",
    "humble", "icy", "idle", "jolly", "keen", "kind", "large", "late", "lazy", "light", "little",
    "lively", "lonely", "loud", "loyal", "lucky", "mellow", "mighty", "mild", "modest", "narrow",
    "neat", "nimble", "noble", "odd", "old", "pale", "patient", "plain", "polite", "proud", "pure",
    "quick", "quiet", "rapid", "rare", "ripe", "rough", "round", "royal", "rusty", "shiny", "short",
    "shy", "silent", "silver", "simple", "slow", "small", "smooth", "soft", "solid", "steady",
    "steep", "stern", "still", "strong", "sturdy", "sunny", "sweet", "swift", "tall", "tame",
    "thin", "tidy", "tiny", "tough", "vast", "vivid", "warm", "wide", "wild", "wise", "young",
)  # fmt: skip
_NOUNS = (
    "acorn", "anchor", "apron", "arrow", "atlas", "badge", "barrel", "basin", "basket", "beacon",
    "bell", "bench", "berry", "blanket", "boat", "bonnet", "book", "boot", "bottle", "branch",
    "bread", "brick", "bridge", "broom", "brush", "bucket", "button", "cabin", "cable", "camel",
    "candle", "canoe", "canvas", "carpet", "castle", "chain", "chair", "chalk", "cherry", "chest",
    "cliff", "clock", "cloud", "coat", "comet", "copper", "cotton", "cradle", "crane", "crown",
    "curtain", "daisy", "desk", "dome", "donkey", "door", "drum", "eagle", "engine", "falcon",
    "feather", "fence", "ferry", "field", "flag", "flute", "forest", "fountain", "fox", "garden",
    "gate", "glove", "goose", "grain", "granite", "grape", "hammer", "harbour", "harp", "hat",
    "hazel", "hedge", "helmet", "heron", "hill", "honey", "horn", "horse", "island", "ivory",
    "jacket", "jar", "jewel", "kettle", "key", "kite", "knot", "ladder", "lake", "lamp", "lantern",
    "leaf", "lemon", "letter", "lion", "lock", "maple", "marble", "mask", "meadow", "medal",
    "mill", "mirror", "moon", "moss", "mountain", "needle", "nest", "net", "oak", "oar", "ocean",
    "olive", "onion", "orchard", "otter", "owl", "paddle", "page", "palace", "paper", "path",
    "pearl", "pebble", "pen", "pepper", "piano", "pillow", "pine", "plate", "plum", "pond",
    "pony", "quilt", "rabbit", "raft", "ribbon", "river", "road", "robin", "rocket", "roof",
    "rope", "saddle", "sail", "salt", "scarf", "shell", "ship", "spade", "spoon", "stable",
    "star", "stone", "stove", "table", "tailor", "temple", "thread", "tiger", "torch", "tower",
    "train", "tulip", "valley", "violin", "wagon", "wall", "walnut", "wheel", "willow", "window",
)  # fmt: skip


class Stock(Generic[T]):
    """The first of endlessly many things: asking for more of them leaves the earlier ones."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source, self._taken = source, list[T]()

    def take(self, number: int) -> list[T]:
        while len(self._taken) < number:
            self._taken.append(next(self._source))
        return self._taken[:number]


def keys(rng: random.Random) -> Iterator[str]:
    """Words with hyphens; of three parts once half of those of two are used up."""
    pairs = len(_ADJECTIVES) * len(_NOUNS) // 2

    def draw(place: int) -> str:
        parts = [rng.choice(_ADJECTIVES), rng.choice(_NOUNS)]
        return "-".join([rng.choice(_ADJECTIVES), *parts] if place >= pairs else parts)

    return _distinct(draw)


def numbers(rng: random.Random) -> Iterator[str]:
    """Of seven digits."""
    return _distinct(lambda _: str(rng.randrange(10**6, 10**7)))


def uuids(rng: random.Random) -> Iterator[str]:
    return _distinct(lambda _: str(uuid.UUID(int=rng.getrandbits(128), version=4)))


def compounds(rng: random.Random) -> Iterator[str]:
    """Words of two nouns written as one, then of three: more than any list of plain words has."""
    pairs = len(_NOUNS) ** 2 // 2
    return _distinct(lambda place: "".join(rng.choices(_NOUNS, k=2 + (place >= pairs))))


def codes(rng: random.Random, length: int = 6) -> Iterator[str]:
    """Words of random small letters."""
    return _distinct(lambda _: "".join(rng.choices(string.ascii_lowercase, k=length)))


def names(rng: random.Random, length: int = 5) -> Iterator[str]:
    """Names of random capital letters."""
    return _distinct(lambda _: "".join(rng.choices(string.ascii_uppercase, k=length)))


def _distinct(draw: Callable[[int], str]) -> Iterator[str]:
    """What has been drawn, without repeats; the drawer is told how many came before."""
    seen: set[str] = set()
    for place in count():
        while (word := draw(place)) in seen:
            pass
        seen.add(word)
        yield word
