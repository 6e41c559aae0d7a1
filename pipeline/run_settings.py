"""The record of the settings that a run goes on with: RUN/settings.json, and MLflow's tags where they were changed.

settings.json has what holds now. What held before it is kept, in the order in which it was replaced:

    RUN/earlier-settings/until-step-00000120.json    held for the first 120 steps
    RUN/earlier-settings/until-step-00000120-2.json  replaced at the same step, before another was taken

MLflow's parameters cannot be changed. A run that has taken no step that counts gets a new tracking run where a setting
that decides what it computes is another; later each setting that is changed becomes a tag, vitforge.changed.KEY, which
says from which step on.
"""

from collections.abc import Mapping
from typing import Any

from cluster.command import log
from cluster.folders import Folder, at_hand
from cluster.settings import Settings, fill_saved
from cluster.storage import StorageError
from pipeline import tracking

SETTINGS = "settings.json"
EARLIER = "earlier-settings"
"""Folder of those that held before, in the run's."""
_WHERE_AND_WHEN = ("checkpoint", "evaluation", "health", "log", "run", "registry")
"""Sections that do not change what is computed."""
_LONGEST_TAG = 5000
_MOST_TAGS = 50
"""Settings that are named at most: another corpus of a mixture may change all of them."""

Changes = dict[str, tuple[Any, Any]]
"""By dotted key: what held, and what holds."""


def changes_since(folder: Folder, settings_type: type[Settings], values: Mapping[str, Any]) -> Changes:
    """What differs from the settings that the run's folder has; nothing where it has none that can be read.

    Args:
        settings_type: whose values they are: what an older version did not save means what it did then.
        values: the settings as they are recorded.
    """
    try:
        saved = folder.read_json(SETTINGS) if folder.size(SETTINGS) is not None else None
    except StorageError as error:
        log.warning("%s; it is written anew", error)
        return {}
    if not isinstance(saved, dict):
        return {}
    before = dict(tracking.flatten(fill_saved(settings_type, saved, values)))
    now = dict(tracking.flatten(values))
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def decides(changes: Changes) -> bool:
    """Whether any of them changes what a run computes."""
    return any(key.partition(".")[0] not in _WHERE_AND_WHEN for key in changes)


def keep_settings(folder: Folder, values: Mapping[str, Any], changes: Changes, step: int) -> list[str]:
    """Write settings.json where it is not there or others hold, after what held before was put aside.

    Args:
        step: optimizer steps that were taken with what held.

    Returns:
        Names in the run's folder of what was written.
    """
    there = folder.size(SETTINGS) is not None
    if there and not changes:
        return []
    written = [SETTINGS]
    if there and changes:
        earlier = folder.read_json(SETTINGS)
        number, name = 1, f"{EARLIER}/until-step-{step:08d}.json"
        while folder.size(name) is not None and folder.read_json(name) != earlier:
            number += 1
            name = f"{EARLIER}/until-step-{step:08d}-{number}.json"
        folder.write_json(name, earlier)
        written.append(name)
    folder.write_json(SETTINGS, values)
    return written


def tell_changes(run: tracking.Run, folder: Folder, changes: Changes, written: list[str], step: int) -> None:
    """Bring the record to MLflow: the files, and a tag for each setting that is another."""
    for name in written:
        with at_hand(folder, name) as path:
            run.artifact(path, EARLIER if name.startswith(EARLIER) else None)
    if not changes:
        return
    named = "; ".join(f"{key}: {was!r} to {now!r}" for key, (was, now) in changes.items())
    log.info("settings that are others than before, from step %d on: %s", step, named[:_LONGEST_TAG])
    tags = run.tags()
    for key, (was, now) in list(changes.items())[:_MOST_TAGS]:
        tag = f"vitforge.changed.{key}"
        story = tags.get(tag, str(was))
        run.tag(tag, f"{story}, from step {step} on {now}"[-_LONGEST_TAG:])
    if len(changes) > _MOST_TAGS:
        run.tag("vitforge.changed", f"{len(changes)} settings at step {step}: see the file {SETTINGS}")
