"""`python -m apb.train eagle`: from a command line to a head in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from apb.arguments import parse_words, paths_of, whole_number
from apb.config import RunConfig, compose_config
from apb.corpus import find_records, find_texts
from apb.errors import InputError
from apb.hf.model import CausalLM, choose_dtype, load_config
from apb.hf.target import HfTarget
from apb.hf.tokenizer import load_tokenizer, stop_ids, vocabulary_hash
from apb.speculate.eagle_head import Eagle2Head, HeadShape
from apb.speculate.vocabulary import DraftVocabulary
from apb.train.eagle import EagleTrainer, HeldOut, Recipe, Teacher
from apb.train.export import head_config, write_head
from apb.train.features import FeatureFolder, FeatureSpec, compute_features
from apb.train.lessons import answered_lessons, make_lessons
from apb.worker import choose_device

_DEPTH = 4
"""Steps of drafting in the figures."""
_MAX_TOKENS = 2048
"""Of a prompt with its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to train on and where to write."""

    output: Path
    work: Path
    data: tuple[str, ...] = ()
    generations: tuple[str, ...] = ()
    text_field: str = "text"
    vocabulary: str | None = None
    lessons: int = 1600
    length: int = 256
    intermediate_size: int | None = None
    recipe: Recipe = field(default_factory=Recipe)

    @classmethod
    def of(cls, values: dict[str, str]) -> Options:
        """Raises InputError for what is missing or no number."""
        if not {"data", "generations"} & values.keys() or "output" not in values:
            raise InputError(
                "output= and data= or generations= are needed: see `python -m apb.train --help`"
            )
        recipe_keys = {item.name for item in fields(Recipe)}
        numbers = {
            key: whole_number(key, value, least=0 if key == "seed" else 1)
            for key, value in values.items()
            if key in _NUMBERS
        }
        recipe: dict[str, Any] = {key: numbers.pop(key) for key in recipe_keys & set(numbers)}
        output = Path(values["output"]).expanduser()
        return cls(
            data=paths_of(values.get("data", "")),
            generations=paths_of(values.get("generations", "")),
            output=output,
            work=Path(values.get("work", output / "work")).expanduser(),
            text_field=values.get("field", "text"),
            vocabulary=values.get("vocabulary"),
            recipe=Recipe(**recipe),
            **numbers,
        )


_NUMBERS = (
    "lessons",
    "length",
    "steps",
    "batch",
    "unroll",
    "held_out",
    "seed",
    "intermediate_size",
)
_WORDS = ("data", "generations", "output", "work", "field", "vocabulary")


def train_eagle(config: RunConfig, options: Options, command: str) -> list[str]:
    """Compute features, train and write the head; returns what to say of it.

    Raises:
        InputError: nothing to read, or files of other settings in the way.
    """
    files = find_texts(options.data, field=options.text_field, setting="data")
    answered = find_records(options.generations, field="token_ids", setting="generations")
    tokenizer = load_tokenizer(config.model)
    hf_config = load_config(config.model)
    vocabulary = None
    if options.vocabulary is not None:
        vocabulary = DraftVocabulary.read(
            options.vocabulary,
            vocab_size=hf_config.vocab_size,
            tokenizer_hash=vocabulary_hash(tokenizer),
        )
    device = choose_device(config.device, 0)
    dtype = choose_dtype(config.dtype, device)
    model = CausalLM.load(config.model, dtype=dtype, device=device)
    target = HfTarget(model, tokenizer, stop_ids(config.model, hf_config, tokenizer))
    features = FeatureFolder(
        options.work,
        FeatureSpec(
            model=config.model.name,
            tokenizer_hash=target.tokenizer_hash,
            data=options.data,
            generations=options.generations,
            lessons=options.lessons,
            length=options.length,
            hidden_size=hf_config.hidden_size,
            seed=options.recipe.seed,
        ),
    )
    template = config.model.prompt_settings
    lessons = chain(
        answered_lessons(answered, vocab_size=hf_config.vocab_size, max_tokens=_MAX_TOKENS),
        make_lessons(files, tokenizer, template, length=options.length, seed=options.recipe.seed),
    )
    compute_features(features, model, config.backend.build(model.attention_target), lessons)
    exported = head_config(
        hf_config,
        intermediate_size=options.intermediate_size or hf_config.intermediate_size,
        tokenizer_hash=target.tokenizer_hash,
    )
    trainer = _trainer(options, target, exported, features, vocabulary)
    trainer.train()
    held_out = trainer.held_out(target.head().float(), _DEPTH)
    card = _card(config.model.name, options, command, trainer.seconds, held_out)
    write_head(options.output, trainer.head, exported, card, dtype=torch.bfloat16)
    return [f"{options.output}: {_figures(held_out)}"]


def _trainer(
    options: Options,
    target: HfTarget,
    settings: Mapping[str, Any],
    features: FeatureFolder,
    vocabulary: DraftVocabulary | None,
) -> EagleTrainer:
    """`settings` are the head's configuration."""
    torch.manual_seed(options.recipe.seed)
    head = new_head(target, settings)
    ids_C = torch.arange(settings["vocab_size"]) if vocabulary is None else vocabulary.token_ids_C
    teacher = Teacher.of(target.embedding(), target.head(), ids_C)
    return EagleTrainer(head, teacher, features, options.recipe, options.work)


def new_head(target: HfTarget, settings: Mapping[str, Any]) -> Eagle2Head:
    """A head of that configuration as it is before training, on the target's device."""
    shape = HeadShape(
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        state_sizes=(settings["hidden_size"],),
        norm_eps=settings["rms_norm_eps"],
    )
    head = Eagle2Head(shape, target.rotary).to(target.device)
    with torch.no_grad():
        # It begins as the state that it is given, from which the next one is not far.
        head.fc.weight[:, shape.hidden_size :].diagonal().add_(1.0)
    return head


def _figures(held_out: HeldOut) -> str:
    shares = ", ".join(f"{share:.3f}" for share in held_out.agreement)
    return (
        f"held-out agreement by depth {shares}; a chain of {len(held_out.agreement)} would yield "
        f"{held_out.acceptance_length:.2f} tokens a step"
    )


def _card(model: str, options: Options, command: str, seconds: float, held_out: HeldOut) -> str:
    recipe = options.recipe
    lines = [
        f"# EAGLE-2 head for {model}",
        "",
        f"* command: `{command}`",
        f"* data: {options.lessons} lessons of up to {options.length} tokens, from generations="
        f"{', '.join(options.generations) or 'none'} (the model's own answers) and data="
        f"{', '.join(options.data) or 'none'} (prose, continuations and quotes)",
        f"* recipe: {recipe}",
        f"* training took {seconds / 60:.0f} minutes on {torch.get_num_threads()} threads, "
        "features not included",
        f"* {recipe.held_out} held-out lessons: {_figures(held_out)}",
        "",
    ]
    return "\n".join(lines)


def run(arguments: Sequence[str], command: str) -> list[str]:
    """Train as `arguments` say; returns what to say of it. Raises ApbError."""
    values, overrides = parse_words(
        arguments, (*_WORDS, *_NUMBERS), settings=("model", "device", "dtype", "backend")
    )
    options = Options.of(values)
    return train_eagle(compose_config(overrides), options, command)
