"""The corpus format through its reading side: what is in it, what damage is noticed, who else can read it."""

import io
import json
import pickle
import resource
import struct
import tarfile
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster import storage
from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError, manifest_hash
from data_prep.image_check import UnusableImage, check_image
from data_prep.verify import verify
from tests.corpora import encoded, image_folder, make_corpus


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = image_folder(tmp_path_factory.mktemp("images") / "source")
    (root / "c1" / "deeper").mkdir()
    (root / "c1" / "deeper" / "picture.png").write_bytes(encoded(7, (21, 33), "PNG"))
    (root / "c2" / "odd name.jpg").write_bytes(encoded(8, (50, 20), "WEBP", lossless=True))
    return root


@pytest.fixture
def corpus(source, tmp_path):
    return make_corpus(source, tmp_path / "corpus")


def test_corpus_holds_the_source_byte_for_byte(corpus, source):
    assert corpus.num_samples == len(corpus.index) == 32
    assert corpus.classes == ["c0", "c1", "c2"]
    assert corpus.class_counts == [10, 11, 11]
    assert len(corpus.shard_sizes) > 2
    ids = np.arange(32)
    origins = [corpus.origin(sample) for sample in ids]
    assert sorted(origins) == sorted(str(path.relative_to(source)) for path in source.rglob("*.*"))
    assert origins != sorted(origins), "all classes are shuffled together"
    rows, classes, weights = corpus.labels_of(ids)
    for sample, origin, image in zip(ids, origins, corpus.read(ids), strict=True):
        content = (source / origin).read_bytes()
        assert image.tobytes() == content
        assert corpus.classes[classes[sample]] == origin.split("/")[0]
        with Image.open(io.BytesIO(content)) as picture:
            assert (corpus.index[sample]["width"], corpus.index[sample]["height"]) == picture.size
    assert rows.tolist() == ids.tolist()
    assert weights.tolist() == [1.0] * 32


def test_shards_are_of_equal_size_without_a_tiny_tail(source, tmp_path):
    root = image_folder(tmp_path / "many", classes=5, images=60)
    sizes = [shard["bytes"] for shard in make_corpus(root, tmp_path / "corpus", shard_mb=0.07).manifest["shards"]]
    assert len(sizes) >= 6
    assert max(sizes) < 1.1 * min(sizes)


def test_webdataset_iterates_the_shards(corpus):
    import webdataset

    shards = [str(corpus.path / shard["name"]) for shard in corpus.manifest["shards"]]
    seen = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(seen) == corpus.num_samples
    for sample, (record, image) in enumerate(zip(seen, corpus.read(np.arange(len(seen))), strict=True)):
        (name,) = {"jpg", "png", "webp"} & set(record)
        assert record[name] == image.tobytes()
        assert int(record["cls"]) == corpus.index[sample]["label"]
        assert record["__key__"].isdigit()


def test_dali_reads_the_shards_with_their_index(corpus):
    from nvidia.dali import fn, pipeline_def

    shards = [corpus.path / shard["name"] for shard in corpus.manifest["shards"]]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def read():
        outputs: Any = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg;png;webp", "cls"],
        )
        return tuple(outputs)

    pipeline = read()
    pipeline.build()
    for sample, image in enumerate(corpus.read(np.arange(corpus.num_samples))):
        got, label = pipeline.run()
        assert np.asarray(got[0]).tobytes() == image.tobytes()
        assert int(np.asarray(label[0]).tobytes()) == corpus.index[sample]["label"]


def test_tarfile_reads_the_shards_and_stores_nothing_of_the_machine(corpus):
    with tarfile.open(corpus.path / "shard-000000.tar", "r:") as tar:
        members = tar.getmembers()
        assert len(members) == 2 * corpus.shard_sizes[0]
        assert {(m.uid, m.gid, m.uname, m.mtime, m.mode) for m in members} == {(0, 0, "", 946684800, 0o644)}


