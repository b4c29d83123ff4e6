"""Runs what the journal does not hold yet, with one gang of ranks for all methods."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from apb.config import RunConfig, plugin_name
from apb.errors import InputError
from apb.evaluate.cases import Item, Vocabulary, items
from apb.evaluate.journal import Journal, Place, Row, read_evaluation
from apb.evaluate.settings import Settings
from apb.hf.model import load_config
from apb.hf.tokenizer import load_tokenizer
from apb.launchers.opening import inside_torchrun
from apb.llm import LLM
from apb.prompts.encode import control_tokens, encode_plain, start_ids
from apb.revision import revision

_ROOM = 384
"""Tokens that template, question and answer, or a continuation, may take beside a document."""
_TOGETHER = 1 << 18
"""Tokens of documents that are made at once; taking other settings costs a third of a second."""
_CHECKOUT = Path(__file__).parents[2]

Todo = tuple[Item, Sequence[str]]
"""A sample, and the methods that it lacks."""


class Baseline(NamedTuple):
    """What others are compared with."""

    name: str
    rows: Mapping[Place, Row]
    metric: str
    """How answers to the user's own questions were scored."""


def evaluate(settings: Settings, other: Baseline | None = None) -> Sequence[Row]:
    """The rows of all samples and methods, those of earlier runs included.

    Args:
        other: another evaluation, which has to have the same samples.

    Raises:
        InputError: the settings do not fit the model, the data, the folder or `other`.
        ApbError: a request failed, or the folder cannot be written; finished rows are kept.
    """
    config = settings.config
    if inside_torchrun() or plugin_name("launcher", config.launcher) == "torchrun":
        raise InputError("an evaluation starts its ranks itself: run it without torchrun")
    _check_lengths(settings, config)
    found = items(settings, _vocabulary(config), max_tokens=config.decode.max_tokens)
    if other is not None:
        _check_comparable(settings, found, other)
    with closing(Journal(settings.output, settings.identity())) as journal:
        documents = _Documents()
        for row in () if other is None else other.rows.values():
            documents.add(row.place, row.digest, f"baseline={settings.baseline}")
        for row in journal.rows.values():
            documents.add(row.place, row.digest, f"output={settings.output}")
        _run_missing(settings, found, journal, documents)
        return [journal.rows[item.place, label] for item in found for label in settings.methods]


def _check_lengths(settings: Settings, config: RunConfig) -> None:
    limit = int(load_config(config.model).max_position_embeddings)
    if settings.lengths[-1] + _ROOM > limit and not config.allow_beyond_context:
        raise InputError(
            f"lengths={settings.lengths[-1]} is beyond {config.model.name}, which reads {limit} "
            f"tokens: give at most {limit - _ROOM}, or set allow_beyond_context=true"
        )


def _vocabulary(config: RunConfig) -> Vocabulary:
    tokenizer = load_tokenizer(config.model)
    controls = control_tokens(tokenizer, str(tokenizer.chat_template))
    encode = partial(encode_plain, tokenizer, controls=controls, name="document")
    return Vocabulary(encode, tuple(start_ids(tokenizer)))


def _check_comparable(settings: Settings, found: Sequence[Item], other: Baseline) -> None:
    shared = [item.place for item in found if item.place in other.rows]
    if not shared:
        raise InputError(
            f"baseline={settings.baseline} shares no sample with this evaluation: give another"
        )
    own = {path.stem for path in settings.data}
    if settings.metric != other.metric and any(place.task in own for place in shared):
        raise InputError(
            f"baseline={settings.baseline} scored answers by metric={other.metric}, which is "
            f"{settings.metric} here: give the same"
        )


class _Documents:
    """The digest of each sample's document, and where it was met first."""

    def __init__(self) -> None:
        self._met: dict[Place, tuple[str, str]] = {}

    def add(self, place: Place, digest: str, origin: str) -> None:
        """Raises InputError if it was met with another document."""
        before, where = self._met.setdefault(place, (digest, origin))
        if before != digest:
            raise InputError(
                f"{where} has another document than {origin} (at {place.task}, {place.length}, "
                f"{place.sample}): give another folder, or the model, seed and version of that one"
            )


def _run_missing(
    settings: Settings, found: Sequence[Item], journal: Journal, documents: _Documents
) -> None:
    missing = [
        (item, todo)
        for item in found
        if (
            todo := [label for label in settings.methods if (item.place, label) not in journal.rows]
        )
    ]
    if not missing:
        return
    source = revision(_CHECKOUT, "apb", "conf", "kernels")
    total = sum(len(todo) for _, todo in missing)
    with (
        closing(LLM.from_overrides(next(iter(settings.methods.values())))) as llm,
        tqdm(total=total, unit="sample", disable=None) as bar,
    ):
        for group in _groups(missing):
            cases = {item: item.load() for item, _ in group}
            for item, case in cases.items():
                documents.add(item.place, case.digest, "this evaluation")
            for label, overrides in settings.methods.items():
                chosen = [item for item, todo in group if label in todo]
                if chosen:
                    llm.configure(overrides)
                for item in chosen:
                    bar.set_description(f"{item.place.task} {item.place.length} {label}")
                    params = llm.config.decode.sampling_params(seed=llm.config.seed)
                    began = time.perf_counter()
                    row = cases[item].run(llm, item.place, label, params)
                    seconds = time.perf_counter() - began
                    journal.append(replace(row, seconds=seconds, source=source))
                    bar.update()


def _groups(missing: Sequence[Todo]) -> Iterator[list[Todo]]:
    """Samples that fit into memory together, so that methods change once for many of them."""
    group: list[Todo] = []
    tokens = 0
    for item, todo in missing:
        if group and tokens + item.place.length > _TOGETHER:
            yield group
            group, tokens = [], 0
        group.append((item, todo))
        tokens += item.place.length
    yield group


def first_method(settings: Settings, rows: Sequence[Row]) -> Baseline:
    """The baseline where no other evaluation is."""
    first = next(iter(settings.methods))
    own = {row.place: row for row in rows if row.method == first}
    return Baseline(first, own, settings.metric)


def other_evaluation(folder: Path) -> Baseline:
    """The first method of the evaluation in a folder.

    Raises:
        InputError: there is none.
    """
    there, rows = read_evaluation(folder)
    first = next(iter(there["methods"]))
    chosen = {row.place: row for row in rows.values() if row.method == first}
    return Baseline(f"{folder.name}: {first}", chosen, there["metric"])
