"""How many ranks a start takes, and what is done while there is no room for them."""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster import capacity
from cluster.capacity import Node
from cluster.settings import SettingsError
from pipeline import crew, layout
from pipeline.crew import Crew, Recruiter, Terms
from tests.ray_head import started
from tests.running import REPOSITORY, environment, free_port

HEAD = Node("head", "head", 0, 0)


def nodes_with(count: int, cpus: float = 1, gpus: float = 0) -> list[Node]:
    return [Node(f"node{number}", f"host{number}", cpus, gpus) for number in range(count)]


def splits_4096(ranks: int) -> None:
    layout.check_batch(4096, None, ranks, False)


def never(seconds: float) -> None:
    raise AssertionError("it waits")


class Nodes:
    """What a cluster looks like to the recruiter, and what its autoscaler is asked."""

    def __init__(self) -> None:
        self.total: list[Node] = []
        self.free: list[Node] = []
        self.grows = False
        self.asked: list[list[dict[str, float]]] = []

    def are(self, total: list[Node], free: list[Node] | None = None) -> None:
        """From now on."""
        self.total, self.free = total, total if free is None else free

    def ask(self, bundles: list[dict[str, float]]) -> None:
        if self.asked[-1:] != [bundles]:
            self.asked.append(bundles)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """In place of a cluster."""
    seen = Nodes()
    monkeypatch.setattr(capacity, "total_nodes", lambda: seen.total)
    monkeypatch.setattr(capacity, "free_nodes", lambda: seen.free)
    monkeypatch.setattr(capacity, "answering", lambda some: some)
    monkeypatch.setattr(capacity, "grows", lambda: seen.grows)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", seen.ask)
    return seen


def test_places_that_do_not_split_the_batch_are_waited_on(nodes: Nodes) -> None:
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            nodes.are(nodes_with(8))

    recruiter = Recruiter(Terms((6, 8), 1, wait_s=60), splits_4096, pause)
    nodes.are(nodes_with(8))
    assert recruiter.recruit(first=True) == Crew(8, 1, False)
    assert not waits
    nodes.are(nodes_with(7))
    assert recruiter.recruit(first=False) == Crew(8, 1, False)
    assert len(waits) == 3


def test_they_are_refused_when_the_wait_is_over(nodes: Nodes) -> None:
    recruiter = Recruiter(Terms((6, 8), 1, wait_s=0.3), splits_4096, lambda seconds: time.sleep(0.05))
    nodes.are(nodes_with(7))
    began = time.monotonic()
    with pytest.raises(SettingsError, match=r"4096 does not split over 7 ranks: use run\.workers = .*8"):
        recruiter.recruit(first=False)
    assert time.monotonic() - began > 0.3
    nodes.are(nodes_with(5))
    with pytest.raises(SettingsError, match=r"run\.workers = 6 with 1 CPU\(s\) each do not fit"):
        recruiter.recruit(first=False)


def test_what_a_killed_driver_asked_an_autoscaler_for_is_taken_back(nodes: Nodes) -> None:
    nodes.grows = True
    nodes.are(nodes_with(8))
    recruiter = Recruiter(Terms((6, 8), 1, wait_s=60), splits_4096, never)
    assert recruiter.recruit(first=True) == Crew(8, 1, False)
    assert nodes.asked == []
    recruiter.close()
    assert nodes.asked == [[]]


def test_a_cluster_that_stays_as_it_is_is_not_waited_on(nodes: Nodes) -> None:
    recruiter = Recruiter(Terms((6, 8), 1, wait_s=60), splits_4096, never)
    nodes.are(nodes_with(7))
    with pytest.raises(SettingsError, match="does not split over 7 ranks"):
        recruiter.recruit(first=True)
    nodes.are(nodes_with(5))
    with pytest.raises(SettingsError, match=r"do not fit on the cluster \(5 node\(s\), 5 CPUs, 0 GPUs\): use fewer"):
        recruiter.recruit(first=True)
    recruiter.close()
    assert not nodes.asked


def test_an_empty_cluster_that_grows_is_asked_and_its_gpus_are_used(nodes: Nodes) -> None:
    def pause(seconds: float) -> None:
        nodes.are([HEAD, *nodes_with(2, cpus=90, gpus=8)])

    recruiter = Recruiter(Terms((8, 16), wait_s=60), splits_4096, pause)
    nodes.grows = True
    nodes.are([HEAD])
    assert recruiter.recruit(first=True) == Crew(16, 11, True)
    recruiter.close()
    assert nodes.asked == [[{"CPU": 1, "GPU": 1}] * 16, []]


