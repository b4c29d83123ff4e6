"""`python -m apb.frequency build model=NAME output=FILE size=N data=PATH[,PATH...] [more]`
`python -m apb.frequency show model=NAME path=FILE`

Ranks a model's tokens by how often they occur and keeps the first N, all stop tokens included: the
list to which FR-Spec trims a drafter's head. FILE ends in .safetensors, or in .pt for the list of
ids alone that SGLang's --speculative-token-map reads.

data=PATH,...         text files, folders of them, .jsonl; each may be gzipped (.gz)
generations=PATH,...  answers of the model itself, which predict its drafts best: .json or .jsonl
                      with lists under `token_ids`, such as output=result.json of apb.run
field=NAME            of the records in a .jsonl of data, text or token ids (text)
max_tokens=N          stop when so many are counted, of generations and of data each

Where both are given, a token's shares of either are added, however much there is of each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from apb.arguments import parse_words, paths_of, whole_number
from apb.config import compose_config
from apb.corpus import CorpusFile, Passage, find_records, find_texts
from apb.errors import ApbError, InputError
from apb.hf.model import load_config
from apb.hf.tokenizer import load_tokenizer, stop_ids, vocabulary_hash
from apb.prompts.encode import checked_ids
from apb.speculate.vocabulary import DraftVocabulary, checked_path

_GENERATED = "token_ids"
_BATCH_CHARS = 2**20
"""Tokenised at once."""
_SHOWN = 16


class Options(NamedTuple):
    """What to count and where to write the list."""

    output: Path
    size: int
    data: tuple[str, ...] = ()
    generations: tuple[str, ...] = ()
    field: str = "text"
    max_tokens: int | None = None


class Target(NamedTuple):
    """The model whose ids are ranked."""

    name: str
    tokenizer: Any
    vocab_size: int
    """The ids below it are both the tokenizer's and the LM head's."""
    stop_ids: frozenset[int]


class TokenCounter:
    """Counts the token ids of passages, up to a number of tokens.

    Control tokens that a text spells out are counted as text.
    """

    def __init__(self, target: Target, *, max_tokens: int | None = None) -> None:
        self._tokenizer, self._left = target.tokenizer, max_tokens
        self._counts_V = torch.zeros(target.vocab_size, dtype=torch.int64)
        self._texts: list[str] = []
        self._chars = 0

    @property
    def is_full(self) -> bool:
        return self._left == 0

    def add(self, passage: Passage) -> None:
        """Raises InputError for lists that hold something else than ids of the model."""
        if isinstance(passage.content, str):
            self._texts.append(passage.content)
            self._chars += len(passage.content)
            if self._chars >= _BATCH_CHARS:
                self._tokenise()
            return
        name = f"record {passage.where}"
        self._count(checked_ids(passage.content, vocab_size=len(self._counts_V), name=name))

    def counts_V(self) -> torch.Tensor:
        """Of everything that was added."""
        self._tokenise()
        return self._counts_V

    def _tokenise(self) -> None:
        if not self._texts:
            return
        encoded = self._tokenizer(
            self._texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        self._texts, self._chars = [], 0
        self._count(list(chain.from_iterable(encoded["input_ids"])))

    def _count(self, ids: list[int]) -> None:
        if self._left is not None:
            ids = ids[: self._left]
            self._left -= len(ids)
        vocab_size = len(self._counts_V)
        found_V = torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size)
        # A tokenizer may have ids beyond the head's, which the model can neither read nor write.
        self._counts_V += found_V[:vocab_size]


def build(options: Options, target: Target) -> tuple[DraftVocabulary, list[str]]:
    """Count, rank and write; returns the list, and what the user should know about it.

    Raises:
        InputError: nothing to count, or the size or a file does not fit.
    """
    sources = [
        find_records(options.generations, field=_GENERATED, setting="generations"),
        find_texts(options.data, field=options.field, setting="data"),
    ]
    if not len(target.stop_ids) <= options.size <= target.vocab_size:
        raise InputError(
            f"size={options.size} must lie between {max(1, len(target.stop_ids))}, which holds the "
            f"stop tokens, and {target.vocab_size}, the vocabulary of {target.name}"
        )
    counters = [TokenCounter(target, max_tokens=options.max_tokens) for _ in sources]
    left_out = sum(map(_count_files, counters, sources))
    counts = [counter.counts_V() for counter in counters]
    counts_V = torch.stack(counts).sum(dim=0)
    if not counts_V.any():
        raise InputError("there are no tokens in the files given: give others as data=")
    vocabulary = DraftVocabulary.ranked(
        counts_V,
        options.size,
        # Answers are few beside texts and tell more: both weigh the same.
        weights_V=torch.stack([own_V.double() / own_V.sum().clamp(min=1) for own_V in counts]).sum(
            dim=0
        ),
        stop_ids=target.stop_ids,
        tokenizer_hash=vocabulary_hash(target.tokenizer),
        corpus=", ".join([*options.generations, *options.data]),
    )
    vocabulary.write(options.output)
    return vocabulary, _notes(vocabulary, target, left_out)


def _count_files(counter: TokenCounter, files: Sequence[CorpusFile]) -> int:
    """Returns the number of lines that were left out."""
    left_out = 0
    total = sum(file.num_bytes for file in files)
    # None lets tqdm stay silent where stderr is no terminal.
    with tqdm(
        total=total, desc="counting", unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for passage in chain.from_iterable(file.passages() for file in files):
            counter.add(passage)
            left_out += passage.left_out
            bar.update(passage.num_bytes)
            if counter.is_full:
                break
    return left_out


def _notes(vocabulary: DraftVocabulary, target: Target, left_out: int) -> list[str]:
    notes = []
    unseen = set(vocabulary.token_ids_C[vocabulary.counts_C == 0].tolist())
    if filling := unseen - target.stop_ids:
        notes.append(
            f"the corpus has only {len(vocabulary) - len(unseen)} distinct tokens, so "
            f"{len(filling)} others with the lowest ids fill the list"
        )
    if left_out:
        notes.append(f"{left_out} lines that are not UTF-8 were left out")
    return notes


def show(path: str, target: Target) -> list[str]:
    """Lines of plain text about a list.

    Raises:
        InputError: it cannot be read, or has ids that the model does not.
    """
    vocabulary = DraftVocabulary.read(path, vocab_size=target.vocab_size)
    hashes = {None: "not recorded", vocabulary_hash(target.tokenizer): f"that of {target.name}"}
    missing = target.stop_ids.difference(vocabulary.token_ids_C.tolist())
    first = vocabulary.token_ids_C[:_SHOWN].tolist()
    return [
        f"token ids      {len(vocabulary)} of {target.vocab_size}",
        f"corpus         {vocabulary.corpus or 'not recorded'}",
        f"coverage       {_coverage(vocabulary)}",
        f"tokenizer      {hashes.get(vocabulary.tokenizer_hash, f'not that of {target.name}')}",
        f"stop tokens    {f'not listed: {sorted(missing)}' if missing else 'all listed'}",
        f"most frequent  {' '.join(repr(target.tokenizer.decode([i])) for i in first)}",
    ]


def _coverage(vocabulary: DraftVocabulary) -> str:
    if vocabulary.coverage is None:
        return "not recorded"
    return f"{vocabulary.coverage:.2%} of {vocabulary.corpus_tokens} tokens"


def load_target(overrides: Sequence[str]) -> Target:
    """The tokenizer and stop tokens of the model that `overrides` name; no weights are read.

    Raises:
        InputError: no such model.
    """
    config = compose_config(overrides).model
    hf_config, tokenizer = load_config(config), load_tokenizer(config)
    vocab_size = min(hf_config.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    ends = stop_ids(config, hf_config, tokenizer)
    return Target(config.name, tokenizer, vocab_size, ends.intersection(range(vocab_size)))


def build_options(values: dict[str, str]) -> Options:
    """Raises InputError for what is missing, is no number or cannot be written."""
    for key in ("output", "size"):
        if key not in values:
            raise InputError(f"{key}= is needed: see `python -m apb.frequency --help`")
    data, generations = (paths_of(values.get(key, "")) for key in ("data", "generations"))
    if not data and not generations:
        raise InputError("data= or generations= is needed: files or folders to count tokens in")
    limit = values.get("max_tokens")
    return Options(
        output=checked_path(values["output"], to_write=True),
        size=whole_number("size", values["size"]),
        data=data,
        generations=generations,
        field=values.get("field", "text"),
        max_tokens=None if limit is None else whole_number("max_tokens", limit),
    )


def _lines(arguments: Sequence[str]) -> list[str]:
    """What the command has to say."""
    if not arguments or arguments[0] not in ("build", "show"):
        raise InputError("say `build` or `show` first: see `python -m apb.frequency --help`")
    if arguments[0] == "show":
        values, overrides = parse_words(arguments[1:], ("path",))
        if "path" not in values:
            raise InputError("path= is needed: the list to show")
        return show(values["path"], load_target(overrides))
    values, overrides = parse_words(arguments[1:], Options._fields)
    options = build_options(values)
    vocabulary, notes = build(options, load_target(overrides))
    line = f"{options.output}: {len(vocabulary)} ids cover {_coverage(vocabulary)}"
    return [line, *(f"note: {note}" for note in notes)]


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)  # noqa: T201
        return 0
    try:
        print("\n".join(_lines(arguments)))  # noqa: T201
    except ApbError as error:
        print(f"apb.frequency: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
