"""Sources on a real S3 server."""

import os
import pickle
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.folders import folder_at
from cluster.s3_connection import SECRETS
from cluster.storage import StorageError
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.index import IndexSettings, index_corpus
from data_prep.listing import SourceError
from data_prep.remote_images import FetchPolicy, RemoteImages
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.verify import verify
from tests.corpora import image_folder, make_corpus
from tests.running import REPOSITORY
from tests.test_sources import (
    add,
    class_tar,
    contents,
    gzip_tar,
    incompressible,
    shard,
    tars_of,
    validation_tar,
    write_meta,
)

pytestmark = pytest.mark.usefixtures("ray")


def test_tables_shards_and_corpora_on_s3_are_sources_too(tmp_path, s3, monkeypatch, messages):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "images", classes=3, images=12)
    bucket = s3.bucket()
    there = folder_at(bucket, "test")
    for path in folder.rglob("*.JPEG"):
        there.put(path, f"pictures/{path.relative_to(folder)}")
    rows = [(str(p.relative_to(folder)), p.parent.name, p.read_bytes()) for p in sorted(folder.rglob("*.JPEG"))]
    lines = ["path,label", *(f"{path},{label}" for path, label, _ in rows)]
    there.write_bytes("pictures/table.csv", "\n".join(lines).encode())
    table = pa.table({"image": [row[2] for row in rows], "label": [row[1] for row in rows]})
    for number in range(2):
        buffer = pa.BufferOutputStream()
        pq.write_table(table.slice(number * 18, 18), buffer)
        there.write_bytes(f"parquet/part-{number}.parquet", buffer.getvalue().to_pybytes())
    expected = shard(folder, tmp_path / "expected")
    for path in expected.path.glob("*.tar"):
        there.put(path, f"tars/{path.name}")
    copy_corpus(CopySettings(source=str(expected.path), destination=f"{bucket}/corpus"))
    s3.faults.rates = {"slow_down": 0.1, "reset": 0.05, "short": 0.1}
    images = {image for image, _ in contents(expected).values()}
    count = len(expected.manifest["shards"])
    for number, place in enumerate(
        (
            "pictures/table.csv", "parquet", "parquet/part-0.parquet", "corpus",
            "tars", "tars/shard-00000[0-9].tar", f"tars/shard-{{000000..{count - 1:06d}}}.tar",
        )
    ):  # fmt: skip
        corpus = shard(f"{bucket}/{place}", tmp_path / str(number))
        found = {image for image, _ in contents(corpus).values()}
        assert found < images if "part-0" in place else found == images, place
    assert tars_of(shard(f"{bucket}/corpus", tmp_path / "again")) == tars_of(expected)
    with pytest.raises(SourceError, match=r"no file that matches shard-000777\.tar in s3://"):
        shard(f"{bucket}/tars/shard-{{000000,000777}}.tar", tmp_path / "none")
    shard(f"{bucket}/parquet", tmp_path / "1")
    assert "is finished already" in messages()
    with pytest.raises(SourceError, match=r"labels = s3://.*/nothing\.csv: there is no such file or folder"):
        shard(f"{bucket}/pictures", tmp_path / "none", labels=f"{bucket}/nothing.csv")
    assert s3.faults.injected.total() > 10


def test_the_truth_of_validation_images_may_be_on_s3_with_what_it_means_beside_it(tmp_path, s3):
    tar, numbers, _ = validation_tar(tmp_path)
    there = folder_at(s3.bucket(), "test")
    for path in (tar, numbers):
        there.put(path, f"kit/{path.name}")
    place = f"{there}/kit/{tar.name}"
    with pytest.raises(SourceError, match="what they mean is not known: give synsets=FILE"):
        list_source(SourceSettings(source=place, truth=f"{there}/kit/{numbers.name}"))
    write_meta(tmp_path / "meta.mat")
    there.put(tmp_path / "meta.mat", "kit/meta.mat")
    corpus = shard(place, tmp_path / "corpus", truth=f"{there}/kit/{numbers.name}")
    expected = shard(tmp_path / "in_folders", tmp_path / "expected")
    assert corpus.classes == expected.classes
    assert contents(corpus) == contents(expected)


def test_the_small_files_beside_a_source_may_be_on_s3(tmp_path, s3):
    source = image_folder(tmp_path / "images", classes=3, images=6)
    there = folder_at(s3.bucket(), "test")
    there.write_bytes("words.txt", b"c0\ttench\nc1\tgoldfish\nc2\thammerhead\n")
    there.write_bytes("names/order.txt", b"c2\nc0\n")
    corpus = shard(source, tmp_path / "corpus", words=f"{there}/words.txt", classes=f"{there}/names/order.txt")
    assert (corpus.classes, corpus.manifest["class_descriptions"]) == (["c2", "c0"], ["hammerhead", "tench"])
    with pytest.raises(StorageError, match=r"s3://.*/nothing\.txt cannot be read: there is no such object"):
        shard(source, tmp_path / "none", words=f"{there}/nothing.txt")