def test_many_labels(source, tmp_path):
    entries: list[dict[str, Any]] = [
        {"path": "c0/000.JPEG", "labels": ["dog", "cat"], "weights": [0.25, 0.9]},
        {"path": "c1/deeper/picture.png", "labels": []},
        {"path": "c2/odd name.jpg", "labels": ["sofa"]},
        {"path": "c2/gone.jpg", "labels": ["sofa"]},
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    table = "path,label,weight\nc0/000.JPEG,cat,0.9\nc0/000.JPEG,dog,0.25\nc2/odd name.jpg,sofa,1\n"
    (tmp_path / "labels.csv").write_text(table)
    corpus = make_corpus(source, tmp_path / "corpus", 0.001, tmp_path / "labels.jsonl")
    assert corpus.label_kind == "multi"
    assert corpus.classes == ["cat", "dog", "sofa"]
    assert corpus.class_counts == [1, 1, 1]
    place = {corpus.origin(sample): sample for sample in range(corpus.num_samples)}
    assert set(place) == {entry["path"] for entry in entries[:3]}
    ids = [place["c2/odd name.jpg"], place["c1/deeper/picture.png"], place["c0/000.JPEG"]] * 2
    rows, classes, weights = corpus.labels_of(ids)
    assert rows.tolist() == [0, 2, 2, 3, 5, 5]
    assert classes.tolist() == [2, 0, 1, 2, 0, 1]
    np.testing.assert_array_equal(weights, np.array([1, 0.9, 0.25] * 2, np.float32))
    assert corpus.index["label"][ids[:3]].tolist() == [2, -1, 0]
    quarantine = (corpus.path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"] for line in quarantine] == ["c2/gone.jpg"]
    assert corpus.manifest["quarantined"] == 1
    assert list(verify(corpus)) == []
    with tarfile.open(corpus.path / corpus.manifest["shards"][0]["name"]) as tar:
        assert sum(name.endswith(".json") for name in tar.getnames()) == corpus.shard_sizes[0]
    from_table = make_corpus(source, tmp_path / "of_csv", 0.001, tmp_path / "labels.csv")
    assert from_table.num_samples == 2
    assert from_table.labels_of([0, 1])[1].tolist().count(2) == 1


def test_reading_is_safe_in_threads_and_after_pickling(corpus):
    expected = [image.tobytes() for image in corpus.read(np.arange(32))]
    arrived = pickle.loads(pickle.dumps(corpus))
    assert arrived.corpus_hash == corpus.corpus_hash
    failures = []

    def read(seed):
        for sample in np.random.default_rng(seed).permutation(32):
            if arrived.read([sample])[0].tobytes() != expected[sample]:
                failures.append(sample)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def cut(path, keep=-1):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest))


