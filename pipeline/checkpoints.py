"""The training state in the run's folder: committed or not there, and found again by a rerun.

    RUN/checkpoints/
        step-00000500-1f3a9c2e-0004/   a checkpoint; the end of its name is of the one save that wrote it
            rank-00000.bin, .json      a part for each rank (pipeline/parts.py)
            manifest.json              what the state is, every part's size and checksum: written last, it commits

Every rank writes its part to its node's own disk and goes on with training; a thread brings the part to the run's
folder, and rank 0's commits when all of them are there. A folder without a manifest counts for nothing, and is
removed by the next start. What a restart needs beside these files is a function of the step: the data position,
the augmentation, the learning rate, the average's decay and the seed of dropout.
"""

import functools
import importlib.metadata
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from cluster.command import duration, log
from cluster.folders import Folder
from cluster.settings import SettingsError
from cluster.storage import StorageError, json_bytes
from pipeline import elastic, workers
from pipeline.config import CheckpointSettings
from pipeline.engine import nonfinite_flag
from pipeline.optimizer import EMA
from pipeline.parts import DamagedCheckpointError, Parts, part_name, write_part
from pipeline.scratch import Scratch
from pipeline.workers import Worker

FORMAT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{8})-\d{4,}")
_RETRY_WAITS = (1.0, 4.0, 15.0)
"""Seconds before another try at a file that could not be brought to the run's folder."""


class CheckpointError(ValueError):
    """A checkpoint could not be written; the ones before it are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Folder
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """What was saved beside the tensors."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    @property
    def step(self) -> int:
        """Optimizer steps that were taken."""
        return int(self.manifest["step"])

    def parts(self) -> Parts:
        """Its tensors, to read from.

        Raises:
            DamagedCheckpointError: a part's list is not what was written.
        """
        return Parts(self.folder, self.manifest["parts"])

    def __str__(self) -> str:
        return str(self.folder)


# ----------------------------------------------------------------------------------------------------------------
# Finding
# ----------------------------------------------------------------------------------------------------------------


def newest(folder: Folder, *, before: Checkpoint | None = None, verify_from: int | None = None) -> Checkpoint | None:
    """The newest committed checkpoint of a run; a damaged one is passed over, loudly.

    Its files' sizes are checked here; their content is when it is loaded.

    Args:
        folder: the run's `checkpoints` folder.
        before: only those that come before this one, which turned out to be damaged.
        verify_from: those of this step and later are read whole, to be passed over if their content is damaged.

    Returns:
        None where none was ever committed.

    Raises:
        SettingsError: some were committed and none is whole, or one is of another format.
    """
    damaged = [str(before)] if before else []
    for name in _committed(folder)[::-1]:
        if before is not None and name >= _name_of(before):
            continue
        try:
            checkpoint = _open(folder.child(name))
            if verify_from is not None and checkpoint.step >= verify_from:
                checkpoint.parts().verify()
            return checkpoint
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            log.warning("%s; falling back to the checkpoint before it", error)
    if damaged:
        raise SettingsError(
            f"none of the {len(damaged)} checkpoint(s) in {folder} is whole ({damaged[0]}): bring the files back, or "
            "use another run.name to begin anew"
        )
    return None


def newest_step(folder: Folder) -> int:
    """The step of the newest committed checkpoint, damaged or not; -1 where there is none. Reads names only.

    Args:
        folder: the run's `checkpoints` folder.
    """
    return max((int(name.split("-")[1]) for name in _committed(folder)), default=-1)


def _name_of(checkpoint: Checkpoint) -> str:
    return checkpoint.folder.url.rstrip("/").rsplit("/", 1)[1]


def _committed(folder: Folder) -> list[str]:
    """Names of the folders with a manifest, by step."""
    names = folder.folders()
    for name in names:
        if re.fullmatch(r"step-\d{8}", name) and folder.size(f"{name}/state.json") is not None:
            raise SettingsError(
                f"checkpoint {folder}/{name} has format 1, this version of Vitforge reads format {FORMAT}: use "
                "another run.name, or the version that wrote it"
            )
    return [name for name in names if _NAME.fullmatch(name) and folder.size(f"{name}/{MANIFEST}") is not None]


