"""The node's cache of shards: real files, several processes, one of them killed."""

import fcntl
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from cluster import storage
from cluster.folders import LocalFolder
from cluster.ownership import MARK
from cluster.storage import StorageError
from data_prep.corpus_cache import cache_folder
from data_prep.shard_cache import FetchError, ShardCache

SIZE = 20_000


class Remote(LocalFolder):
    """A folder that writes down what is fetched from it, and may be slow."""

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        super().__init__(path)
        self.seconds = seconds

    def get(self, name, path):
        with (self.local.parent / "fetches").open("a") as file:
            file.write(f"{name} {os.getpid()}\n")
        if self.seconds:
            path.with_name("half").write_bytes(self.read_bytes(name, 0, SIZE // 2))
            time.sleep(self.seconds)
        super().get(name, path)


def remote(root: Path, shards: int, seed: int = 0) -> Path:
    folder = root / f"remote-{seed}"
    folder.mkdir()
    for shard in range(shards):
        content = np.random.default_rng([seed, shard]).bytes(SIZE)
        (folder / f"shard-{shard:06d}.tar").write_bytes(content)
    return folder


def cache(folder: Path, limit_shards: float, seconds: float = 0.0, kind: type[Remote] = Remote) -> ShardCache:
    files = sorted(folder.glob("*.tar"))
    checksums = [storage.hash_file(path) for path in files]
    names, sizes = [path.name for path in files], [SIZE] * len(files)
    return ShardCache(
        kind(folder, seconds), names, sizes, checksums, folder.parent / "cache", round(limit_shards * SIZE)
    )


def fetches(root: Path) -> list[str]:
    path = root / "fetches"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def content(reader: ShardCache, shard: int) -> bytes:
    descriptor = reader.open(shard)
    try:
        return os.pread(descriptor, SIZE + 1, 0)
    finally:
        os.close(descriptor)


def held(reader: ShardCache) -> set[int]:
    return {
        shard for shard in range(len(reader.names)) if (reader.cache_dir / f"{reader.checksums[shard]}.tar").exists()
    }


def taken(folder: Path) -> int:
    """Bytes of the shards that are there or arriving, at one moment."""
    if not (folder / "room.lock").exists():
        return 0
    with (folder / "room.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # os.walk passes over folders that go in between; rglob raises
        paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
        parts = [path for path in paths if path.suffix == ".tar" or path.parent.suffix == ".fetching"]
        return sum(storage.file_size(path) or 0 for path in parts if path.name != "half")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_windows(folder, limit_shards, order, window, seconds, in_step=None):
    """A rank: reads window by window, shards of a window again and again, and says what comes."""
    reader = cache(folder, limit_shards, seconds)
    for start in range(0, len(order), window):
        if in_step:
            in_step.wait(60)
        reader.prefetch(order[start:], 2 * window)
        for shard in order[start : start + window] * 3:
            assert content(reader, shard) == (folder / reader.names[shard]).read_bytes()
            time.sleep(0.001)
    reader.close()


def start(function, *arguments) -> multiprocessing.context.SpawnProcess:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


def test_ranks_of_a_node_fetch_each_shard_once_an_epoch_through_room_for_two_windows(tmp_path):
    window, epochs = 4, 2
    folder = remote(tmp_path, 20)
    order = [int(shard) for epoch in range(epochs) for shard in np.random.default_rng(epoch).permutation(20)]
    in_step = multiprocessing.get_context("spawn").Barrier(3)
    ranks = [start(read_windows, folder, 2 * window, order, window, 0.01, in_step) for _ in range(3)]
    most = 0
    while any(rank.is_alive() for rank in ranks):
        most = max(most, taken(tmp_path / "cache"))
        time.sleep(0.01)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    counts = np.unique(fetches(tmp_path), return_counts=True)
    assert len(counts[0]) == 20
    # a shard of the first epoch that the second begins with may still be there
    assert counts[1].max() == epochs
    assert counts[1].sum() <= 20 * epochs
    assert 0 < most <= 2 * window * SIZE
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".tar"} == {"room.lock", MARK}


def fetch_slowly(folder: Path) -> None:
    cache(folder, 4, seconds=120).path(0)


def test_what_a_killed_process_was_fetching_is_taken_over_and_its_leftovers_go(tmp_path):
    folder = remote(tmp_path, 4)
    killed = start(fetch_slowly, folder)
    wait_until(lambda: (tmp_path / "cache").is_dir() and list((tmp_path / "cache").glob("*.fetching/half")))
    reader = cache(folder, 4)
    assert content(reader, 1)  # another shard need not wait
    os.kill(killed.pid or 0, signal.SIGKILL)
    killed.join()
    left = tmp_path / "cache" / f"{reader.checksums[0]}.lock"
    assert left.stat().st_size == SIZE
    for shard in (1, 2, 3, 0):  # the room that it had taken is free again, all four fit
        assert content(reader, shard) == (folder / reader.names[shard]).read_bytes()
    assert fetches(tmp_path).count("shard-000000.tar") == 2
    assert held(reader) == {0, 1, 2, 3}
    assert not list((tmp_path / "cache").glob("*.fetching"))
    assert not left.exists()


def test_a_killed_reader_no_longer_says_what_is_needed(tmp_path):
    folder = remote(tmp_path, 4)
    rank = start(read_windows, folder, 2, [0, 1] * 10_000, 1, 0.0)
    reader = cache(folder, 2)
    wait_until(lambda: {0, 1} <= held(reader))
    os.kill(rank.pid or 0, signal.SIGKILL)
    rank.join()
    assert len(list((tmp_path / "cache").glob("plan-*"))) == 1
    reader.prefetch([2, 3], 2)  # had the killed one a say, these would have to wait
    wait_until(lambda: held(reader) == {2, 3})
    assert len(list((tmp_path / "cache").glob("plan-*"))) == 1  # our own
    reader.close()


class Damaging(Remote):
    """The first transfers arrive damaged: one with another byte, one short."""

    def get(self, name, path):
        super().get(name, path)
        number = len(fetches(self.local.parent))
        whole = path.read_bytes()
        if number == 1:
            path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        elif number == 2:
            path.write_bytes(whole[:-1])


def test_a_damaged_transfer_is_fetched_again(tmp_path):
    folder = remote(tmp_path, 1)
    reader = cache(folder, 1, kind=Damaging)
    assert content(reader, 0) == (folder / reader.names[0]).read_bytes()
    assert len(fetches(tmp_path)) == 3


def test_a_shard_that_stays_damaged_or_is_missing_is_one_error_that_names_it(tmp_path):
    folder = remote(tmp_path, 3)
    reader = cache(folder, 3)
    (folder / reader.names[0]).write_bytes(bytes(SIZE))
    (folder / reader.names[1]).unlink()
    reader.prefetch([0, 1, 2], 3)  # fetching ahead reports nothing and goes on
    wait_until(lambda: held(reader) == {2})
    with pytest.raises(storage.StorageError, match=r"shard-000000.tar is damaged"):
        reader.path(0)
    with pytest.raises(storage.StorageError, match=r"shard-000001.tar cannot be read"):
        reader.path(1)
    assert held(reader) == {2}
    reader.close()


def test_a_cache_that_cannot_be_written_says_nothing_of_the_shard(tmp_path):
    """As when its disk is full: a shard that is only not here must not count as lost."""
    reader = cache(remote(tmp_path, 1), 4)
    (reader.cache_dir / f"{reader.checksums[0]}.fetching").write_bytes(b"in the way of the folder")
    with pytest.raises(FetchError, match=r"shard-000000\.tar cannot be fetched to .*/cache: .*set VITFORGE_CACHE"):
        reader.open(0)
    (reader.cache_dir / f"{reader.checksums[0]}.fetching").unlink()
    assert len(content(reader, 0)) == SIZE


def test_a_copy_damaged_on_the_node_is_fetched_again(tmp_path):
    folder = remote(tmp_path, 1)
    reader = cache(folder, 1)
    path = reader.path(0)
    assert not reader.renew(0)
    path.write_bytes(bytes(SIZE))
    assert reader.renew(0)
    assert content(reader, 0) == (folder / reader.names[0]).read_bytes()
    assert len(fetches(tmp_path)) == 2


def test_without_a_known_order_the_longest_unused_goes_and_what_is_open_stays_readable(tmp_path):
    folder = remote(tmp_path, 5)
    reader = cache(folder, 3)
    for shard in (0, 1, 2, 0):
        content(reader, shard)
        time.sleep(0.02)
    descriptor = reader.open(1)
    time.sleep(0.02)
    content(reader, 2)
    time.sleep(0.02)
    content(reader, 3)
    content(reader, 4)
    assert held(reader) == {2, 3, 4}
    assert os.pread(descriptor, SIZE, 0) == (folder / reader.names[1]).read_bytes()
    os.close(descriptor)


def test_what_is_needed_last_goes_and_fetching_ahead_pushes_out_nothing_needed_sooner(tmp_path):
    folder = remote(tmp_path, 6)
    reader = cache(folder, 3)
    reader.prefetch([5, 0, 1, 2, 3, 4], 6)
    wait_until(lambda: held(reader) == {5, 0, 1})
    time.sleep(0.6)
    assert held(reader) == {5, 0, 1}
    content(reader, 4)  # needed now, against the plan: 1 is what will be needed last
    assert held(reader) == {5, 0, 4}
    reader.prefetch([2, 0, 5], 3)
    wait_until(lambda: held(reader) == {2, 0, 5})
    reader.close()


def test_corpora_share_one_limit_and_equal_shards(tmp_path):
    first, second = remote(tmp_path, 3), remote(tmp_path, 3, seed=1)
    (second / "shard-000000.tar").write_bytes((first / "shard-000001.tar").read_bytes())
    one, two = cache(first, 3), cache(second, 3)
    for shard in range(3):
        content(one, shard)
    content(two, 0)
    assert len(fetches(tmp_path)) == 3
    content(two, 1)
    content(two, 2)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def test_a_limit_that_cannot_do_is_refused_with_one_that_does(tmp_path):
    folder = remote(tmp_path, 2)
    with pytest.raises(storage.StorageError, match=r"largest shard needs 2e-05 GB.*cache_gb=0.01"):
        cache(folder, 0.5)
    with pytest.raises(storage.StorageError, match=r"a window of 4 shards needs"):
        cache(folder, 3).check_room(4 * SIZE, "a window of 4 shards")


def test_a_folder_that_is_no_cache_of_ours_is_refused_and_kept(tmp_path):
    folder, place = remote(tmp_path, 3), tmp_path / "cache"
    place.mkdir()
    theirs = [place / name for name in ("dataset.tar", "dataset.lock", "plan-b", f"{0:032x}.tar")]
    for path in theirs:
        path.write_bytes(b"theirs" * SIZE)
    with pytest.raises(StorageError, match=r"is no cache of shards: it holds 'dataset\.lock'.* VITFORGE_CACHE"):
        cache(folder, 2.5)
    for path in theirs[:3]:
        path.unlink()
    reader = cache(folder, 2.5)  # a cache of before there were marks
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    for path in theirs[:3]:  # which came later
        path.write_bytes(b"theirs" * SIZE)
    for shard in (0, 1, 2):
        assert content(reader, shard)
    reader.prefetch([0, 1, 2], 3)
    reader.close()
    assert [path.exists() for path in theirs] == [True, True, True, False]
    assert len(held(reader)) <= 2


@pytest.mark.parametrize("part", ["", "shards"])
def test_a_cache_of_another_user_or_behind_a_link_is_refused(tmp_path, monkeypatch, part):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    assert cache_folder("shards") == tmp_path / "cache" / "shards"
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    place = tmp_path / "cache" / part
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=f"{place} is a symbolic link.* Set VITFORGE_CACHE"):
        cache_folder("shards")
    place.unlink()
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, 65534, 65534)
        with pytest.raises(StorageError, match=f"{place} belongs to another user"):
            cache_folder("shards")


@pytest.mark.parametrize("part", ["corpora", "shards", "files"])
def test_a_folder_of_the_user_s_beside_the_cache_stays_open_to_others(tmp_path, monkeypatch, part):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path))
    place = tmp_path / part
    (place / "in21k").mkdir(parents=True)
    place.chmod(0o755)
    with pytest.raises(StorageError, match=f"{part} is no part of a cache: it holds 'in21k'.* Set VITFORGE_CACHE"):
        cache_folder(part)
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    (place / "in21k").rename(place / ("0a" * 32))  # as a cache of before it was for one user has it
    assert stat.S_IMODE(cache_folder(part).stat().st_mode) == 0o700
