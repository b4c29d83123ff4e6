"""Endless village chronicle, seeded: the text that needles hide in, and how they come there."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# No digit and no key of a needle occurs below, so a needle is found only where it was put.
_PEOPLE = (
    "Agnes", "Albin", "Bertil", "Brenna", "Cedric", "Clara", "Dagmar", "Edwin", "Elsa", "Fergus",
    "Frida", "Gideon", "Greta", "Harald", "Hester", "Ingrid", "Ivo", "Jonas", "Judith", "Konrad",
    "Lena", "Ludwig", "Mabel", "Magnus", "Nora", "Oswin", "Petra", "Quentin", "Rosa", "Rupert",
    "Sigrid", "Silas", "Tilda", "Tobias", "Ursula", "Viktor", "Wanda", "Wilfred", "Yara", "Zelda",
)  # fmt: skip
_TRADES = (
    "baker", "beekeeper", "blacksmith", "boatman", "bookbinder", "brewer", "candlemaker",
    "carpenter", "clockmaker", "cobbler", "cooper", "dyer", "farmer", "ferryman", "fiddler",
    "gardener", "glazier", "goatherd", "innkeeper", "mason", "midwife", "miller", "painter",
    "potter", "roofer", "saddler", "schoolteacher", "shepherd", "surveyor", "tailor", "tanner",
    "thatcher", "tinker", "weaver", "wheelwright", "woodcutter",
)  # fmt: skip
_WORDS: dict[str, tuple[str, ...]] = {
    "time": (
        "After the harvest", "At first light", "At the spring fair", "Before the snow came",
        "During the long rain", "Early in the autumn", "In the dry weeks of summer",
        "Late one evening", "On a quiet morning", "On the eve of the feast",
        "On the last market day", "One foggy afternoon", "Shortly after midnight",
        "That same winter", "The following week", "Toward the end of the year",
        "When the ice broke", "When the river rose", "While the bells were ringing",
        "Years later",
    ),
    "place": (
        "the abandoned quarry", "the apple orchard", "the bakery", "the chapel",
        "the crooked bridge", "the duck pond", "the eastern gate", "the ferry landing",
        "the fish market", "the granary", "the hill farm", "the inn", "the lower meadow",
        "the mill race", "the north road", "the old barracks", "the oak grove", "the parish hall",
        "the sawmill", "the schoolhouse", "the sheep pens", "the smithy", "the stone well",
        "the tannery", "the tithe barn", "the town library", "the upper pasture",
        "the village green", "the vineyard", "the watchtower",
    ),
    "thing": (
        "a barrel of salted herring", "a basket of pears", "a bolt of blue cloth",
        "a box of candles", "a broken plough", "a bundle of letters", "a cart of firewood",
        "a carved chest", "a coil of rope", "a copper kettle", "a crate of lamps", "a faded map",
        "a heavy ledger", "a jar of honey", "a lame donkey", "a leather harness",
        "a new church bell", "a pair of oars", "a patched sail", "a pot of red paint",
        "a sack of barley", "a set of chisels", "a silver buckle", "a small organ",
        "a spare wheel", "a stack of roof tiles", "a tame crow", "a wooden ladder",
        "an iron stove", "an oil portrait",
    ),
    "deed": (
        "borrowed", "carried away", "cleaned", "examined", "gave away", "hid", "inherited",
        "kept watch over", "left behind", "looked after", "lost", "mended", "paid for", "praised",
        "sketched", "sold", "traded", "weighed",
    ),
    "reason": (
        "because nobody else had the patience", "because the council had asked for it",
        "despite the bitter wind", "for reasons that were never written down",
        "hoping for a better price", "in memory of a late uncle", "in spite of an old quarrel",
        "much to the surprise of the neighbours", "so that the children could see it",
        "to settle a friendly wager", "to the delight of the travellers",
        "while everyone else was at supper", "with a little help from the miller's sons",
        "with great care", "without telling a soul", "without any hurry",
    ),
    "view": (
        "a cheerful song is better than a short sermon", "the old customs ought to be kept",
        "the roof would not last another winter", "no good ever came of haste",
        "strangers should be fed first", "the fields would recover in time",
        "the road needed fresh gravel", "the wine had been watered",
        "wolves had been heard in the hills", "the price of wool was bound to fall",
        "the well would soon run dry", "it was time to plant more trees",
    ),
}  # fmt: skip
_FORMS = (
    "{time}, {person} the {trade} {deed} {thing} near {place}, {reason}.",
    "{time}, {person} met {other} the {trade} at {place} and {deed} {thing}.",
    "{person} the {trade} {deed} {thing} that {other} had brought from {place}.",
    "{time}, the {trade} {person} told {other} at {place} that {view}.",
    "It was {person} who {deed} {thing} at {place}, though {other} thought that {view}.",
    "{other} the {trade} always said that {view}, yet {person} {deed} {thing} by {place}.",
    "Nobody at {place} knew why {person} {deed} {thing}, but {other} believed that {view}.",
    "{time}, {thing} was found behind {place}, and {person} asked {other} to take it home.",
)


_SENTENCES_PER_PARAGRAPH = 6


def weave(hay: Sequence[str], placed: Sequence[tuple[float, str]]) -> list[str]:
    """The sentences of `hay` with others among them, each at its depth (0 to 1, not falling)."""
    sentences: list[str] = []
    done = 0
    for depth, sentence in placed:
        at = round(depth * len(hay))
        sentences += [*hay[done:at], sentence]
        done = at
    sentences += hay[done:]
    return sentences


def paragraphs(sentences: Sequence[str]) -> str:
    """Sentences as running text."""
    starts = range(0, len(sentences), _SENTENCES_PER_PARAGRAPH)
    return "\n\n".join(
        " ".join(sentences[start : start + _SENTENCES_PER_PARAGRAPH]) for start in starts
    )


def chronicle(rng: random.Random) -> Iterator[str]:
    """Yield sentences without end, none of them twice; the state of `rng` decides all of them."""
    seen: set[str] = set()
    while True:
        sentence = _sentence(rng)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def _sentence(rng: random.Random) -> str:
    person, other = rng.sample(_PEOPLE, 2)
    words = {slot: rng.choice(choices) for slot, choices in _WORDS.items()}
    form = rng.choice(_FORMS)
    return form.format(person=person, other=other, trade=rng.choice(_TRADES), **words)
