"""How an EAGLE head is run where its tensors leave it open, and who decided that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from apb.errors import InputError
from apb.rotary import Rotary
from apb.speculate.eagle_layouts import HeadFiles

_LAYERS = "eagle_aux_hidden_state_layer_ids"

T = TypeVar("T")


class RopeSource(Enum):
    """Whose rotary embedding a head uses."""

    own = "own"
    target = "target"


class Origin(Enum):
    """Who decided an option."""

    setting = "setting"
    checkpoint = "checkpoint"
    default = "default"


class Option(NamedTuple, Generic[T]):
    """What holds, and who decided it."""

    value: T
    origin: Origin

    @classmethod
    def of(cls, setting: T | None, checkpoint: T | None, default: T) -> Option[T]:
        if setting is not None:
            return cls(setting, Origin.setting)
        if checkpoint is not None:
            return cls(checkpoint, Origin.checkpoint)
        return cls(default, Origin.default)


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How a head is run where its tensors do not say, and how that was decided.

    A wrong option costs acceptance and nothing else shows it.

    Attributes:
        rope: EAGLE-1/2 take the target's, as FR-Spec does; EAGLE-3 its own.
        entering: layers of the target whose incoming states are read; none for EAGLE-1/2.
        norm_before_residual: of EAGLE-3, the residual stream starts from the normed state.
        norm_output: of EAGLE-3.1, the state fed back is the one after the final norm.
    """

    rope: Option[RopeSource]
    entering: Option[tuple[int, ...]]
    norm_before_residual: Option[bool]
    norm_output: Option[bool]

    def __str__(self) -> str:
        options = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(
            f"{name}={getattr(option.value, 'value', option.value)} ({option.origin.value})"
            for name, option in options
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """What the user decides; None leaves it to the checkpoint."""

    rope: RopeSource | None = None
    entering: tuple[int, ...] | None = None
    norm_before_residual: bool | None = None
    norm_output: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What a head has to fit."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    rotary: Rotary
    tokenizer_hash: str | None = None


def chosen_options(
    files: HeadFiles, target: TargetFacts, settings: HeadSettings, num_states: int
) -> HeadOptions:
    """The user's word, else the checkpoint's, else what the head's makers take for granted.

    `num_states` is how many states of the target an EAGLE-3 head reads; 0 is EAGLE-1/2.

    Raises:
        InputError: the layers to read do not fit the head or the target.
    """
    config = files.config
    residual, output = config.get("norm_before_residual"), config.get("norm_output")
    if files.is_from_specforge:
        # There the setting says that the LM head reads normed states, which it always does;
        # training feeds back the states before the norm.
        output = None
    return HeadOptions(
        rope=Option.of(settings.rope, None, RopeSource.own if num_states else RopeSource.target),
        entering=_entering(files, target, settings, num_states),
        norm_before_residual=Option.of(settings.norm_before_residual, residual, False),
        norm_output=Option.of(settings.norm_output, output, False),
    )


def _entering(
    files: HeadFiles, target: TargetFacts, settings: HeadSettings, num_states: int
) -> Option[tuple[int, ...]]:
    """The list at the top level names layers that states enter (EAGLE, vLLM, speculators), that in
    ``eagle_config`` layers that they leave (SpecForge, NVIDIA, SGLang).
    """
    if not num_states:
        return Option((), Origin.default)
    num_layers, nested = target.num_layers, files.config.get("eagle_config") or {}
    listed: Sequence[int] | None = files.config.get(_LAYERS)
    if listed is None and nested.get(_LAYERS) is not None:
        listed = [layer + 1 for layer in nested[_LAYERS]]
    option = Option.of(
        settings.entering,
        None if listed is None else tuple(listed),
        (2, num_layers // 2, num_layers - 3),
    )
    layers = option.value
    in_order = list(layers) == sorted(set(layers)) and all(0 <= i < num_layers for i in layers)
    if not in_order or len(layers) != num_states:
        raise InputError(
            f"{files.folder} reads the states that enter {num_states} of {num_layers} layers, and "
            f"the {option.origin.value} says {list(layers)}: set drafter.entering to the right "
            "layers, in ascending order"
        )
    return option
