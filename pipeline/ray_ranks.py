"""How Ray Train starts our ranks: what runs on each, on which network interface, without what we do not use."""

import asyncio
import contextlib
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from cluster.command import NO_ROOM, shown
from cluster.launch_environment import forget_other_launchers
from cluster.ray_runtime import own_workers, take_variables
from pipeline.workers import LOOPBACK, choose_interface


class MailboxControl:
    """The control of a rank under Ray. Rank 0 asks for all."""

    def __init__(self, mailbox: Any, rank: int, attempt: int) -> None:
        self._mailbox, self._rank, self.attempt = mailbox, rank, attempt
        self.secret: bytes | None = ray.get(mailbox.secret.remote(), timeout=300)

    def begin(self) -> None:
        if self._rank == 0:
            self._mailbox.begin.remote()

    def stop_wanted(self, needs_s: float) -> str | None:
        if self._rank:
            return None
        wish: str | None = ray.get(self._mailbox.wish.remote(needs_s), timeout=30)
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
    take_variables(ray.get(mailbox.variables.remote(), timeout=300))
    try:
        finished = config["target"](config["argument"], MailboxControl(mailbox, rank, config["attempt"]))
    except Exception as error:
        if not isinstance(error, ValueError) and getattr(error, "errno", None) not in NO_ROOM:
            print(shown(traceback.format_exc()), file=sys.stderr, flush=True)  # the driver shows its last line
        raise
    if rank == 0:
        ray.get(mailbox.end.remote(finished))


class RanksTrainer(TorchTrainer):
    """`TorchTrainer` without four helper processes that cost seconds of every start (Ray 2.60).

    One is the controller, which starts the ranks and asks how they are: it runs in this process, which has nothing
    else to do meanwhile. One tells the autoscaler what the ranks need: the recruiter does (pipeline/crew.py), and the
    placement group of the ranks. One hands out Ray Data sets, of which there are none. The last frees placement groups
    that outlive the job; those of an actor that is not detached end with the job anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        return [item for item in super()._create_default_callbacks() if type(item).__name__ not in unused]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        controller = _Controller(**{**parts, "scaling_policy": _AsAsked(self.scaling_config)})
        asyncio.run(controller.run())
        return controller.get_result()


class _AsAsked(FixedScalingPolicy):
    """As many ranks as were asked for, without a word to the actor that adds up what to ask an autoscaler for.

    On a busy machine that actor answers later than within the 5 s that Ray waits for it, and a trace is shown.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing."""


class _Workers(WorkerGroup):
    """Ranks whose controller is no actor: they never ask it for the checkpoints that Ray Train keeps."""

    def _get_worker_runtime_env(self, custom_runtime_env: Any) -> Any:
        """None on a cluster of our own, whose workers have the driver's environment: those that are there are taken."""
        return {} if own_workers() else super()._get_worker_runtime_env(custom_runtime_env)

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, arguments: dict[str, Any]) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[number] for name, values in arguments.items()},
                )
                for number, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers


class RanksBackend(_TorchBackend):
    """Ray Train's process group, on an interface that reaches the other nodes."""

    def on_start(self, worker_group: Any, backend_config: "RanksConfig") -> None:
        worker_group.execute(_use_interface, backend_config.interface)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the ranks' processes end. Leaving the group first would wait for one that crashed or hangs."""


@dataclass
class RanksConfig(TorchConfig):
    """Settings of `RanksBackend`."""

    interface: str | None = None
    """Network interface; None chooses it."""

    @property
    def backend_cls(self) -> type[RanksBackend]:
        return RanksBackend


def _use_interface(named: str | None) -> None:
    forget_other_launchers("Ray")  # what the node that Ray was started on had in its environment
    several = len([node for node in ray.nodes() if node["Alive"]]) > 1
    choose_interface(named, ray.util.get_node_ip_address() if several else LOOPBACK)
