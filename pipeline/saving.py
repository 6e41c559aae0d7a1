"""Saving and loading of the training state by all ranks, with training going on in between.

Every rank writes its part to its node's own disk and goes on with training; a thread brings the part to the run's
folder, and rank 0's commits when all of them are there (pipeline/checkpoints.py).
"""

import functools
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import xxhash

from cluster.command import duration, log
from cluster.folders import Folder
from cluster.storage import StorageError
from pipeline import elastic, workers
from pipeline.agreement import on_all_ranks
from pipeline.checkpoints import FILES, Checkpoint, commit, newest, remove_uncommitted, retain
from pipeline.config import CheckpointSettings
from pipeline.engine import nonfinite_flag
from pipeline.optimizer import EMA
from pipeline.parts import DamagedCheckpointError, part_name, write_part
from pipeline.scratch import Scratch
from pipeline.workers import Worker

_RETRY_WAITS = (1.0, 4.0, 15.0)
"""Seconds before another try at a file that could not be brought to the run's folder."""


class CheckpointError(ValueError):
    """A checkpoint could not be written; the ones before it are as they were."""


@dataclass
class _Save:
    """A checkpoint on its way."""

    step: int
    target: Folder
    state: dict[str, Any]
    files: dict[str, int]
    began: float
    """By the monotonic clock."""
    brought: threading.Event = field(default_factory=threading.Event)
    """This rank's part is in the run's folder, or will never be."""
    given_up: threading.Event = field(default_factory=threading.Event)
    """Another rank's part never will be."""
    error: str | None = None
    committed: bool = False
    """On rank 0: it counts, whatever a rank believes of its own part."""
    thread: threading.Thread | None = None


