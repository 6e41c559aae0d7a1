"""Which parent a fine-tuning starts from: the one that it is told, or the one that it began with.

An alias may have moved since the run began, and the parent may be gone: neither matters to a run that is told the same.
Told another one, a run that has a checkpoint refuses; one that has none begins anew with it.
"""

from dataclasses import dataclass
from typing import Any

from cluster.command import log
from cluster.folders import Folder
from cluster.settings import SettingsError
from cluster.storage import StorageError
from models.vit import VitConfig
from pipeline import checkpoints, packages
from pipeline.config import FinetuneSettings
from pipeline.run_files import INITIAL_WEIGHTS, read_run_record
from pipeline.run_settings import SETTINGS

Colors = tuple[float, float, float]
_POSITION = ("position_interpolation", "position_antialias")
"""Settings that decide how the parent's weights become initial ones."""


@dataclass(frozen=True)
class Parent:
    """What a fine-tuning starts from."""

    settings: FinetuneSettings
    """With the parent in the words that the run began with, where that is the same one."""
    uri: str
    """What to load, models:/NAME/VERSION where the run has begun."""
    run: str | None = None
    """The MLflow run that made it, as far as the run has it."""
    architecture: VitConfig | None = None
    """Of the fine-tuning when it began, which has the parent's in all that cannot be chosen; None where the parent must
    be loaded."""
    colors: tuple[Colors, Colors] | None = None
    """Mean and deviation of the parent's preprocessing, as far as the run has them."""
    has_checkpoint: bool = False


def choose_parent(settings: FinetuneSettings, folder: Folder) -> Parent:
    """The parent of a run.

    Args:
        folder: the run's.

    Raises:
        SettingsError: it has a checkpoint, and is told another parent.
        PackageError: it is told a parent in other words, and those name none.
    """
    record = read_run_record(folder)
    if record is None or record["parent"] is None:
        return Parent(settings, settings.parent)
    newest = checkpoints.newest(folder.child("checkpoints"))
    asked = _asked(folder, record)
    if settings.parent not in (asked, record["parent"]):
        told = packages.resolve(settings.parent).uri if settings.parent.startswith("models:") else settings.parent
        if told != record["parent"]:
            if newest is not None:
                raise SettingsError(
                    f"{folder} is the run of a fine-tuning of {record['parent']}, and has a checkpoint; parent = "
                    f"{settings.parent!r} is {told}: give parent={asked} to go on, or another run.name"
                )
            log.info("this run began with %s and has no checkpoint: it begins anew with %s", record["parent"], told)
            return Parent(settings, settings.parent)
    log.info("this run began with %s and goes on with it", record["parent"])
    settings = settings.model_copy(update={"parent": asked})
    unknown = Parent(settings, record["parent"], has_checkpoint=newest is not None)
    if folder.size(INITIAL_WEIGHTS) is None:
        return unknown
    if "architecture" in record:
        architecture, colors = record["architecture"], record["colors"]
    elif newest is not None:  # begun by an older version, which wrote that into checkpoints only
        data = newest.state["settings"]["data"]
        architecture, colors = newest.state["architecture"], (data["mean"], data["std"])
    else:
        return unknown
    if newest is None and not _adapted_alike(folder, settings):
        return unknown
    mean, std = (tuple(values) for values in colors)
    return Parent(
        settings,
        record["parent"],
        record.get("parent_run"),
        VitConfig.from_json(architecture),
        (mean, std),
        newest is not None,
    )


def _saved(folder: Folder) -> dict[str, Any]:
    try:
        saved = folder.read_json(SETTINGS) if folder.size(SETTINGS) is not None else {}
    except StorageError:
        return {}
    return saved if isinstance(saved, dict) else {}


def _asked(folder: Folder, record: dict[str, Any]) -> str:
    """The parent in the words of the command that began the run."""
    asked = _saved(folder).get("parent")
    return asked if isinstance(asked, str) else str(record["parent"])


def _adapted_alike(folder: Folder, settings: FinetuneSettings) -> bool:
    """Whether the initial weights were made of the parent's in the way that the settings say."""
    saved = _saved(folder)
    return all(saved.get(key, type(settings).model_fields[key].default) == getattr(settings, key) for key in _POSITION)
