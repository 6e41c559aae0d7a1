"""Sharding through its command and its function, on real Ray: sources, reruns, kills, bad input."""

import gzip
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.command import Progress
from cluster.folders import LocalFolder
from cluster.settings import SettingsError, parse_command
from cluster.storage import StorageError
from data_prep.corpus import Corpus
from data_prep.corpus_jobs import mark_working_folder
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.tasks import Work, run_tasks
from data_prep.verify import verify
from tests.corpora import encoded, image_folder

ROOT = Path(__file__).resolve().parents[1]


def shard(source, destination, **settings) -> Corpus:
    values = {"shard_mb": 0.01} | settings
    return shard_corpus(ShardSettings(source=str(source), destination=str(destination), **values))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def class_tar(folder: Path, tar_format: int, prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for path in sorted(folder.rglob("*"), reverse=True):
            tar.add(path, prefix + str(path.relative_to(folder)), recursive=False)
    return buffer.getvalue()


def tar_of_tars(root: Path, target: Path, inside: str = "") -> Path:
    """As ImageNet is distributed, with members named in every way that tar knows."""
    formats = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as outer:
        for number, folder in enumerate(sorted(root.iterdir(), reverse=True)):
            prefix = ["", "./", f"{folder.name}/"][number % 3]
            data = class_tar(folder, formats[number % 3], prefix)
            info = tarfile.TarInfo(f"{inside}{folder.name}.tar")
            info.size = len(data)
            outer.addfile(info, io.BytesIO(data))
    return target


@pytest.fixture
def source(tmp_path):
    root = image_folder(tmp_path / "images", classes=4, images=12)
    # longer than a tar header holds, and not ASCII: a GNU or pax extension is needed
    (root / "c3" / ("long-" * 30 + "é.jpg")).write_bytes(encoded(1))
    (root / "c2" / "folder" / ("deep-" * 12)).mkdir(parents=True)
    (root / "c2" / "folder" / ("deep-" * 12) / ("é" * 60 + ".png")).write_bytes(encoded(2, image_format="PNG"))
    return root


def test_the_corpus_depends_on_the_images_alone(ray, source, tmp_path):
    """Not on the number of workers, the order of the file system, or whether folders or tars hold them."""
    one = shard(source, tmp_path / "one", workers=1)
    many = shard(source, tmp_path / "many", workers=4)
    copy = shutil.copytree(source, tmp_path / "copied" / "images")
    assert content(one.path) == content(many.path)
    assert shard(copy, tmp_path / "copy").corpus_hash == one.corpus_hash
    outer = tar_of_tars(source, tmp_path / "images.tar", inside="a_folder/")
    from_tar = shard(outer, tmp_path / "from_tar")
    assert [s["xxh3_128"] for s in from_tar.manifest["shards"]] == [s["xxh3_128"] for s in one.manifest["shards"]]
    ids = range(one.num_samples)
    assert [from_tar.origin(i) for i in ids] == [one.origin(i) for i in ids]
    assert list(verify(from_tar)) == []
    other_seed = shard(source, tmp_path / "other", seed=1)
    assert sorted(map(other_seed.origin, ids)) == sorted(map(one.origin, ids))
    assert [other_seed.origin(i) for i in ids] != [one.origin(i) for i in ids]


def test_a_rerun_does_no_finished_work_again_and_repairs_what_is_damaged(ray, source, tmp_path, messages):
    corpus = shard(source, tmp_path / "corpus")
    before = content(corpus.path)
    made = {path.name: path.stat().st_ino for path in corpus.path.iterdir()}
    again = shard(source, tmp_path / "corpus")
    assert again.corpus_hash == corpus.corpus_hash
    assert {path.name: path.stat().st_ino for path in corpus.path.iterdir()} == made
    assert "finished already" in messages()

    (corpus.path / "shard-000001.tar").write_bytes(before["shard-000001.tar"][:-1])
    (corpus.path / "shard-000002.record.json").unlink()
    (corpus.path / ".shard-000002.tar.writing-0123456789ab").write_bytes(b"of a killed writer")
    shard(source, tmp_path / "corpus")
    assert content(corpus.path) == before
    now = {path.name: path.stat().st_ino for path in corpus.path.iterdir()}
    rewritten = {name for name in made if name.endswith(".tar") and now[name] != made[name]}
    assert rewritten == {"shard-000001.tar", "shard-000002.tar"}

    (corpus.path / "manifest.json").write_bytes(before["manifest.json"][:100])
    shard(source, tmp_path / "corpus")
    assert content(corpus.path) == before


def test_a_corpus_of_before_the_checksums_of_origins_stays_what_it_is(ray, source, tmp_path):
    folder = shard(source, tmp_path / "corpus").folder
    folder.remove("manifest.json")
    records = [name for name in folder.tree() if ".record." in name]
    for name in records:
        record = folder.read_json(name)
        del record["origins_xxh3_128"]
        folder.write_json(name, record)
    old = shard(source, tmp_path / "corpus")
    assert "origins" not in str(old.manifest["shards"])
    assert len(set(old.origins())) == len(old)
    folder.remove("manifest.json")
    folder.remove(records[0])  # the shard is written again, and its new record has the checksum
    assert shard(source, tmp_path / "corpus").corpus_hash == old.corpus_hash
    assert "origins_xxh3_128" in folder.read_json(records[0])


def test_images_that_do_not_decode_are_quarantined(ray, source, tmp_path, messages):
    whole = shard(source, tmp_path / "whole")
    good = (source / "c1" / "003.JPEG").read_bytes()
    (source / "c1" / "003.JPEG").write_bytes(good[: len(good) // 2] + bytes(len(good) - len(good) // 2))
    (source / "c0" / "001.JPEG").write_bytes(b"<html>".ljust((source / "c0" / "001.JPEG").stat().st_size))
    for path in (source / "c2").rglob("*.*"):
        path.write_bytes(bytes(path.stat().st_size))
    corpus = shard(source, tmp_path / "corpus", max_failures=0.5)
    entries = [json.loads(line) for line in (corpus.path / "quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["origin"]: entry["reason"] for entry in entries}
    assert len(reasons) == corpus.manifest["quarantined"] == 2 + 13
    assert reasons["c1/003.JPEG"].startswith("damaged JPEG")
    assert "begins with '<html>" in reasons["c0/001.JPEG"]
    assert corpus.num_samples == whole.num_samples - 15
    assert corpus.class_counts == [11, 11, 0, 13]
    assert list(verify(corpus)) == []
    assert "15 images are left out" in messages()
    assert "13 x no image: begins with zeros" in messages()
    assert "1 class has no image: c2" in messages()
    # a shard without quarantined images is the same as before: keys count planned positions
    before, after = content(whole.path), content(corpus.path)
    same = [name for name in after if name.endswith(".tar") and after[name] == before[name]]
    touched = [name for name in after if name.endswith(".record.json") and json.loads(after[name])["quarantined"]]
    assert len(same) + len(touched) == len(corpus.shard_sizes)


def test_words_name_the_classes(ray, source, tmp_path):
    (tmp_path / "words.txt").write_text("c1\tdog, domestic dog\nc0\tcat\nn9\tunused\n")
    corpus = shard(source, tmp_path / "corpus", words=str(tmp_path / "words.txt"))
    assert corpus.classes == ["c0", "c1", "c2", "c3"]
    assert corpus.class_descriptions == ["cat", "dog, domestic dog", "c2", "c3"]


def test_what_is_not_sharded_is_said(source, messages):
    (source / "c1" / "notes.txt").write_text("no image")
    (source / "c1" / ".hidden.jpg").write_text("no image")
    (source / "loose.jpg").write_bytes(encoded(1))
    (source / "empty").mkdir()
    listing = list_source(SourceSettings(source=str(source)))
    assert listing.classes == ["c0", "c1", "c2", "c3", "empty"]
    assert len(listing) == 50
    assert "1 files without an image's suffix, for example c1/notes.txt" in messages()
    assert "1 images directly in" in messages()


# ---------------------------------------------------------------------------------------------------- bad input


def no_source(tmp):
    return tmp / "missing"


def empty(tmp):
    (tmp / "source").mkdir()
    return tmp / "source"


def without_images(tmp):
    (tmp / "source" / "c0").mkdir(parents=True)
    (tmp / "source" / "c0" / "readme.txt").write_text("nothing")
    return tmp / "source"


def only_loose_images(tmp):
    (tmp / "source").mkdir()
    (tmp / "source" / "a.jpg").write_bytes(encoded(1))
    return tmp / "source"


def compressed(tmp):
    outer = tar_of_tars(image_folder(tmp / "images"), tmp / "plain.tar")
    (tmp / "source.tar.xz").write_bytes(lzma.compress(outer.read_bytes()))
    return tmp / "source.tar.xz"


def class_tar_compressed(tmp):
    with tarfile.open(tmp / "source.tar", "w") as outer:
        data = lzma.compress(class_tar(image_folder(tmp / "images") / "c0", tarfile.GNU_FORMAT))
        info = tarfile.TarInfo("c0.tar")
        info.size = len(data)
        outer.addfile(info, io.BytesIO(data))
    return tmp / "source.tar"


def compressed_twice(tmp):
    with tarfile.open(tmp / "source.tar.gz", "w:gz") as outer:
        data = gzip.compress(class_tar(image_folder(tmp / "images") / "c0", tarfile.GNU_FORMAT))
        info = tarfile.TarInfo("c0.tar.gz")
        info.size = len(data)
        outer.addfile(info, io.BytesIO(data))
    return tmp / "source.tar.gz"


def gzip_damaged(tmp):
    outer = tar_of_tars(image_folder(tmp / "images"), tmp / "plain.tar")
    data = bytearray(gzip.compress(outer.read_bytes()))
    data[-6] ^= 1  # in the checksum
    (tmp / "source.tar.gz").write_bytes(data)
    return tmp / "source.tar.gz"


def gzip_cut(tmp):
    outer = tar_of_tars(image_folder(tmp / "images"), tmp / "plain.tar")
    (tmp / "source.tar.gz").write_bytes(gzip.compress(outer.read_bytes())[:5000])
    return tmp / "source.tar.gz"


def flat_tar_of_images(tmp):
    with tarfile.open(tmp / "source.tar", "w") as outer:
        outer.add(image_folder(tmp / "images") / "c0" / "001.JPEG", "one.JPEG")
    return tmp / "source.tar"


def tar_cut(tmp, keep):
    outer = tar_of_tars(image_folder(tmp / "images"), tmp / "source.tar")
    outer.write_bytes(outer.read_bytes()[:keep])
    return outer


def tar_damaged(tmp):
    outer = tar_of_tars(image_folder(tmp / "images"), tmp / "source.tar")
    data = bytearray(outer.read_bytes())
    data[512 + 3] ^= 1  # in the first header of the first class tar
    outer.write_bytes(data)
    return outer


def no_tar(tmp):
    (tmp / "source.bin").write_bytes(os.urandom(5000))
    return tmp / "source.bin"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_source, "no such file or folder"),
        (empty, "is empty"),
        (without_images, "has no images in its 1 sub-folders"),
        (only_loose_images, r"1 images lie directly in it\); an image folder has one sub-folder"),
        (compressed, r"is compressed with xz.*decompress it first, or to gzip"),
        (class_tar_compressed, r"class tar c0\.tar in .* is compressed with xz"),
        (compressed_twice, r"is compressed, and so are the class tars in it \(c0.tar.gz\)"),
        (gzip_damaged, "source.tar.gz is damaged or cut short"),
        (gzip_cut, "source.tar.gz is .*cut short"),
        (
            flat_tar_of_images,
            "is neither a tar of one tar per class nor one of class folders: .* like 'one.JPEG'; give truth",
        ),
        (lambda tmp: tar_cut(tmp, 9000), "is cut short: member 'c2.tar' should end at byte"),
        (lambda tmp: tar_cut(tmp, -10240), "cut short"),
        (tar_damaged, r"class tar c2\.tar in .* damaged at byte 512: wrong header checksum"),
        (no_tar, "is not a tar or is damaged at byte 0"),
    ],
)
def test_unusable_sources_are_refused_and_leave_nothing(tmp_path, monkeypatch, make, message):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        shard(source, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_source_of_which_nothing_decodes_is_refused_and_leaves_nothing(ray, source, tmp_path):
    for path in source.rglob("*.*"):
        path.write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"no image of source .* can be used: 50 x no JPEG"):
        shard(source, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_destinations_that_hold_something_else_are_refused_and_kept(ray, source, tmp_path):
    corpus = shard(source, tmp_path / "corpus")
    before = content(corpus.path)
    with pytest.raises(ValueError, match="holds another corpus"):
        shard(source, tmp_path / "corpus", seed=5)
    (source / "c0" / "one_more.jpg").write_bytes(encoded(5))
    with pytest.raises(ValueError, match=r"holds another corpus.*50 images.*now 51 images"):
        shard(source, tmp_path / "corpus")
    assert content(corpus.path) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"not made by sharding \(it has 'holiday.txt'\)"):
        shard(source, tmp_path / "photos")
    with pytest.raises(ValueError, match="is a file"):
        shard(source, tmp_path / "photos" / "holiday.txt")
    assert (tmp_path / "photos" / "holiday.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="inside the source"):
        shard(source, source / "corpus")
    with pytest.raises(ValueError, match="gs:// cannot be used here"):
        shard(source, "gs://bucket/corpus")


@pytest.mark.parametrize("name", ["images", "duplicates"])
def test_a_folder_of_a_user_s_in_the_destination_is_refused_and_kept(source, tmp_path, name):
    """Of the names that sharding has for its own working folders."""
    there = tmp_path / "dataset" / name
    shutil.copytree(source, there)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for place in (source, there):
        with pytest.raises(ValueError, match=rf"is not empty and was not made by sharding \(it has '{name}/c0/"):
            shard(place, tmp_path / "dataset")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_what_a_user_puts_into_a_working_folder_stays(ray, source, tmp_path, messages):
    folder = LocalFolder(tmp_path / "corpus")
    for name, files in {"images": ["000000.bytes", "000000.npz"], "duplicates": [f"{0:032x}.jsonl"]}.items():
        for file in files:
            folder.child(name).write_bytes(file, b"of a version without marks, killed")
    shard(source, folder.local)
    assert folder.folders() == []
    mark_working_folder(folder.child("images"))
    folder.child("images").write_bytes("notes.txt", b"mine")
    folder.child("images").write_bytes("000001.bytes", b"ours")
    shard(source, folder.local)
    assert folder.child("images").tree().keys() == {"notes.txt"}
    assert "images stays: notes.txt is not ours" in messages()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "", r"must be a \.csv, \.tsv, \.jsonl, \.json .* or \.parquet file"),
        ("l.jsonl", "", "has no column that says where the images are"),
        ("l.jsonl", '{"path": "c0/000.JPEG"}', "has no column of labels: its columns are path"),
        ("l.jsonl", '{"path": "a", "labels": ["a"]}\n{"path": "b"}', "line 2: must be an object with path and labels"),
        (
            "l.jsonl",
            '{"path": "c0/000.JPEG", "labels": ["a"], "weights": []}',
            r"line 1: not as many weights \(0\) as labels \(1\)",
        ),
        (
            "l.jsonl",
            '{"path": "../000.JPEG", "labels": ["a"]}',
            "line 1: path '../000.JPEG' leads out of the folder: .*",
        ),
        ("l.jsonl", '{"path": "nothing.jpg", "labels": ["a"]}', "none of the 1 images named"),
        ("l.csv", "file,label\n", "names no image"),
        ("l.csv", "where,label\n", "its columns are where, label; the first line must be"),
        ("l.csv", "path,label,weight\nc0/000.JPEG,a,heavy\n", "line 2: weight 'heavy' is not a number"),
        ("l.csv", "path,label\nc0/000.JPEG,a\nc0/000.JPEG,a\n", "line 3: label 'a' .* stands twice"),
    ],
)
def test_wrong_labels_files_are_refused_with_the_line(source, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        shard(source, tmp_path / "corpus", labels=str(tmp_path / name))
    assert not (tmp_path / "corpus").exists()


def test_unknown_settings_are_refused():
    with pytest.raises(SettingsError, match="did you mean 'shard_mb'"):
        parse_command(
            ShardSettings, prog="shard", description="", positionals=("source", "destination"),
            argv=["a", "b", "shards_mb=3"],
        )  # fmt: skip


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "data_prep" / "shard.py"), *map(str, words)]


