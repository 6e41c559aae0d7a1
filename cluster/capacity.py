"""What a Ray cluster has room for now: node by node, as it is and not as it was."""

import time
from dataclasses import dataclass

import ray

from cluster.command import log


@dataclass(frozen=True)
class Node:
    """A node of the cluster and what is free on it (or all that it has)."""

    id: str
    host: str
    cpus: float
    gpus: float

    def room(self, cpus: int, gpu: bool) -> int:
        """How many workers of so many CPUs (and a GPU) fit on it."""
        places = int(self.cpus // cpus)
        return min(places, int(self.gpus)) if gpu else places


def total_nodes() -> list[Node]:
    """The nodes that take work, with all that they have."""
    leaving = draining()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            node["Resources"].get("CPU", 0),
            node["Resources"].get("GPU", 0),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def free_nodes() -> list[Node]:
    """The nodes that take work, with what is free on them."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(node.id, node.host, free[node.id].get("CPU", 0), free[node.id].get("GPU", 0))
        for node in total_nodes()
        if node.id in free
    ]


def draining() -> set[str]:
    """The nodes that will soon be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


def grows() -> bool:
    """Whether nodes may still come: the nodes of Ray's cluster launcher and of KubeRay, the head too, have a group."""
    return any(node["Alive"] and "ray.io/node-group" in node["Labels"] for node in ray.nodes())


def request(bundles: list[dict[str, float]]) -> None:
    """Leave word with the autoscaler what the cluster should have in all."""
    from ray.autoscaler.sdk import request_resources

    try:
        request_resources(bundles=bundles)
    except ray.exceptions.RayError as error:
        log.warning("the autoscaler could not be asked for nodes: %s", error)


def answering(nodes: list[Node], timeout_s: float = 8.0) -> list[Node]:
    """Those of some nodes that start a process now. The cluster's own list is up to half a minute behind."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if len(nodes) < 2:
        return nodes  # our own: it answers, or nothing does

    @ray.remote(num_cpus=0, max_retries=0)
    def answer() -> None:
        return None

    asked = {
        answer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(): node
        for node in nodes
    }
    began = time.monotonic()
    waiting, there = list(asked), []
    while waiting and (left := timeout_s - (time.monotonic() - began)) > 0:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=left)
        for reference in ready:
            try:
                ray.get(reference)
                there.append(asked[reference])
            except ray.exceptions.RayError:
                pass
    missing = [node.host for node in nodes if node not in there]
    if missing:
        log.warning("%d node(s) of the cluster do not answer and are left out: %s", len(missing), ", ".join(missing))
    for reference in waiting:
        ray.cancel(reference, force=True)
    return there
