"""What killed processes leave is removed, and nothing that may be another's."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cluster import marked_folders
from cluster.marked_folders import MarkedFolder, TemporaryFolderError, remove_left_behind, temporary_folder
from cluster.ownership import MARK, OwnershipError, private_folder
from tests.running import REPOSITORY

OWNER = """
import sys, time
from pathlib import Path
from cluster.marked_folders import MarkedFolder
folder = MarkedFolder("weights", Path(sys.argv[1]))
(folder.path / "deep").mkdir()
(folder.path / "deep" / "part").write_bytes(b"0" * 100)
print(folder.path, flush=True)
time.sleep(600)
"""
AS_NOBODY = (
    "import os, pathlib, sys; from cluster.marked_folders import MarkedFolder; "
    "from cluster.ownership import private_folder; os.setgid(65534); os.setuid(65534); "
)
"""(The libraries may lie where only we can read them.)"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@contextmanager
def owner(place: Path, *around: str) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process, with its folder."""
    process = subprocess.Popen(
        [*around, sys.executable, "-c", OWNER, str(place)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a killed process left."""
    with owner(tmp_path) as (_, folder):
        pass
    assert (folder / "deep" / "part").exists()
    return folder


def rewrite(left: Path, /, **changes: object) -> None:
    mark = left / MARK
    mark.write_text(json.dumps({**json.loads(mark.read_text()), **changes}))


def test_a_killed_process_s_folder_is_removed_and_a_living_one_s_is_not(left: Path, tmp_path: Path) -> None:
    with owner(tmp_path) as (process, living):
        assert not left.exists()
        process.send_signal(signal.SIGSTOP)
        MarkedFolder("weights", tmp_path).close()
        assert (living / "deep" / "part").exists()
        process.kill()
        process.wait()
        with temporary_folder("weights", tmp_path) as ours:
            assert list(tmp_path.iterdir()) == [ours]
            assert stat.S_IMODE(ours.stat().st_mode) == 0o700
            facts = json.loads((ours / MARK).read_text())
            assert (facts["user"], facts["pid"], facts["purpose"]) == (os.geteuid(), os.getpid(), "weights")
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_another_process_has_now_is_not_its_owner(left: Path, tmp_path: Path) -> None:
    rewrite(left, pid=os.getpid())
    remove_left_behind(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize(
    "changes",
    [{"user": 12345}, {"user": None}, {"folder": "vitforge-weights-0123456789abcdef"}, {"inode": 1},
     {"boot": "another", "host": "another"}, {"host": "another"}, {"pid": "1"}, {"pid": -1}, {"pid": True},
     {"pid": 1 << 80}, {"started": None}],
    ids=str,
)  # fmt: skip
def test_a_mark_that_proves_nothing_keeps_its_folder(
    left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr(
        marked_folders, "_OF_ONE_MACHINE", set()
    )  # as if other machines had this file system mounted too
    rewrite(left, **changes)
    remove_left_behind(tmp_path)
    assert (left / "deep" / "part").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 4000], ids=repr)
def test_a_mark_that_cannot_be_read_keeps_its_folder(left: Path, tmp_path: Path, content: bytes) -> None:
    (left / MARK).write_bytes(content)
    remove_left_behind(tmp_path)
    assert (left / "deep" / "part").exists()


def test_a_machine_that_was_started_again_is_not_the_one_before(left: Path, tmp_path: Path) -> None:
    rewrite(left, boot="before")
    remove_left_behind(tmp_path)
    assert left.exists() == (tmp_path.stat().st_dev not in devices_of_one_machine())


def test_a_process_that_has_our_disk_mounted_over_a_network_may_live(left: Path, tmp_path: Path) -> None:
    rewrite(left, boot="another", host="client", own_disk=False)
    remove_left_behind(tmp_path)
    assert (left / "deep" / "part").exists()


def devices_of_one_machine() -> set[int]:
    kinds = {"ext4", "ext3", "xfs", "tmpfs", "overlay"}
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    places = [line[4] for line in lines if line[line.index("-") + 1] in kinds]
    return {Path(place).stat().st_dev for place in places if os.access(place, os.R_OK)}