def test_an_autoscaler_that_does_not_help_is_asked_for_less(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(crew, "_ASK_LESS_S", 0.2)
    recruiter = Recruiter(Terms((2, 4), 3, wait_s=0.8), splits_4096, lambda seconds: time.sleep(0.05))
    nodes.grows = True
    nodes.are([HEAD])
    with pytest.raises(SettingsError, match=r"run\.workers = 2 with 3 CPU\(s\) each do not fit on the cluster"):
        recruiter.recruit(first=True)
    assert nodes.asked == [[{"CPU": 3, "GPU": 1}] * 4, [{"CPU": 3, "GPU": 1}] * 2, [{"CPU": 3}] * 2]


def test_room_is_asked_for_beside_what_others_use(nodes: Nodes) -> None:
    def pause(seconds: float) -> None:
        nodes.are(nodes.total, nodes.total)

    recruiter = Recruiter(Terms((2, 2), 2, wait_s=60), splits_4096, pause)
    nodes.grows = True
    nodes.are([HEAD, *nodes_with(2, cpus=4)], [HEAD, *nodes_with(1, cpus=1), *nodes_with(2, cpus=1)[1:]])
    assert recruiter.recruit(first=True) == Crew(2, 2, False)
    assert nodes.asked == [[{"CPU": 2}, {"CPU": 2}, {"CPU": 3, "GPU": 0}, {"CPU": 3, "GPU": 0}]]


def test_ranks_at_work_ask_for_room_for_the_most(nodes: Nodes) -> None:
    recruiter = Recruiter(Terms((1, 4), 1, wait_s=60), splits_4096, never)
    nodes.grows = True
    nodes.are([HEAD, *nodes_with(2)])
    found = recruiter.recruit(first=True)
    assert found == Crew(2, 1, False)
    assert not nodes.asked
    nodes.are(nodes.total, [HEAD, *nodes_with(2, cpus=0)])
    assert recruiter.larger(found, ["node0", "node1"]) is None
    assert nodes.asked == [[{"CPU": 1}] * 4]


# ---- a cluster with Ray's own autoscaler, as the cluster launcher starts it --------------------------------------

HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # as Ray's stand-in for a cloud knows the head
RECRUIT = """
import json, time
from cluster.ray_runtime import ray_session
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from cluster import capacity
from cluster.command import set_up_logging
from pipeline import crew

def requested():
    constraints = get_cluster_resource_state(internal_kv_get_gcs_client()).cluster_resource_constraints
    return [[dict(one.request.resources_bundle), one.count] for some in constraints for one in some.resource_requests]

set_up_logging()
crew._ASK_LESS_S = 5.0  # no node ever has a GPU, which is asked for first
with ray_session():
    before = sum(node.cpus for node in capacity.total_nodes())
    recruiter = crew.Recruiter(crew.Terms((2, 2), 1, wait_s=240), lambda ranks: None, time.sleep)
    found = recruiter.recruit(first=True)
    asked = requested()
    recruiter.close()
    print(json.dumps([before, [found.ranks, found.cpus, found.gpu], asked, requested()]))
"""


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of the users of a cluster: a head without CPUs, and a cloud that has two nodes of one CPU."""
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    config = {
        "cluster_name": "growing", "max_workers": 2, "idle_timeout_minutes": 5, "head_node_type": HEAD_TYPE,
        "provider": {
            "type": "external", "module": provider, "head_node_id": HEAD_ID, "launch_multiple": True,
            "gcs_address": address, "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 2},
        },
    }  # fmt: skip
    nothing = [
        "cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    ]  # fmt: skip
    (tmp_path / "cluster.json").write_text(json.dumps(config | {key: [] for key in nothing}))
    users = environment(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    launcher = {
        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_agent_register_timeout_ms": "300000",
    }  # fmt: skip
    options = [
        "--port", str(port), "--num-cpus", "0", "--num-gpus", "0", "--include-dashboard", "false",
        "--autoscaling-config", str(tmp_path / "cluster.json"),
    ]  # fmt: skip
    with started(options, {**users, **launcher}, tmp_path / "ray.log"):
        yield {**users, "RAY_ADDRESS": address}


@pytest.mark.slow
def test_an_empty_cluster_starts_the_nodes_that_the_ranks_need(growing: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RECRUIT], cwd=REPOSITORY, env=growing, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:] + (tmp_path / "ray.log").read_text()[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0, [2, 1, False], [[{"CPU": 1}, 2]], []]
    assert "waiting for room for 2 rank(s): 1 node(s) with 0 CPUs and 0 GPUs free" in done.stderr