class Checkpoints:
    """Saves and loads a run's training state. Every rank makes one, at the same time.

    Rank 0 clears away what runs that died left uncommitted: no other job may work in the folder.

    Args:
        folder: the run's `checkpoints` folder, which every rank reaches.
        settings: how many stay, and where parts are written first.
        worker: who this rank is.
        keep_every: checkpoints at multiples of this many steps stay.

    Attributes:
        scratch: where this rank's parts are written first.
        committed: on rank 0, step and time (Unix) of the checkpoint that was committed last; None before one was.
        longest_s: on rank 0, seconds from the beginning of a save to its commit, at most; None before the first.
    """

    def __init__(
        self, folder: Folder, settings: CheckpointSettings, worker: Worker, keep_every: int | None = None
    ) -> None:
        self.folder, self.settings, self.worker, self.keep_every = folder, settings, worker, keep_every
        self.committed: tuple[int, float] | None = None
        self.longest_s: float | None = None
        self._scratch = on_all_ranks(lambda: Scratch(settings.scratch, f"checkpoints-{worker.rank}"))
        self.scratch = self._scratch.path
        self._session = workers.from_all(secrets.token_hex(4))[0]
        self._saves = 0
        self._failed = False
        self._pending: _Save | None = None
        if worker.leads:
            remove_uncommitted(folder)

    def newest(self, before: Checkpoint | None = None) -> Checkpoint | None:
        """As the function `newest`, the same for all ranks: what rank 0 sees."""
        found: Any = None
        if self.worker.leads:
            try:
                found = newest(self.folder, before=before)
            except ValueError as error:
                found = error
        found = workers.from_all(found)[0]
        if isinstance(found, ValueError):
            raise found
        checkpoint: Checkpoint | None = found
        return checkpoint

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write this rank's part to the node's disk and let a thread bring it to the run's folder.

        Waits first for the checkpoint before, if that is still on its way. Should that one have failed, this one is
        tried all the same: what was wrong may have passed.

        Args:
            step: optimizer steps taken so far.
            state: what the manifest says beside the tensors, as JSON; "scores" in it are what keep_best goes by.

        Raises:
            CheckpointError: this one could not be written, or neither of the two before it.
        """
        try:
            self._settle()
            self._failed = False
        except CheckpointError as failure:  # all ranks have the same
            if self._failed:
                raise
            self._failed = True
            log.warning("%s. Trying that of step %d", failure, step)
        began = time.monotonic()
        assert not nonfinite_flag(engine).item(), "a state after a gradient that was not finite is not worth keeping"
        held = elastic.holdings(engine)
        pieces = held.share(self.worker.rank, self.worker.world_size)
        shapes = {piece.name: list(piece.shape) for piece in held.pieces}
        files, error = {}, None
        try:
            files = write_part(held, pieces, self.scratch, self.worker.rank)
        except OSError as caught:
            error = f"{self.scratch} on {workers.node()}: {caught.strerror or caught}"
        outcomes = workers.from_all((error, shapes))
        self._raise([error for error, _ in outcomes], step)
        state = {**state, "shapes": {name: shape for _, some in outcomes for name, shape in some.items()}}
        target = self.folder.child(f"step-{step:08d}-{self._session}-{self._saves:04d}")
        self._saves += 1
        save = self._pending = _Save(step, target, state, files, began)
        save.thread = threading.Thread(target=self._bring, args=(save,), name="vitforge-checkpoint", daemon=True)
        save.thread.start()
        if not self.settings.background:
            self._settle()

    def wait(self) -> None:
        """Until the checkpoint on its way is committed. All ranks call it.

        Raises:
            CheckpointError: it could not be.
        """
        self._settle()

    def close(self) -> None:
        """Remove what is left on the node's disk."""
        self._scratch.close()

    def load(
        self, engine: Any, checkpoint: Checkpoint, check: Callable[[Checkpoint], None] = lambda _: None
    ) -> Checkpoint:
        """Put a saved state into an engine, whatever layout either has. All ranks call it.

        Args:
            check: refuses a checkpoint that is fallen back to, by raising ValueError.

        Returns:
            The checkpoint that was loaded: an earlier one where this one's content turned out to be damaged.

        Raises:
            SettingsError: none is whole.
            StorageError: the storage fails.
        """
        began = time.perf_counter()
        while True:
            error: ValueError | None = None
            try:
                scalars = self._fill(engine, checkpoint)
            except (DamagedCheckpointError, StorageError) as caught:
                error = caught
            errors = [found for found in workers.from_all(error) if found is not None]
            if not errors:
                break
            for broken in errors:
                if not isinstance(broken, DamagedCheckpointError):
                    raise broken
            log.warning("%s; falling back to the checkpoint before it", errors[0])
            earlier = self.newest(before=checkpoint)
            assert earlier is not None
            check(earlier)
            checkpoint = earlier
        elastic.restart(engine, checkpoint.step, scalars)
        log.info("resumed from %s in %s", checkpoint, duration(time.perf_counter() - began))
        return checkpoint

    def _fill(self, engine: Any, checkpoint: Checkpoint) -> dict[str, float]:
        parts = checkpoint.parts()
        held = elastic.holdings(engine)
        known = parts.states()
        wanted = []
        for piece in held.pieces:
            for state, tensor in held.flats[piece.flat].items():
                # An average that is new begins with the weights; check_resumable knows of the change.
                source = elastic.WEIGHT if state == EMA and state not in known else state
                target = tensor[piece.offset : piece.offset + piece.count]
                if source in known:
                    wanted.append((piece.name, source, piece.start, target))
                else:
                    target.zero_()
        parts.read(wanted, "loading the checkpoint,")
        return {"step": float(checkpoint.step), **parts.scalars}

    # ---- the thread ------------------------------------------------------------------------------------------
    # There are no collectives in it: they would meet those of the training loop. Ranks hear of each other through
    # the folder.

    def _bring(self, save: _Save) -> None:
        try:
            for name in save.files:
                self._patiently(save, functools.partial(self._put, save, name))
            save.brought.set()
            if self.worker.leads:
                self._patiently(save, functools.partial(self._commit, save))
        except Exception as error:
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            save.error = f"{save.target} from {workers.node()}: {what}"
            log.warning("the checkpoint of step %d could not be written (%s)", save.step, save.error)
        finally:
            save.brought.set()  # after the error is: it is looked at then

    def _put(self, save: _Save, name: str) -> None:
        path = self.scratch / name
        if path.exists():  # or an earlier try had moved it already
            save.target.put(path, name, move=True)
        if save.target.size(name) != save.files[name]:
            raise OSError(f"{name} did not arrive whole")

    def _patiently(self, save: _Save, action: Callable[[], None]) -> None:
        """Do something that may fail for a while."""
        for wait in (*_RETRY_WAITS, None):
            try:
                action()
                return
            except Exception as error:
                if wait is None or save.given_up.wait(wait):
                    raise
                log.warning("%s could not be written yet (%s)", save.target, error)

    def _commit(self, save: _Save) -> None:
        parts = []
        for rank in range(self.worker.world_size):
            listing = f"{part_name(rank)}.json"
            pause = 0.02
            while (size := save.target.size(listing)) is None:
                if save.given_up.wait(pause):
                    return
                pause = min(2 * pause, 1.0)
            content = save.target.read_bytes(listing)
            numbers = f"{part_name(rank)}.bin"
            files = {numbers: save.target.size(numbers), listing: size}
            if len(content) != size or files[numbers] is None:
                raise OSError(f"the part of rank {rank} did not arrive whole")
            parts.append({"files": files, "digest": xxhash.xxh3_128_hexdigest(content)})
        commit(save.target, save.step, parts, save.state)
        save.committed, self.committed = True, (save.step, time.time())
        self.longest_s = max(self.longest_s or 0.0, time.monotonic() - save.began)
        try:
            kept = self.settings
            retain(self.folder, save.target, kept.keep, self.keep_every, kept.keep_best)
        except Exception as error:
            log.warning("checkpoints that need not stay could not be removed (%s); the next save does", error)

    # ---- the meeting of the ranks ----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait for the checkpoint on its way; all ranks learn how it went."""
        save = self._pending
        if save is None:
            return
        self._pending = None
        assert save.thread is not None
        save.brought.wait()
        errors = workers.from_all(save.error)
        if any(errors):
            save.given_up.set()
        save.thread.join()
        if workers.from_all(save.committed)[0]:
            return  # every part was there and whole: an answer that got lost on the way to its rank changes nothing
        if not any(errors):
            errors = workers.from_all(save.error)
        if any(errors) and self.worker.leads:
            try:
                save.target.remove_tree(FILES)
            except OSError as error:
                log.warning("%s could not be removed (%s); the next start does", save.target, error)
        self._raise(errors, save.step)

    def _raise(self, errors: list[str | None], step: int) -> None:
        for rank, error in enumerate(errors):
            if error is not None:
                self._scratch.empty()
                raise CheckpointError(
                    f"the checkpoint of step {step} could not be written, on rank {rank}: {error}. The checkpoints "
                    "before it are as they were: make room or put the storage right, then run the same command again"
                )