def test_the_command_ends_with_one_message_and_status_2(tmp_path):
    done = subprocess.run(
        command(tmp_path / "missing", tmp_path / "corpus"), capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: source {tmp_path / 'missing'}: there is no such file or folder")


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(ray, tmp_path):
    source = tmp_path / "images"
    picture = encoded(1, (1200, 900), quality=90)
    for number in range(1200):
        folder = source / f"c{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.jpg").write_bytes(picture + number.to_bytes(4, "big"))
    destination = tmp_path / "corpus"
    settings = {"shard_mb": 2.5, "workers": 1}
    words = [f"{key}={value}" for key, value in settings.items()]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(command(source, destination, *words), env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(destination.glob("*.record.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (destination / "manifest.json").exists()
    time.sleep(3)  # the killed driver's workers end a moment later
    finished = {path.name: path.stat().st_ino for path in destination.glob("*.record.json")}
    resumed = shard(source, destination, **settings)
    fresh = shard(source, tmp_path / "fresh", **settings)
    assert 2 <= len(finished) < len(fresh.shard_sizes)
    assert content(resumed.path) == content(fresh.path)
    assert {name: (destination / name).stat().st_ino for name in finished} == finished


def end_at_once(task: int) -> dict[str, Any]:
    """As an image would on which a decoder crashes."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_shard_on_which_every_worker_dies_is_one_error_that_names_it(ray, tmp_path):
    tasks = {"shard-000007.tar": lambda: 7}
    folder = LocalFolder(tmp_path)
    with pytest.raises(StorageError, match=r"shard-000007\.tar in .* cannot be made: its process ended 5 times"):
        run_tasks(end_at_once, tasks, folder, 1, Progress(1, "images", "sharding"), lambda name: 1, work=Work())
