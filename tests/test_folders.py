"""Folders on mounted file systems, where these are not as simple as one disk."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.folders import LocalFolder
from cluster.storage import StorageError
from tests.running import REPOSITORY

MOVE = """
import sys
from pathlib import Path
from cluster.folders import LocalFolder
scratch, target = map(Path, sys.argv[1:])
assert scratch.stat().st_dev == target.stat().st_dev
LocalFolder(target).put(scratch / "part", "part", move=True)
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
    left = [tmp_path / ".x.writing-01", tmp_path / "a" / ".y.writing-02", tmp_path / "a" / "b" / ".z.writing-03"]
    for path in [*left, tmp_path / "a" / "whole"]:
        path.write_bytes(b"")
    LocalFolder(tmp_path).remove_unfinished()
    assert [path.exists() for path in left] == [False, True, True]
    LocalFolder(tmp_path).remove_unfinished(deep=True)
    assert not any(path.exists() for path in left)
    assert (tmp_path / "a" / "whole").exists()