def seal_manifest(path, **changes):
    """Changes that go with a matching hash: what another version of this code would have written."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest | {"corpus_hash": manifest_hash(manifest)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p / "manifest.json", 40), "manifest.json is damaged.*Remove manifest.json"),
        (lambda p: edit_manifest(p, num_samples=31), "manifest.json was altered"),
        (lambda p: seal_manifest(p, format_version=2), "format version 2, this code reads 1"),
        (lambda p: (p / "manifest.json").unlink(), "has not finished; run the same shard command"),
        (lambda p: cut(p / "index.bin"), r"index.bin has \d+ bytes where the manifest says"),
        (lambda p: flip(p / "index.bin", 500), "index.bin is damaged: its checksum"),
        (lambda p: (p / "index.bin").unlink(), "index.bin is missing"),
        (lambda p: cut(p / "shard-000001.tar"), "shard-000001.tar has .* cut short"),
        (lambda p: (p / "shard-000001.tar").unlink(), "shard-000001.tar is missing.*same shard command"),
    ],
)
def test_damage_is_named_when_opening(corpus, damage, message):
    damage(corpus.path)
    with pytest.raises(CorpusError, match=message):
        Corpus.open(str(corpus.path))


def test_opening_what_is_no_corpus(tmp_path):
    with pytest.raises(CorpusError, match="no such folder"):
        Corpus.open(str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match=r"make one with `python data_prep/shard\.py"):
        Corpus.open(str(tmp_path))
    with pytest.raises(storage.StorageError, match="gs:// cannot be used here"):
        Corpus.open("gs://bucket/corpus")


def test_an_altered_image_is_named_when_read_and_by_verify(corpus):
    victim = 17
    row = corpus.index[victim]
    shard = corpus.manifest["shards"][row["shard"]]["name"]
    flip(corpus.path / shard, int(row["offset"]) + 100)
    again = Corpus.open(str(corpus.path))
    with pytest.raises(CorpusError, match=rf"{shard} is damaged: sample {victim} \(member '0000"):
        again.read([3, victim])
    again.read(np.delete(np.arange(32), victim))
    problems = list(verify(again))
    assert len(problems) == 2
    assert f"{shard}: its checksum" in problems[0]
    assert f"{shard}: sample {victim} (member" in problems[1]


def test_verify_compares_labels_and_dali_index(corpus):
    assert list(verify(corpus)) == []
    victim = 9
    row = corpus.index[victim]
    shard = corpus.path / corpus.manifest["shards"][row["shard"]]["name"]
    label_at = int(row["offset"]) + (int(row["length"]) + 511) // 512 * 512 + 512
    flip(shard, label_at)
    cut(corpus.path / "shard-000000.idx", -5)
    flip(corpus.path / "shard-000000.origins", 3)
    problems = "\n".join(verify(corpus))
    assert "shard-000000.origins is damaged: it is not what was written" in problems
    assert f"sample {victim} " in problems
    assert "the label beside it" in problems
    assert "shard-000000.idx is missing or is not the index" in problems


def test_too_few_open_files_lose_no_sample(tmp_path):
    corpus = make_corpus(image_folder(tmp_path / "images", classes=4, images=12), tmp_path / "corpus", shard_mb=0.004)
    assert len(corpus.shard_sizes) > 20
    expected = [image.tobytes() for image in corpus.read(range(48))]
    again = Corpus.open(str(corpus.path))
    del corpus
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/dev/null") as last:  # noqa: PTH123 - the lowest free number
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 10, limits[1]))
        try:
            images = again.read(range(48))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [image.tobytes() for image in images] == expected


@pytest.mark.parametrize("ids", [[-1], [32]])
def test_ids_outside_are_refused(corpus, ids):
    for method in (corpus.read, corpus.labels_of):
        with pytest.raises(CorpusError, match=r"must lie in 0\.\.31"):
            method(ids)


# ------------------------------------------------------------------------------------------------- image check


def turned(image_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(1, (60, 40), image_format, exif=exif)


def as_mode(mode, image_format, **options):
    with Image.open(io.BytesIO(encoded(1, (60, 40)))) as image:
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, image_format, **options)
        return buffer.getvalue()


PLAIN = encoded(1, (60, 40))
ODD_BUT_WHOLE = {
    "jpeg": PLAIN,
    "progressive": encoded(1, (60, 40), progressive=True),
    "gray": as_mode("L", "JPEG"),
    "cmyk": as_mode("CMYK", "JPEG"),
    "turned jpeg": turned("JPEG"),
    "turned png": turned("PNG"),
    "turned webp": turned("WEBP"),
    "turned tiff": turned("TIFF"),
    "junk after the end": PLAIN + b"junk" * 50,
    "zeros before the end marker": PLAIN[:-2] + bytes(20) + PLAIN[-2:],
    "unknown JFIF version": PLAIN.replace(b"JFIF\0\x01\x01", b"JFIF\0\x02\x01"),
    "palette png": as_mode("P", "PNG"),
    "png with alpha": as_mode("RGBA", "PNG"),
    "one-bit png": as_mode("1", "PNG"),
    "webp": encoded(1, (60, 40), "WEBP"),
    "bmp": encoded(1, (60, 40), "BMP"),
    "tiff": encoded(1, (60, 40), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", ODD_BUT_WHOLE)
def test_whole_images_pass_with_the_size_that_the_decoder_gives(name):
    from nvidia.dali import fn, pipeline_def

    data = ODD_BUT_WHOLE[name]
    facts = check_image(data)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode():
        source = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], batch=True)
        return fn.decoders.image(source)

    pipeline = decode()
    pipeline.build()
    assert np.asarray(pipeline.run()[0][0]).shape == (facts.height, facts.width, 3)
    assert (facts.width < facts.height) == name.startswith("turned")


def test_format_is_judged_by_content():
    assert check_image(encoded(1, image_format="PNG")).extension == "png"
    assert check_image(encoded(1, image_format="WEBP")).extension == "webp"
    assert check_image(PLAIN).extension == "jpg"


def overwritten(data, start, content):
    return data[:start] + content + data[start + len(content) :]


BIG = encoded(3, (400, 300), quality=95)
BIG_PNG = encoded(3, (80, 60), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>", r"begins with '<!DOCTYPE html>"),
        (bytes(1000), "begins with zeros"),
        (encoded(1, image_format="GIF"), "GIF images are not supported"),
        (BIG[: len(BIG) // 2], "damaged JPEG: .*premature end"),
        (BIG[:-2], "damaged JPEG: premature end"),
        (BIG[:100], "damaged JPEG"),
        (overwritten(BIG, len(BIG) // 2, bytes(300)), "damaged JPEG"),
        (overwritten(BIG, len(BIG) // 2, b"\xff\xd9"), "damaged JPEG"),
        (BIG[: len(BIG) // 2] + BIG[len(BIG) // 2 + 301 :], "damaged JPEG"),
        (
            overwritten(BIG, len(BIG) // 2, bytes(300)).replace(b"JFIF\0\x01\x01", b"JFIF\0\x02\x01"),
            "damaged JPEG: premature end",
        ),
        (BIG_PNG[:-40], "damaged PNG"),
        (overwritten(BIG_PNG, len(BIG_PNG) // 2, b"damage"), "damaged PNG"),
        (encoded(1, image_format="WEBP")[:-30], "damaged WEBP"),
        (BIG_PNG[:16] + struct.pack(">II", 70000, 70000) + BIG_PNG[24:], "PNG"),
    ],
)
def test_damaged_images_are_refused_with_the_reason(data, reason):
    with pytest.raises(UnusableImage, match=reason):
        check_image(data)
