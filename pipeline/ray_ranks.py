"""What runs inside Ray's processes for the launcher: the mailbox between driver and ranks, and the ranks' start."""

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipeline.workers import choose_interface


class Mailbox:
    """Where the driver leaves its wish for the ranks, and the ranks their word for the driver. A Ray actor."""

    def __init__(self) -> None:
        self._wish: str | None = None
        self._places: dict[int, str] = {}
        self._begun = False
        self._ended: bool | None = None
        self._verdict: str | None = None

    def ask(self, reason: str) -> None:
        """Ask the ranks to save and stop."""
        self._wish = reason

    def wish(self) -> str | None:
        """What the ranks are asked."""
        return self._wish

    def join(self, rank: int, node: str) -> None:
        """A rank says on which node it runs."""
        self._places[rank] = node

    def places(self) -> dict[int, str]:
        """The nodes of the ranks that have joined."""
        return self._places

    def begin(self) -> None:
        """Rank 0 says that the first step is about to be taken."""
        self._begun = True

    def begun(self) -> bool:
        """Whether the first step was about to be taken."""
        return self._begun

    def end(self, finished: bool) -> None:
        """Rank 0 says how the ranks ended."""
        self._ended = finished

    def ended(self) -> bool | None:
        """Whether the ranks came to their end, or stopped because they were asked to; None: neither."""
        return self._ended

    def condemn(self, message: str) -> None:
        """A rank says why it ends the ranks."""
        self._verdict = self._verdict or message

    def verdict(self) -> str | None:
        """Why a rank ended the ranks."""
        return self._verdict


class MailboxControl:
    """The control of a rank under Ray. Rank 0 asks for all."""

    def __init__(self, mailbox: Any, rank: int, attempt: int) -> None:
        self._mailbox, self._rank, self.attempt = mailbox, rank, attempt

    def begin(self) -> None:
        if self._rank == 0:
            self._mailbox.begin.remote()

    def stop_wanted(self) -> str | None:
        if self._rank:
            return None
        wish: str | None = ray.get(self._mailbox.wish.remote(), timeout=30)
        return wish

    def hung(self, message: str) -> None:
        """Tell the driver, if it can be reached."""
        with contextlib.suppress(Exception):
            ray.get(self._mailbox.condemn.remote(message), timeout=3)


def on_rank(config: dict[str, Any]) -> None:
    """What Ray Train runs on every rank."""
    rank = ray.train.get_context().get_world_rank()
    mailbox = config["mailbox"]
    mailbox.join.remote(rank, ray.get_runtime_context().get_node_id())
    finished = config["target"](config["argument"], MailboxControl(mailbox, rank, config["attempt"]))
    if rank == 0:
        ray.get(mailbox.end.remote(finished))


class RanksBackend(_TorchBackend):
    """Ray Train's process group, on an interface that reaches the other nodes."""

    def on_start(self, worker_group: Any, backend_config: "RanksConfig") -> None:
        worker_group.execute(_use_interface, backend_config.interface)
        super().on_start(worker_group, backend_config)


@dataclass
class RanksConfig(TorchConfig):
    """Settings of `RanksBackend`."""

    interface: str | None = None
    """Network interface; None chooses it."""

    @property
    def backend_cls(self) -> type[RanksBackend]:
        return RanksBackend


def _use_interface(named: str | None) -> None:
    several = len([node for node in ray.nodes() if node["Alive"]]) > 1
    choose_interface(named, ray.util.get_node_ip_address() if several else None)
