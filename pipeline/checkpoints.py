"""The training state on disk: complete or absent, and found again by a rerun.

    RUN/checkpoints/
        step-00000500/            a checkpoint: renamed to this name when all of it is there
            state.json            step, samples consumed, corpus, settings, layout, world size, versions, files
            zero/                 DeepSpeed's files: one part a rank
        step-00000600.partial/    one that is being written, or was when the run died: removed by the next save

What a restart needs beside these files is a function of the step: the data position, the augmentation, the
learning rate and the seed of dropout.
"""

import contextlib
import importlib.metadata
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.command import log
from cluster.folders import Folder
from cluster.settings import SettingsError
from cluster.storage import sync_folder, sync_tree, write_json
from pipeline.workers import Worker

FORMAT = 1
_TAG = "zero"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were taken."""
        return int(self.state["step"])


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not all there as they were written."""


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run whose files are all there; one that was damaged is passed over, loudly.

    Returns:
        None where there is no checkpoint.

    Raises:
        SettingsError: there are checkpoints and none is whole, or one is of another format.
    """
    damaged = []
    for path in _found(folder)[::-1]:
        try:
            return _open(path)
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
    """The step of the newest checkpoint of a run, damaged or not; -1 where there is none. Reads names only."""
    found = [name for name in folder.child("checkpoints").folders() if not name.endswith(_PARTIAL)]
    return int(max(found).removeprefix("step-")) if found else -1


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*[0-9]"))


def _open(path: Path) -> Checkpoint:
    """A checkpoint whose files are there with their sizes.

    Raises:
        DamagedCheckpointError: they are not.
        SettingsError: it is of another format.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        files: dict[str, int] = state["files"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} has no readable state.json") from error
    if state.get("format") != FORMAT:
        raise SettingsError(
            f"checkpoint {path} has format {state.get('format')}, this version of Vitforge reads format {FORMAT}"
        )
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} {what}")
    return Checkpoint(path, state)


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], worker: Worker, keep: int) -> None:
    """Write the state of all ranks and make it count. Every rank must call it, and all see the same folder.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps taken so far.
        state: what state.json says beside the step.
        keep: how many of the newest checkpoints stay.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    if worker.leads:
        for leftover in folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
    dist.barrier()
    if worker.leads:
        # DeepSpeed leaves a copy of its conversion script beside the states.
        (partial / "zero_to_fp32.py").unlink(missing_ok=True)
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        write_json(partial / "state.json", {"format": FORMAT, "step": step, "files": files, **state})
        sync_tree(partial)
        # What stands at this step or after it was damaged, or the run would have gone on from there.
        for passed_over in [path for path in _found(folder) if path.name >= final.name]:
            shutil.rmtree(passed_over)
        partial.rename(final)
        sync_folder(folder)
        for old in _found(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(engine: Any, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights and optimizer states into an engine of the same layout. All ranks call it.

    Raises:
        DamagedCheckpointError: DeepSpeed did not find all of it.
    """
    path, _ = engine.load_checkpoint(str(checkpoint.folder), tag=_TAG, load_lr_scheduler_states=False)
    if path is None or engine.global_steps != checkpoint.step:
        raise DamagedCheckpointError(
            f"checkpoint {checkpoint.folder} could not be loaded whole: remove it, and the run goes on from the one "
            "before"
        )


def full_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's weights in fp32, put together from the parts of all ranks (their master weights where kept)."""
    from pipeline.engine import prepare_deepspeed

    prepare_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    parts = checkpoint.folder / _TAG
    if any(parts.glob("*zero_pp_rank*optim_states.pt")):
        quiet = io.StringIO()  # it prints how it goes about it
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder), tag=_TAG)
    else:
        # Our own training state, hence trusted: DeepSpeed keeps Python objects beside the tensors.
        weights = torch.load(parts / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    return {name: tensor.detach().to(torch.float32).contiguous().clone() for name, tensor in weights.items()}


def check_resumable(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """Refuse a checkpoint that is not of this run as it is set up now.

    Args:
        expected: keys of state.json with the values they must have; only these are compared. "settings" are those
            that change the result.

    Raises:
        SettingsError: naming what differs and what would do.
    """
    where = f"checkpoint {checkpoint.folder}"
    found = checkpoint.state
    if found["architecture"] != expected["architecture"]:
        changed = _differences(found["architecture"], expected["architecture"])
        raise SettingsError(f"{where} is of another architecture ({changed}): give this run another run.name")
    if found["corpus_hash"] != expected["corpus_hash"]:
        raise SettingsError(
            f"{where} was trained on another corpus ({found['corpus_hash'][:12]}, not "
            f"{expected['corpus_hash'][:12]}): give this run another run.name, or the old corpus as data.corpus"
        )
    if found["settings"] != expected["settings"]:
        changed = _differences(found["settings"], expected["settings"])
        raise SettingsError(
            f"{where} was written with other settings ({changed}): set them back, or use another run.name"
        )
    for key, name in (
        ("world_size", "run.workers"),
        ("zero_stage", "training.zero_stage"),
        ("precision", "training.precision"),
    ):
        if key in expected and found[key] != expected[key]:
            raise SettingsError(
                f"{where} was written with {name} = {found[key]}, this run has {expected[key]}: use {found[key]} again"
            )


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
