"""`python -m apb.train answers`: the target's own answers, from which drafting heads learn most."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apb.arguments import parse_words, paths_of, whole_number
from apb.config import RunConfig, compose_config
from apb.corpus import CorpusFile, find_texts
from apb.errors import InputError
from apb.hf.batch import BatchGenerator
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.tokenizer import load_tokenizer, stop_ids
from apb.json_lines import JsonLines
from apb.prompts.template import build_prompt
from apb.train.requests import make_request
from apb.worker import choose_device

_CHARS_PER_TOKEN = 6
"""More than prose has, so that a passage fills a prompt."""
_NUMBERS = ("count", "prompt", "max_tokens", "batch", "seed")
_WORDS = ("data", "output", "field")
_TEMPERATURES = (0.0, 0.0, 0.7)
"""Of batches in turn: most users decode greedily or nearly so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to ask about, and how much.

    Attributes:
        count: answers.
        prompt: tokens of a document at most.
        max_tokens: of an answer.
        batch: answers generated side by side.
    """

    data: tuple[str, ...]
    output: Path
    field: str = "text"
    count: int = 2000
    prompt: int = 320
    max_tokens: int = 128
    batch: int = 32
    seed: int = 0

    @classmethod
    def of(cls, values: dict[str, str]) -> Options:
        """Raises InputError for what is missing or no number."""
        if "data" not in values or "output" not in values:
            raise InputError("data= and output= are needed: see `python -m apb.train --help`")
        numbers = {
            key: whole_number(key, value, least=0 if key == "seed" else 1)
            for key, value in values.items()
            if key in _NUMBERS
        }
        return cls(
            data=paths_of(values["data"]),
            output=Path(values["output"]).expanduser(),
            field=values.get("field", "text"),
            **numbers,
        )


def answer_requests(config: RunConfig, options: Options) -> None:
    """Ask the model about passages of the texts and leave a record per answer.

    Records hold ``prompt_ids`` and ``token_ids``. An interrupted run goes on where it stopped.

    Raises:
        InputError: nothing to read, or less of it than answers are wanted.
    """
    files = find_texts(options.data, field=options.field, setting="data")
    tokenizer, device = load_tokenizer(config.model), choose_device(config.device, 0)
    template = config.model.prompt_settings
    prompts = _prompts(files, tokenizer, template, options)
    with closing(JsonLines(options.output, output=options.output, writer="run")) as journal:
        journal.drop_begun()
        done = len(journal.read().whole)
        missing = islice(prompts, done, options.count)
        model = CausalLM.load(config.model, dtype=choose_dtype(config.dtype, device), device=device)
        stops = stop_ids(config.model, load_config(config.model), tokenizer)
        generator = BatchGenerator(model, stops)
        bar = tqdm(total=options.count, initial=done, desc="answers", disable=None)
        while batch := list(islice(missing, options.batch)):
            turn = done // options.batch
            answers = generator.answers(
                batch,
                max_tokens=options.max_tokens,
                temperature=_TEMPERATURES[turn % len(_TEMPERATURES)],
                seed=options.seed + turn,
            )
            records = [
                {"prompt_ids": prompt_ids, "token_ids": token_ids}
                for prompt_ids, token_ids in zip(batch, answers, strict=True)
            ]
            journal.append(*records)
            done += len(batch)
            bar.update(len(batch))
        bar.close()
    if done < options.count:
        raise InputError(
            f"data= has passages for {done} requests, fewer than count={options.count}: give more "
            "text or ask for fewer"
        )


def _prompts(
    files: Sequence[CorpusFile], tokenizer: Any, template: Mapping[str, Any], options: Options
) -> Iterator[tuple[int, ...]]:
    """The same for the same files and options, spread over the files."""
    rng = random.Random(options.seed)
    for text in _passages(files, options, rng):
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids = encoded["input_ids"][: rng.randint(min(48, options.prompt), options.prompt)]
        document, question = make_request(tokenizer.decode(ids).strip("\ufffd"), rng)
        if document.strip():
            prompt = build_prompt(tokenizer, document, question, **template)
            yield (*prompt.context_ids, *prompt.query_ids)


def _passages(files: Sequence[CorpusFile], options: Options, rng: random.Random) -> Iterator[str]:
    """First a few of each file, then more of those that have them."""
    order = list(files)
    rng.shuffle(order)
    start, stop, found = 0, -(-options.count // len(order)), 1
    while found:
        found = 0
        for file in order:
            passages = file.passages(max_chars=_CHARS_PER_TOKEN * options.prompt)
            for passage in islice(passages, start, stop):
                found += 1
                if isinstance(passage.content, str) and passage.content.strip():
                    yield passage.content
        start, stop = stop, 2 * stop


def run(arguments: Sequence[str], command: str) -> list[str]:
    """Answer as `arguments` say; returns what to say of it. Raises ApbError."""
    values, overrides = parse_words(
        arguments, (*_WORDS, *_NUMBERS), settings=("model", "device", "dtype")
    )
    options = Options.of(values)
    answer_requests(compose_config(overrides), options)
    return [f"{options.output}: {options.count} answers"]
