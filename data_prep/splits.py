"""Which files of a source are one split: train and validation that lie beside each other never become one corpus."""

import fnmatch
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import yaml
from braceexpand import braceexpand

from cluster.command import log
from cluster.folders import Folder
from cluster.paths import shown
from cluster.storage import StorageError
from data_prep.listing import SourceError
from data_prep.split_names import SPLITS, canonical_split, split_of_file, split_of_folder

ALL = "all"
"""What split= says to take the files of all splits."""
_INFO = "_info.json"
_ENERGON = ".nv-meta/split.yaml"
_EXAMPLES = 3
_LARGEST = 1 << 24
"""Bytes of a description."""
_MOST_TARS = 1_000_000
"""Names that one pattern of a description stands for."""


def suggested(source: str, *settings: str, program: str = "shard") -> str:
    """A command that would do, for messages."""
    return " ".join(["python", f"data_prep/{program}.py", shlex.quote(source), "DESTINATION", *settings])


def one_split(
    names: Sequence[str],
    *,
    split: str | None,
    place: str,
    pattern: str | None = None,
    known: Mapping[str, str] | None = None,
    program: str = "shard",
) -> list[str]:
    """The files of the split that was asked for; all of them where they are of one split, or of none that is named.

    Args:
        names: of the files, all of one kind.
        split: what was asked for, or None; "all" takes the files of all splits.
        place: of the source as it was given, for messages.
        pattern: that chose them, or None. It may name several splits: '{train,val}-*.tar' asks for both.
        known: the splits of files that a description beside them names.
        program: "shard" or "index".

    Raises:
        SourceError: they are of several splits and none was asked for, or none is of the one that was.
    """
    splits = {name: (known or {}).get(name) or split_of_file(name) for name in names}
    groups: dict[str | None, list[str]] = {}
    for name, found in splits.items():
        groups.setdefault(found, []).append(name)
    if split == ALL:
        if len(groups) > 1:
            log.info("%s: files of all splits, as split=all says: %s", place, _in_words(groups))
        return list(names)
    if split is not None:
        chosen = [name for name in names if splits[name] in (canonical_split(split), split)]
        if not chosen:
            raise SourceError(f"split = {split}: source {place} has no file of it, but {_in_words(groups)}")
        log.info("%s: the %d files of split %s, of %d", place, len(chosen), split, len(names))
        return chosen
    if len(groups) < 2 or (pattern is not None and _says_all(pattern, splits)):
        return list(names)
    named = in_order(group for group in groups if group is not None)
    commands = [suggested(place, f"split={group}", program=program) for group in [*named[:3], ALL]]
    raise SourceError(
        f"source {place} has files of several splits: {_in_words(groups)}. They are not joined unless you say so. Give "
        f"one of:\n  " + "\n  ".join(commands) + "\nor a pattern in quotes that only the files of one split match"
    )


def in_order(splits: Iterable[str]) -> list[str]:
    """Splits as people name them: training first, then validation, then test, then others."""
    known = list(SPLITS)
    return sorted(set(splits), key=lambda split: (known.index(split) if split in known else len(known), split))


def matching_folder(names: Sequence[str], split: str) -> str | None:
    """The one of some folders that is a split (train2017 and in21k_train are train); None where not just one is."""
    asked = canonical_split(split)
    for matches in (
        [name for name in names if name == split],
        [name for name in names if split_of_folder(name) == asked],
        [name for name in names if split_of_file(name) == asked],
    ):
        if matches:
            return matches[0] if len(matches) == 1 else None
    return None


def described_splits(folder: Folder) -> dict[str, str]:
    """The splits of tars that a description beside them names, timm's `_info.json` or Energon's `split.yaml`.

    Returns:
        Split of each file that it names; empty where there is no description that can be read.
    """
    if folder.size(_INFO) is None:
        return _splits_of_energon(folder)
    found: dict[str, str] = {}
    try:
        splits = folder.read_json(_INFO)["splits"]
        for split, facts in splits.items():
            found |= {str(name): canonical_split(split) for name in facts["filenames"]}
    except OSError:
        raise
    except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s/%s does not say which file is of which split (%s)", folder, _INFO, shown(str(error)))
    return found


def _splits_of_energon(folder: Folder) -> dict[str, str]:
    """As `described_splits`; its lists may have patterns with braces."""
    if folder.size(_ENERGON) is None:
        return {}
    found: dict[str, str] = {}
    try:
        splits = yaml.safe_load(folder.read_bytes(_ENERGON, most=_LARGEST))["split_parts"]
        for split, patterns in splits.items():
            for pattern in filter(lambda each: isinstance(each, str), patterns):
                found |= dict.fromkeys(islice(braceexpand(pattern), _MOST_TARS), canonical_split(split))
    except OSError:
        raise
    except (StorageError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s/%s does not say which file is of which split (%s)", folder, _ENERGON, shown(str(error)))
    return found


def _says_all(pattern: str, splits: Mapping[str, str | None]) -> bool:
    """Whether a pattern names the split of every file that it matches."""
    parts = list(braceexpand(pattern))
    return all(
        any(fnmatch.fnmatchcase(name, part) and split_of_file(part) == split for part in parts)
        for name, split in splits.items()
    )


def _in_words(groups: Mapping[str | None, Sequence[str]]) -> str:
    return "; ".join(
        f"{group or 'no split in their names'} ({len(names)}: {', '.join(map(shown, names[:_EXAMPLES]))}"
        f"{', ...' if len(names) > _EXAMPLES else ''})"
        for group, names in groups.items()
    )
