"""What is done with finished corpora and with shards of others: showing, indexing."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.contact_sheet import draw_contact_sheet
from data_prep.corpus import Corpus
from data_prep.distributions import Distribution, measure
from data_prep.index import IndexSettings, index_corpus
from data_prep.listing import SourceError
from data_prep.show import describe, draw
from data_prep.verify import verify
from tests.corpora import encoded, image_folder, make_corpus

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


# --------------------------------------------------------------------------------------------------------- show


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("show")
    source = image_folder(folder / "images", classes=3, images=6)
    for place in range(4):
        (source / "c1" / f"more {place}.jpg").write_bytes(encoded(500 + place, (90, 200)))
    (source / "c0" / "damaged.jpg").write_bytes(encoded(9)[:-40])
    (source / "c2" / "page.jpg").write_bytes(b"<html>nothing</html>")
    (source / "c2" / "gray.png").write_bytes(encoded(10, (30, 30), "PNG"))
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(source / "c2" / "deep.png")
    (source / "empty").mkdir()
    return make_corpus(source, folder / "corpus")


def test_show_counts_what_is_there(corpus):
    text = "\n".join(describe(corpus, measure(corpus), classes=10))
    assert "24 images of 4 classes (one class an image)" in text
    assert f"{len(corpus.shard_sizes)} shards" in text
    assert corpus.corpus_hash in text
    assert "left out: 2 images" in text
    assert "  1 x no JPEG, PNG, WebP, BMP or TIFF: begins with '<html>nothing</html>'" in text
    assert "images of a class: 0 to 10, median 7; 1 classes without any" in text
    lines = [line.split() for line in text.splitlines()]
    shown = {line[0]: line[1:] for line in lines if line and line[0] in (*corpus.classes,)}
    assert shown == {"c1": ["10", "█" * 40], "c2": ["8", "█" * 32], "c0": ["6", "█" * 24], "empty": ["0"]}
    assert ["30", "19"] in [line[:2] for line in lines], "images whose shorter side has 30 pixels"
    assert ["90", "4"] in [line[:2] for line in lines]


def test_show_lists_the_largest_and_the_smallest_classes(corpus):
    lines = list(describe(corpus, [], classes=1))
    place = lines.index("  ... 2 more classes ...")
    assert lines[place - 1].split()[0] == "c1"
    assert lines[place + 1].split()[0] == "empty"


@pytest.mark.parametrize("spread", [1, 30, 1000])
def test_bars_hold_every_image_once_on_round_numbers(spread):
    rng = np.random.default_rng(spread)
    values = np.concatenate([rng.integers(200, 200 + spread, 3000), [1, 60000]])
    distribution = Distribution("side", "pixels", 1, np.bincount(values))
    bars = distribution.bars()
    assert len(bars) <= 14
    for bar in bars:
        inside = (values >= bar.low) & (values < bar.high if bar.high > bar.low else values == bar.low)
        assert bar.images == inside.sum()
    assert sum(bar.images for bar in bars) == len(values)
    assert distribution.quantile(0) == 1
    assert distribution.quantile(1) == 60000
    assert distribution.quantile(0.5) == np.sort(values)[(len(values) - 1) // 2]


def test_show_draws_the_images_of_the_corpus(corpus, tmp_path):
    sheet, histograms = draw(corpus, measure(corpus), tmp_path / "new" / "looks", images=1000, seed=0)
    assert sorted(path.name for path in sheet.parent.iterdir()) == ["corpus-histograms.png", "corpus-images.png"]
    with Image.open(histograms) as picture:
        assert picture.width > 1000
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # 24 images in 6 columns by class, then id; the sixteen-bit one is a plain gray of 40000 / 257
    deep = next(i for i in range(24) if corpus.origin(i) == "c2/deep.png")
    order = np.lexsort((np.arange(24), corpus.index["label"]))
    place = order.tolist().index(deep)
    cell = pixels[30 + place // 6 * 200 :, 10 + place % 6 * 170 :][:160, :160]
    assert (cell == round(40000 / 257)).all()
    first = sheet.read_bytes()
    assert draw(corpus, measure(corpus), tmp_path, images=5, seed=1)[0].read_bytes() != first
    small = (tmp_path / "corpus-images.png").read_bytes()
    assert draw(corpus, measure(corpus), tmp_path, images=5, seed=1)[0].read_bytes() == small
    assert draw(corpus, measure(corpus), tmp_path, images=5, seed=2)[0].read_bytes() != small


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # of the text drawn
def test_an_image_too_large_to_draw_is_named_and_marked(corpus, tmp_path, monkeypatch):
    deep = next(i for i in range(24) if corpus.origin(i) == "c2/deep.png")
    gray = next(i for i in range(24) if corpus.origin(i) == "c2/gray.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many: 64 x 64, but not 30 x 30
    failures = draw_contact_sheet(corpus, [deep, gray], "title", tmp_path / "sheet.png")
    assert len(failures) == 1
    assert failures[0].startswith(f"sample {deep} (c2/deep.png): Image size (4096 pixels) exceeds limit")
    monkeypatch.undo()
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.convert("RGB").getpixel((10, 30)) == (0xB0, 0x00, 0x20), "a red frame"


def test_show_as_a_command_draws_into_a_place_of_the_corpus_not_where_one_stands(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_HOME", str(tmp_path / "home"))
    job = tmp_path / "working_dir_files" / "job"
    job.mkdir(parents=True)
    before = sorted(path.name for path in corpus.path.iterdir())
    done = run("show.py", corpus.path, "images=3", cwd=job)
    assert done.returncode == 0, done.stderr
    assert "24 images of 4 classes" in done.stdout
    for picture in ("images", "histograms"):
        drawn = tmp_path / "home" / "show" / f"corpus-{corpus.corpus_hash[:8]}" / f"corpus-{picture}.png"
        assert f"drew {drawn}" in done.stdout
        assert drawn.is_file()
    assert sorted(path.name for path in corpus.path.iterdir()) == before
    done = run("show.py", corpus.path, "output=.", cwd=job)
    assert done.returncode == 2
    assert done.stderr.startswith("error: output = '.' is relative, but this job runs in a temporary copy")
    done = run("show.py", corpus.path, f"output={corpus.path / 'manifest.json'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert list(job.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- index


def index(source: Path, destination: Path, **settings: Any) -> Corpus:
    return index_corpus(IndexSettings(source=str(source), destination=str(destination), **settings))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def quarantine(corpus: Corpus) -> dict[str, str]:
    lines = (corpus.path / "quarantine.jsonl").read_text().splitlines()
    return {entry["origin"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.fixture
def written(tmp_path) -> tuple[Path, list[tuple[bytes, int]]]:
    """Two tars as the webdataset package writes them, and what is in them."""
    import webdataset

    folder = tmp_path / "written"
    folder.mkdir()
    samples = []
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"train-{shard:04d}.tar")) as sink:
            for place in range(7):
                number = 7 * shard + place
                image, label = encoded(number, (40 + number, 30), "PNG" if number == 3 else "JPEG"), number % 5
                extension = "png" if number == 3 else "jpg"
                sink.write(
                    {"__key__": f"a folder/{number:05d}", extension: image, "cls": label, "json": {"id": number}}
                )
                samples.append((image, label))
    return folder, samples


def test_tars_of_webdataset_become_a_corpus_as_they_are(ray, written, tmp_path):
    folder, samples = written
    corpus = index(folder, tmp_path / "corpus")
    assert (corpus.num_samples, corpus.label_kind, corpus.shard_sizes) == (14, "single", [7, 7])
    assert corpus.classes == ["0", "1", "2", "3", "4"]
    assert corpus.class_counts == [3, 3, 3, 3, 2]
    assert [image.tobytes() for image in corpus.read(range(14))] == [image for image, _ in samples]
    assert corpus.labels_of(range(14))[1].tolist() == [label for _, label in samples]
    assert corpus.index["width"].tolist() == list(range(40, 54))
    assert corpus.origin(3) == "train-0000.tar/a folder/00003.png"
    assert list(verify(corpus)) == []
    assert (corpus.path / "train-0001.tar").samefile(folder / "train-0001.tar")
    copied = index(folder, tmp_path / "copied", tars="copy")
    assert content(copied.path) == content(corpus.path)
    assert not (copied.path / "train-0001.tar").samefile(folder / "train-0001.tar")


def test_dali_reads_indexed_tars(ray, written, tmp_path):
    from nvidia.dali import fn, pipeline_def

    folder, samples = written
    corpus = index(folder, tmp_path / "corpus")
    tars = [corpus.path / shard["name"] for shard in corpus.manifest["shards"]]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def read():
        outputs: Any = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=["jpg;png", "cls"],
        )
        return tuple(outputs)

    pipeline = read()
    pipeline.build()
    for image, label in samples:
        got, number = pipeline.run()
        assert np.asarray(got[0]).tobytes() == image
        assert int(np.asarray(number[0]).tobytes()) == label


def test_too_many_unusable_samples_stop_the_indexing(ray, tmp_path):
    good = [(f"{n}.{e}", encoded(n) if e == "jpg" else b"0") for n in range(5) for e in ("jpg", "cls")]
    bad = [("x.jpg", encoded(7)), ("y.jpg", encoded(8)[:-30]), ("y.cls", b"0")]
    write_tar(tmp_path / "source" / "x.tar", good + bad, tarfile.PAX_FORMAT)
    with pytest.raises(
        SourceError, match=r"2 of the first 7 images .* more than max_failures = 0\.25 allows: .*no \.cls"
    ):
        index(tmp_path / "source", tmp_path / "corpus")
    corpus = index(tmp_path / "source", tmp_path / "corpus", max_failures=0.3)
    assert (len(corpus), corpus.manifest["quarantined"]) == (5, 2)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_in_any_order_and_samples_that_cannot_be_used(ray, tmp_path, tar_format):
    long = "deep/" * 30 + "né" * 20  # more than a tar header holds, and not ASCII
    members = [
        ("./", b""), ("./a.cls", b"2\n"), ("./a.txt", b"a caption"), ("./a.JPEG", encoded(1)),
        (f"{long}.webp", encoded(2, (50, 20), "WEBP")), (f"{long}.cls", b"0"),
        ("no_label.jpg", encoded(3)), ("damaged.jpg", encoded(4)[:-30]), ("damaged.cls", b"1"),
        ("name.jpg", encoded(5)), ("name.cls", b"cat"), ("two.jpg", encoded(6)), ("two.png", encoded(6)),
        ("two.cls", b"1"), ("outside.jpg", encoded(7)), ("outside.cls", b"3"), ("__meta__", b"x"),
        (".hidden.jpg", b"x"), ("README", b"x"), ("mask.seg.png", b"x"), ("mask.jpg", encoded(8)), ("mask.cls", b"1"),
        ("late.cls", b"1"),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "source" / "x.tar", members, tar_format)
    (tmp_path / "classes.txt").write_text("n1\tdog, hound\nn2\nn3\tcat\n")
    corpus = index(tar, tmp_path / "corpus", classes=str(tmp_path / "classes.txt"), max_failures=0.9)
    assert corpus.classes == ["n1", "n2", "n3"]
    assert corpus.class_descriptions == ["dog, hound", "n2", "cat"]
    assert [corpus.origin(sample) for sample in range(3)] == [
        "x.tar/./a.JPEG", f"x.tar/{long}.webp", "x.tar/mask.jpg",
    ]  # fmt: skip
    assert corpus.labels_of(range(3))[1].tolist() == [2, 0, 1]
    assert [image.tobytes() for image in corpus.read([0, 2])] == [encoded(1), encoded(8)]
    reasons = quarantine(corpus)
    assert reasons.pop("x.tar/damaged.jpg").startswith("damaged JPEG")
    assert reasons.pop("x.tar/late.cls").startswith("no image (jpg, jpeg, png, ")
    assert reasons == {
        "x.tar/no_label.jpg": "no .cls next to the image",
        "x.tar/name.jpg": ".cls is no class number but 'cat'",
        "x.tar/two.jpg": "2 images under one key: jpg, png",
        "x.tar/outside.jpg": "class 3 is outside 0..2",
    }
    assert list(verify(corpus)) == []


def test_many_labels_beside_the_images(ray, tmp_path):
    members = []
    texts = ['{"labels": [4, 1], "weights": [0.25, 0.9]}', '{"label": 2, "caption": "é"}', '{"labels": []}']
    wrong = ['{"labels": ["cat"]}', "{", '{"labels": [1], "weights": [-1]}', '{"labels": [1, 1]}', '{"labels": [true]}']
    for number, text in enumerate([*texts, *wrong]):
        members += [(f"{number}.jpg", encoded(number)), (f"{number}.json", text.encode())]
    write_tar(tmp_path / "source" / "many.tar", members)
    corpus = index(tmp_path / "source", tmp_path / "corpus", max_failures=0.7)
    assert (corpus.label_kind, corpus.num_samples, len(quarantine(corpus))) == ("multi", 3, 5)
    rows, classes, weights = corpus.labels_of([0, 1, 2])
    assert (rows.tolist(), classes.tolist()) == ([0, 0, 1], [1, 4, 2])
    np.testing.assert_array_equal(weights, np.array([0.9, 0.25, 1], np.float32))
    assert corpus.index["label"].tolist() == [1, 2, -1]
    assert corpus.class_counts == [0, 1, 1, 0, 1]
    assert list(verify(corpus)) == []
    path = corpus.path / "many.tar"
    path.write_bytes(path.read_bytes().replace(b'"label": 2', b'"label": 3'))
    assert any("the label beside it is not that of" in problem for problem in verify(Corpus.open(str(corpus.path))))


def test_our_own_shards_give_the_same_index(ray, corpus, tmp_path):
    again = index(corpus.path, tmp_path / "again")
    np.testing.assert_array_equal(again.index, corpus.index)
    assert [shard["xxh3_128"] for shard in again.manifest["shards"]] == [
        shard["xxh3_128"] for shard in corpus.manifest["shards"]
    ]
    for shard in corpus.manifest["shards"]:
        name = Path(shard["name"]).with_suffix(".idx").name
        assert (again.path / name).read_bytes() == (corpus.path / name).read_bytes()


def test_indexing_goes_on_where_it_was(ray, written, tmp_path):
    folder, _ = written
    corpus = index(folder, tmp_path / "corpus")
    before = content(corpus.path)
    inodes = {name: (corpus.path / name).stat().st_ino for name in before}
    for name in ("manifest.json", "index.bin", "train-0001.record.json", "train-0001.idx"):
        (corpus.path / name).unlink()
    (corpus.path / ".train-0001.tar.writing-0123456789ab").write_bytes(b"of a killed run")
    assert content(index(folder, tmp_path / "corpus").path) == before
    kept = [name for name in before if name.startswith("train-0000")]
    assert all((corpus.path / name).stat().st_ino == inodes[name] for name in kept)
    write_tar(folder / "train-0002.tar", [("1.jpg", encoded(1)), ("1.cls", b"1")])
    with pytest.raises(ValueError, match=r"holds another corpus.*bytes, 2 tars, .*; now .* 3 tars"):
        index(folder, tmp_path / "corpus")
    assert content(corpus.path) == before
    assert index(folder / "train-000[12].tar", tmp_path / "other").shard_sizes == [7, 1]


def test_one_tar_that_is_cut_short_stops_indexing_and_is_named(ray, written, tmp_path):
    folder, _ = written
    path = folder / "train-0001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:20000])
    with pytest.raises(ValueError, match=r"train-0001\.tar is cut short"):
        index(folder, tmp_path / "corpus")
    with pytest.raises(ValueError, match="has not finished"):
        Corpus.open(str(tmp_path / "corpus"))


def no_usable_sample(tmp: Path) -> Path:
    images = [(f"{number}.jpg", encoded(number)) for number in range(3)]
    labels = [(f"{number}.cls", b"1") for number in range(3)]
    return write_tar(tmp / "source" / "apart.tar", images + labels)


def zipped(tmp: Path) -> Path:
    (tmp / "source").mkdir()
    (tmp / "source" / "x.tar.gz").write_bytes(b"")
    return tmp / "source"


def zipped_but_named_tar(tmp: Path) -> Path:
    (tmp / "source").mkdir()
    (tmp / "source" / "x.tar").write_bytes(gzip.compress(b"x" * 1000))
    return tmp / "source"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: tmp / "missing", "no such file or folder, and no file matches"),
        (zipped, r"has no .tar file; it has compressed ones \(x.tar.gz\)"),
        (zipped_but_named_tar, r"x\.tar is compressed with gzip"),
        (no_usable_sample, r"no sample of source .* can be used: 3 x no \.cls next to the image; 3 x no image"),
        (lambda tmp: write_tar(tmp / "a.tar", [("1.jpg", encoded(1))]), "has no label: neither .cls nor .json"),
        (lambda tmp: write_tar(tmp / "a.tar", [("1.jpg", encoded(1)), ("1.json", b'{"labels": []}')]), "has a label"),
    ],
)
def test_tars_that_make_no_corpus_are_refused_and_leave_nothing(ray, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        index(make(tmp_path), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_tars_on_another_file_system_are_copied_on_demand_only(ray, written, tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    destination = memory / f"vitforge-test-{os.getpid()}"
    with pytest.raises(ValueError, match=r"train-0000\.tar cannot be hard-linked .* Give tars=copy"):
        index(written[0], destination)
    assert not destination.exists()
    try:
        assert index(written[0], destination, tars="copy").num_samples == 14
    finally:
        shutil.rmtree(destination)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("a\n\nb\n", "line 2: there is no name"), ("a\nb\na\n", "line 3: class 'a'")],
)
def test_wrong_files_of_classes_are_refused_with_the_line(written, tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        index(written[0], tmp_path / "corpus", classes=str(tmp_path / "classes.txt"))
    assert not (tmp_path / "corpus").exists()
