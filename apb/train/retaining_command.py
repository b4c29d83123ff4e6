"""`python -m apb.train retaining_heads`: from a command line to heads in a folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from apb.arguments import parse_words, paths_of, whole_number
from apb.compress.retaining_file import FILE_NAME
from apb.compress.retaining_head import activation
from apb.config import RunConfig, compose_config
from apb.corpus import find_files
from apb.errors import InputError
from apb.hf.compressor_target import compressor_target
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.tokenizer import load_tokenizer
from apb.train.pairs import MIN_DOCUMENT, Reader, Reading, collect
from apb.train.reading_pass import ReadingPass
from apb.train.recall import HEADS, compare, figures, recall_card
from apb.train.retaining import HeadRecipe, HeadTrainer
from apb.train.retaining_labels import Objective
from apb.worker import choose_device

T = TypeVar("T")
_RECIPE_KEYS = ("steps", "updates", "hidden", "warm_up", "seed")
_NUMBERS = (*_RECIPE_KEYS, "length", "held_out")
_WORDS = ("data", "output", "work", "field", "query_aware", "loss", "learning_rate")
_LENGTH = 10240
"""Tokens of a reading (Locret), where the model reads so many."""
_SWITCH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to train on and where to write."""

    data: tuple[str, ...]
    output: Path
    work: Path
    text_field: str = "text"
    length: int | None = None
    held_out: int = 32
    query_aware: bool = True
    recipe: HeadRecipe = field(default_factory=HeadRecipe)

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Options:
        """Raises InputError for what is missing or not of its kind."""
        if "data" not in values or "output" not in values:
            raise InputError("data= and output= are needed: see `python -m apb.train --help`")
        numbers = {
            key: whole_number(key, value, least=0 if key in ("seed", "warm_up") else 1)
            for key, value in values.items()
            if key in _NUMBERS
        }
        recipe = {key: numbers.pop(key) for key in _RECIPE_KEYS if key in numbers}
        if recipe.get("updates", 1) > MIN_DOCUMENT // 2:
            raise InputError(
                f"updates={recipe['updates']} exceeds {MIN_DOCUMENT // 2}: a document may have "
                f"only {MIN_DOCUMENT} tokens, and a step needs two; lower updates"
            )
        output = Path(values["output"]).expanduser()
        return cls(
            data=paths_of(values["data"]),
            output=output,
            work=Path(values.get("work", output / "work")).expanduser(),
            text_field=values.get("field", "text"),
            query_aware=_choice(values, "query_aware", _SWITCH, "true"),
            recipe=HeadRecipe(
                **recipe,
                loss=_choice(values, "loss", {item.value: item for item in Objective}, "locret"),
                learning_rate=_learning_rate(values),
            ),
            **numbers,
        )


def _choice(values: Mapping[str, str], key: str, choices: Mapping[str, T], default: str) -> T:
    value = values.get(key, default)
    if value not in choices:
        raise InputError(f"{key}={value} must be one of {', '.join(choices)}")
    return choices[value]


def _learning_rate(values: Mapping[str, str]) -> float:
    given = values.get("learning_rate", str(HeadRecipe().learning_rate))
    try:
        rate = float(given)
    except ValueError:
        rate = math.nan
    if not 0.0 < rate <= 1.0:
        raise InputError(f"learning_rate={given} must be a number above 0 and at most 1")
    return rate


def train_heads(config: RunConfig, options: Options, command: str) -> list[str]:
    """Train, write and compare heads; returns what to say of them.

    Raises:
        InputError: nothing to learn from, or files of other settings in the way.
    """
    device = choose_device(config.device, 0)
    hf_config = load_config(config.model)
    dtype = choose_dtype(config.dtype, device)
    target = compressor_target(config.model, hf_config, device=device, dtype=dtype)
    target.require_whole_rotary(HEADS)
    activation(target.hidden_act)
    readings = _readings(config, options, hf_config.max_position_embeddings)
    held_out, learnt = readings[: options.held_out], readings[options.held_out :]
    model = CausalLM.load(config.model, dtype=dtype, device=device)
    reading_pass = ReadingPass(model, config.backend.build(model.attention_target))
    identity = _identity(config, readings)
    trainer = HeadTrainer(
        reading_pass, target, learnt, options.recipe, work=options.work, identity=identity
    )
    trainer.train()
    heads = replace(trainer.heads(torch.bfloat16), note=command)
    options.output.mkdir(parents=True, exist_ok=True)
    heads.write(options.output / FILE_NAME)
    recalls = compare(reading_pass, target, heads, held_out)
    about = [
        f"command: `{command}`",
        f"data: {', '.join(options.data)}; {len(readings)} pairs, "
        f"{sum(len(reading.ids_T) for reading in readings)} tokens, the question "
        f"{'before and behind' if options.query_aware else 'behind'} the document",
        "recipe: AdamW, "
        + ", ".join(f"{key}={value}" for key, value in options.recipe.settings().items()),
        f"training took {trainer.seconds / 60:.0f} minutes on {torch.get_num_threads()} threads",
    ]
    card = recall_card(config.model.name, about, recalls, num_pairs=len(held_out))
    (options.output / "README.md").write_text(card)
    return [f"{options.output}: {figures(recalls)}"]


def _readings(config: RunConfig, options: Options, max_positions: int) -> list[Reading]:
    """Those that are held out, and those to learn from."""
    if options.length is not None and options.length > max_positions:
        raise InputError(
            f"length={options.length} exceeds the {max_positions} tokens that the model reads: "
            "lower length"
        )
    reader = Reader(
        load_tokenizer(config.model),
        config.model.prompt_settings,
        length=options.length or min(_LENGTH, max_positions),
        query_aware=options.query_aware,
    )
    readings = collect(
        find_files(options.data, field=options.text_field, setting="data"),
        reader,
        needed=options.recipe.num_readings + options.held_out,
        seed=options.recipe.seed,
    )
    if len(readings) <= options.held_out:
        raise InputError(
            f"data= gives {len(readings)} usable pairs, which leave none beside "
            f"held_out={options.held_out}: give more data or hold out fewer"
        )
    return readings


def _identity(config: RunConfig, readings: Sequence[Reading]) -> str:
    """Of the model and of every token that is learnt from."""
    digest = hashlib.sha256(config.model.name.encode())
    for reading in readings:
        digest.update(reading.ids_T.numpy().data)
        digest.update(repr(reading[1:]).encode())
    return digest.hexdigest()


def run(arguments: Sequence[str], command: str) -> list[str]:
    """Train as `arguments` say; returns what to say of it. Raises ApbError."""
    values, overrides = parse_words(
        arguments, (*_WORDS, *_NUMBERS), settings=("model", "device", "backend", "dtype")
    )
    options = Options.of(values)
    return train_heads(compose_config(overrides), options, command)