@pytest.mark.parametrize("form", ["outer", "inner"])
def test_gzip_tars_on_s3_give_the_same_corpus_and_are_decoded_once(tmp_path, s3, messages, form):
    root = incompressible(tmp_path / "images", 80)
    source = gzip_tar(root, form)
    there = folder_at(s3.bucket(), "test")
    there.put(source, source.name)
    expected = shard(root, tmp_path / "expected", shard_mb=8)
    s3.faults.rates = {"slow_down": 0.1, "reset": 0.05, "short": 0.1}
    corpus = shard(f"{there}/{source.name}", tmp_path / "corpus", shard_mb=8)
    assert tars_of(corpus) == tars_of(expected)
    assert s3.faults.injected.total() > 5
    s3.faults.rates = {}
    assert shard(f"{there}/{source.name}", tmp_path / "again", shard_mb=8).corpus_hash == corpus.corpus_hash
    assert "is known from before" in messages()


def test_a_gzip_tar_of_which_the_store_refuses_a_part_is_one_error_of_the_store(tmp_path, s3):
    source = gzip_tar(incompressible(tmp_path / "images", 80), "outer")
    there = folder_at(s3.bucket(), "test")
    there.put(source, source.name)
    s3.faults.rates, s3.faults.only = {"denied": 1.0}, r"bytes=1\d{7}-"
    with pytest.raises(StorageError, match=rf"{source.name}.*denied"):
        shard(f"{there}/{source.name}", tmp_path / "corpus")


def test_a_gzip_tar_that_is_gone_or_shorter_is_one_error(tmp_path, s3):
    source = gzip_tar(incompressible(tmp_path / "images", 80), "outer")
    there = folder_at(s3.bucket(), "test")
    there.put(source, source.name)
    listing = list_source(SourceSettings(source=f"{there}/{source.name}"))
    there.write_bytes(source.name, source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"source\.tar\.gz .*it has changed since it was listed"):
        list(listing.images.groups(listing.names, listing.sizes))
    there.remove(source.name)
    with pytest.raises(SourceError, match=r"source\.tar\.gz is gone: it was there when the source was listed"):
        list(listing.images.groups(listing.names, listing.sizes))


def test_tars_of_others_on_s3_become_a_corpus_as_they_are(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    expected = make_corpus(image_folder(tmp_path / "images", classes=3, images=12), tmp_path / "expected")
    bucket = s3.bucket()
    for path in expected.path.glob("*.tar"):
        folder_at(bucket, "test").put(path, f"tars/{path.name}")
    source = f"{bucket}/tars/shard-0000*.tar"
    s3.faults.rates = {"slow_down": 0.1, "short": 0.1}
    for number, destination in enumerate((str(tmp_path / "there"), f"{bucket}/corpus")):
        corpus = index_corpus(IndexSettings(source=source, destination=destination, tars="copy"))
        assert not list(verify(corpus)), number
        assert {image for image, _ in contents(corpus).values()} == {image for image, _ in contents(expected).values()}
    with pytest.raises(SourceError, match=r"cannot be hard-linked into .* give tars=copy"):
        index_corpus(IndexSettings(source=source, destination=str(tmp_path / "linked")))
    with pytest.raises(SourceError, match="there is no file that matches nothing"):
        index_corpus(IndexSettings(source=f"{bucket}/tars/nothing-*.tar", destination=str(tmp_path / "none")))


def test_what_opens_the_buckets_of_a_table_travels_with_its_images(tmp_path, s3):
    """To a process that has the settings of the endpoint and no credentials: a worker of a running cluster."""
    bucket = s3.bucket()
    folder_at(bucket, "test").write_bytes("a.jpg", b"an image")
    images = RemoteImages.at([f"{bucket}/a.jpg", "/etc/hostname"], FetchPolicy())
    (tmp_path / "images.pickle").write_bytes(pickle.dumps(images))
    code = f"""
import pickle
from data_prep.columns import Strings
images = pickle.load(open({str(tmp_path / "images.pickle")!r}, "rb"))
[group] = images.groups(Strings.of([b"a", b"b"]), [0, 0])
print(bytes(group[0]))
"""
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    environment |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "b'an image'", done.stderr


def test_sources_on_s3_are_the_same_whatever_the_network_does(tmp_path, s3, monkeypatch):
    """An image folder, a tar of class tars, and a table with addresses."""
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "images", classes=3, images=12)
    bucket = s3.bucket()
    there = folder_at(f"{bucket}/pictures", "test")
    for path in folder.rglob("*.JPEG"):
        there.put(path, str(path.relative_to(folder)))
    with tarfile.open(tmp_path / "source.tar", "w") as outer:
        for each in sorted(folder.iterdir()):
            add(outer, f"{each.name}.tar", class_tar(each))
    folder_at(bucket, "test").put(tmp_path / "source.tar", "tars/source.tar")
    lines = [f"{bucket}/pictures/{p.relative_to(folder)},{p.parent.name}" for p in sorted(folder.rglob("*.JPEG"))]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *lines, f"{bucket}/pictures/none.jpg,c1"]) + "\n")
    expected = shard(folder, tmp_path / "expected")
    s3.faults.rates = {"slow_down": 0.1, "reset": 0.05, "short": 0.1}
    assert tars_of(shard(f"{bucket}/pictures", tmp_path / "1")) == tars_of(expected)
    assert tars_of(shard(f"{bucket}/tars/source.tar", tmp_path / "2")) == tars_of(expected)
    third = shard(tmp_path / "table.csv", tmp_path / "3", image_kb=1)
    assert [entry["reason"] for entry in third.quarantined()] == ["there is no such object"]
    assert {image for image, _ in contents(third).values()} == {image for image, _ in contents(expected).values()}
    assert s3.faults.injected.total() > 10
