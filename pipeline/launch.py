"""Start the ranks of a stage: under Ray Train, or as the process that torchrun started already."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.command import log
from cluster.ray_runtime import ray_session
from cluster.settings import SettingsError
from pipeline.workers import under_torchrun


def run_ranks(
    target: Callable[[Any], None],
    argument: Any,
    *,
    name: str,
    folder: Path,
    workers: int | None,
    cpus_per_worker: int | None,
    max_failures: int,
    timeout_s: int,
    check: Callable[[int], None],
) -> None:
    """Call `target(argument)` on every rank and wait for all of them.

    A rank that crashes ends the others; they are started again, up to `max_failures` times. A ValueError is what
    the user can put right: it is raised here at once, since another try would end the same way.

    Args:
        name: shown by Ray.
        folder: for Ray Train's own records; every node sees it.
        workers: ranks; None takes every GPU, or 1 without one.
        cpus_per_worker: logical CPUs a rank; None shares the cluster's.
        timeout_s: for collective operations.
        check: refuses a number of ranks by raising ValueError, before any of them starts.

    Raises:
        ValueError: from `check`, from a rank, or for ranks that the cluster has no room for.
        RuntimeError: the ranks crashed too often.
    """
    if under_torchrun():
        world = int(os.environ["WORLD_SIZE"])
        if workers is not None and workers != world:
            raise SettingsError(f"torchrun started {world} ranks, the settings ask for {workers}: make them agree")
        check(world)
        target(argument)
        return
    if workers is not None:
        check(workers)
    with ray_session(min_cpus=(workers or 1) * (cpus_per_worker or 1)):
        ranks, cpus, gpus = _fit(workers, cpus_per_worker)
        check(ranks)
        _run_on_ray(target, argument, name, folder, ranks, cpus, gpus, max_failures, timeout_s)


def _fit(workers: int | None, cpus_per_worker: int | None) -> tuple[int, int, bool]:
    """Ranks, CPUs a rank, and whether each has a GPU, for the cluster as it is.

    Raises:
        SettingsError: the cluster has no room for them.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = int(sum(node.get("CPU", 0) for node in nodes))
    ranks = workers or max(gpus, 1)
    if gpus and ranks > gpus:
        raise SettingsError(f"run.workers = {ranks}, but the cluster has {gpus} GPUs: use at most {gpus}")
    cpus = cpus_per_worker or max(1, cores // ranks)

    def room(node: dict[str, float]) -> int:
        places = int(node.get("CPU", 0) // cpus)
        return min(places, int(node.get("GPU", 0))) if gpus else places

    if cpus_per_worker is None:
        # Nodes of different sizes: an even share of the whole need not fit on each.
        while cpus > 1 and sum(map(room, nodes)) < ranks:
            cpus -= 1
    if sum(map(room, nodes)) < ranks:
        raise SettingsError(
            f"run.workers = {ranks} with {cpus} CPU(s){' and a GPU' if gpus else ''} each do not fit on the cluster "
            f"({len(nodes)} node(s), {cores} CPUs, {gpus} GPUs): use fewer workers, or a smaller run.cpus_per_worker"
        )
    return ranks, cpus, gpus > 0


def _on_rank(config: dict[str, Any]) -> None:
    config["target"](config["argument"])


def _run_on_ray(
    target: Callable[[Any], None],
    argument: Any,
    name: str,
    folder: Path,
    ranks: int,
    cpus: int,
    gpus: bool,
    max_failures: int,
    timeout_s: int,
) -> None:
    # A crash is noticed within half a second, instead of two.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    for attempt in range(max_failures + 1):
        trainer = TorchTrainer(
            _on_rank,
            train_loop_config={"target": target, "argument": argument},
            scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpus, resources_per_worker={"CPU": cpus}),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=timeout_s),
            run_config=RunConfig(
                name=f"{name}-{os.getpid()}-{attempt}",
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
            for failure in failures.values():
                if isinstance(failure, ValueError):
                    raise failure from None
            what = "; ".join(f"rank {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items()))
            what = what or _last_line(error)
            if attempt == max_failures:
                raise RuntimeError(
                    f"the ranks crashed {attempt + 1} time(s), run.max_failures = {max_failures}; last: {what}"
                ) from error
            log.warning("crash %d of at most %d: %s; starting the ranks again", attempt + 1, max_failures, what)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'without a message'}"
