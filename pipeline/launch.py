"""Start the ranks of a stage, and start them again: under Ray Train, or as the process that torchrun started already.

Under Ray the number of ranks may change from one start to the next. Each start takes as many as the cluster has room
for then; a node that joins makes the ranks save and stop, to go on with more; a node that is being taken away makes
them save and stop, to go on elsewhere; a crash is followed by another start.
"""

import datetime
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, Literal

import torch.distributed as dist

from cluster.authenticated_channel import new_secret
from cluster.command import NO_ROOM, USER_ERROR, counted, leads, log
from cluster.launch_environment import Launch, launch
from cluster.marked_folders import temporary_folder
from cluster.ray_runtime import ray_session, withheld_variables
from cluster.settings import SettingsError
from cluster.stop_signals import STOP
from cluster.storage import StorageError
from cluster.waiting import Waiting
from pipeline.crew import Crew, Recruiter, Terms
from pipeline.stopping import Control, Every, SignalControl, TimeLimit

Target = Callable[[Any, Control], bool]
"""Runs on every rank; returns whether it came to its end (False: it saved and stopped because it was told to)."""

_ERROR = "vitforge/error"
"""In torchrun's store: what rank 0 says to the user, once it has failed."""
_SAID_WITHIN_S = 5.0
_BACK_OFF_S = (0, 5, 15, 45, 120)
"""Seconds before another start, by failures in a row. The first costs nothing: most failures are single."""


def run_ranks(
    target: Target,
    argument: Any,
    *,
    name: str,
    terms: Terms,
    check: Callable[[int], None],
    progress: Callable[[], str] = lambda: "",
    limit_s: float | None = None,
    here: bool = False,
) -> None:
    """Call `target(argument, control)` on every rank and wait for all of them.

    A rank that crashes ends the others; they are started again. A ValueError is what the user can put right: it is
    raised here at once, since another try would end the same way.

    Args:
        name: shown by Ray.
        check: refuses a number of ranks by raising ValueError, before any of them starts.
        progress: a number that has grown when work was saved since it was asked last; crashes are counted anew then.
        limit_s: seconds after the command's start in which it must have saved and stopped.
        here: one rank is enough, and this process is it, without Ray.

    Raises:
        ValueError: from `check`, from a rank, or for ranks that the cluster has no room for.
        RuntimeError: the ranks crashed too often.
        SystemExit: they saved and stopped because the command was told to, or its time was over.
    """
    STOP.install()
    with ExitStack() as stack:
        limit = None
        if limit_s is not None and leads():
            limit = TimeLimit(limit_s, STOP, os.getppid() if launch().torchrun else os.getpid())
            stack.enter_context(closing(Every(1.0, limit.look, "time-limit")))
        if here or launch().torchrun:
            _run_this_rank(target, argument, terms, check, limit)
        else:
            _run_ranks(target, argument, name, terms, check, progress, limit)


def _run_this_rank(
    target: Target, argument: Any, terms: Terms, check: Callable[[int], None], limit: TimeLimit | None
) -> None:
    """This process is a rank: one of those that torchrun started, or the only one."""
    started = launch()
    world = started.world_size
    if terms.workers is not None and not terms.workers[0] <= world <= terms.workers[1]:
        asked = _range(*terms.workers)
        raise SettingsError(f"torchrun started {world} ranks, the settings ask for {asked}: make them agree")
    check(world)
    try:
        finished = target(argument, SignalControl(STOP, limit))
    except Exception as error:
        if _is_said_by_rank_0(error, started):
            raise _silent_end(started, USER_ERROR) from None
        raise
    finally:
        STOP.begun = False
    if dist.is_initialized():
        dist.destroy_process_group()  # left to the interpreter's end, its threads may abort a finished process
    if not finished:
        status = STOP.status or 128 + signal.SIGTERM
        raise SystemExit(status) if started.rank == 0 else _silent_end(started, status)


def _run_ranks(
    target: Target,
    argument: Any,
    name: str,
    terms: Terms,
    check: Callable[[int], None],
    progress: Callable[[], str],
    limit: TimeLimit | None,
) -> None:
    if terms.workers is not None and terms.workers[0] == terms.workers[1]:
        check(terms.workers[0])
    with ray_session(min_cpus=(terms.workers or (1, 1))[0] * (terms.cpus_per_worker or 1)):
        STOP.install()  # Ray has put its own in its place
        launcher = _Launcher(target, argument, name, terms, check, progress, limit)
        with closing(launcher.recruiter):
            launcher.run()


