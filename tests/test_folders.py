"""Folders on mounted file systems, where these are not as simple as one disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.folders import LocalFolder
from cluster.storage import StorageError, temporary_path
from tests.running import REPOSITORY

MOVE = """
import sys
from pathlib import Path
from cluster.folders import LocalFolder
scratch, target = map(Path, sys.argv[1:])
assert scratch.stat().st_dev == target.stat().st_dev
LocalFolder(target).put(scratch / "part", "part", move=True)
"""
KILLED_WRITER = """
import os, sys
from contextlib import ExitStack
from pathlib import Path
from cluster.storage import atomic_file
with ExitStack() as stack:
    for place in sys.argv[1:]:
        stack.enter_context(atomic_file(Path(place, "weights"))).write(b"half of it")
    os.kill(os.getpid(), 9)
"""


def test_a_file_is_moved_between_two_mounts_of_one_file_system(tmp_path: Path) -> None:
    """As the folders that a container is given: the device is the same, and renaming is refused."""
    for name in ("scratch", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-mounted").mkdir()
    (tmp_path / "scratch" / "part").write_bytes(b"weights")
    mounts = " && ".join(f"mount --bind {tmp_path}/{name} {tmp_path}/{name}-mounted" for name in ("scratch", "target"))
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not permitted here")
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f'{mounts} && exec "$@"', "bash", sys.executable, "-c", MOVE,
         str(tmp_path / "scratch-mounted"), str(tmp_path / "target-mounted")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target" / "part").read_bytes() == b"weights"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_read_error_of_the_file_system_is_worth_another_try_and_a_missing_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "away").symlink_to("/proc/self/mem")  # whose reading fails as that of a server that is away
    folder = LocalFolder(tmp_path)
    with pytest.raises(StorageError, match="away cannot be read: Input/output error") as caught:
        folder.read_bytes("away")
    assert isinstance(caught.value, OSError)
    with pytest.raises(StorageError, match="nothing cannot be read: No such file") as caught:
        folder.read_bytes("nothing")
    assert not isinstance(caught.value, OSError)


def test_what_killed_writers_left_is_removed_in_the_folders_below_too(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    folders = [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, *map(str, folders)], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    left = [path for folder in folders for path in folder.glob(".*")]
    assert len(left) == 3
    older = tmp_path / ".z.writing-0123456789ab"  # as versions without marks wrote
    living = temporary_path(tmp_path / "living")
    theirs = [tmp_path / "a" / "whole", tmp_path / ".my.writing-notes", tmp_path / "a" / ".thesis.writing-2024"]
    theirs.append(tmp_path / left[0].name.replace(f"-{os.geteuid()}-", "-12345-", 1))
    for path in [older, living, *theirs]:
        path.write_bytes(b"")
    (folder := tmp_path / ".book.writing-0123456789ab").mkdir()
    (link := tmp_path / ".link.writing-0123456789ab").symlink_to(theirs[0])
    LocalFolder(tmp_path).remove_unfinished()
    assert [path.exists() for path in [*left, older]] == [False, True, True, False]
    LocalFolder(tmp_path).remove_unfinished(deep=True)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in [living, folder, link, *theirs])


def test_a_link_to_nothing_and_a_name_that_is_none_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    folder = LocalFolder(tmp_path)
    assert folder.tree() == {"file": 7}
    assert [folder.size(name) for name in ("latest", "loop", "pipe", "file", "n" * 300)] == [None, None, None, 7, None]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127):
        LocalFolder(tmp_path).write_bytes(name, b"content")
    assert LocalFolder(tmp_path).names() == ["n" * 255, "ü" * 127]
