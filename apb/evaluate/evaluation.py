"""Runs what the journal does not hold yet, with one gang of ranks for all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial

from tqdm import tqdm

from apb.config import RunConfig
from apb.errors import InputError
from apb.evaluate.cases import CONTINUATION_LEN, Item, Vocabulary, items
from apb.evaluate.journal import Journal, Place, Row, Rows, read_evaluation
from apb.evaluate.settings import Settings
from apb.hf.model import load_config
from apb.hf.tokenizer import load_tokenizer
from apb.llm import LLM, inside_torchrun
from apb.prompts.encode import control_tokens, encode_plain, start_ids

_QUESTION_ROOM = 384
"""Tokens that template, question and answer may take beside a document."""


def evaluate(settings: Settings) -> Sequence[Row]:
    """The rows of all samples and methods, those of earlier runs included.

    Raises:
        InputError: the settings do not fit the model, the data or the folder.
        ApbError: a request failed, or the folder cannot be written; finished rows are kept.
    """
    config = settings.config
    if inside_torchrun() or config.launcher == "torchrun":
        raise InputError("an evaluation starts its ranks itself: run it without torchrun")
    _check_lengths(settings, config)
    found = items(settings, _vocabulary(config), max_tokens=config.decode.max_tokens)
    with closing(Journal(settings.output, settings.identity())) as journal:
        _run_missing(settings, found, journal)
        return [journal.rows[item.place, label] for item in found for label in settings.methods]


def _check_lengths(settings: Settings, config: RunConfig) -> None:
    limit = int(load_config(config.model).max_position_embeddings)
    room = max(_QUESTION_ROOM, CONTINUATION_LEN)
    if settings.lengths[-1] + room > limit and not config.allow_beyond_context:
        raise InputError(
            f"lengths={settings.lengths[-1]} is beyond {config.model.name}, which reads {limit} "
            f"tokens: give at most {limit - room}, or set allow_beyond_context=true"
        )


def _vocabulary(config: RunConfig) -> Vocabulary:
    tokenizer = load_tokenizer(config.model)
    controls = control_tokens(tokenizer, str(tokenizer.chat_template))
    encode = partial(encode_plain, tokenizer, controls=controls, name="document")
    return Vocabulary(encode, tuple(start_ids(tokenizer)))


def _run_missing(settings: Settings, found: Sequence[Item], journal: Journal) -> None:
    missing = {
        item: todo
        for item in found
        if (
            todo := [label for label in settings.methods if (item.place, label) not in journal.rows]
        )
    }
    if not missing:
        return
    total = sum(map(len, missing.values()))
    with (
        closing(LLM.from_overrides(next(iter(settings.methods.values())))) as llm,
        tqdm(total=total, unit="sample", disable=None) as bar,
    ):
        current = next(iter(settings.methods))
        for item, todo in missing.items():
            case = item.load()
            for label in todo:
                bar.set_description(f"{item.place.task} {item.place.length} {label}")
                if label != current:
                    llm.configure(settings.methods[label])
                    current = label
                config = llm.config
                params = config.decode.sampling_params(seed=config.seed)
                journal.append(case.run(llm, item.place, label, params))
                bar.update()


def baseline_rows(settings: Settings, rows: Sequence[Row]) -> tuple[str, Mapping[Place, Row]]:
    """Whom methods are compared with, and its rows: the first method, or one of another folder.

    Raises:
        InputError: the other folder has other samples.
    """
    if settings.baseline is None:
        first = next(iter(settings.methods))
        return first, {row.place: row for row in rows if row.method == first}
    there, others = read_evaluation(settings.baseline)
    first = next(iter(there["methods"]))
    return f"{settings.baseline.name}: {first}", _matched(settings, rows, others, first)


def _matched(
    settings: Settings, rows: Sequence[Row], others: Rows, method: str
) -> Mapping[Place, Row]:
    matched = {}
    for row in rows:
        other = others.get((row.place, method))
        if other is None:
            continue
        if other.digest != row.digest:
            raise InputError(
                f"baseline={settings.baseline} has other documents than this evaluation (at "
                f"{row.task}, {row.length}, {row.index}): give one with the same model and seed"
            )
        matched[row.place] = other
    if not matched:
        raise InputError(f"baseline={settings.baseline} shares no sample with this evaluation")
    return matched
