"""The Ray launcher without a cluster: order of ranks, GPUs, environment, versions."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb import LLM
from apb.config import compose_config
from apb.errors import InputError
from apb.launcher_config import RayLauncherConfig
from apb.launchers.ray_rank import (
    Mailbox,
    gpu_index,
    installed_versions,
    interface_of,
    passed_on,
)

pytest.importorskip("ray", reason="needs ray")
from apb.launchers.ray_cluster import (
    Place,
    _connect,
    bundle,
    check_versions,
    in_rank_order,
    local_ranks,
)


@given(
    nodes=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), first=st.sampled_from("abcd")
)
def test_ranks_of_a_node_are_neighbours_and_the_drivers_node_has_rank_0(
    nodes: list[str], first: str
) -> None:
    found = [Place(idx, node, f"10.0.0.{ord(node)}") for idx, node in enumerate(nodes)]
    order = in_rank_order(found, first=first)
    assert sorted(order) == sorted(found)
    groups = [node for node, _ in itertools.groupby(place.node for place in order)]
    assert len(groups) == len(set(nodes))
    assert groups[0] == first or first not in nodes
    numbers = list(zip((place.node for place in order), local_ranks(order), strict=True))
    assert set(numbers) == {(node, idx) for node in nodes for idx in range(nodes.count(node))}


@pytest.mark.parametrize(
    ("assigned", "visible", "index"),
    [
        ("3", None, 3),
        ("3", "", 3),
        ("6", "4,5,6,7", 2),
        ("GPU-b", "GPU-a, GPU-b", 1),
    ],
)
def test_the_gpu_that_ray_assigns_is_found_among_all_that_the_node_shows(
    assigned: str, visible: str | None, index: int
) -> None:
    assert gpu_index(assigned, visible) == index


def test_only_listed_variables_reach_the_ranks() -> None:
    secret = dict.fromkeys(
        ["HF_TOKEN", "APB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PATH", "PYTHONPATH"], "x"
    )
    harmless = {"NCCL_DEBUG": "INFO", "HF_HOME": "/data", "APB_HOME": "/a", "OMP_NUM_THREADS": "4"}
    assert passed_on({**secret, **harmless}) == harmless
    assert passed_on({"MY_A": "1", "MY_B": "2", "YOUR": "3"}, ["MY_*"]) == {
        "MY_A": "1",
        "MY_B": "2",
    }
    # Ray decides which GPUs a node has; the driver's machine has no say.
    assert not passed_on({"CUDA_VISIBLE_DEVICES": "0"})


def test_a_node_with_other_versions_is_named() -> None:
    ours = installed_versions()
    assert ours.keys() == {"python", "apb", "torch", "transformers"}
    order = [Place(0, "a", "10.0.0.1"), Place(1, "b", "10.0.0.2")]
    check_versions(order, [ours, dict(ours)])
    with pytest.raises(InputError) as caught:
        check_versions(order, [ours, {**ours, "torch": "1.0"}])
    assert str(caught.value) == (
        f"node 10.0.0.2 has torch 1.0 and this process torch {ours['torch']}: "
        "install the same on every node"
    )
    with pytest.raises(InputError, match=r"10\.0\.0\.1 has transformers None"):
        check_versions(order, [{name: ours[name] for name in ours if name != "transformers"}, ours])


def test_a_rank_reserves_a_gpu_only_where_it_runs_on_one() -> None:
    config = RayLauncherConfig(cpus_per_rank=4, resources={"accelerator_type:H200": 0.1})
    on_cpu = {"CPU": 4, "accelerator_type:H200": 0.1}
    assert bundle(config, gpu=False) == on_cpu
    assert bundle(config, gpu=True) == {**on_cpu, "GPU": 1}


def test_a_cluster_that_asks_for_a_missing_token_is_bad_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray: Any = pytest.importorskip("ray")
    error = getattr(ray.exceptions, "AuthenticationError", None)
    if error is None:
        pytest.skip("this Ray knows no tokens")

    def init(**_: Any) -> None:
        raise error("Token authentication is enabled but no authentication token was found")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match=r"launcher\.address=local asks for a token"):
        _connect("local")


def test_the_loopback_address_is_the_loopback_interfaces() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_a_mailbox_hands_out_all_that_was_sent_in_order() -> None:
    box = Mailbox()
    assert not box.poll()
    box.post(b"request")
    assert box.poll()
    assert box.recv_bytes() == b"request"
    assert box.take(wait=False) == []
    box.send_bytes(b"1")
    box.send_bytes(b"2")
    assert box.take(wait=True) == [b"1", b"2"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("launcher.address=ray://head:10001", "ray job submit"),
        ("launcher.address=''", "launcher.address is empty"),
        ("launcher.placement_timeout_s=-1", "placement_timeout_s=-1"),
        ("launcher.cpus_per_rank=0", "cpus_per_rank=0 must be at least 1"),
        ("+launcher.resources.gold=0", "launcher.resources.gold=0"),
        ("launcher.strategy=CLOSE", "launcher.strategy"),
        ("launcher.adress=auto", "did you mean address"),
    ],
)
def test_wrong_settings_are_refused_before_ray_is_asked(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compose_config(["model=tiny", "launcher=ray", override])


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "ray" else real(name, *rest)

    monkeypatch.setattr("apb.launchers.opening.find_spec", find_spec)
    with pytest.raises(InputError, match=r"pip install 'apb\[ray\]'"):
        LLM("tiny", launcher="ray")