def _open(folder: Folder) -> Checkpoint:
    """A checkpoint whose files are there with their sizes.

    Raises:
        DamagedCheckpointError: they are not.
        SettingsError: it is of another format.
    """
    try:
        manifest = folder.read_json(MANIFEST)
        found, parts = manifest["format"], manifest["parts"]
        whole = manifest.get("digest") == _digest(manifest)
    except (StorageError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError):
            raise  # the object store fails, which says nothing of what lies there
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: its {MANIFEST} cannot be read") from error
    if found != FORMAT:
        raise SettingsError(f"checkpoint {folder} has format {found}, this version of Vitforge reads format {FORMAT}")
    if not whole:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} is not what was written")
    sizes = folder.tree()
    for part in parts:
        for name, size in part["files"].items():
            if sizes.get(name) != size:
                what = f"has {sizes[name]:,} bytes instead of {size:,}" if name in sizes else "is missing"
                raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} {what}")
    return Checkpoint(folder, manifest)


def _digest(manifest: dict[str, Any]) -> str:
    content = json_bytes({key: value for key, value in manifest.items() if key != "digest"})
    return str(xxhash.xxh3_128_hexdigest(content))


# ----------------------------------------------------------------------------------------------------------------
# Saving and loading, by all ranks
# ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Save:
    """A checkpoint on its way."""

    step: int
    target: Folder
    state: dict[str, Any]
    files: dict[str, int]
    brought: threading.Event = field(default_factory=threading.Event)
    """This rank's part is in the run's folder, or will never be."""
    given_up: threading.Event = field(default_factory=threading.Event)
    """Another rank's part never will be."""
    error: str | None = None
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
        stall_seconds: how long training has waited for checkpoints since this was made.
        scratch: where this rank's parts are written first.
        committed: on rank 0, step and time (Unix) of the checkpoint that was committed last; None before one was.
    """

    def __init__(
        self, folder: Folder, settings: CheckpointSettings, worker: Worker, keep_every: int | None = None
    ) -> None:
        self.folder, self.settings, self.worker, self.keep_every = folder, settings, worker, keep_every
        self.stall_seconds = 0.0
        self.committed: tuple[int, float] | None = None
        self._scratch = Scratch(settings.scratch, f"checkpoints-{worker.rank}")
        self.scratch = self._scratch.path
        self._session = workers.from_all(secrets.token_hex(4))[0]
        self._saves = 0
        self._pending: _Save | None = None
        if worker.leads:
            committed = set(_committed(folder))
            for name in folder.folders():
                if _NAME.fullmatch(name) and name not in committed:
                    log.info("removing %s/%s, which was never committed", folder, name)
                    folder.child(name).remove_tree()

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

        Waits first for the checkpoint before, if that is still on its way.

        Args:
            step: optimizer steps taken so far.
            state: what the manifest says beside the tensors, as JSON; "scores" in it are what keep_best goes by.

        Raises:
            CheckpointError: this one could not be written, or the one before it not brought to its place.
        """
        began = time.perf_counter()
        self._settle()
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
        save = self._pending = _Save(step, target, state, files)
        save.thread = threading.Thread(target=self._bring, args=(save,), name="vitforge-checkpoint", daemon=True)
        save.thread.start()
        if not self.settings.background:
            self._settle()
        self.stall_seconds += time.perf_counter() - began

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
            try:
                for name in save.files:
                    self._patiently(save, functools.partial(self._put, save, name))
            finally:
                save.brought.set()
            if self.worker.leads:
                self._patiently(save, functools.partial(self._commit, save))
        except Exception as error:
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            save.error = f"{save.target} from {workers.node()}: {what}"
            log.warning("the checkpoint of step %d could not be written (%s)", save.step, save.error)

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
        manifest = {"format": FORMAT, "step": save.step, "parts": parts, "state": save.state}
        save.target.write_json(MANIFEST, {**manifest, "digest": _digest(manifest)})
        self.committed = (save.step, time.time())
        try:
            self._retain(save)
        except Exception as error:
            log.warning("checkpoints that need not stay could not be removed (%s); the next save does", error)

    def _retain(self, save: _Save) -> None:
        """Remove what need not stay, now that a newer one is committed."""
        opened = []
        for name in _committed(self.folder):
            folder = self.folder.child(name)
            if name != save.target.url.rsplit("/", 1)[1] and int(name.split("-")[1]) >= save.step:
                _remove(folder)  # it was damaged and passed over, or the run would have gone on from there
                continue
            try:
                opened.append(Checkpoint(folder, folder.read_json(MANIFEST)))
            except StorageError as error:
                log.warning("%s stays: %s", folder, error)
        stay = opened[-self.settings.keep :]
        if self.keep_every is not None:
            stay += [checkpoint for checkpoint in opened if checkpoint.step % self.keep_every == 0]
        if (metric := self.settings.keep_best) is not None:
            sign = -1 if metric == "heldout/loss" else 1
            scored = [checkpoint for checkpoint in opened if metric in checkpoint.state.get("scores", {})]
            stay += sorted(scored, key=lambda checkpoint: sign * checkpoint.state["scores"][metric])[-1:]
        for checkpoint in opened:
            if checkpoint not in stay:
                _remove(checkpoint.folder)

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
        if not any(errors):
            errors = workers.from_all(save.error)
        if any(errors) and self.worker.leads:
            try:
                save.target.remove_tree()
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


