"""Who this process is among the ranks: read from the environment that Ray Train and torchrun both set."""

import datetime
import os
import resource
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from cluster import launch_environment

_OPEN_FILES = 65_536
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Worker:
    """One rank."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    gpu_index: int | None = None
    """The rank's GPU among those that the process sees; None computes on the CPU."""

    @property
    def gpu(self) -> bool:
        """Whether the rank computes on a GPU."""
        return self.gpu_index is not None

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU. (Not the current device: each thread has one of its own.)"""
        return torch.device("cpu") if self.gpu_index is None else torch.device("cuda", self.gpu_index)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that logs, tracks and commits."""
        return self.rank == 0

    def dali_device(self, backend: str) -> int | None:
        """DALI's device number for a decoding backend; None decodes without a GPU."""
        return None if backend == "cpu" else self.gpu_index


def from_all(value: Any) -> list[Any]:
    """What every rank has, in the order of the ranks; all must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def node() -> str:
    """The name of this machine, for messages."""
    return socket.gethostname()


def choose_interface(named: str | None, address: str | None) -> None:
    """Set the network interface of gloo and NCCL, unless the environment names one already.

    Args:
        named: the interface that the settings name.
        address: this machine's address towards the other ranks, whose interface is taken where none is named:
            loopback where there are no others. None leaves the choice to gloo and NCCL.

    Raises:
        ValueError: there is no interface of that name here.
    """
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    if named is not None and named not in addresses:
        raise ValueError(
            f"interface = {named!r}: {node()} has no such network interface; it has {', '.join(sorted(addresses))}"
        )
    variables = ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]
    if named is None:
        named = next((name for name, there in addresses.items() if address in there), None)
        if address == LOOPBACK:  # NCCL passes over it, and needs no network on one machine
            variables.remove("NCCL_SOCKET_IFNAME")
    if named is not None:
        for variable in variables:
            os.environ.setdefault(variable, named)


def _address_towards(host: str) -> str | None:
    """This machine's address on the way to another; None where that is this machine itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def listening_address(worker: Worker) -> str:
    """The address on which the other ranks can reach this one, and as few else as possible. Every rank must call it.

    On one machine that is loopback; between machines the address of gloo's interface, or that towards the others.

    Raises:
        ValueError: there is none.
    """
    if worker.world_size == worker.local_world_size:
        return LOOPBACK
    towards = from_all(_address_towards(os.environ["MASTER_ADDR"]))
    others = [address for address in towards if address is not None]
    if not others:  # several launchers on this machine
        return LOOPBACK
    entries = psutil.net_if_addrs().get(os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0], [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in entries:
            if entry.family == family and not entry.address.startswith("fe80:"):  # that one needs its interface said
                return entry.address
    # Many a machine knows its own name as an address on loopback.
    address = towards[worker.rank] or _address_towards(others[0])
    if address is None:
        raise ValueError(
            f"{node()} has no address that the other ranks can reach (MASTER_ADDR is {os.environ['MASTER_ADDR']}): "
            "name the network interface between them by the setting interface"
        )
    return address


def join(timeout_s: int, interface: str | None = None) -> Worker:
    """Become a rank: choose the device and join the process group that the environment describes.

    Without such an environment (no launcher at all) this is a world of one.

    Args:
        timeout_s: seconds after which a collective operation that does not finish is an error.
        interface: network interface towards the other ranks; None chooses it where there are several machines.
    """
    if not launch_environment.is_rank():
        launch_environment.be_alone()  # DeepSpeed reads these itself and looks for MPI where they are missing
    numbers = launch_environment.rank_numbers()
    launch_environment.forget_other_launchers("torchrun" if launch_environment.under_torchrun() else "Ray")
    gpu_index = None
    if torch.cuda.is_available():
        # Ray shows a worker only its own GPU or all of the node's, depending on its version and settings.
        gpu_index = numbers[2] % torch.cuda.device_count()
        torch.cuda.set_device(gpu_index)
        os.environ["LOCAL_RANK"] = str(gpu_index)  # DeepSpeed takes its device from here
    # Shells give 1,024 open files, and corpora have more shards. Ray raises that for its workers, torchrun does not.
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if files != resource.RLIM_INFINITY and files < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, most))
    if not dist.is_initialized():
        several = numbers[1] > numbers[3]
        choose_interface(interface, _address_towards(os.environ["MASTER_ADDR"]) if several else LOOPBACK)
        timeout = datetime.timedelta(seconds=timeout_s)
        backend = "gloo" if gpu_index is None else "nccl"
        if numbers[1] == 1 and os.environ["MASTER_PORT"] == "0":
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=timeout)
    return Worker(numbers[0], numbers[1], numbers[2], numbers[3], gpu_index)
