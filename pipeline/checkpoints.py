"""The training state in the run's folder: committed or not there, and found again by a rerun.

    RUN/checkpoints/
        step-00000500-1f3a9c2e-0004/   a checkpoint; the end of its name is of the one save that wrote it
            rank-00000.bin, .json      a part for each rank (pipeline/parts.py)
            manifest.json              what the state is, every part's size and checksum: written last, it commits

pipeline/saving.py writes them. A folder without a manifest counts for nothing, and is removed by the next start.
What a restart needs beside these files is a function of the step: the data position, the augmentation, the learning
rate, the average's decay and the seed of dropout.
"""

import contextlib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from cluster.command import log
from cluster.folders import Folder
from cluster.paths import shown
from cluster.records import check_record
from cluster.settings import Settings, SettingsError, fill_saved
from cluster.storage import StorageError, json_bytes, parse_json
from models.vit import VitConfig
from pipeline import elastic
from pipeline.checkpoint_records import CheckpointManifest, ResumableState, check_part_files, elements
from pipeline.config import LOWER_IS_BETTER
from pipeline.optimizer import EMA
from pipeline.parts import DamagedCheckpointError, Parts, part_name

FORMAT = 2
MANIFEST = "manifest.json"
FILES = re.compile(r"manifest\.json|rank-\d{5,}\.(bin|json)")
"""The files of a checkpoint."""
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{8})-\d{4,}")


class UnreadableError(StorageError, OSError):
    """The storage does not give a checkpoint that is there; worth another try later."""


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
        UnreadableError: the storage fails.
    """
    damaged = [str(before)] if before else []
    for name in _committed(folder)[::-1]:
        if before is not None and name >= _last_name(before.folder):
            continue
        try:
            checkpoint = _open(folder.child(name))
            if verify_from is not None and checkpoint.step >= verify_from:
                checkpoint.parts().verify()
            return checkpoint
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            log.warning("%s; falling back to the checkpoint before it", error)
        except (OSError, StorageError) as error:
            raise UnreadableError(
                f"checkpoint {folder}/{name} cannot be read now ({error}): the storage fails. Put that right, then run "
                "the same command again: the run goes on from this checkpoint"
            ) from error
    if damaged:
        raise SettingsError(
            f"none of the {len(damaged)} checkpoint(s) in {folder} is whole ({damaged[0]}): bring the files back, or "
            "use another run.name to begin anew"
        )
    return None


def best(folder: Folder, score: str) -> Checkpoint | None:
    """The whole checkpoint of a run that is best by a score; None where none has it. Of equal ones the newest.

    Args:
        folder: the run's `checkpoints` folder.

    Raises:
        UnreadableError: the storage fails.
    """
    opened = []
    try:
        for name in _committed(folder):
            with contextlib.suppress(DamagedCheckpointError):
                opened.append(_open(folder.child(name)))
        for checkpoint in reversed(_by_score(opened, score)):
            try:
                checkpoint.parts().verify()
                return checkpoint
            except DamagedCheckpointError as error:
                log.warning("%s; falling back to the next best", error)
    except (OSError, StorageError) as error:
        raise UnreadableError(
            f"the checkpoints in {folder} cannot be read now ({error}): the storage fails. Put that right, then run "
            "the same command again"
        ) from error
    return None


def is_better(score: str, value: float, than: float) -> bool:
    """Whether one value of a score is better than another: more, or less of a loss."""
    return value < than if score in LOWER_IS_BETTER else value > than


def _by_score(opened: list[Checkpoint], score: str) -> list[Checkpoint]:
    """Those that have the score, the best last."""
    sign = -1 if score in LOWER_IS_BETTER else 1
    scored = [checkpoint for checkpoint in opened if score in checkpoint.state.get("scores", {})]
    finite = [checkpoint for checkpoint in scored if math.isfinite(checkpoint.state["scores"][score])]
    return sorted(finite, key=lambda checkpoint: sign * checkpoint.state["scores"][score])


def newest_name(folder: Folder) -> str:
    """The name of the newest committed checkpoint, damaged or not; empty where there is none. Reads names only.

    Args:
        folder: the run's `checkpoints` folder.
    """
    return max(_committed(folder), key=_step_of, default="")


def _last_name(folder: Folder) -> str:
    return folder.url.rstrip("/").rsplit("/", 1)[1]


def _step_of(name: str) -> int:
    return int(name.split("-")[1])


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
        StorageError: or OSError, the storage fails.
    """
    try:
        content = folder.read_bytes(MANIFEST)
    except StorageError as error:
        if folder.size(MANIFEST) is not None:
            raise  # it is there: the storage fails, which says nothing of what lies there
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: its {MANIFEST} is missing") from error
    manifest = _parsed(folder, content)
    sizes = folder.tree()
    for part in manifest["parts"]:
        for name, size in part["files"].items():
            # What a failing storage leaves out of a list is asked for by name, which then is an error.
            there = sizes[name] if name in sizes else folder.size(name)
            if there != size:
                what = "is missing" if there is None else f"has {there:,} bytes instead of {size:,}"
                raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} {what}")
    return Checkpoint(folder, manifest)


