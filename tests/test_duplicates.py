"""Duplicates: what the hash tells apart, the exact search, what is decided, and sharding with it on real Ray."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cluster.folders import LocalFolder, folder_at
from cluster.settings import SettingsError
from data_prep import duplicates
from data_prep.corpus import Corpus, CorpusError
from data_prep.duplicate_search import HammingIndex
from data_prep.duplicates import DuplicateSearch, decide, remove_duplicates
from data_prep.perceptual_hash import MIRROR, SIMILAR, describe_images, similarity
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.show import describe
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.verify import verify
from tests.corpora import encoded, image_folder, make_corpus
from tests.s3_server import S3Server

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---------------------------------------------------------------------------------------------------------- the hash


def jpeg(image: Image.Image, quality: int = 90, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def crop(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    x, y = width * share / 2, height * share / 2
    return image.crop((round(x), round(y), round(width - x), round(height - y)))


def turned(image: Image.Image) -> bytes:
    """Stored on its side, with the note how to turn it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(image.transpose(Image.Transpose.ROTATE_90), exif=exif)


COPIES = {
    "the same pixels as PNG": png,
    "quality 30": lambda image: jpeg(image, 30),
    "half as large": lambda image: jpeg(image.resize((image.width // 2, image.height // 2))),
    "twice as large": lambda image: jpeg(image.resize((image.width * 2, image.height * 2))),
    "squeezed": lambda image: jpeg(image.resize((64, 64))),
    "gray": lambda image: jpeg(image.convert("L")),
    "CMYK": lambda image: jpeg(image.convert("CMYK")),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.15)),
    "darker": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(0.8)),
    "more contrast": lambda image: jpeg(ImageEnhance.Contrast(image).enhance(1.2)),
    "turned by its EXIF": turned,
    "progressive": lambda image: jpeg(image, progressive=True),
}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Real pictures: pieces of two photographs that overlap little, without those of nothing but sky."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    places = [(x, y) for x in range(0, 600, 120) for y in range(0, 400, 100)]
    pieces = [picture.crop((x, y, x + 150, y + 125)).resize((300, 250)) for picture in pictures for x, y in places]
    return [piece for piece in pieces if np.asarray(piece.convert("L")).std() > 20]


@pytest.fixture(scope="module")
def originals(photographs):
    return describe_images([png(image) for image in photographs])


def distances(a, b):
    return np.bitwise_count(a["hash"] ^ b["hash"])


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_near_and_alike(photographs, originals, name):
    copies = describe_images([COPIES[name](image) for image in photographs])
    assert copies["pictured"].all()
    assert (distances(copies, originals) <= 8).mean() >= 0.975
    assert (similarity(copies["shape"], originals["shape"], mirrored=False) >= SIMILAR).all()


def test_most_slightly_cropped_copies_are_near_too(photographs, originals):
    for share, least in ((0.02, 0.95), (0.05, 0.6)):
        copies = describe_images([jpeg(crop(image, share)) for image in photographs])
        near = distances(copies, originals) <= 8
        assert near.mean() >= least
        assert (similarity(copies["shape"], originals["shape"], mirrored=False)[near] >= SIMILAR).mean() >= 0.95


def test_mirrored_copies_are_near_the_mirrored_hash(photographs, originals):
    copies = describe_images([jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for image in photographs])
    assert (np.bitwise_count(copies["hash"] ^ MIRROR ^ originals["hash"]) <= 8).all()
    assert (similarity(copies["shape"], originals["shape"], mirrored=True) >= SIMILAR).all()
    assert (similarity(copies["shape"], originals["shape"], mirrored=False) < SIMILAR).mean() > 0.9


def test_other_pictures_are_not_duplicates(originals):
    first, second = np.triu_indices(len(originals), 1)
    near = distances(originals[first], originals[second]) <= 8
    alike = similarity(originals["shape"][first], originals["shape"][second], mirrored=False) >= SIMILAR
    assert not (near & alike).any()
    # simple things in the middle of a page: their hashes are near each other, they are not the same
    pages = []
    for kind in range(6):
        page = np.full((120, 120), 255, np.uint8)
        shape = np.random.default_rng(kind).integers(0, 2, (7, 7), np.uint8)
        page[40:82, 40:82] = 255 * np.kron(shape, np.ones((6, 6), np.uint8))
        pages.append(png(Image.fromarray(page)))
    decisions = decide(describe_images(pages), [], dedup=True, distance=8)
    assert not decisions["reason"].any()


