"""`python -m apb.batch +model=NAME input=FOLDER|FILE output=FILE [question="..."] [any setting]`

Answers a question about each of many documents. `input` is a folder of text and PDF files, a .jsonl
or .parquet file (columns `document` or `path`, and optionally `question` and `id`), or a URI that
Ray Data reads, such as s3://bucket/docs.parquet. `output` ends in .jsonl or .parquet. A row that
fails carries its error; the same command again answers what is missing. The exit code is 0 if every
row has an answer, 1 if some failed, 2 for bad input.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apb.batch.journal import Answer, Journal, check_answers
from apb.batch.rows import Row, Rows, open_rows
from apb.command import exit_code, this_rank
from apb.config import RunConfig, compose_config
from apb.drain import Terminated, draining
from apb.errors import EngineDeadError, InputError, RequestError
from apb.llm import LLM
from apb.output import RequestOutput
from apb.prompts.source import FileConfig

_LOG = logging.getLogger("apb")
_OPTIONS = ("input", "output", "question")
_SETTINGS = ("prompt=file", "progress=false")
"""Limits of documents are those of files; the bar counts rows."""
_WITHOUT_EFFECT = (
    *("launcher", "world_size", "runtime", "prompt", "output", "progress", "trace"),
    *("supervision", "on_failure", "on_rank_loss", "request_timeout_s"),
)


def run(overrides: Sequence[str], *, source: str, output: str, question: str | None) -> int:
    """Answer every row that has no answer yet; returns how many failed.

    Raises:
        InputError: a setting, `source` or `output` that cannot work, before a model is loaded.
        EngineDeadError: the ranks are gone and no others follow; finished rows are on disk.
    """
    overrides = [*_SETTINGS, *overrides]
    config = compose_config(overrides)
    if not isinstance(config.prompt, FileConfig):
        raise InputError("a batch takes its documents from input=: drop prompt=")
    if config.trace:
        raise InputError("trace=true traces one answer: ask for it with apb.run, or drop it")
    with closing(LLM.from_overrides(overrides)) as llm:
        if this_rank():  # which only answers
            llm.start()
            with draining(config.supervision.drain_s):
                unread: Iterator[dict[str, Any]] = iter(())
                for row in llm.shared(unread):
                    _answer(llm, config, **row)
            return 0
        check_answers(Path(output))
        rows = open_rows(source)
        settings = fingerprint(config, llm.world_size)
        with closing(Journal(Path(output), settings)) as journal:
            batch = _Batch(config, rows, journal, question)
            llm.start()
            with draining(config.supervision.drain_s) as is_ending:
                for row in llm.shared(batch.pending(is_ending)):
                    batch.record(_answer(llm, config, **row))
            return batch.finish()


def fingerprint(config: RunConfig, world_size: int) -> str:
    """Of the settings that answers depend on; where the ranks are, and for how long, is not.

    Question and document are not either: they stand in the answers (see `Journal.is_answered`).
    """
    settings = {
        name: value for name, value in asdict(config).items() if name not in _WITHOUT_EFFECT
    }
    if config.num_blocks is None:  # so that it is one per rank
        settings["world_size"] = world_size
    # The kind of a plug-in is its class, which `asdict` drops.
    kinds = [type(getattr(config, name)).__name__ for name in ("method", "drafter", "backend")]
    encoded = json.dumps([settings, kinds], sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:12]


class _Batch:
    """One pass over the rows, as rank 0 or the driver makes it."""

    def __init__(
        self, config: RunConfig, rows: Rows, journal: Journal, question: str | None
    ) -> None:
        self._config, self._rows, self._journal, self._question = config, rows, journal, question
        self._order: dict[str, None] = {}
        self._is_cut = False
        self._counts = {"answered": 0, "failed": 0, "kept": 0}
        self._bar: tqdm[Any] = tqdm(total=rows.total, desc="rows", disable=None)

    def pending(self, is_ending: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Rows to ask about, their documents read; those that cannot be read fail here.

        Rows that failed before come last: those that end the ranks may use up the restarts.
        """
        failed = self._journal.failed()
        for is_retry in (False, True) if failed else (False,):
            for row in self._distinct():
                if is_ending():
                    self._is_cut = True  # ranks without a driver have to hear of the end as usual
                    return
                self._order[row.id] = None
                if (row.id in failed) != is_retry:
                    continue
                if self._journal.is_answered(self._asked(row)):
                    self._count("kept")
                    continue
                try:
                    yield self._read(row)
                except InputError as error:
                    self.record({**self._asked(row), "error": str(error)})

    def _distinct(self) -> Iterator[Row]:
        """The rows of the input; one with the id of another is an error."""
        seen: set[str] = set()
        for row in self._rows.read():
            if row.id in seen:
                row = row._replace(id=f"{row.id} (again)", error=f"id {row.id} occurs twice")
            seen.add(row.id)
            yield row

    def _asked(self, row: Row) -> Answer:
        question = row.question or self._question
        return {"id": row.id, "question": question, "source": row.source}

    def _read(self, row: Row) -> Answer:
        asked = self._asked(row)
        if row.error is not None:
            raise InputError(row.error)
        if not asked["question"]:
            raise InputError("the row has no question: add a column or give question=")
        document = row.document
        if document is None:
            prompt = self._config.prompt
            assert isinstance(prompt, FileConfig)
            document = prompt.read(row.path or Path())
        return {"asked": asked, "document": document}

    def record(self, answer: Answer) -> None:
        """Write a row of output."""
        self._journal.add(answer)
        self._count("answered" if answer["error"] is None else "failed")

    def _count(self, what: str) -> None:
        self._counts[what] += 1
        self._bar.update()

    def finish(self) -> int:
        """Leaves the output in order; returns how many rows failed.

        Raises:
            Terminated: the batch was told to end before its last row.
        """
        if self._is_cut:
            raise Terminated
        self._journal.finish(self._order)
        self._bar.close()
        counts = self._counts
        kept = f", {counts['kept']} were there" if counts["kept"] else ""
        _LOG.info("%d answered, %d failed%s", counts["answered"], counts["failed"], kept)
        return counts["failed"]