def _parsed(folder: Folder, content: bytes) -> dict[str, Any]:
    """What a manifest says: the one reader of it.

    Raises:
        DamagedCheckpointError: it is none, or not what was written.
        SettingsError: it is of another format.
    """
    damaged = f"checkpoint {folder} is damaged: its {MANIFEST}"
    try:
        manifest = parse_json(content, MANIFEST)
        found = manifest.get("format") if isinstance(manifest, dict) else None
        whole = isinstance(manifest, dict) and manifest.get("digest") == _digest(manifest)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{damaged} is no manifest") from error
    if type(found) is not int:
        raise DamagedCheckpointError(f"{damaged} is no manifest")
    if found != FORMAT:
        raise SettingsError(f"checkpoint {folder} has format {found}, this version of Vitforge reads format {FORMAT}")
    if not whole:
        raise DamagedCheckpointError(f"{damaged} is not what was written")
    record = check_record(CheckpointManifest, manifest, damaged, DamagedCheckpointError)
    if (problem := check_part_files(record, part_name)) is not None:
        raise DamagedCheckpointError(f"{damaged}: {problem}")
    value: dict[str, Any] = manifest
    return value


def _digest(manifest: dict[str, Any]) -> str:
    content = json_bytes({key: value for key, value in manifest.items() if key != "digest"})
    return str(xxhash.xxh3_128_hexdigest(content))


# ----------------------------------------------------------------------------------------------------------------
# Committing and removing
# ----------------------------------------------------------------------------------------------------------------