def test_flat_images_and_what_does_not_decode_have_exact_duplicates_only():
    flat = [jpeg(Image.new("RGB", (60 + 7 * n, 50), (200, 30, 30)), 90 - n) for n in range(3)]
    damaged = [encoded(5)[:100], b"<html>", b"<html>"]
    descriptors = describe_images([*flat, *damaged, flat[1]])
    assert not descriptors["pictured"].any()
    decisions = decide(descriptors, [], dedup=True, distance=16)
    assert decisions["reason"].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert decisions["of"][5:].tolist() == [4, 1]
    descriptors["content"][3:5] = 0  # could not be had: nothing is known of them
    assert not decide(descriptors[3:5], [descriptors[3:5]], dedup=True, distance=16)["reason"].any()


# -------------------------------------------------------------------------------------------------------- the search


def search(index: HammingIndex, queries, **options) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    index.search(
        queries, lambda pairs: found.extend(zip(*(column.tolist() for column in pairs), strict=True)), **options
    )
    return found


def hashes_with_copies(count: int, changed: int, seed: int) -> np.ndarray:
    """Half of them are the other half with a few bits changed, a tenth is nearly one and the same."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    hashes[count // 2 :] = hashes[: count - count // 2]
    hashes[: count // 10] = hashes[0]
    for bits in rng.integers(0, 64, (changed, count), dtype=np.uint64):
        hashes ^= np.uint64(1) << bits
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 3, 8, 13, 16])
@pytest.mark.parametrize("count", [1, 37, 1500])
def test_the_search_finds_every_pair_within_the_distance_once(distance, count):
    hashes, queries = hashes_with_copies(count, distance // 2, 0), hashes_with_copies(400, 2, 0)
    found = search(HammingIndex(hashes, distance), queries, threads=3)
    apart = np.bitwise_count(queries[:, None] ^ hashes)
    expected = {(*pair, int(apart[tuple(pair)])) for pair in np.argwhere(apart <= distance).tolist()}
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("crowd", [40, 100])
def test_crowded_keys_are_searched_by_their_other_bits(crowd):
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 2**64, 1200, dtype=np.uint64)
    hashes[:900] &= np.uint64(0xFFFF_FFFF_0000_0000)  # of three bands each has a key that most hashes lie under
    hashes[:900] |= rng.integers(0, 2**12, 900, dtype=np.uint64)
    found = search(HammingIndex(hashes, 5, crowd=crowd), hashes[::2])
    apart = np.bitwise_count(hashes[::2, None] ^ hashes)
    assert sorted(found) == sorted((*pair, int(apart[tuple(pair)])) for pair in np.argwhere(apart <= 5).tolist())


def test_queries_that_are_settled_are_asked_no_further():
    """The same picture many times over is not compared with every copy of it."""
    hashes = hashes_with_copies(8_000, 1, 0)
    hashes[:] = hashes[0]
    still_open, compared = np.ones(len(hashes), bool), 0

    def settle(pairs):
        nonlocal compared
        compared += len(pairs[0])
        still_open[pairs[0]] = False

    HammingIndex(hashes, 8).search(hashes, settle, still_open)
    assert compared < 8_000 * 1100


# -------------------------------------------------------------------------------------------------------- decisions


def test_the_first_stays_and_excluded_images_go_before(photographs):
    a, b, c = photographs[0], photographs[5], photographs[25]
    source = [
        jpeg(a),
        jpeg(b),
        jpeg(a, 40),
        jpeg(a),
        png(b),
        jpeg(c, 70),
        jpeg(c.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ]
    described = describe_images(source)
    decisions = decide(described, [], dedup=True, distance=8)
    assert decisions["reason"].tolist() == [0, 0, 2, 1, 2, 0, 2]
    assert decisions["of"][[2, 3, 4, 6]].tolist() == [0, 0, 1, 5]
    assert decisions["mirrored"].tolist() == [False] * 6 + [True]
    evaluation = [describe_images([jpeg(photographs[9])]), describe_images([png(c), jpeg(b)])]
    decisions = decide(described, evaluation, dedup=False, distance=8)
    assert decisions["reason"].tolist() == [0, 1, 0, 0, 2, 2, 2]
    assert decisions["where"][[1, 4, 5, 6]].tolist() == [1, 1, 1, 1]
    assert decisions["of"][[1, 4, 5, 6]].tolist() == [1, 1, 0, 0]
    both = decide(described, evaluation, dedup=True, distance=8)
    assert both["reason"].tolist() == [0, 1, 2, 1, 2, 2, 2]
    assert both["where"].tolist() == [0, 1, -1, -1, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------- sharding


@pytest.fixture
def source(tmp_path):
    """Three classes of eight images; c2 has in it a copy of c0's first, smaller and mirrored."""
    root = image_folder(tmp_path / "images", classes=3, images=8)
    with Image.open(root / "c0" / "000.JPEG") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((90, 60)).save(root / "c2" / "again.png")
    shutil.copy(root / "c1" / "003.JPEG", root / "c2" / "copied.JPEG")
    return root


