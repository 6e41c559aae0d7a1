"""Attach to a Ray cluster, or start one for as long as this process needs it.

Import this module before `ray` (or anything that imports it): Ray reads how to authenticate, and what to warn
about, from the environment at the moment it is imported.
"""

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.command import in_unpacked_job, log

REPOSITORY = Path(__file__).resolve().parents[1]

FORWARDED = ("VITFORGE_", "MLFLOW_", "AWS_", "NCCL_", "GLOO_", "OMP_", "RAY_TRAIN_")
"""Environment variables that begin so go along to every worker; on a running cluster Ray takes none by itself."""

_SECRET = re.compile("SECRET|PASSWORD|TOKEN|ACCESS_KEY")
"""Names that do not: Ray writes what it is to set into its logs. The workers of a private cluster inherit them, and
the credentials of an object store travel inside pickled folders (cluster/object_store.py)."""

_STARTS = 3
"""Attempts at starting a private cluster."""

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns on every start that it will one day stop hiding GPUs from tasks that ask for none; we want it so.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
    # A private cluster gets a token of its own that is never written to disk. (Left to itself, Ray 2.60 runs
    # without any, and writes a token file that changes how later clusters of this user start.)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def ray_session(min_cpus: int = 1) -> Iterator[None]:
    """Ray for the length of a `with` block.

    With RAY_ADDRESS set (`ray job submit` sets it) the running cluster is used, and left running. Otherwise a
    private one starts on this machine and ends with the block: it has no job interface, and only holders of its
    token can reach anything in it. (Ray 2.60 listens on every interface, whatever address it is given.) It offers
    `min_cpus` logical CPUs even where the machine has fewer.

    Raises:
        ValueError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(FORWARDED) and not _SECRET.search(name)
    }
    if not in_unpacked_job():
        # A submitted job's working folder is on every worker's path already, at a place that differs by node.
        path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(path)
    common: dict[str, Any] = {
        "runtime_env": {"env_vars": variables},
        "log_to_driver": True,
        "logging_level": logging.WARNING,
    }
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            try:
                ray.init(address=address, **common)
            except ConnectionError as error:
                raise ValueError(
                    f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): start "
                    "one with `ray start --head`, or unset RAY_ADDRESS to run on this machine alone"
                ) from error
        else:
            _start_private(max(min_cpus, os.cpu_count() or 1), common)
        resources = ray.cluster_resources()
        log.info(
            "Ray runs on %s: %d node(s), %d CPUs, %d GPUs",
            f"the cluster at {address}" if address else "this machine",
            len(ray.nodes()),
            resources.get("CPU", 0),
            resources.get("GPU", 0),
        )
        yield
    finally:
        ray.shutdown()


def _start_private(cpus: int, options: dict[str, Any]) -> None:
    """A cluster on this machine. Ray gives its start 30 s, which a very busy machine may need more than once."""
    import ray

    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == _STARTS:
                raise
            log.warning("Ray did not start within its time on this busy machine; trying again")
            ray.shutdown()