def _silent_end(started: Launch, status: int) -> SystemExit:
    """The end of a rank that is not the first and says nothing.

    Beside rank 0 no other gives a status: torchrun ends a node's ranks as soon as one of them has failed, and rank 0
    has still to close what is open.
    """
    return SystemExit(0 if started.rank < started.local_world_size else status)


def _is_said_by_rank_0(error: Exception, started: Launch) -> bool:
    """Whether this is another rank, which fails of what rank 0 says, or because rank 0 did of what can be put right.

    Every rank calls it with its own error; what they say of theirs goes through the store that torchrun holds.
    """
    if not dist.is_initialized() or started.world_size == 1:
        return False
    can_be_put_right = isinstance(error, ValueError) or getattr(error, "errno", None) in NO_ROOM
    try:
        store = dist.distributed_c10d._get_default_store()
        if started.rank == 0:
            if can_be_put_right:
                store.set(_ERROR, str(error))
            return False
        store.wait([_ERROR], datetime.timedelta(seconds=_SAID_WITHIN_S))
        said = store.get(_ERROR).decode()
    except RuntimeError:  # rank 0 has none, or another kind; or the store is gone
        return False
    return said == str(error) or not can_be_put_right


class _Launcher:
    """The starts of one stage on Ray."""

    def __init__(
        self,
        target: Target,
        argument: Any,
        name: str,
        terms: Terms,
        check: Callable[[int], None],
        progress: Callable[[], str],
        limit: TimeLimit | None,
    ) -> None:
        self.target, self.argument, self.name = target, argument, name
        self.terms, self.progress, self.limit = terms, progress, limit
        self.attempt = 0
        self.recruiter = Recruiter(terms, check, self._sleep)

    def run(self) -> None:
        """Start the ranks until they come to their end."""
        failures, saved = 0, self.progress()
        while True:
            crew = self.recruiter.recruit(first=self.attempt == 0)
            outcome, why = self._start(crew)
            self.attempt += 1
            if outcome == "finished":
                return
            if STOP.requested:
                if outcome == "crashed":
                    log.warning("the ranks crashed while they saved and stopped: %s", why)
                raise SystemExit(STOP.status)
            try:
                now = self.progress()
            except (OSError, StorageError) as error:  # the storage that the ranks crashed of, perhaps
                log.warning("%s", error)
                now = saved
            if now != saved:
                failures, saved = 0, now
            if outcome == "stopped":
                log.info("the ranks saved and stopped: %s", why)
                continue
            failures += 1
            if failures > self.terms.max_failures:
                raise RuntimeError(
                    f"the ranks crashed {failures} time(s) without a new checkpoint, more than "
                    f"{self.terms.section}max_failures = {self.terms.max_failures}; last: {why}"
                )
            pause = _BACK_OFF_S[min(failures, len(_BACK_OFF_S)) - 1]
            log.warning(
                "crash %d of at most %d without a new checkpoint: %s; starting the ranks again%s",
                failures,
                self.terms.max_failures,
                why,
                f" in {pause} s" if pause else "",
            )
            self._sleep(pause)

    def _sleep(self, seconds: float) -> None:
        if STOP.wait(seconds):
            raise SystemExit(STOP.status)

    # ---- one start -------------------------------------------------------------------------------------------

    def _start(self, crew: Crew) -> tuple[Literal["finished", "stopped", "crashed"], str]:
        """Start a crew and wait for it; returns how it ended and why."""
        # Ray Train's records of a run, which only its controller writes, on this node, and nobody needs afterwards.
        with temporary_folder("ray") as records:
            return self._wait_for(crew, str(records))

    def _wait_for(self, crew: Crew, records: str) -> tuple[Literal["finished", "stopped", "crashed"], str]:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a crash is noticed sooner than in two s
        os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")  # it is in this process
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # we watch the nodes ourselves
        import ray
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
        from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

        if os.environ.get("VITFORGE_TRACEBACK") != "1":
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # traces of what is raised here as well
        from pipeline.mailbox import Mailbox
        from pipeline.ray_ranks import RanksConfig, RanksTrainer, on_rank

        # On the driver's node: it must outlive every other. One that dies is there again at once, with nothing in it.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        actor = ray.remote(num_cpus=0, label_selector=here, max_restarts=-1, max_task_retries=-1)(Mailbox)
        mailbox = actor.remote(new_secret(), withheld_variables())
        trainer = RanksTrainer(
            on_rank,
            train_loop_config={
                "target": self.target,
                "argument": self.argument,
                "mailbox": mailbox,
                "attempt": self.attempt,
            },
            scaling_config=ScalingConfig(
                num_workers=crew.ranks, use_gpu=crew.gpu, resources_per_worker={"CPU": crew.cpus}
            ),
            torch_config=RanksConfig(
                backend="nccl" if crew.gpu else "gloo",
                timeout_s=self.terms.timeout_s,
                interface=self.terms.interface,
            ),
            run_config=RunConfig(
                name=f"{self.name}-{os.getpid()}-{self.attempt}",
                storage_path=records,
                logging_config=LoggingConfig(log_level="CRITICAL"),  # on_rank says what is to be said
                # Every other start is ours to make, with as many ranks as there is room for then.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        STOP.begun = False
        waiting = Waiting(f"{counted(crew.ranks, 'rank')} to start")
        overseer = _Overseer(self, mailbox, crew, waiting)
        watching = Every(1.0, overseer.look, "overseer")
        try:
            trainer.fit()
            finished = _left(mailbox.ended)
            if finished is None:  # the mailbox died since: ranks that nobody asked to stop came to their end
                finished = not overseer.asked
            return ("finished", "") if finished else ("stopped", overseer.asked or "told to stop")
        except TrainingFailedError as error:
            failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
            for failure in failures.values():
                if isinstance(failure, ValueError) and not isinstance(failure, OSError):
                    raise failure from None
            cause = error.controller_failure if isinstance(error, ControllerError) else None
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                return "crashed", f"the room for {crew.ranks} rank(s) was taken before they started"
            hung = _left(mailbox.verdict)
            what = "; ".join(f"rank {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items()))
            if overseer.asked and not hung:
                # A node that went before the ranks had saved, as was announced: no failure of theirs.
                return "stopped", f"{overseer.asked}; {what or _last_line(error)}"
            return "crashed", hung or what or _last_line(error)
        finally:
            STOP.begun = False
            waiting.close()
            watching.close()


class _Overseer:
    """Watches a crew at work, from the driver, and tells it to stop when there is a reason."""

    def __init__(self, launcher: _Launcher, mailbox: Any, crew: Crew, waiting: Waiting) -> None:
        self.launcher, self.mailbox, self.crew = launcher, mailbox, crew
        self._waiting = waiting
        self.asked: str | None = None
        self._places: dict[int, str] = {}
        self._checked = time.monotonic()

    def look(self) -> None:
        """Look once; called every second from a thread."""
        import ray

        if not STOP.begun and ray.get(self.mailbox.begun.remote(), timeout=30):
            STOP.begun = True
        if self.launcher.limit:
            self.launcher.limit.needs_s = ray.get(self.mailbox.needs_s.remote(), timeout=30)
        if len(self._places) < self.crew.ranks:
            self._places = ray.get(self.mailbox.places.remote(), timeout=30)
        if self._places:
            self._waiting.close()  # the first rank says what it waits for
        if self.asked is None:
            self.asked = self._reason()
            if self.asked and not STOP.requested:  # which has been said
                log.info("telling the ranks to save and stop: %s", self.asked)
        if self.asked:  # every time: a mailbox that was started again has forgotten it
            ray.get(self.mailbox.ask.remote(self.asked), timeout=30)

    def _reason(self) -> str | None:
        import ray

        from cluster import capacity

        if STOP.requested:
            return STOP.reason
        leaving = capacity.draining()
        due = time.monotonic() - self._checked > self.launcher.terms.resize_check_s
        lost = sorted({node for node in self._places.values() if node in leaving})
        if lost:
            hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
            return f"node {', '.join(hosts.get(node, node) for node in lost)} is being taken away"
        if due:
            self._checked = time.monotonic()
            larger = self.launcher.recruiter.larger(self.crew, list(self._places.values()))
            if larger:
                return f"there is room for {larger} ranks instead of {self.crew.ranks}"
        return None


def _range(fewest: int, most: int) -> str:
    return str(fewest) if fewest == most else f"{fewest}-{most}"


def _left(word: Any) -> Any:
    """What was left in a mailbox, asked for by one of its methods; None where it does not answer."""
    import ray

    try:
        return ray.get(word.remote(), timeout=30)
    except ray.exceptions.RayError:
        return None


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'without a message'}"