@pytest.fixture
def evaluation(source, tmp_path) -> Corpus:
    """An evaluation set: two images of its own, and two that are in the source, one of them re-encoded."""
    images = tmp_path / "evaluation" / "images" / "c"
    images.mkdir(parents=True)
    for place in range(2):
        (images / f"own {place}.jpg").write_bytes(encoded(900 + place))
    shutil.copy(source / "c1" / "001.JPEG", images / "same.jpg")
    with Image.open(source / "c1" / "002.JPEG") as image:
        image.save(images / "encoded again.png")
    return make_corpus(images.parent, tmp_path / "evaluation" / "corpus")


def shard(source: Path, destination: Path, **settings) -> Corpus:
    return shard_corpus(ShardSettings(source=str(source), destination=str(destination), shard_mb=0.01, **settings))


def removed(corpus: Corpus) -> dict[str, dict[str, Any]]:
    lines = (corpus.path / "removed.jsonl").read_text().splitlines()
    return {entry.pop("origin"): entry for entry in map(json.loads, lines)}


def test_sharding_leaves_out_duplicates_and_says_which_and_why(ray, source, evaluation, tmp_path, messages):
    whole = shard(source, tmp_path / "whole")
    assert "removed" not in whole.manifest
    settings = {"exclude": (evaluation.url,), "dedup": True}
    corpus = shard(source, tmp_path / "corpus", **settings)
    assert list(verify(corpus)) == []
    entries = removed(corpus)
    assert {origin: (entry["reason"], entry["of"]) for origin, entry in entries.items()} == {
        "c1/001.JPEG": ("exact", "c/same.jpg"),
        "c1/002.JPEG": ("near", "c/encoded again.png"),
        "c2/again.png": ("near", "c0/000.JPEG"),
        "c2/copied.JPEG": ("exact", "c1/003.JPEG"),
    }
    assert entries["c1/002.JPEG"]["corpus"] == entries["c1/001.JPEG"]["corpus"] == evaluation.corpus_hash
    assert entries["c2/again.png"]["corpus"] is None
    assert entries["c2/again.png"]["mirrored"]
    assert entries["c2/again.png"]["distance"] <= 8
    assert entries["c2/again.png"]["similarity"] >= SIMILAR
    there = {corpus.origin(sample) for sample in range(len(corpus))}
    assert there | set(entries) == {whole.origin(sample) for sample in range(len(whole))}
    assert there.isdisjoint(entries)
    assert corpus.manifest["removed"] == {
        "images": 4, "of_excluded_corpora": 2, "inside_the_source": 2, "exact": 2, "near": 2, "mirrored": 1,
    }  # fmt: skip
    assert not (corpus.path / "duplicates").exists()
    assert "4 duplicates are removed" in "\n".join(describe(corpus, [], 3))
    assert "4 duplicates are removed: 2 of images in excluded corpora" in messages()
    assert messages().count("describing 26/26 images") == 1

    again = shard(source, tmp_path / "corpus", **settings)  # nothing is described a second time
    assert again.corpus_hash == corpus.corpus_hash
    assert "is finished already (22 images)" in messages()
    other = shard(source, tmp_path / "other", **settings, workers=1)
    assert {path.name: path.read_bytes() for path in other.path.iterdir()} == {
        path.name: path.read_bytes() for path in corpus.path.iterdir()
    }
    assert messages().count(f"{evaluation}: describing 4/4") == 1
    with pytest.raises(CorpusError, match="holds another corpus"):
        shard(source, tmp_path / "corpus", dedup=True)
    with pytest.raises(SettingsError, match="duplicate_distance is not read"):
        shard(source, tmp_path / "more", duplicate_distance=3)
    assert {"c2/copied.JPEG"} == set(removed(shard(source, tmp_path / "equal", dedup=True, duplicate_distance=0))) - {
        "c2/again.png"
    }


