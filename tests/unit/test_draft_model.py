"""Guarantees of draft models: exact reading in a window, the trees they stand for, drawn chains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.attention.sdpa import SdpaConfig
from apb.comm import Communicator
from apb.engine import Engine
from apb.errors import InputError
from apb.generation import generate
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.hf.draft_model import HfDraftModel
from apb.hf.target import HfTarget
from apb.methods.full import FullConfig
from apb.metrics import Timeline
from apb.prompts.base import PromptTokens
from apb.sampling import Sampler, SamplingParams, filtered_probs
from apb.speculate.base import MAX_NODES, Drafter, DraftModel, DraftRequest
from apb.speculate.control import ControllerKind
from apb.speculate.draft_model import DraftModelConfig
from apb.speculate.draft_reader import DraftReader
from apb.speculate.speculator import Speculator
from apb.speculate.tree import DraftTree, TreeBuilder
from models import (
    VOCAB,
    apb_model,
    draft_target,
    hf_logits,
    hf_model,
    random_ids,
)
from plans import make_plan

CPU = torch.device("cpu")
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, top_k=9, seed=5)
TOLERANCE = 1e-4


class Target(HfTarget):
    """The tiny target; the tiny models are found by name as its draft models."""

    def __init__(self) -> None:
        super().__init__(apb_model("llama"), byte_tokenizer(), frozenset({257}))

    def load_draft_model(self, name: str, **sizes: int) -> HfDraftModel:
        return HfDraftModel(apb_model(name), **sizes)


TARGET = Target()


class Log:
    """Passes everything on to a draft model, and remembers how many rows each pass had."""

    def __init__(self, model: DraftModel) -> None:
        self._model, self.passes = model, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def read(self, token_ids: Sequence[int], *rest: Any) -> Tensor:
        self.passes.append(len(token_ids))
        return self._model.read(token_ids, *rest)


def make_reader(name: str, *, sinks: int = 2, window: int = 12) -> DraftReader:
    model = TARGET.load_draft_model(name, sinks=sinks, window=window, spare=DraftReader.SPARE)
    return DraftReader(model, sinks=sinks, window=window)


def last_logits(name: str, reader: DraftReader) -> Tensor:
    return apb_model(name).logits(reader.read_root()[1])[0]


@torch.inference_mode()
def windowed_logits(
    name: str, text: Sequence[int], prompt_len: int, *, sinks: int, window: int
) -> Tensor:
    """The same as a dense mask over a plain forward pass, for the rows behind a prompt."""
    passed_over = range(sinks, max(sinks, prompt_len - window))
    places_T = torch.tensor([place for place in range(len(text)) if place not in passed_over])
    index_T = torch.arange(len(places_T))
    seen_TT = (index_T < sinks) | (index_T[:, None] - index_T <= window)
    seen_TT &= index_T <= index_T[:, None]
    logits_BTV: Tensor = hf_model(name)(
        input_ids=torch.tensor(text)[places_T][None],
        position_ids=places_T[None],
        attention_mask=seen_TT[None, None],
    ).logits
    return logits_BTV[0, prompt_len - len(text) :]


@pytest.mark.parametrize(
    ("name", "prompt_len", "sinks"),
    [
        *(("llama", prompt_len, 2) for prompt_len in (1, 2, 13, 14, 15, 40)),
        ("llama", 1, 0),
        ("qwen2", 40, 0),
        ("qwen3", 14, 2),
    ],
)
def test_each_token_sees_the_first_ones_and_the_window_before_it(
    name: str, prompt_len: int, sinks: int
) -> None:
    """One token at a time, far enough that the window comes round more than twice."""
    window = 12
    text = random_ids(prompt_len + 30, seed=prompt_len)
    reader = make_reader(name, sinks=sinks, window=window)
    reader.begin(text[:prompt_len])
    found = []
    for token_id in text[prompt_len:]:
        reader.advance([token_id])
        found.append(last_logits(name, reader))
    expected = windowed_logits(name, text, prompt_len, sinks=sinks, window=window)
    assert float((torch.stack(found) - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("count", [1, 5, MAX_NODES, MAX_NODES + 3, 150])
def test_tokens_that_came_at_once_see_each_other(count: int) -> None:
    text = random_ids(30 + count, seed=count)
    reader = make_reader("llama", window=200)
    reader.begin(text[:30])
    reader.advance(text[30:])
    difference = last_logits("llama", reader) - hf_logits("llama", text)[-1]
    assert float(difference.abs().max()) < TOLERANCE


def test_a_text_that_goes_on_beyond_the_window_is_passed_over_but_for_its_end() -> None:
    text = random_ids(150, seed=0)
    reader, fresh = make_reader("llama"), make_reader("llama")
    reader.begin(text[:30])
    reader.advance(text[30:])
    fresh.begin(text[:-1])
    fresh.advance(text[-1:])
    assert torch.equal(last_logits("llama", reader), last_logits("llama", fresh))


def build(prompt_ids: Sequence[int], params: SamplingParams = GREEDY, **settings: Any) -> Drafter:
    """A drafter that has seen the prompt but its last token, and then that one."""
    drafter = DraftModelConfig(**{"model": "qwen2", **settings}).build_drafter(TARGET)
    drafter.begin(DraftRequest(prompt_ids[:-1], params))
    drafter.observe(prompt_ids[-1:], None)
    return drafter


def drafted(drafter: Drafter, root: int, max_nodes: int) -> DraftTree:
    builder = TreeBuilder(root, max_nodes=max_nodes)
    drafter.extend_tree(builder, source=1)
    return builder.build()


Chain = tuple[int, ...]


def spelled(tree: DraftTree) -> list[Chain]:
    """The tokens from the root, which is left out, to every other node."""
    paths: list[Chain] = [()]
    for parent, token_id in itertools.islice(zip(tree.parents, tree.tokens, strict=True), 1, None):
        paths.append((*paths[parent], token_id))
    return paths[1:]


def likeliest(
    text: Sequence[int], *, depth: int, topk: int, allowed: Sequence[int] = range(VOCAB)
) -> dict[Chain, float]:
    """All paths that EAGLE-2 considers, best first, each by whole forward passes."""
    allowed_C = torch.tensor(allowed)
    considered: dict[Chain, float] = {}
    beam: dict[Chain, float] = {(): 0.0}
    for _ in range(depth):
        level = {}
        for path, score in beam.items():
            gains_C = hf_logits("qwen2", [*text, *path])[-1, allowed_C].log_softmax(-1)
            for gain, index in zip(*gains_C.topk(topk), strict=True):
                level[*path, int(allowed_C[index])] = score + float(gain)
        considered |= level
        beam = dict(sorted(level.items(), key=lambda item: -item[1])[:topk])
    return dict(sorted(considered.items(), key=lambda item: -item[1]))


@pytest.mark.parametrize(("depth", "topk", "max_nodes"), [(3, 3, 10), (4, 2, 64), (3, 1, 5)])
def test_trees_are_those_of_whole_forward_passes_whatever_was_accepted(
    depth: int, topk: int, max_nodes: int
) -> None:
    """Step after step over branches that were read, were not, or were never thought of."""
    choose = torch.Generator().manual_seed(depth)
    text = list(random_ids(20, seed=1))
    drafter = build(text, depth=depth, topk=topk)
    for step in range(9):
        tree = drafted(drafter, text[-1], max_nodes)
        expected = likeliest(text, depth=depth, topk=topk)
        assert spelled(tree) == list(expected)[: max_nodes - 1]
        path = list(expected)[int(torch.randint(len(expected), (1,), generator=choose))]
        accepted = path[: step % (depth + 1)]
        # The target's own token may be one that was considered, and read.
        own = () if step % 2 and accepted else random_ids(1, seed=step)
        new_ids = [*accepted, *own]
        drafter.observe(new_ids, None)
        text += new_ids


def test_what_was_read_of_an_accepted_draft_is_not_read_again() -> None:
    model = Log(TARGET.load_draft_model("qwen2", sinks=0, window=99, spare=99))
    reader = DraftReader(model, sinks=0, window=99)
    reader.begin([1, 2, 3])
    reader.advance([4])
    root, _ = reader.read_root()
    rows, _ = reader.read([5, 6], [root, root])
    reader.read([7, 8], rows)
    reader.advance([6, 8, 9, 10])
    reader.read_root()
    assert model.passes == [3, 1, 2, 2, 2]


@pytest.mark.parametrize("budget", [2, 4, 11])
def test_a_smaller_tree_is_the_beginning_of_a_larger_one(budget: int) -> None:
    text = random_ids(20, seed=2)
    largest = spelled(drafted(build(text), text[-1], MAX_NODES))
    assert spelled(drafted(build(text), text[-1], budget)) == largest[: budget - 1]


def test_nodes_of_other_drafters_are_shared() -> None:
    text = random_ids(20, seed=2)
    best = list(likeliest(text, depth=4, topk=4))
    builder = TreeBuilder(text[-1], max_nodes=8)
    builder.add_path(best[0], source=7)
    builder.add(0, 259, source=7)
    build(text).extend_tree(builder, source=1)
    assert set(spelled(builder.build())) == {(259,), *best[:6]}


def write_list(folder: Path, ids: Sequence[int]) -> str:
    path = folder / "frequent.pt"
    torch.save(list(ids), path)
    return str(path)


@pytest.mark.parametrize("document_ids", [True, False])
def test_a_trimmed_head_scores_listed_tokens_and_those_of_the_prompt(
    tmp_path: Path, document_ids: bool
) -> None:
    listed = random_ids(40, seed=8)
    text = random_ids(20, seed=3)
    drafter = build(text, vocabulary=write_list(tmp_path, listed), document_ids=document_ids)
    allowed = sorted({*listed, 257, *(text[:-1] if document_ids else ())})
    expected = likeliest(text, depth=4, topk=4, allowed=allowed)
    assert spelled(drafted(drafter, text[-1], MAX_NODES)) == list(expected)


def test_a_list_of_all_tokens_changes_nothing(tmp_path: Path) -> None:
    text = random_ids(20, seed=3)
    whole = build(text, vocabulary=write_list(tmp_path, range(VOCAB)))
    assert drafted(whole, text[-1], 32) == drafted(build(text), text[-1], 32)


def test_a_list_is_cut_to_its_most_frequent_tokens(tmp_path: Path) -> None:
    text = random_ids(20, seed=3)
    drafter = build(
        text,
        vocabulary=write_list(tmp_path, [9, 8, 7, 6, 5]),
        vocabulary_size=3,
        document_ids=False,
    )
    tokens = set(drafted(drafter, text[-1], MAX_NODES).tokens[1:])
    assert tokens == {9, 8, 257}


def proposals(drafter: Drafter, root: int, max_nodes: int = 9) -> DraftTree:
    tree = drafted(drafter, root, max_nodes)
    assert tree.is_chain
    return tree


@pytest.mark.parametrize(("trimmed", "max_nodes", "depth"), [(False, 9, 4), (True, 4, 3)])
def test_drawn_tokens_come_with_the_distribution_that_they_are_of(
    tmp_path: Path, trimmed: bool, max_nodes: int, depth: int
) -> None:
    """The model's, of the trimmed head, as the request warps it; and none is left out."""
    listed = random_ids(60, seed=8)
    vocabulary = {"vocabulary": write_list(tmp_path, listed)} if trimmed else {}
    text = list(random_ids(20, seed=4))
    drafter = build(text, SAMPLED, stochastic=True, **vocabulary)
    allowed_C = torch.tensor(sorted({*listed, *text[:-1], 257}) if trimmed else range(VOCAB))
    tree = proposals(drafter, text[-1], max_nodes)
    assert len(tree) == 1 + depth
    for node in range(depth):
        proposal = tree.proposals[node]
        assert proposal.drawn == (tree.tokens[node + 1],)
        logits_C = hf_logits("qwen2", [*text, *tree.tokens[1 : node + 1]])[-1, allowed_C]
        expected_V = torch.zeros(VOCAB).index_add_(0, allowed_C, filtered_probs(logits_C, SAMPLED))
        assert float((proposal.dense(VOCAB) - expected_V).abs().max()) < TOLERANCE
        assert expected_V[proposal.drawn[0]] > 0.0


def test_draws_follow_the_distribution() -> None:
    """Pearson's test: the statistic of 8 degrees of freedom is above 31.8 once in 10 000 times."""
    text = list(random_ids(20, seed=4))
    drafter = build(text, SAMPLED, stochastic=True, depth=1)
    trees = [proposals(drafter, text[-1]) for _ in range(300)]
    counts_V = torch.bincount(torch.tensor([tree.tokens[1] for tree in trees]), minlength=VOCAB)
    expected_V = 300 * trees[0].proposals[0].dense(VOCAB)
    possible = expected_V > 0
    assert int(possible.sum()) <= 9
    assert int(counts_V[~possible].sum()) == 0
    assert float(((counts_V - expected_V) ** 2 / expected_V)[possible].sum()) < 31.8
    flat_V = torch.full_like(expected_V, 300 / int(possible.sum()))
    assert float(((counts_V - flat_V) ** 2 / flat_V)[possible].sum()) > 31.8


def test_a_seed_gives_the_same_drafts_and_no_other_random_numbers_are_touched() -> None:
    text = list(random_ids(20, seed=4))
    before = torch.get_rng_state()
    trees = [proposals(build(text, SAMPLED, stochastic=True), text[-1]) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert trees[0] == trees[1]
    other = SamplingParams(temperature=0.8, seed=6)
    assert proposals(build(text, other, stochastic=True), text[-1]) != trees[0]


def test_drafts_are_not_drawn_with_the_numbers_that_test_them() -> None:
    """Else a draft would know the target's choice, and answers would be biased."""
    text = list(random_ids(20, seed=4))
    same = []
    for seed in range(8):
        params = SamplingParams(temperature=1.0, seed=seed)
        tree = proposals(build(text, params, stochastic=True), text[-1])
        same.append(Sampler(params).draw(tree.proposals[0].probs_C.clone()) == tree.tokens[1])
    assert not all(same)


def test_a_greedy_request_gets_the_likeliest_drafts_and_no_drawn_ones() -> None:
    text = random_ids(20, seed=4)
    tree = drafted(build(text, GREEDY, stochastic=True), text[-1], 32)
    assert tree == drafted(build(text), text[-1], 32)
    assert not tree.proposals


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target itself, as a checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    hf_model("llama").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(("depth", "topk"), [(4, 1), (1, 3)])
def test_the_target_as_its_own_draft_model_is_accepted_whole(
    folder: Path, depth: int, topk: int
) -> None:
    rounds = 6
    params = SamplingParams(max_tokens=1 + rounds * (depth + 1))
    config = DraftModelConfig(
        model=str(folder), depth=depth, topk=topk, controller=ControllerKind.fixed
    )
    prompt = PromptTokens((), random_ids(40, seed=5), random_ids(6, seed=6))
    model = apb_model("llama")
    engine = Engine(
        model=model,
        method=FullConfig().build(seed=0),
        backend=SdpaConfig().build(model.attention_target),
        comm=Communicator(0, 1, CPU),
    )
    plan = make_plan(FullConfig(), prompt, world_size=1, shape=model.shape)
    engine.prefill(prompt, plan, room=len(prompt.query_ids) + params.max_tokens)
    speculator = Speculator(config, draft_target("llama"))
    speculator.begin([*prompt.context_ids, *prompt.query_ids], params)
    speculator.wait()
    steps = generate(
        engine,
        prompt.query_ids,
        params,
        timeline=Timeline(CPU),
        is_last=lambda _: False,
        speculator=speculator,
        max_nodes=config.max_nodes,
    )
    assert len(list(steps)) == params.max_tokens
    assert speculator.stats.steps == rounds
    assert speculator.stats.acceptance_length == depth + 1


def test_models_of_the_configuration_are_found_and_ids_beyond_the_target_are_not_drafted() -> None:
    """`tiny` has 384 rows for the 260 tokens of the same tokenizer."""
    before = torch.get_rng_state()
    drafter = DraftModelConfig(model="tiny", topk=260, depth=1).build_drafter(draft_target("llama"))
    drafter.begin(DraftRequest([1, 2], GREEDY))
    drafter.observe([3], None)
    tokens = drafted(drafter, 3, 999).tokens[1:]
    assert sorted(tokens) == list(range(VOCAB))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_token_that_the_draft_model_lacks_does_not_reach_the_device() -> None:
    with pytest.raises(ValueError, match="no token 260"):
        build([1, 260, 2])


def test_another_tokenizer_is_refused_with_both_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path)
    own = draft_target("llama").tokenizer_hash[:12]
    config = DraftModelConfig(model=str(tmp_path))
    with pytest.raises(InputError, match=rf"{tmp_path}: .*(vocabulary .*, the target's {own})"):
        config.build_drafter(draft_target("llama"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs drafter.model"),
        ({"model": "nowhere"}, r"drafter.model=nowhere: .*set drafter\.model to a folder"),
        ({"model": "tiny", "depth": 0}, "drafter.depth=0 must be at least 1"),
        ({"model": "tiny", "topk": 0}, "drafter.topk=0 must be at least 1"),
        ({"model": "tiny", "sinks": -1}, "drafter.sinks=-1 must be at least 0"),
        ({"model": "tiny", "window": 0}, "drafter.window=0 must be at least 1"),
        ({"model": "tiny", "vocabulary_size": 9}, "drafter.vocabulary_size=9 cuts"),
        ({"model": "tiny", "vocabulary": "none.pt"}, "none.pt"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        DraftModelConfig(**settings).build_drafter(draft_target("llama"))
    assert "\n" not in str(error.value)
