"""`python -m apb.train retaining_heads`: from a command line to heads in a folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from apb.arguments import parse_words, paths_of, whole_number
from apb.compress.base import Compressor, CompressorConfig, CompressorTarget
from apb.compress.knorm import KnormConfig
from apb.compress.query import QueryConfig
from apb.compress.random import RandomConfig
from apb.compress.retaining_file import FILE_NAME, RetainingHeads
from apb.compress.retaining_head import RetainingHeadConfig, activation
from apb.compress.window import WindowConfig
from apb.config import RunConfig, compose_config
from apb.corpus import find_files
from apb.errors import InputError
from apb.hf.compressor_target import compressor_target
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.tokenizer import load_tokenizer
from apb.train.pairs import Reader, Reading, collect
from apb.train.reading_pass import ReadingPass
from apb.train.recall import Recall, RecallMeter
from apb.train.retaining import HeadRecipe, HeadTrainer
from apb.train.retaining_labels import SHARE, Objective
from apb.worker import choose_device

T = TypeVar("T")
_HEADS = "retaining_head"
_RECIPE_KEYS = ("steps", "updates", "hidden", "warm_up", "seed")
_NUMBERS = (*_RECIPE_KEYS, "length", "held_out")
_WORDS = ("data", "output", "work", "field", "query_aware", "loss", "learning_rate")
_SWITCH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to train on and where to write."""

    data: tuple[str, ...]
    output: Path
    work: Path
    text_field: str = "text"
    length: int = 10240
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
    """Train, compare and write heads; returns what to say of them.

    Raises:
        InputError: nothing to learn from, or files of other settings in the way.
    """
    files = find_files(options.data, field=options.text_field, setting="data")
    device = choose_device(config.device, 0)
    hf_config = load_config(config.model)
    dtype = choose_dtype(config.dtype, device)
    target = compressor_target(config.model, hf_config, device=device, dtype=dtype)
    target.require_whole_rotary(_HEADS)
    activation(target.hidden_act)
    _check_length(options, hf_config.max_position_embeddings)
    template = {"template": config.model.template, "user_template": config.model.user_template}
    reader = Reader(
        load_tokenizer(config.model),
        template,
        length=options.length,
        query_aware=options.query_aware,
    )
    readings = collect(
        files,
        reader,
        needed=options.recipe.num_readings + options.held_out,
        seed=options.recipe.seed,
    )
    if len(readings) <= options.held_out:
        raise InputError(
            f"data= gives {len(readings)} usable pairs, which leave none beside "
            f"held_out={options.held_out}: give more data or hold out fewer"
        )
    model = CausalLM.load(config.model, dtype=dtype, device=device)
    reading_pass = ReadingPass(model, config.backend.build(model.attention_target))
    trainer = HeadTrainer(
        reading_pass,
        target,
        readings[options.held_out :],
        options.recipe,
        work=options.work,
        identity=_identity(config, readings),
    )
    trainer.train()
    heads = trainer.heads(torch.bfloat16)
    recalls = _compare(reading_pass, target, heads, readings[: options.held_out])
    options.output.mkdir(parents=True, exist_ok=True)
    heads.write(options.output / FILE_NAME)
    card = _card(config.model.name, options, command, trainer, readings, recalls)
    (options.output / "README.md").write_text(card)
    return [f"{options.output}: {_figures(recalls)}"]


def _check_length(options: Options, max_positions: int) -> None:
    if options.length > max_positions:
        raise InputError(
            f"length={options.length} exceeds the {max_positions} tokens that the model reads: "
            "lower length"
        )


def _identity(config: RunConfig, readings: Sequence[Reading]) -> str:
    """Of the model and of every token that is learnt from."""
    digest = hashlib.sha256(config.model.name.encode())
    for reading in readings:
        digest.update(reading.ids_T.numpy().data)
        digest.update(repr(reading[1:]).encode())
    return digest.hexdigest()


def _compare(
    reading_pass: ReadingPass,
    target: CompressorTarget,
    heads: RetainingHeads,
    readings: Sequence[Reading],
) -> dict[str, Recall]:
    """The trained heads and the compressors that need no training, on documents not learnt from."""
    compressors: dict[str, Compressor] = {}
    for kernel in (5, 1):
        trained = RetainingHeadConfig(kernel=kernel).build(seed=0)
        trained.use(heads, target)
        compressors[_HEADS + _pooling(kernel)] = trained
    others: tuple[tuple[str, CompressorConfig], ...] = (
        *(("query" + _pooling(kernel), QueryConfig(kernel=kernel)) for kernel in (5, 1)),
        *(("window" + _pooling(kernel), WindowConfig(kernel=kernel)) for kernel in (5, 1)),
        ("knorm", KnormConfig()),
        ("random", RandomConfig()),
    )
    for name, other in others:
        compressors[name] = other.build(seed=0)
        compressors[name].attach(target)
    meter = RecallMeter(compressors)
    for reading in readings:
        reading_pass.run(reading, meter.observe)
    return meter.recalls()


def _pooling(kernel: int) -> str:
    return "" if kernel > 1 else f", kernel={kernel}"


def _figures(recalls: Mapping[str, Recall]) -> str:
    means = ", ".join(f"{name} {recall.mean:.3f}" for name, recall in recalls.items())
    return f"held-out recall of the top 1/{SHARE} of tokens, mean over layers: {means}"


def _card(
    model: str,
    options: Options,
    command: str,
    trainer: HeadTrainer,
    readings: Sequence[Reading],
    recalls: Mapping[str, Recall],
) -> str:
    num_tokens = sum(len(reading.ids_T) for reading in readings)
    order = "question, document, question, answer"
    lines = [
        f"# Retaining heads for {model}",
        "",
        f"* command: `{command}`",
        f"* data: {', '.join(options.data)}; {len(readings)} pairs, {num_tokens} tokens, at most "
        f"{options.length} each, read as {order if options.query_aware else order[10:]}",
        f"* recipe: {options.recipe}",
        f"* training took {trainer.seconds / 60:.0f} minutes on {torch.get_num_threads()} threads",
        f"* {options.held_out} held-out pairs: share of the 1/{SHARE} of a document's tokens with "
        "the highest labels that is among the same number of kept ones, per layer and KV head",
        "",
        "| compressor | mean recall | " + " | ".join(map(str, _layers(recalls))) + " |",
        "|---|---|" + "---|" * len(_layers(recalls)),
    ]
    for name, recall in recalls.items():
        cells = " | ".join(f"{share:.2f}" for share in recall.per_layer)
        lines.append(f"| `{name}` | {recall.mean:.3f} +- {recall.error:.3f} | {cells} |")
    return "\n".join([*lines, ""])


def _layers(recalls: Mapping[str, Recall]) -> range:
    return range(len(recalls[_HEADS].per_layer))


def run(arguments: Sequence[str], command: str) -> list[str]:
    """Train as `arguments` say; returns what to say of it. Raises ApbError."""
    values, overrides = parse_words(
        arguments, (*_WORDS, *_NUMBERS), settings=("model", "device", "backend", "dtype")
    )
    options = Options.of(values)
    return train_heads(compose_config(overrides), options, command)