def commit(folder: Folder, step: int, parts: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Make a checkpoint count: all of its parts are in its folder.

    Args:
        parts: for each rank its files' bytes by name, and its list's xxh3_128.
        state: what there is to say beside the tensors.
    """
    manifest = {"format": FORMAT, "step": step, "parts": parts, "state": state}
    folder.write_json(MANIFEST, {**manifest, "digest": _digest(manifest)})


def retain(folder: Folder, newest: Folder, keep: int, keep_every: int | None, keep_best: str | None) -> None:
    """Remove what need not stay, now that a newer one is committed.

    Args:
        newest: that one; what stands at its step or after it was damaged and passed over.
        keep: how many of the newest stay.
        keep_every: those at multiples of this many steps stay.
        keep_best: the one that is best by this score stays.
    """
    opened = []
    for name in _committed(folder):
        child = folder.child(name)
        if name != _last_name(newest) and _step_of(name) >= _step_of(_last_name(newest)):
            _remove(child)
            continue
        try:
            opened.append(Checkpoint(child, _parsed(child, child.read_bytes(MANIFEST))))
        except (StorageError, DamagedCheckpointError, SettingsError) as error:
            log.warning("%s stays: %s", child, error)
    stay = opened[-keep:]
    if keep_every is not None:
        stay += [checkpoint for checkpoint in opened if checkpoint.step % keep_every == 0]
    if keep_best is not None:
        stay += _by_score(opened, keep_best)[-1:]
    for checkpoint in opened:
        if checkpoint not in stay:
            _remove(checkpoint.folder)


def remove_uncommitted(folder: Folder) -> None:
    """Remove what saves that died left. No other job may work in the folder."""
    folder.remove_unfinished(deep=True)  # on an object store a folder shows only once a file of it is whole
    committed = set(_committed(folder))
    for name in folder.folders():
        if _NAME.fullmatch(name) and name not in committed:
            log.info("removing %s/%s, which was never committed", folder, name)
            folder.child(name).remove_tree(FILES)


def _remove(folder: Folder) -> None:
    if folder.local is not None and folder.local.is_symlink():
        return  # to a checkpoint of another run, perhaps
    folder.remove(MANIFEST)  # first, so that nobody takes the rest for a checkpoint
    folder.remove_tree(FILES)


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
    for name, shape in checkpoint.state["shapes"].items():
        if elements(shape) != parts.count(name, state):  # memory is taken for what is there
            raise DamagedCheckpointError(
                f"checkpoint {checkpoint.folder} is damaged: it has {parts.count(name, state):,} of the "
                f"{elements(shape):,} elements of {state} of {name}"
            )
    weights = {name: torch.empty(shape) for name, shape in checkpoint.state["shapes"].items()}
    parts.read([(name, state, 0, weight.view(-1)) for name, weight in weights.items()], "reading the weights,")
    return weights


def check_resumable(
    checkpoint: Checkpoint, expected: dict[str, Any], settings_type: type[Settings], allow_changes: bool = False
) -> None:
    """Refuse a checkpoint that is not of this run as it is set up now. World size and ZeRO stage may change.

    Args:
        settings_type: whose values "settings" are; what an older version did not save means what it did then.
        expected: keys of the state with the values they must have; only these are compared. "settings" are those
            that change the result.
        allow_changes: other settings, another precision and another corpus are allowed, loudly.

    Raises:
        SettingsError: naming what differs and what would do.
    """
    where = f"checkpoint {checkpoint.folder}"
    check_record(ResumableState, checkpoint.state, f"{where} is none of a run: its {MANIFEST}: state", SettingsError)
    found = {
        **checkpoint.state,
        "architecture": _complete_architecture(checkpoint.state["architecture"]),
        "settings": fill_saved(settings_type, checkpoint.state["settings"], expected["settings"]),
    }
    if found["architecture"] != expected["architecture"]:
        changed = _differences(found["architecture"], expected["architecture"])
        raise SettingsError(
            f"{where} is of another architecture ({changed}): give this run another run.name, or "
            f"{_own_settings(checkpoint)}"
        )
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
            f"change by run.allow_changes=true. Where it is the recipe that changed, {_own_settings(checkpoint)}"
        )
    for change in changes:
        log.warning("%s was written %s; the run goes on with the change", where, change)


def _own_settings(checkpoint: Checkpoint) -> str:
    run = checkpoint.folder.url.rstrip("/").rsplit("/", 2)[0]
    return f"give {run}/settings.json as the recipe: those are the settings that the run has"


def _complete_architecture(saved: dict[str, Any]) -> dict[str, Any]:
    """With the fields that came later; as it is where it is not of this version's fields."""
    try:
        return VitConfig.from_json(saved).to_json()
    except ValueError:
        return saved


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += [_differences(before, after, f"{prefix}{key}.")] if before != after else []
        elif before != after:
            changes.append(f"{prefix}{key} was {shown(before)}, is {shown(after)}")
    return "; ".join(changes)
