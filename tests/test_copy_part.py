"""A copy of a part of a corpus: shards of its own, for every reader, and the same corpus for a run."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.folders import Folder, folder_at
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError
from data_prep.index import IndexSettings, index_corpus
from data_prep.mixture import Mixture
from data_prep.order import SampleOrder
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.subset import SubsetSettings, make_parts
from data_prep.verify import verify
from pipeline.corpora import shuffle_windows
from pipeline.data_config import DataSettings
from tests.corpora import encoded, image_folder, make_corpus
from tests.running import losses, tiny, torchrun
from tests.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("ray")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("base")
    return make_corpus(image_folder(root / "images", classes=3, images=16), root / "corpus", shard_mb=0.02)


def parts_of(corpus: Corpus, destination: object, **settings: Any) -> dict[str, Corpus]:
    return make_parts(SubsetSettings(corpus=corpus.url, destination=str(destination), **settings))


def copy(source: object, destination: object, workers: int = 0) -> Corpus:
    return copy_corpus(CopySettings(source=str(source), destination=str(destination), workers=workers))


def content(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.tree()}


def samples(corpus: Corpus) -> list[tuple[str, bytes, Any]]:
    """Origin, image, labels and size of every sample, in the order of the ids."""
    ids = np.arange(len(corpus))
    rows, classes, weights = corpus.labels_of(ids)
    labels = [(classes[rows == row].tolist(), weights[rows == row].tolist()) for row in ids]
    sizes = corpus.index[ids][["width", "height", "label"]].tolist()
    images = [image.tobytes() for image in corpus.read(ids)]
    return list(zip(corpus.origins(), images, zip(labels, sizes, strict=True), strict=True))


def same_corpus(one: Corpus, other: Corpus) -> None:
    """What a run knows of two corpora, and what it gets of them, is the same."""
    assert one.corpus_hash == other.corpus_hash
    assert Mixture.of(one).corpus_hash == Mixture.of(other).corpus_hash
    assert samples(one) == samples(other)
    assert (one.shard_sizes, one.classes, one.class_counts) == (other.shard_sizes, other.classes, other.class_counts)


def images_of_tars(folder: Path) -> list[bytes]:
    """What webdataset finds in the tars of a folder."""
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    return [
        next(value for name, value in sample.items() if name in ("jpg", "png"))
        for sample in webdataset.WebDataset(tars, shardshuffle=False)
    ]


def test_every_reader_of_a_copy_finds_the_parts_samples_and_no_other(base: Corpus, tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    parts = parts_of(base, tmp_path / "parts", holdout=0.25)
    seen = []
    for name, part in parts.items():
        made = copy(part, tmp_path / name)
        assert list(verify(made)) == []
        same_corpus(made, part)
        images = [image for _, image, _ in samples(part)]
        assert images_of_tars(made.path) == images
        tars = [made.path / shard["name"] for shard in made.manifest["shards"]]

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def read(tars: list[Path] = tars) -> tuple[Any, ...]:
            outputs: Any = fn.readers.webdataset(
                paths=[str(path) for path in tars], index_paths=[str(path.with_suffix(".idx")) for path in tars],
                ext=["jpg", "cls"], name="reader",
            )  # fmt: skip
            return tuple(outputs)

        pipeline = read()
        pipeline.build()
        assert pipeline.epoch_size("reader") == len(part)
        assert [np.asarray(pipeline.run()[0][0]).tobytes() for _ in images] == images
        seen += images
    assert len(seen) == len(set(seen)) == len(base)


def test_windows_and_order_are_those_of_the_part(base: Corpus, tmp_path: Path, s3: S3Server) -> None:
    """On an object store the windows follow from the bytes of shards, which in the copy are fewer."""
    there = copy(base, s3.bucket() + "/base")
    part = parts_of(there, there.url.replace("/base", "/parts"), subsets=(0.3,))["30pct"]
    made = copy(part, s3.bucket() + "/copy", workers=1)
    same_corpus(made, part)
    sizes = [sum(shard["bytes"] for shard in corpus.manifest["shards"]) for corpus in (part, made)]
    assert sizes[1] < 0.5 * sizes[0]
    settings = DataSettings(corpus="x", cache_gb=4 * max(s["bytes"] for s in part.manifest["shards"]) / 1e9)
    windows = [shuffle_windows(Mixture.of(corpus), settings) for corpus in (part, made)]
    assert windows[0] == windows[1] == [2]
    orders = [SampleOrder(len(c), 3, c.shard_sizes, window=2).ids(np.arange(len(c)))[1] for c in (part, made)]
    np.testing.assert_array_equal(orders[0], orders[1])
    back = copy(made, tmp_path / "back", workers=3)
    again = copy(parts_of(base, tmp_path / "parts", subsets=(0.3,))["30pct"], tmp_path / "again", workers=3)
    assert content(back.folder) == content(made.folder)
    place = "manifest.json"  # says where the base lay
    assert {**content(again.folder), place: b""} == {**content(made.folder), place: b""}


def test_an_interrupted_copy_goes_on_and_a_finished_one_stays(base: Corpus, tmp_path: Path) -> None:
    part = parts_of(base, tmp_path / "parts", holdout=0.25)["heldout"]
    made = copy(part, tmp_path / "copy")
    before = content(made.folder)
    (made.path / "manifest.json").unlink()
    (made.path / "copying.json").write_text(json.dumps({"corpus_hash": part.corpus_hash}))
    tars = [shard["name"] for shard in made.manifest["shards"]]
    (made.path / tars[1]).write_bytes(b"cut")
    (made.path / tars[2].replace(".tar", ".record.json")).unlink()
    (made.path / "places.bin").write_bytes(b"of an older version")
    kept = (made.path / tars[0]).stat().st_ino
    assert content(copy(part, tmp_path / "copy").folder) == before
    assert (made.path / tars[0]).stat().st_ino == kept
    inodes = {path.name: path.stat().st_ino for path in made.path.iterdir()}
    copy(part, tmp_path / "copy")
    assert {path.name: path.stat().st_ino for path in made.path.iterdir()} == inodes
    (made.path / tars[1]).unlink()  # of a finished one
    assert content(copy(part, tmp_path / "copy").folder) == before
    other = parts_of(base, tmp_path / "other", holdout=0.25, seed=1)["heldout"]
    with pytest.raises(CorpusError, match="holds another corpus"):
        copy(other, tmp_path / "copy")
    with pytest.raises(CorpusError, match="is a part that shares the shards of another corpus"):
        copy(part, parts_of(base, tmp_path / "same", holdout=0.25)["heldout"].url)
    with pytest.raises(CorpusError, match="copy of a part of another corpus: append to that one"):
        shard_corpus(ShardSettings(source=base.url, destination=made.url, append=True))


def test_damage_of_the_shared_shards_is_not_copied(base: Corpus, tmp_path: Path) -> None:
    whole = Corpus.open(shutil.copytree(base.path, tmp_path / "base").as_posix())
    part = parts_of(whole, tmp_path / "parts", holdout=0.25)["heldout"]
    tar = whole.path / part.manifest["shards"][0]["name"]
    row = part.index[0]
    damaged = bytearray(tar.read_bytes())
    damaged[int(row["offset"]) + int(row["length"]) // 2] ^= 1
    tar.write_bytes(damaged)
    with pytest.raises(CorpusError, match=rf"{tar} is damaged: its sample with the image at byte {row['offset']}"):
        copy(part, tmp_path / "copy")
    with pytest.raises(CorpusError, match=r"manifest\.json is missing"):
        Corpus.open(str(tmp_path / "copy"))
    assert not (tmp_path / "copy" / tar.name).exists()


def test_whole_shards_of_an_older_copy_become_those_of_the_part(base: Corpus, tmp_path: Path) -> None:
    """Older versions copied the shards of a part as they are."""
    part = parts_of(base, tmp_path / "parts", holdout=0.25)["heldout"]
    old = shutil.copytree(part.path, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["shards_at"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    for shard in manifest["shards"]:
        for suffix in (".tar", ".idx", ".origins"):
            shutil.copy(base.path / shard["name"].replace(".tar", suffix), old)
    same_corpus(Corpus.open(str(old)), part)
    assert len(images_of_tars(old)) > len(part)
    with pytest.raises(CorpusError, match="with whole shards, as older versions copied one"):
        copy(part, old)
    made = copy(old, tmp_path / "new")
    same_corpus(made, part)
    assert len(images_of_tars(made.path)) == len(part)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("label", ["cls", "json"])
def test_tars_of_others_keep_what_their_samples_have(tmp_path: Path, tar_format: int, label: str) -> None:
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "tars" / f"x {shard}.tar", "w", format=tar_format) as tar:
            for place in range(12):
                key = f"deep/{'n' * (100 * (place % 2))}/é {shard}{place}"
                number = b"%d\n" % (place % 3) if label == "cls" else b'{"labels": [2, 0], "weights": [0.3, 1]}'
                members = {"txt": b"a caption", "JPEG": encoded(20 * shard + place), label: number}
                if place == 5:
                    del members[label]  # is in the tar and not in the corpus
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    with (tmp_path / "data").open("w+b") as file:
                        file.write(data)
                        file.seek(0)
                        tar.addfile(info, file)
    whole = index_corpus(IndexSettings(source=str(tmp_path / "tars"), destination=str(tmp_path / "corpus")))
    assert len(whole) == 22
    part = parts_of(whole, tmp_path / "parts", subsets=(9,))["9-images"]
    made = copy(part, tmp_path / "copy")
    assert list(verify(made)) == []
    same_corpus(made, part)
    names = {origin.partition("/")[2] for origin in made.origins()}
    found: dict[str, int] = {}
    for path in made.path.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {member.name: member.size for member in tar.getmembers()}
    assert {name for name in found if name.endswith(".JPEG")} == names
    assert len(found) == 3 * len(part)


def test_a_version_of_a_corpus_is_copied_with_its_own_shards(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", classes=2, images=8)
    settings = ShardSettings(source=str(source), destination=str(tmp_path / "corpus"), shard_mb=0.01)
    first = shard_corpus(settings)
    alone = content(first.folder)
    for number in range(2):
        (source / "c1" / f"new{number}.JPEG").write_bytes(encoded(77 + number))
        newest = shard_corpus(settings.model_copy(update={"append": True}))
    assert (len(newest), newest.version) == (18, 3)
    one = copy(f"{newest.url}#1", tmp_path / "one")
    assert content(one.folder) == alone
    two = copy(f"{newest.url}#2", tmp_path / "two")
    assert (len(two), two.version) == (17, 2)
    same_corpus(two, Corpus.open(f"{newest.url}#2"))
    same_corpus(Corpus.open(f"{two.url}#1"), first)
    assert list(verify(two)) == []
    assert len(images_of_tars(two.path)) == 17
    assert content(copy(newest.url, tmp_path / "all").folder) == content(newest.folder)
    (source / "c0" / "third.JPEG").write_bytes(encoded(99))
    grown = settings.model_copy(update={"append": True, "destination": two.url})
    assert len(shard_corpus(grown)) == 19
    part = parts_of(Corpus.open(f"{newest.url}#2"), tmp_path / "parts", subsets=(0.5,))["50pct"]
    same_corpus(copy(part, tmp_path / "half"), part)
    with pytest.raises(CorpusError, match="has no version 7"):
        copy(f"{newest.url}#7", tmp_path / "seven")
    assert folder_at(str(tmp_path / "seven"), "x").names() == []


@pytest.mark.slow
def test_a_run_that_began_on_a_part_goes_on_with_its_copy(base: Corpus, tmp_path: Path) -> None:
    """With the losses of one that never changed, though the tars are others."""
    part = parts_of(base, tmp_path / "parts", subsets=(0.6,))["60pct"]
    made = copy(part, tmp_path / "copy")
    words = [*tiny(8, 4), "checkpoint.keep=8", "run.name=x", "run.workers=1"]
    done = torchrun(1, tmp_path / "home", *words, f"data.corpus={part.url}")
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "home" / "runs" / "x"
    expected = losses(run / "metrics.jsonl")
    assert len(expected) == 8
    shutil.rmtree(next((run / "checkpoints").glob("step-00000008*")))
    (run / "result.json").unlink()
    done = torchrun(1, tmp_path / "home", *words, f"data.corpus={made.url}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trained 4 steps" in done.stderr
    assert losses(run / "metrics.jsonl") == expected