def _answer(llm: LLM, config: RunConfig, *, asked: Answer, document: str) -> Answer:
    """A row's answer, or why there is none."""
    params = config.decode.sampling_params(seed=config.seed)
    try:
        output = llm.ask(document, asked["question"], params)
    except (InputError, RequestError, EngineDeadError) as error:
        if llm.is_dead:
            raise
        return {**asked, "error": str(error)}
    return {**asked, **_fields(output), "error": None}


def _fields(output: RequestOutput) -> Answer:
    metrics = output.metrics
    return {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "method": metrics.method,
        "context_tokens": metrics.context_tokens,
        "generated_tokens": metrics.generated_tokens,
        "prefill_s": round(metrics.prefill_s, 4),
        "ttft_s": round(metrics.ttft_s, 4),
        "decode_s": round(metrics.decode_s, 4),
        "notes": "; ".join(metrics.notes),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)  # noqa: T201
        return 0
    return exit_code("apb.batch", partial(_run, arguments))


def _run(arguments: Sequence[str]) -> int:
    values, overrides = _parse(arguments)
    failed = run(
        overrides,
        source=values["input"],
        output=values["output"],
        question=values.get("question"),
    )
    return 1 if failed else 0


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    words = [argument.partition("=") for argument in arguments]
    values = {key: value for key, _, value in words if key in _OPTIONS and value}
    if missing := [key for key in ("input", "output") if key not in values]:
        raise InputError(f"{' and '.join(f'{key}=' for key in missing)} missing: see --help")
    return values, ["".join(word) for word in words if word[0] not in _OPTIONS]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
