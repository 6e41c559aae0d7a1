"""Attach to a Ray cluster, or start one for as long as this process needs it.

Import this module before `ray` (or anything that imports it): Ray reads how to authenticate, and what to warn
about, from the environment at the moment it is imported.
"""

import contextlib
import functools
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.command import counted, in_unpacked_job, log
from cluster.launch_environment import LaunchError, ray_address
from cluster.redact import without_credentials
from cluster.s3_connection import SECRETS
from cluster.waiting import Waiting
from cluster.worker_output import show_plainly

REPOSITORY = Path(__file__).resolve().parents[1]

FORWARDED = ("VITFORGE_", "MLFLOW_", "AWS_", "NCCL_", "GLOO_", "OMP_", "RAY_TRAIN_")
"""Environment variables that begin so go along to every worker; on a running cluster Ray takes none by itself."""

_SECRET = re.compile("SECRET|PASSWORD|TOKEN|ACCESS_KEY|PASSPHRASE|MLFLOW_TRACKING_USERNAME")
"""Names that do not, nor values with a credential in them: Ray writes what it is to set into its logs. The workers of a
private cluster inherit them; those of a running one get them as `withheld_variables`, and the credentials of an object
store inside pickled folders (cluster/object_store.py)."""

_STARTS = 3
"""Attempts at starting a private cluster."""
_ANSWERS_S = 10.0
"""Seconds in which a running one answers."""

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not (sys.stdout.isatty() and sys.stderr.isatty()):
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of messages that do not come by cluster/worker_output.py
# Ray warns on every start that it will one day stop hiding GPUs from tasks that ask for none; we want it so.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if ray_address() is None and "RAY_AUTH_MODE" not in os.environ:
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
        LaunchError: RAY_ADDRESS names a cluster that does not answer, or none can be started here.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = ray_address()
    withheld = withheld_variables()
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(FORWARDED) and name not in withheld
    }
    if not in_unpacked_job() or address is None:
        # A submitted job's working folder is on every worker's path already, at a place that differs by node.
        path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(path)
    common: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    try:
        with Waiting(f"the Ray cluster at {address} to answer" if address else "Ray to start"):
            if address is not None:
                _attach(address, {**common, "runtime_env": {"env_vars": variables}})
            else:
                with _python_path(variables["PYTHONPATH"]):
                    _start_private(max(min_cpus, os.cpu_count() or 1), common)
        show_plainly()
        resources = ray.cluster_resources()
        log.info(
            "Ray runs on %s: %s, %s, %s",
            f"the cluster at {address}" if address else "this machine",
            counted(len(ray.nodes()), "node"),
            counted(int(resources.get("CPU", 0)), "CPU"),
            counted(int(resources.get("GPU", 0)), "GPU"),
        )
        yield
    finally:
        ray.shutdown()


def own_workers() -> bool:
    """Whether Ray's workers are of a private cluster, and inherit this process's environment as it was at its start."""
    return ray_address() is None


@contextmanager
def _python_path(value: str) -> Iterator[None]:
    """In the block, processes that are started look for modules there.

    A private cluster's workers inherit all that they need. An environment of a job's own would be another one than that
    of the workers which Ray starts at once, and each of them would be ended and started again.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = value
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def withheld_variables() -> dict[str, str]:
    """The variables for workers that Ray must not be told, because it would log them; for `take_variables` there."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(FORWARDED) and (_SECRET.search(name) or without_credentials(value) != value)
    }


def take_variables(withheld: Mapping[str, str]) -> None:
    """Set in a worker what its driver withheld from Ray.

    MLflow's are the driver's, which chose the server. Of the others, a node's own come first; credentials of an object
    store are not mixed.
    """
    own = any(name in os.environ for name in (*SECRETS, "AWS_PROFILE"))
    for name, value in withheld.items():
        if name.startswith("MLFLOW_") or (name not in os.environ and not (name in SECRETS and own)):
            os.environ[name] = value