def _remove(folder: Folder) -> None:
    folder.remove(MANIFEST)  # first, so that nobody takes the rest for a checkpoint
    folder.remove_tree()


# ----------------------------------------------------------------------------------------------------------------
# What is in one
# ----------------------------------------------------------------------------------------------------------------


def full_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's weights in fp32, put together from the parts of all ranks: their average where one was kept.

    Raises:
        DamagedCheckpointError: a part is not what was written.
    """
    parts = checkpoint.parts()
    state = EMA if EMA in parts.states() else elastic.WEIGHT
    weights = {name: torch.empty(shape) for name, shape in checkpoint.state["shapes"].items()}
    parts.read([(name, state, 0, weight.view(-1)) for name, weight in weights.items()], "reading the weights,")
    return weights


def check_resumable(checkpoint: Checkpoint, expected: dict[str, Any], allow_changes: bool = False) -> None:
    """Refuse a checkpoint that is not of this run as it is set up now. World size and ZeRO stage may change.

    Args:
        expected: keys of the state with the values they must have; only these are compared. "settings" are those
            that change the result.
        allow_changes: other settings, another precision and another corpus are allowed, loudly.

    Raises:
        SettingsError: naming what differs and what would do.
    """
    where = f"checkpoint {checkpoint.folder}"
    found = checkpoint.state
    if found["architecture"] != expected["architecture"]:
        changed = _differences(found["architecture"], expected["architecture"])
        raise SettingsError(f"{where} is of another architecture ({changed}): give this run another run.name")
    batches = [state["settings"]["training"]["global_batch"] for state in (found, expected)]
    if batches[0] != batches[1]:
        raise SettingsError(
            f"{where} was written with training.global_batch = {batches[0]}, this run has {batches[1]}, by which no "
            f"step would have the samples that come next: use {batches[0]} again, or another run.name"
        )
    changes = []
    if found["corpus_hash"] != expected["corpus_hash"]:
        changes.append(f"on another corpus ({found['corpus_hash'][:12]}, not {expected['corpus_hash'][:12]})")
    if found["settings"] != expected["settings"]:
        changes.append(f"with other settings ({_differences(found['settings'], expected['settings'])})")
    if found["precision"] != expected.get("precision", found["precision"]):
        changes.append(f"with training.precision = {found['precision']}, not {expected['precision']}")
    if changes and not allow_changes:
        raise SettingsError(
            f"{where} was written {', and '.join(changes)}: set that back, use another run.name, or go on with the "
            "change by run.allow_changes=true"
        )
    for change in changes:
        log.warning("%s was written %s; the run goes on with the change", where, change)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += [_differences(before, after, f"{prefix}{key}.")] if before != after else []
        elif before != after:
            changes.append(f"{prefix}{key} was {before!r}, is {after!r}")
    return "; ".join(changes)


def versions() -> dict[str, str]:
    """Versions of the libraries that a training state depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy")}
