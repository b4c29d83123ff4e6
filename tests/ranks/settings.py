"""Every method with what it can be told, for suites that hold all of them to the same guarantees.

A new method joins by a line in `SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import NamedTuple

from apb.compress.base import CompressorConfig
from apb.compress.expected_attention import ExpectedAttentionConfig
from apb.compress.fusion import FusionConfig
from apb.compress.keydiff import KeydiffConfig
from apb.compress.knorm import KnormConfig
from apb.compress.lag_kv import LagKvConfig
from apb.compress.query import QueryConfig
from apb.compress.table import COMPRESSORS
from apb.compress.tova import TovaConfig
from apb.compress.window import WindowConfig
from apb.config import plugin_name
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig, Length
from apb.methods.base import MethodConfig
from apb.methods.full import FullConfig
from apb.methods.placement import Placement
from apb.methods.plan import AnchorForm, PrefillPlan
from apb.methods.ring import RingConfig
from apb.methods.star import StarConfig
from apb.methods.ulysses import UlyssesConfig
from apb.methods.zigzag import ZigzagConfig
from apb.prompts.base import PromptTokens
from models import NAMES, random_ids
from ranks.cases import make_prompt
from ranks.oracle import Statement
from ranks.programs import Case

PLACEMENTS = (Placement.sharded, Placement.rank0)
EXACT_LENGTHS = (1, 2, 3, 5, 17, 64, 101, 200)
WINDOWS = {"query": QueryConfig, "window": WindowConfig}


SCORES = (
    ExpectedAttentionConfig(future=7, sinks=2, rows=9),
    KeydiffConfig(),
    TovaConfig(),
    LagKvConfig(lag=4),
    # Reciprocal ranks tie easily, and rounding decides; with these hardly ever.
    FusionConfig(members=["tova", "keydiff"], weights=[1.0, 1.618], constant=9.3),
)
CHOICES = [(policy, form) for policy in LayoutPolicy for form in AnchorForm][1:]
"""Of layouts and anchors for them."""


class Setting(NamedTuple):
    """A method under one layout policy and one form of the anchor."""

    name: str
    make: Callable[[Random, int], MethodConfig]
    """A config with random details, given the length of the shortest block."""
    exact: bool
    num_blocks: Callable[[int, int], int | None]
    """What to ask for, given a wish and the number of ranks; None where there is no choice."""
    lengths: Sequence[int] = EXACT_LENGTHS
    """Of the contexts that exact settings are tried on."""
    draws: int = 3
    """How many random prompts approximate settings are tried on, per model."""


def no_choice(wish: int, world_size: int) -> None:
    return None


def any_number(wish: int, world_size: int) -> int:
    return max(wish, world_size)


def in_pairs(wish: int, world_size: int) -> int:
    pairs = 2 * world_size
    return -(-wish // pairs) * pairs


def blocks_of(policy: LayoutPolicy) -> Callable[[int, int], int]:
    return in_pairs if policy is LayoutPolicy.zigzag else any_number


def apb(
    compressor: CompressorConfig,
    policy: LayoutPolicy,
    form: AnchorForm,
    *,
    anchor_len: Length,
    passing_len: Length,
    overlap: bool = True,
    layer_budgets: str = "uniform",
) -> ApbConfig:
    return ApbConfig(
        compressor=compressor,
        layout=policy,
        anchor=form,
        anchor_len=anchor_len,
        passing_len=passing_len,
        layer_budgets=layer_budgets,
        overlap=overlap,
        min_block_len=1,
    )


def some_apb(policy: LayoutPolicy, form: AnchorForm) -> Setting:
    def make(rng: Random, block_len: int) -> ApbConfig:
        window, kernel = rng.choice((1, 4, 64)), rng.choice((1, 3, 5))
        compressors: tuple[CompressorConfig, ...] = (
            QueryConfig(window=window, kernel=kernel),
            WindowConfig(window=window, kernel=kernel),
            KnormConfig(),
        )
        return apb(
            rng.choice(compressors),
            policy,
            form,
            anchor_len=rng.randint(0, block_len),
            passing_len=rng.randint(0, block_len) // rng.choice((1, 2, 4)),
            overlap=rng.choice((True, False)),
        )

    return Setting(f"apb-{policy.name}-{form.name}", make, False, blocks_of(policy))


def apb_by_layer(policy: LayoutPolicy, form: AnchorForm) -> Setting:
    """Layers pass on as unlike parts of a block as they can."""

    def make(rng: Random, block_len: int) -> ApbConfig:
        return apb(
            rng.choice((WindowConfig(window=4), QueryConfig(window=4))),
            policy,
            form,
            anchor_len=rng.randint(0, block_len),
            passing_len=rng.randint(0, block_len) // rng.choice((1, 2, 4)),
            overlap=rng.choice((True, False)),
            layer_budgets="pyramid",
        )

    return Setting(f"apb_by_layer-{policy.name}-{form.name}", make, False, blocks_of(policy))


def apb_by_score(compressor: CompressorConfig, policy: LayoutPolicy, form: AnchorForm) -> Setting:
    """Scored otherwise than by observed rows or norms."""

    def make(rng: Random, block_len: int) -> ApbConfig:
        # Two keys are equally far from their mean, so that rounding would decide between them.
        some = rng.randint(3, max(3, block_len // 3))
        return apb(
            compressor,
            policy,
            form,
            anchor_len=rng.randint(0, block_len),
            passing_len=0 if block_len < 3 else some,
        )

    name = f"apb_by_{plugin_name('method/compressor', compressor)}-{policy.name}-{form.name}"
    return Setting(name, make, False, blocks_of(policy))


def apb_passing_all(policy: LayoutPolicy, form: AnchorForm) -> Setting:
    """Exact where there is no query to splice in (E3)."""

    def make(rng: Random, block_len: int) -> ApbConfig:
        without_weights = [name for name in COMPRESSORS if name != "retaining_head"]
        compressor = COMPRESSORS[rng.choice(without_weights)]()
        share = rng.choice((0.0, 0.25, 0.5, 1.0))
        return apb(compressor, policy, form, anchor_len=share, passing_len=1.0)

    name = f"apb_passing_all-{policy.name}-{form.name}"
    lengths = EXACT_LENGTHS[form is AnchorForm.shared :: 2]  # each on one of the forms
    return Setting(name, make, True, blocks_of(policy), lengths=lengths)


def some_star(policy: LayoutPolicy, form: AnchorForm) -> Setting:
    def make(rng: Random, block_len: int) -> StarConfig:
        overlap = rng.choice((True, False))
        return StarConfig(layout=policy, anchor=form, overlap=overlap, min_block_len=1)

    name = f"star-{policy.name}-{form.name}"
    return Setting(name, make, False, blocks_of(policy), draws=2)


SETTINGS: list[Setting] = [
    Setting("full", lambda *_: FullConfig(), True, no_choice),
    Setting("ring", lambda *_: RingConfig(), True, any_number),
    Setting("zigzag", lambda *_: ZigzagConfig(), True, in_pairs),
    Setting("ulysses", lambda *_: UlyssesConfig(), True, no_choice),
    *(
        apb_by_score(compressor, *choice)
        for compressor, choice in zip(SCORES, CHOICES, strict=True)
    ),
    apb_by_layer(LayoutPolicy.balanced, AnchorForm.shared),
    apb_by_layer(LayoutPolicy.zigzag, AnchorForm.replicated),
    *(
        of(policy, form)
        for of in (some_apb, some_star, apb_passing_all)
        for policy in LayoutPolicy
        for form in AnchorForm
    ),
]


def exact_cases(setting: Setting, model: str, world_size: int) -> list[Case]:
    """Every length, with one block per rank and with more, on both placements in turn."""
    rng = Random(f"{setting.name} {model}")
    cases = []
    for index, context_len in enumerate(setting.lengths):
        num_blocks = setting.num_blocks(rng.randint(4, 9), world_size)
        length = context_len // min(num_blocks or world_size, context_len)
        cases.append(
            Case(
                model=model,
                method=setting.make(rng, length),
                prompt=make_prompt(context_len, prefix_len=index % 2),
                new_ids=random_ids(1 + context_len % 9, seed=7),
                num_blocks=num_blocks if rng.random() < 0.7 else None,
                placement=PLACEMENTS[(index + world_size) % 2],
            )
        )
    return cases


def drawn_case(setting: Setting, model: str, world_size: int, seed: int) -> Case:
    """Random settings that depend on the number of ranks only where the layout policy does."""
    rng = Random(f"{setting.name} {model} {seed}")
    wish = rng.randint(4, 9)
    num_blocks = setting.num_blocks(wish, world_size)
    assert num_blocks is not None
    context_len = rng.randint(*rng.choice(((1, 3), (wish, 40), (60, 140), (60, 140))))
    prefix_len = rng.choice((0, 0, 1, 4, context_len - 1))
    context = random_ids(context_len, seed=seed)
    query = random_ids(rng.choice((0, 1, 3, 8, 8, 40)), seed=100 + seed)
    return Case(
        model=model,
        prompt=PromptTokens(context[:prefix_len], context[prefix_len:], query),
        new_ids=random_ids(rng.randint(1, 6), seed=200 + seed),
        num_blocks=num_blocks,
        placement=PLACEMENTS[(seed + world_size) % 2],
        method=setting.make(rng, context_len // min(num_blocks, context_len)),
    )


def cases_of(setting: Setting, model: str, world_size: int) -> list[Case]:
    if setting.exact:
        return exact_cases(setting, model, world_size)
    return [drawn_case(setting, model, world_size, seed) for seed in range(setting.draws)]


def one_case_each(world_size: int) -> list[Case]:
    """A case of every setting, with several blocks and six new tokens."""
    return [
        Case(
            model=NAMES[index % len(NAMES)],
            method=setting.make(Random(setting.name), 10),
            prompt=make_prompt(83, prefix_len=4, query_len=0 if setting.exact else 7),
            new_ids=random_ids(6, seed=5),
            num_blocks=setting.num_blocks(5, world_size),
        )
        for index, setting in enumerate(SETTINGS)
    ]


def statement_of(case: Case, plan: PrefillPlan) -> Statement:
    """What an approximate method has to compute for the blocks that the plan chose."""
    method, prompt = case.method, case.prompt
    assert isinstance(method, ApbConfig | StarConfig)
    statement = Statement(
        model=case.model,
        context=prompt.context_ids,
        prefix_len=len(prompt.prefix_ids),
        query=prompt.query_ids,
        block_lens=tuple(map(len, plan.layout.blocks)),
        anchor_len=0,
        passing_len=0,
        layer_passing_lens=plan.layer_passing_lens,
        shared=method.anchor is AnchorForm.shared,
        new_ids=case.new_ids,
        star=isinstance(method, StarConfig),
    )
    if isinstance(method, StarConfig):
        return statement
    assert isinstance(method.anchor_len, int)
    assert isinstance(method.passing_len, int)
    lengths = replace(statement, anchor_len=method.anchor_len, passing_len=method.passing_len)
    for name, config in WINDOWS.items():
        if isinstance(method.compressor, config):
            window, kernel = method.compressor.window, method.compressor.kernel
            return replace(lengths, compressor=name, window=window, kernel=kernel)
    if isinstance(method.compressor, KnormConfig):
        return replace(lengths, compressor="knorm")
    name = plugin_name("method/compressor", method.compressor)
    details = {k: v for k, v in asdict(method.compressor).items() if k != "covariance"}
    frozen = ((k, tuple(v) if isinstance(v, list) else v) for k, v in details.items())
    return replace(lengths, compressor=name, details=tuple(frozen))