def _attach(address: str, options: dict[str, Any]) -> None:
    """Use a running cluster. Ray itself tries a dead address for a quarter of an hour: it is tried here first."""
    import ray

    why = _no_ray_at(address)
    if why is None:
        try:
            ray.init(address=address, **options)
            return
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            why = _first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            if "uthent" in why or isinstance(error, ConnectionError):
                # gRPC was answered there, and Ray does not say in the exception that it was the token.
                why += "; where it takes a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            raise LaunchError(_no_cluster(address, why)) from error
    raise LaunchError(_no_cluster(address, why))


def _no_cluster(address: str, why: str) -> str:
    return (
        f"no Ray cluster answers at RAY_ADDRESS={address} ({why}): start one with `ray start --head`, give the "
        "HOST:PORT that it printed, or unset RAY_ADDRESS to run on this machine alone"
    )


def _no_ray_at(address: str) -> str | None:
    """Why there can be no cluster at an address; None where there may be one. Takes some seconds at most."""
    scheme, separator, rest = address.rpartition("://")
    if address == "auto":
        return None  # Ray looks on this machine, and says at once if there is none
    if separator and scheme != "ray":
        return f"{scheme}:// is what `ray job submit --address` takes; here it is HOST:PORT"
    host, _, port = rest.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        return "it is not of the form HOST:PORT"
    deadline, why = time.monotonic() + _ANSWERS_S, "it does not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                return None if os.environ.get("RAY_USE_TLS") in ("1", "true") else _no_grpc_on(connection)
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(0.5)  # a head that is just starting
    return why


def _no_grpc_on(connection: socket.socket) -> str | None:
    """Why what listens there is not Ray, which speaks gRPC: that begins, as all of HTTP/2, with a frame of settings."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    began = b""
    while len(began) < 9 and (some := connection.recv(9 - len(began))):
        began += some
    return None if len(began) == 9 and began[3] == 4 else "what listens there is not Ray"


def _start_private(cpus: int, options: dict[str, Any]) -> None:
    """A cluster on this machine. Ray gives its start 30 s, which a very busy machine may need more than once."""
    import ray

    for attempt in range(1, _STARTS + 1):
        try:
            with _in_own_sessions():
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
            return
        except Exception as error:  # what Ray raises for a start that takes too long is no more special
            late = "timed out during startup" in str(error)
            ray.shutdown()
            _end_failed_start()
            if not late or attempt == _STARTS:
                raise LaunchError(_not_started(error, attempt if late else 0)) from error
            log.warning("Ray did not start within its time on this busy machine; trying again")


def _end_failed_start() -> None:
    """End what a start that failed has left: Ray 2.60 does so when this process ends, which slows the next try."""
    left = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            # Ray names the folder of a start by its time and by the process that makes it.
            if re.search(rf"/session_[\d_-]+_{os.getpid()}/", " ".join(child.cmdline())):
                child.kill()
                left.append(child)
    psutil.wait_procs(left, timeout=10)


def _not_started(error: Exception, tries: int) -> str:
    what = f"not within {tries} times 30 s" if tries else _first_line(error)
    temporary = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    sessions = sorted(temporary.glob(f"session_*_{os.getpid()}"))
    logs = f"; its logs are in {sessions[-1] / 'logs'}" if sessions else ""
    advice = (
        "run the same command again when the machine is less busy and has memory to spare"
        if tries
        else f"put right what it says (it works in {temporary}; RAY_TMPDIR names another folder)"
    )
    return f"Ray did not start on this machine ({what}): {advice}, or let torchrun start the ranks, without Ray{logs}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Traceback" in str(error):  # of what it came from: Ray puts that into the message
        return lines[-1]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def _in_own_sessions() -> Iterator[None]:
    """What Ray starts in this block is out of reach of the terminal and of what is sent to our process group.

    Its processes must outlive the save that a signal to the group asks for. Ray 2.60 blocks SIGINT for them, and lets
    SIGHUP and SIGTERM end them. They end with this process all the same, by the kernel's parent-death signal.
    """
    from ray._private import services

    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen
