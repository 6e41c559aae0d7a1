"""Who this process is, as its environment says: what launchers leave there is read here, and nowhere else.

The ranks of a stage are started by torchrun, or by Ray Train, which the command itself starts. Both say who is who by
RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Other launchers set these or names of their own, and what is left of
a launcher outlives it in shells, containers and the nodes of a cluster: what does not fit together is refused.
"""

import os
from dataclasses import dataclass

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ALONE = dict(zip(RANK_VARIABLES, ("0", "1", "0", "1"), strict=True))
_MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the process that runs the command of a submitted job."""
_STARTERS_OF_COPIES = {
    "mpirun of Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun of MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "flux run": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
}
"""Launchers that start one command many times: how many there are, and which this is."""
_LEFT_BY_OTHERS = ("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""Names, or their beginnings, by which libraries beside ours would take a rank for another one."""


class LaunchError(ValueError):
    """What the environment says of who this process is does not fit together; the message says what to do."""


@dataclass(frozen=True)
class Launch:
    """Who this process is."""

    torchrun: bool = False
    """Whether torchrun started it: it is then a rank itself, and Ray is not needed."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def launch() -> Launch:
    """Who the process of a command is.

    Raises:
        LaunchError: naming what is set and what does not fit.
    """
    if under_torchrun():
        return Launch(True, *rank_numbers())
    given = {name: os.environ[name] for name in RANK_VARIABLES if _given(name)}
    if not given.items() <= _ALONE.items() or ("RANK" in given and "WORLD_SIZE" not in given):
        raise LaunchError(
            f"{_listed(given)} in the environment, but torchrun did not start this process ({_TORCHRUN} is not set): "
            "who the other ranks are cannot be known. Let torchrun start them, as in "
            "`torchrun --nproc-per-node N COMMAND`; or, where this is left from something else, run "
            f"`{_without(given)} python COMMAND`, and the command starts its ranks by itself"
        )
    if not _given(_RAY_JOB):
        _refuse_copies()
    return Launch()


def rank_numbers() -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, as torchrun or Ray Train have set them; alone without them.

    Raises:
        LaunchError: some are missing, or make no sense.
    """
    names = (*RANK_VARIABLES, *_MASTER_VARIABLES)
    missing = [name for name in names if not _given(name)]
    if not under_torchrun() and not _given("RANK"):
        return 0, 1, 0, 1
    if missing:
        given = {name: os.environ[name] for name in (_TORCHRUN, *names) if _given(name)}
        raise LaunchError(
            f"{_listed(given)} in the environment, but {', '.join(missing)} {_is(missing)} not: this is left from "
            f"another start. Run `{_without(given)} python COMMAND`, or let torchrun start it"
        )
    try:
        rank, world, local_rank, local_world = (int(os.environ[name]) for name in RANK_VARIABLES)
        fits = 0 <= rank < world and 0 <= local_rank < local_world <= world
    except ValueError:
        fits = False
    if not fits:
        raise LaunchError(
            f"{_listed({name: os.environ[name] for name in RANK_VARIABLES})} in the environment: no rank is that. "
            "Let torchrun set them, or unset all of them and the command starts its ranks by itself"
        )
    return rank, world, local_rank, local_world


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return _given(_TORCHRUN)


def leads() -> bool:
    """Whether this process speaks for the command: under torchrun every rank runs it, and only the first does."""
    return launch().rank == 0


def ray_address() -> str | None:
    """Where the Ray cluster is that the command is to use; None starts one on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def describe() -> str:
    """One line: what was found, and what follows from it. Empty where the environment says nothing."""
    found = launch()
    others = [name for name, (_, rank) in _STARTERS_OF_COPIES.items() if _given(rank)]
    unused = f"; what {' and '.join(others)} left in the environment is not used" if others else ""
    if found.torchrun:
        here = f"{found.local_world_size} of them on this node"
        return f"started by torchrun as rank {found.rank} of {found.world_size}, {here}{unused}"
    if _given(_RAY_JOB):
        return f"started as a Ray job: Ray's workers run on its cluster{unused}"
    if (address := ray_address()) is not None:
        return f"RAY_ADDRESS={address}: Ray's workers run on that cluster{unused}"
    return f"started alone: Ray's workers run on this machine{unused}" if unused else ""


def forget_other_launchers(ours: str) -> None:
    """Take out of the environment by what libraries would take this rank for another launcher's.

    (DeepSpeed 0.19 compares OMPI_COMM_WORLD_LOCAL_RANK with LOCAL_RANK; torch connects to torchrun's store where
    TORCHELASTIC_USE_AGENT_STORE says so.)

    Args:
        ours: who started this rank: "torchrun" or "Ray".
    """
    left = _LEFT_BY_OTHERS if ours == "torchrun" else (*_LEFT_BY_OTHERS, "TORCHELASTIC_")
    for name in [name for name in os.environ if name.startswith(left)]:
        del os.environ[name]


def is_rank() -> bool:
    """Whether torchrun or Ray Train started this process as a rank."""
    return under_torchrun() or _given("RANK")


def be_alone() -> None:
    """Say in the environment that this process is a world of one, to libraries that would look for it elsewhere."""
    os.environ.update(_ALONE, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _refuse_copies() -> None:
    for name, (size, rank) in _STARTERS_OF_COPIES.items():
        copies = os.environ.get(size, "")
        if copies.isdecimal() and int(copies) > 1:
            raise LaunchError(
                f"{name} started {copies} copies of this command ({size}={copies}, {rank}={os.environ.get(rank)}), "
                "each of which would do all of the work: start it once, and it starts its workers by itself; or let "
                "torchrun start the ranks, once on every node (`torchrun --nnodes ... COMMAND`)"
            )


def _given(name: str) -> bool:
    return bool(os.environ.get(name))


def _without(given: dict[str, str]) -> str:
    return " ".join(["env", *(f"-u {name}" for name in given)])


def _is(names: "list[str] | dict[str, str]") -> str:
    return "is" if len(names) == 1 else "are"


def _listed(given: dict[str, str]) -> str:
    return f"{', '.join(f'{name}={value}' for name, value in given.items())} {_is(given)}"
