"""Guarantees of the configuration: every plug-in can be named, and mistakes are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from apb.compress.expected_attention import ExpectedAttentionConfig
from apb.compress.window import WindowConfig
from apb.config import RunConfig, compose_config, model_names
from apb.errors import InputError
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig
from apb.methods.auto import AutoConfig
from apb.methods.placement import Placement
from apb.methods.plan import AnchorForm
from apb.methods.star import StarConfig
from apb.methods.wire import WireFormat
from apb.paths import config_dir
from apb.plugins import PLUGINS
from apb.prompts.base import PromptTokens
from plans import make_plan

MODEL = "model=tiny"


def test_every_plugin_has_a_file_and_every_file_a_plugin() -> None:
    for group, plugins in PLUGINS.items():
        files = {path.stem for path in (config_dir() / group).glob("*.yaml")}
        assert files == set(plugins), group


def test_every_group_of_files_is_known() -> None:
    groups = {str(path.parent.relative_to(config_dir())) for path in config_dir().rglob("*/*.yaml")}
    assert groups == {*PLUGINS, "model"}


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, plugins in PLUGINS.items() for name in plugins]
)
def test_every_plugin_can_be_chosen(group: str, name: str) -> None:
    config: object = compose_config([MODEL, f"{group}={name}"])
    for part in group.split("/"):
        config = getattr(config, part)
    assert type(config) is PLUGINS[group][name]


@pytest.mark.parametrize("name", model_names())
def test_every_model_file_is_valid(name: str) -> None:
    assert compose_config([f"model={name}"]).model.name == name


def test_model_with_and_without_plus_mean_the_same() -> None:
    assert compose_config(["+model=tiny"]) == compose_config(["model=tiny"])


def test_overrides_reach_the_dataclasses() -> None:
    config = compose_config(
        [
            *(MODEL, "method/compressor=window", "method.compressor.window=7"),
            *("method.anchor=replicated", "method.anchor_len=48", "method.passing_len=0.5"),
            *("num_blocks=6", "dtype=float32", "decode.temperature=0.5", 'decode.stop=["\\n"]'),
        ]
    )
    assert isinstance(config, RunConfig)
    assert config.method == ApbConfig(
        compressor=WindowConfig(window=7),
        anchor=AnchorForm.replicated,
        anchor_len=48,
        passing_len=0.5,
    )
    assert isinstance(config.method.anchor_len, int)
    assert isinstance(config.method.passing_len, float)
    assert (config.num_blocks, config.dtype) == (6, "float32")
    assert config.decode.sampling_params(seed=4).temperature == 0.5


def test_settings_of_layout_wire_and_placement_reach_the_dataclasses() -> None:
    config = compose_config(
        [
            *(MODEL, "method=auto", "method.layout=zigzag", "method.wire=int8"),
            *("method.overlap=false", "method.anchor_len=48"),
            *("decode.placement=rank0", "runtime.chunk_len=7"),
        ]
    )
    assert config.method == AutoConfig(
        compressor=ExpectedAttentionConfig(),
        layout=LayoutPolicy.zigzag,
        wire=WireFormat.int8,
        overlap=False,
        anchor_len=48,
    )
    assert config.decode.placement is Placement.rank0
    assert config.runtime.chunk_len == 7
    assert compose_config([MODEL, "method=star", "method.layout=balanced"]).method == StarConfig(
        layout=LayoutPolicy.balanced
    )


def test_blocks_that_zigzag_cannot_deal_are_refused_with_the_nearest_number() -> None:
    config = compose_config([MODEL, "method=zigzag", "num_blocks=3"])
    prompt = PromptTokens((), tuple(range(100)), ())
    for world_size in (1, 2, 3):
        nearest = {1: 4, 2: 4, 3: 6}[world_size]
        refusal = f"num_blocks=3 .* nearest number that can is {nearest}$"
        with pytest.raises(InputError, match=refusal):
            make_plan(config.method, prompt, world_size=world_size, num_blocks=config.num_blocks)
        make_plan(config.method, prompt, world_size=world_size, num_blocks=nearest)


def test_whole_share_stays_a_share() -> None:
    """1.0 is the whole block and 1 is one token."""
    config = compose_config([MODEL, "method.passing_len=1.0", "method.anchor_len=1"]).method
    assert isinstance(config, ApbConfig)
    assert (type(config.passing_len), type(config.anchor_len)) == (float, int)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "model"),
        (["model=nowhere"], "nowhere"),
        ([MODEL, "bogus=1"], "bogus"),
        ([MODEL, "method.bogus=1"], "bogus"),
        ([MODEL, "+method.bogus=1"], "bogus"),
        ([MODEL, "+bogus=1"], "bogus"),
        ([MODEL, "method=bogus"], "bogus"),
        ([MODEL, "method=full", "method.anchor_len=3"], "anchor_len"),
        ([MODEL, "num_blocks=many"], "many"),
        ([MODEL, "method.anchor_len=long"], "long"),
        ([MODEL, "method.anchor=both"], "both"),
        ([MODEL, "decode.stop=3"], "stop"),
        ([MODEL, "num_blocks=0"], "num_blocks=0 must be at least 1"),
        ([MODEL, "world_size=0"], "world_size=0 must be at least 1"),
        ([MODEL, "dtype=int3"], "dtype=int3 must be one of"),
        ([MODEL, "device=tpu"], "device=tpu must be one of"),
        (
            [MODEL, "launcher=slurm"],
            "launcher=slurm does not exist: choose one of auto, local, ray",
        ),
        ([MODEL, "decode.top_p=0"], "top_p"),
        ([MODEL, "decode.max_tokens=0"], "max_tokens"),
        ([MODEL, "method.passing_len=1.5"], "passing_len=1.5"),
        ([MODEL, "method.anchor_len=-1"], "anchor_len=-1"),
        ([MODEL, "method.min_block_len=0"], "min_block_len=0"),
        ([MODEL, "method/compressor=window", "method.compressor.kernel=4"], "kernel=4"),
        ([MODEL, "runtime.chunk_len=0"], "runtime.chunk_len=0 must be at least 1"),
        ([MODEL, "method.layout=odd"], "odd"),
        ([MODEL, "method.wire=int4"], "int4"),
        ([MODEL, "decode.placement=rank1"], "rank1"),
        *(
            ([MODEL, f"method={name}", "method.layout=zigzag"], "layout")
            for name in ("full", "ring", "zigzag", "ulysses")
        ),
        ([MODEL, "num_blocks"], "num_blocks"),
        ([MODEL, "=3"], "override"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused_in_one_line_that_names_them(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError) as error:
        compose_config(overrides)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert "full_key" not in message
    assert "Traceback" not in message


def test_missing_model_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"\+model=NAME .*tiny"):
        compose_config([])


def test_composing_inside_a_hydra_application_leaves_it_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("answer: 42\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        assert compose_config([MODEL]).model.name == "tiny"
        with pytest.raises(InputError):
            compose_config([MODEL, "bogus=1"])
        assert GlobalHydra.instance().hydra is theirs
        assert compose("theirs").answer == 42
    assert not GlobalHydra.instance().is_initialized()
    assert compose_config([MODEL]).model.name == "tiny"
    assert not GlobalHydra.instance().is_initialized()
