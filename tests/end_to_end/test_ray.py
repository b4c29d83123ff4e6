"""`launcher=ray` on a cluster of this machine alone: what local ranks do, Ray ranks do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from apb import LLM, EngineDeadError, InputError, SamplingParams

ray = pytest.importorskip("ray", reason="needs ray")

ROOT = Path(__file__).parents[2]
DOCUMENT = "The mill stood by the river, and the miller kept bees. " * 40
QUESTION = "Who kept bees?"
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
SETTINGS = ["method.min_block_len=64", "method.layout=even"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two pretended GPUs: Ray counts them, ranks run on the CPU."""
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=80_000_000,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def llm(cluster: str) -> Iterator[LLM]:
    with LLM("tiny", launcher="ray", world_size=2, overrides=SETTINGS) as ranks:
        yield ranks


def free(resource: str) -> float:
    return float(ray.available_resources().get(resource, 0))


def wait_until_free(resource: str, amount: float) -> None:
    give_up = time.monotonic() + 30
    while free(resource) < amount:
        assert time.monotonic() < give_up
        time.sleep(0.1)


def actors() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "RankActor" in child.name()]


def test_ray_ranks_answer_what_local_ranks_answer(llm: LLM) -> None:
    ours = llm.ask(DOCUMENT, QUESTION, PARAMS)
    with LLM("tiny", launcher="local", world_size=2, overrides=SETTINGS) as local:
        theirs = local.ask(DOCUMENT, QUESTION, PARAMS)
        assert llm.logprobs(DOCUMENT, "The miller.") == local.logprobs(DOCUMENT, "The miller.")
    assert ours.token_ids == theirs.token_ids
    assert ours.metrics.layout == theirs.metrics.layout
    assert len(ours.metrics.layout) == 2
    assert "".join(llm.stream(DOCUMENT, QUESTION, PARAMS)) == ours.text


def test_a_closed_stream_and_a_bad_request_leave_the_ranks_ready(llm: LLM) -> None:
    expected = llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids
    stream = llm.stream(DOCUMENT, QUESTION, SamplingParams(max_tokens=30_000, ignore_eos=True))
    next(stream)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 5
    with pytest.raises(InputError, match="document is empty"):
        llm.ask("", QUESTION)
    assert llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids == expected


def test_ranks_listen_on_the_nodes_ray_address_alone(llm: LLM) -> None:
    found = [
        connection.laddr.ip
        for rank in actors()
        for connection in rank.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    ours = [address for address in found if address != "::"]  # where Ray's own port is
    assert len(ours) >= 3  # the store and a gloo port per rank
    assert set(ours) == {ray.util.get_node_ip_address()}


def test_a_second_job_on_the_same_gpus_is_told_what_is_free(llm: LLM) -> None:
    with pytest.raises(InputError) as caught:
        LLM("tiny", launcher="ray", world_size=1, overrides=["launcher.placement_timeout_s=1"])
    assert "1 GPU (the cluster has 2, 0 free)" in str(caught.value)
    assert "let the job that holds them end" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_ranks_than_gpus_are_told_how_many_there_are(cluster: str) -> None:
    with pytest.raises(InputError, match=r"3 GPU \(the cluster has 2, \d free\)"):
        LLM("tiny", launcher="ray", world_size=3, overrides=["launcher.placement_timeout_s=1"])


@pytest.fixture
def other_node(cluster: str, tmp_path: Path) -> Iterator[None]:
    """A second node of the cluster, where another release of transformers is installed."""
    (tmp_path / "transformers-1.0.dist-info").mkdir()
    (tmp_path / "transformers-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 1.0\n"
    )
    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={cluster}", "--block"]
    options = ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000"]
    node = subprocess.Popen(
        [*command, *options, '--resources={"other": 1}'],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until_free("other", 1)
    yield
    node.terminate()
    node.wait(30)


@pytest.mark.usefixtures("other_node")
def test_a_node_with_other_versions_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"^node [\d.]+ has transformers 1\.0 and this process"):
        LLM("tiny", launcher="ray", device="cpu", overrides=["+launcher.resources.other=1"])
    wait_until_free("other", 1)


def test_a_model_that_is_not_there_leaves_nothing_behind(cluster: str) -> None:
    before = free("CPU")
    with pytest.raises(InputError, match="is not on this machine"):
        LLM("nowhere", launcher="ray", device="cpu", world_size=1)
    wait_until_free("CPU", before)


def test_a_lost_gang_is_replaced_and_leaves_nothing(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that dies unasked costs no request; one that hangs is named, with its stack."""
    before, already = free("CPU"), set(actors())
    monkeypatch.setenv("APB_FAULTS", "rank=1,stage=prefill,layer=1,kind=hang,request=3,gang=1")
    settings = ["supervision.layer_s=2", "method.min_block_len=64"]
    with LLM("tiny", launcher="ray", device="cpu", world_size=2, overrides=settings) as ranks:
        expected = ranks.ask(DOCUMENT, QUESTION, PARAMS).token_ids
        first = set(actors()) - already
        next(iter(first)).send_signal(signal.SIGKILL)
        assert ranks.ask(DOCUMENT, QUESTION, PARAMS).token_ids == expected
        begin = time.monotonic()
        with pytest.raises(EngineDeadError) as caught:
            ranks.ask(DOCUMENT, QUESTION, PARAMS)
        assert time.monotonic() - begin < 2 + 5
        failure = caught.value.failure
        assert failure is not None
        assert (failure.rank, failure.host) == (1, ray.util.get_node_ip_address())
        assert failure.place == "prefill, layer 1"
        assert "more than supervision.layer_s=2 allows" in failure.reason
        assert "apb/faults.py" in failure.stack
    wait_until_free("CPU", before)
    give_up = time.monotonic() + 10
    while set(actors()) - already:
        assert time.monotonic() < give_up
        time.sleep(0.1)


def test_a_killed_driver_leaves_no_ranks(cluster: str, tmp_path: Path) -> None:
    before = free("CPU")
    command = [sys.executable, "-m", "apb.run", "+model=tiny", "launcher=ray", "device=cpu"]
    settings = [f"launcher.address={cluster}", "decode.max_tokens=60000", "decode.ignore_eos=true"]
    driver = subprocess.Popen([*command, *settings], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 60
        while free("CPU") >= before:
            assert time.monotonic() < give_up
            assert driver.poll() is None
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    wait_until_free("CPU", before)


def test_a_ray_job_answers_a_dataset_that_ray_data_reads(cluster: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: list[dict[str, Any]] = [
        {"id": "a", "document": DOCUMENT, "question": QUESTION},
        {"id": "b", "document": " ", "question": QUESTION},
        {"id": "c", "document": DOCUMENT, "question": "Where?"},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "in.parquet")
    command = [sys.executable, str(ROOT / "launch/ray_job.py"), "+model=tiny", "device=cpu"]
    settings = [f"input=local://{tmp_path}/in.parquet", "output=out.jsonl", "decode.max_tokens=3"]
    done = subprocess.run(
        [*command, *settings, f"launcher.address={cluster}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert [line["error"] for line in lines][::2] == [None, None]
    assert "document is empty" in lines[1]["error"]


def test_no_cluster_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "apb.run", "+model=tiny", "launcher=ray"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, "launcher.address=127.0.0.1:1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert "apb: no Ray cluster at launcher.address=127.0.0.1:1: start one" in done.stderr
