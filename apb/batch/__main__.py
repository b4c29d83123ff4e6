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
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apb.batch.journal import Answer, Journal, check_output
from apb.batch.rows import Row, Rows, open_rows
from apb.config import RunConfig, compose_config, normalised
from apb.errors import ApbError, InputError, RequestError
from apb.llm import LLM
from apb.log import configure_logging
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
        EngineDeadError: the ranks are gone; finished rows are on disk.
    """
    overrides = [*_SETTINGS, *overrides]
    config = compose_config(overrides)
    if not isinstance(config.prompt, FileConfig):
        raise InputError("a batch takes its documents from input=: drop prompt=")
    if config.trace:
        raise InputError("trace=true traces one answer: ask for it with apb.run, or drop it")
    with closing(LLM.from_overrides(overrides)) as llm:
        if os.environ.get("RANK", "0") != "0":  # of a torchrun gang: rank 0 reads and writes
            unread: Iterator[dict[str, str]] = iter(())
            for row in llm.shared(unread):
                _answer(llm, config, **row)
            return 0
        check_output(Path(output))
        rows = open_rows(source)
        with closing(Journal(Path(output), fingerprint(config))) as journal:
            batch = _Batch(config, rows, journal, question)
            for row in llm.shared(batch.pending()):
                batch.record(_answer(llm, config, **row))
            return batch.finish()


def fingerprint(config: RunConfig) -> str:
    """Of the settings that answers depend on; where the ranks are, and for how long, is not."""
    settings = {
        name: value for name, value in asdict(config).items() if name not in _WITHOUT_EFFECT
    }
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
        self._settings = fingerprint(config)
        self._order: dict[str, None] = {}
        self._counts = {"answered": 0, "failed": 0, "kept": 0}
        self._bar: tqdm[Any] = tqdm(total=rows.total, desc="rows", disable=None)

    def pending(self) -> Iterator[dict[str, str]]:
        """Rows to ask about, their documents read; those that cannot be read fail here."""
        for row in self._rows.read():
            if row.id in self._order:
                row = row._replace(id=f"{row.id} (again)", error=f"id {row.id} occurs twice")
            self._order[row.id] = None
            if self._journal.is_answered(row.id):
                self._count("kept")
                continue
            try:
                yield self._read(row)
            except InputError as error:
                question = row.question or self._question
                self.record({"id": row.id, "question": question, "error": str(error)})

    def _read(self, row: Row) -> dict[str, str]:
        if row.error is not None:
            raise InputError(row.error)
        question = row.question or self._question
        if not question:
            raise InputError("the row has no question: add a column or give question=")
        document = row.document
        if document is None:
            prompt = self._config.prompt
            assert isinstance(prompt, FileConfig)
            document = prompt.read(row.path or Path())
        return {"row_id": row.id, "question": question, "document": document}

    def record(self, answer: Answer) -> None:
        """Write a row of output."""
        self._journal.add({**answer, "settings": self._settings})
        self._count("answered" if answer["error"] is None else "failed")

    def _count(self, what: str) -> None:
        self._counts[what] += 1
        self._bar.update()

    def finish(self) -> int:
        self._journal.finish(self._order)
        self._bar.close()
        counts = self._counts
        kept = f", {counts['kept']} were there" if counts["kept"] else ""
        _LOG.info("%d answered, %d failed%s", counts["answered"], counts["failed"], kept)
        return counts["failed"]


def _answer(llm: LLM, config: RunConfig, *, row_id: str, question: str, document: str) -> Answer:
    """A row's answer, or why there is none."""
    try:
        output = llm.ask(document, question, config.decode.sampling_params(seed=config.seed))
    except (InputError, RequestError) as error:
        return {"id": row_id, "question": question, "error": str(error)}
    return {"id": row_id, "question": question, **_fields(output), "error": None}


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
    rank, world_size = int(os.environ.get("RANK", "0")), os.environ.get("WORLD_SIZE")
    configure_logging(rank, None if world_size is None else int(world_size))
    try:
        values, overrides = _parse(arguments)
        failed = run(
            normalised(overrides),
            source=values["input"],
            output=values["output"],
            question=values.get("question"),
        )
    except ApbError as error:
        if rank == 0 or not isinstance(error, InputError):
            print(f"apb.batch: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 1 if failed else 0


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    words = [argument.partition("=") for argument in arguments]
    values = {key: value for key, _, value in words if key in _OPTIONS and value}
    if missing := [key for key in ("input", "output") if key not in values]:
        raise InputError(f"{' and '.join(f'{key}=' for key in missing)} missing: see --help")
    return values, ["".join(word) for word in words if word[0] not in _OPTIONS]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