def test_what_is_not_the_folder_that_was_marked_stays(left: Path, tmp_path: Path) -> None:
    rescued = tmp_path / "rescued"
    shutil.copytree(left, rescued)
    name = left.name
    left.rename(tmp_path / "mine")
    shutil.copytree(rescued, tmp_path / name)  # the same name, another folder
    linked = tmp_path / "vitforge-weights-00000000000000aa"
    linked.symlink_to(rescued)
    unmarked = tmp_path / "vitforge-weights-00000000000000bb"
    unmarked.mkdir()
    (unmarked / "file").write_text("mine")
    mark_elsewhere = tmp_path / "vitforge-weights-00000000000000cc"
    mark_elsewhere.mkdir()
    (mark_elsewhere / MARK).symlink_to(rescued / MARK)
    piped = tmp_path / "vitforge-weights-00000000000000dd"
    piped.mkdir()
    os.mkfifo(piped / MARK)
    (tmp_path / "dataset.lock").write_text("")
    (tmp_path / "dataset").mkdir()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    remove_left_behind(tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_what_has_taken_the_name_of_a_living_folder_stays(tmp_path: Path) -> None:
    folder = MarkedFolder("weights", tmp_path)
    folder.path.rename(tmp_path / "moved")
    mine = folder.path
    mine.mkdir()
    (mine / "file").write_text("mine")
    with pytest.raises(FileNotFoundError):
        folder.empty()
    shutil.copy(tmp_path / "moved" / MARK, mine / MARK)
    folder.close()
    assert (mine / "file").read_text() == "mine"


def test_links_out_of_a_folder_are_not_followed(left: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    (left / "link").symlink_to(mine)
    (left / "deep" / "link").symlink_to(mine / "file")
    remove_left_behind(tmp_path)
    assert not left.exists()
    assert (mine / "file").read_text() == "mine"


def test_a_container_s_process_is_told_by_its_lock(tmp_path: Path) -> None:
    around = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*around, "true"], capture_output=True).returncode:
        pytest.skip("no process numbers of their own may be made here")
    with owner(tmp_path, *around) as (_, folder):
        assert json.loads((folder / MARK).read_text())["pid"] < 10
        remove_left_behind(tmp_path)
        assert (folder / "deep" / "part").exists()
    if tmp_path.stat().st_dev in devices_of_one_machine():
        until = time.monotonic() + 30
        while folder.exists() and time.monotonic() < until:  # the process itself is not ours to wait for
            remove_left_behind(tmp_path)
            time.sleep(0.02)
        assert not folder.exists()


@as_root
def test_another_user_s_folders_are_neither_removed_nor_used(request: pytest.FixtureRequest) -> None:
    place = Path(tempfile.mkdtemp())  # pytest's own can be entered by us alone
    request.addfinalizer(lambda: shutil.rmtree(place))
    place.chmod(0o777)
    theirs, folder = place / "theirs", place / "folder"
    code = f"{AS_NOBODY}private_folder(pathlib.Path(sys.argv[1])); "
    made = (
        code
        + "f = MarkedFolder('weights', pathlib.Path(sys.argv[2])); print(f.path, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", made, str(theirs), str(folder)], cwd=REPOSITORY, capture_output=True, text=True
    )
    left = Path(done.stdout.strip())
    assert left.parent == folder
    remove_left_behind(folder)
    assert left.exists()
    with pytest.raises(OwnershipError, match=r"theirs belongs to another user \(number 65534\)"):
        private_folder(theirs)
    private_folder(place / "ours")
    done = subprocess.run(
        [sys.executable, "-c", code, str(place / "ours")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "belongs to another user (number 0)" in done.stderr


def test_the_folder_in_the_temporary_folder_is_this_user_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = tmp_path / f"vitforge-{os.geteuid()}"
    place.mkdir(0o777)  # as versions before made it, or readable by others by mistake
    with temporary_folder("weights") as folder:
        assert folder.parent == place
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    place.rmdir()
    for make in (place.touch, lambda: place.symlink_to(tmp_path / "elsewhere"), lambda: place.symlink_to(tmp_path)):
        make()
        with pytest.raises(OwnershipError), temporary_folder("weights"):
            pass
        place.unlink()
    assert list(tmp_path.iterdir()) == []


@as_root
def test_a_full_temporary_folder_is_one_message_and_nothing_is_left_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / "full").write_bytes(bytes(8192))
        with pytest.raises(TemporaryFolderError, match=rf"{tmp_path} \(No space left on device\): make room"):
            MarkedFolder("weights")
        assert list((tmp_path / f"vitforge-{os.geteuid()}").iterdir()) == []
        (tmp_path / "full").unlink()
        MarkedFolder("weights").close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