def test_descriptions_of_an_evaluation_set_are_kept_on_the_node_and_nothing_is_written_into_the_set(
    ray, source, evaluation, tmp_path, cache
):
    before = {path.name: path.read_bytes() for path in evaluation.path.iterdir()}
    search = DuplicateSearch((evaluation.url,), False, 8)
    listing = list_source(SourceSettings(source=str(source)))
    remove_duplicates(listing, search, LocalFolder(tmp_path / "corpus"), 1)
    assert {path.name: path.read_bytes() for path in evaluation.path.iterdir()} == before
    assert [path.name for path in (cache / "perceptual-hashes").iterdir()]
    shutil.rmtree(tmp_path / "corpus" / "duplicates")
    for path in evaluation.path.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))  # it is not read again
    assert len(remove_duplicates(listing, search, LocalFolder(tmp_path / "corpus"), 1)) == 24


def test_what_was_described_before_an_interruption_is_not_read_again(ray, source, tmp_path, monkeypatch, messages):
    monkeypatch.setattr(duplicates, "_PART_IMAGES", 5)
    listing = list_source(SourceSettings(source=str(source)))
    expected = remove_duplicates(listing, DuplicateSearch((), True, 8), LocalFolder(tmp_path / "undisturbed"), 2)
    last = source / "c2" / "007.JPEG"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match=r"007\.JPEG is gone"):
        remove_duplicates(listing, DuplicateSearch((), True, 8), LocalFolder(tmp_path / "corpus"), 1)
    last.write_bytes(content)
    for path in (source / "c0").iterdir():
        path.write_bytes(b"not read")
    after = remove_duplicates(listing, DuplicateSearch((), True, 8), LocalFolder(tmp_path / "corpus"), 1)
    assert after.removed is not None
    assert expected.removed is not None
    assert after.removed.lines == expected.removed.lines
    assert len(after) == len(expected) == 24


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_corpus(source, evaluation, tmp_path):
    command = [
        sys.executable, str(ROOT / "data_prep" / "shard.py"), str(source), "corpus", "shard_mb=0.005", "dedup=true",
        f"exclude=[{evaluation.url}]",
    ]  # fmt: skip
    (tmp_path / "undisturbed").mkdir()
    whole = subprocess.run(command, cwd=tmp_path / "undisturbed", capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0, whole.stderr
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed" / "corpus").iterdir()}
    for pattern in ("duplicates/*/part-*", "duplicates/*.jsonl", "shard-*.record.json"):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "corpus").glob(pattern)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "describing" not in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == expected


@pytest.mark.slow
def test_on_s3_as_on_a_file_system(source, evaluation, tmp_path, s3: S3Server):
    excluded, there = folder_at(s3.bucket() + "/evaluation", "test"), folder_at(s3.bucket() + "/corpus", "test")
    for name in evaluation.folder.tree():
        excluded.put(evaluation.path / name, name)

    def run(destination: str, corpus: str) -> str:
        script = str(ROOT / "data_prep" / "shard.py")
        words = [script, str(source), destination, "shard_mb=0.01", "dedup=true", f"exclude=[{corpus}]"]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "evaluation: describing" in run(there.url, excluded.url)
    assert "describing" not in run(there.url, excluded.url)
    assert not any(name.startswith("perceptual-hashes") for name in excluded.names())
    run("local", evaluation.url)
    assert {name: there.read_bytes(name) for name in there.tree() if name != "manifest.json"} == {
        path.name: path.read_bytes() for path in (tmp_path / "local").iterdir() if path.name != "manifest.json"
    }
    assert Corpus.open(there).corpus_hash == Corpus.open(str(tmp_path / "local")).corpus_hash


def test_a_damaged_copy_does_not_take_the_whole_one_along(ray, tmp_path):
    """Pillow decodes a scan with damage in its middle, and one turned by EXIF is always read by Pillow."""
    root = tmp_path / "images" / "c"
    root.mkdir(parents=True)
    picture = Image.effect_mandelbrot((200, 150), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 1
    for name, options in (("1", {}), ("2", {"exif": exif})):
        damaged = bytearray(jpeg(picture, 95, **options))
        middle = len(damaged) - 40
        damaged[middle : middle + 6] = b"\xff\xd3" * 3
        with Image.open(io.BytesIO(damaged)) as image:
            image.load()
        (root / f"{name}-damaged.jpg").write_bytes(damaged)
    (root / "3-whole.jpg").write_bytes(jpeg(picture, 90))
    corpus = shard(tmp_path / "images", tmp_path / "corpus", dedup=True, max_failures=1.0)
    assert [corpus.origin(sample) for sample in range(len(corpus))] == ["c/3-whole.jpg"]
    with pytest.raises(SettingsError, match="Shard with min_side first"):
        shard(tmp_path / "images", tmp_path / "more", dedup=True, min_side=10)
