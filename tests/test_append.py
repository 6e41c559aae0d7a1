"""Images appended to a corpus: a new version of it, the older ones stay readable and as they were."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.folders import LocalFolder
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import assemble
from data_prep.origin_lines import line_of_before, name_of_line, one_line
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.shard_plan import Plan
from data_prep.shard_task import write_shard
from data_prep.sources import SourceSettings, list_source
from data_prep.verify import verify
from pipeline.corpora import open_corpora, with_places
from pipeline.data_config import DataSettings
from tests.corpora import encoded, image_folder

pytestmark = pytest.mark.usefixtures("ray")


def shard(source: Path, destination: Path, **settings: Any) -> Corpus:
    values: dict[str, Any] = {"shard_mb": 0.02} | {
        key: str(v) if isinstance(v, Path) else v for key, v in settings.items()
    }
    return shard_corpus(ShardSettings(source=str(source), destination=str(destination), **values))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def grow(root: Path, first: int, count: int = 15, classes: tuple[str, ...] = ("c0", "c2", "a-new-one")) -> None:
    for number in range(first, first + count):
        path = root / classes[number % len(classes)] / f"new-{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number, (50, 40)))


def test_appended_images_are_new_shards_of_a_new_version(tmp_path, messages):
    root = image_folder(tmp_path / "images")
    (root / "c1" / "broken.jpg").write_bytes(b"<html>")
    first = shard(root, tmp_path / "corpus")
    before = content(tmp_path / "corpus")
    grow(root, 1000)
    second = shard(root, tmp_path / "corpus", append=True)
    assert "15 are new" in messages()
    assert "1 new classes at the end of the list: a-new-one" in messages()
    assert (second.version, second.num_samples) == (2, first.num_samples + 15)
    assert second.classes == [*first.classes, "a-new-one"]
    assert second.manifest["quarantined"] == 1
    assert [entry["origin"] for entry in second.quarantined()] == ["c1/broken.jpg"]
    after = content(tmp_path / "corpus")
    of_the_newest = {"manifest.json", "README.md", "_info.json", "samples.parquet"}
    assert {name for name in before if after[name] != before[name]} == of_the_newest
    assert after["manifest-000001.json"] == before["manifest.json"]

    old = Corpus.open(f"{tmp_path / 'corpus'}#1")
    assert old.corpus_hash == first.corpus_hash
    assert list(verify(old)) == list(verify(second)) == []
    ids = np.arange(first.num_samples)
    assert np.array_equal(old.index, second.index[: len(ids)])
    assert list(map(second.origin, range(len(ids)))) == list(map(old.origin, range(len(ids))))
    assert sum(second.class_counts) == second.num_samples
    assert second.class_counts[second.classes.index("a-new-one")] == 5
    keys = [name for path in (tmp_path / "corpus").glob("*.idx") for name in path.read_text().split() if ".jpg" in name]
    assert len(keys) == len(set(keys)) == second.num_samples

    grow(root, 2000)
    third = shard(root, tmp_path / "corpus", append=True)
    assert (third.version, third.num_samples, third.corpus_hash) == (3, first.num_samples + 30, third.corpus_hash)
    assert Corpus.open(f"{tmp_path / 'corpus'}#2").corpus_hash == second.corpus_hash
    assert list(verify(third)) == []
    with pytest.raises(ValueError, match="has no version 4: it has versions 1 to 3"):
        Corpus.open(f"{tmp_path / 'corpus'}#4")


def test_appending_nothing_new_changes_nothing(tmp_path, messages):
    root = image_folder(tmp_path / "images")
    shard(root, tmp_path / "corpus")
    grow(root, 1000)
    shard(root, tmp_path / "corpus", append=True)
    before = content(tmp_path / "corpus")
    again = shard(root, tmp_path / "corpus", append=True)
    assert again.version == 2
    assert "has all of them: nothing to do" in messages()
    assert content(tmp_path / "corpus") == before


def test_an_append_that_was_killed_goes_on_or_gives_way(tmp_path, messages):
    root = image_folder(tmp_path / "images")
    first = shard(root, tmp_path / "corpus")
    grow(root, 1000, count=40)
    shard(root, tmp_path / "corpus", append=True)
    whole = content(tmp_path / "corpus")
    # as a kill before the end leaves it: no index, the manifest still the old one, a shard missing
    (tmp_path / "corpus" / "manifest.json").write_bytes(whole["manifest-000001.json"])
    number = len(first.shard_sizes)
    for name in ("manifest-000001.json", "index-000002.bin", f"shard-{number:06d}.record.json"):
        (tmp_path / "corpus" / name).unlink()
    kept = (tmp_path / "corpus" / f"shard-{number + 1:06d}.tar").stat().st_ino
    assert Corpus.open(str(tmp_path / "corpus")).corpus_hash == first.corpus_hash
    shard(root, tmp_path / "corpus", append=True)
    assert content(tmp_path / "corpus") == whole
    assert (tmp_path / "corpus" / f"shard-{number + 1:06d}.tar").stat().st_ino == kept

    (tmp_path / "corpus" / "manifest.json").write_bytes(whole["manifest-000001.json"])
    (tmp_path / "corpus" / "manifest-000001.json").unlink()
    for path in root.rglob("new-*.jpg"):
        path.unlink()
    grow(root, 3000, count=5)
    other = shard(root, tmp_path / "corpus", append=True)
    assert "an unfinished append of other images, or with other settings, is removed" in messages()
    assert (other.version, other.num_samples) == (2, first.num_samples + 5)
    assert list(verify(other)) == []


def test_damage_in_any_version_is_repaired_by_its_command(tmp_path):
    root = image_folder(tmp_path / "images")
    first = shard(root, tmp_path / "corpus")
    grow(root, 1000, count=30)
    second = shard(root, tmp_path / "corpus", append=True)
    whole = content(tmp_path / "corpus")
    added = tmp_path / "corpus" / f"shard-{len(first.shard_sizes):06d}.tar"
    added.write_bytes(added.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        Corpus.open(str(tmp_path / "corpus"))
    assert shard(root, tmp_path / "corpus", append=True).corpus_hash == second.corpus_hash
    assert content(tmp_path / "corpus") == whole
    for path in root.rglob("new-*.jpg"):
        path.unlink()
    for folder in root.iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()
    (tmp_path / "corpus" / "shard-000000.record.json").unlink()
    repaired = shard(root, tmp_path / "corpus")
    assert repaired.corpus_hash == first.corpus_hash
    assert content(tmp_path / "corpus") == whole
    assert Corpus.open(str(tmp_path / "corpus")).corpus_hash == second.corpus_hash


def test_many_labels_are_appended(tmp_path):
    root = image_folder(tmp_path / "images")
    rows = [{"path": str(path.relative_to(root)), "labels": ["x", path.parent.name]} for path in root.rglob("*.JPEG")]
    table = tmp_path / "labels.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    first = shard(root, tmp_path / "corpus", labels=table)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = shard(root, tmp_path / "corpus", labels=table, append=True)
    assert list(verify(second)) == []
    assert (first.num_samples, second.num_samples) == (20, 30)
    for sample in range(30):
        _, classes, _ = second.labels_of([sample])
        assert {second.classes[number] for number in classes} == {"x", second.origin(sample).split("/")[0]}


def test_an_image_that_had_no_label_is_appended_once_it_has_one(tmp_path, messages):
    root = image_folder(tmp_path / "images", classes=1, images=6)
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "".join(f"c0/00{n}.JPEG,{('ant', 'bee', '')[n % 3]}\n" for n in range(6)))
    first = shard(root, tmp_path / "corpus", labels=table, no_label=("empty",))
    assert [entry["reason"] for entry in first.quarantined()] == ["left out: no label"] * 2
    table.write_text("path,label\n" + "".join(f"c0/00{n}.JPEG,{('ant', 'bee', 'Bee ')[n % 3]}\n" for n in range(6)))
    second = shard(root, tmp_path / "corpus", labels=table, append=True)
    assert (second.classes, second.class_counts) == (["ant", "bee", "Bee"], [2, 2, 2])
    assert "the new class 'Bee' is nearly called like 'bee', which the corpus has" in messages()
    assert list(verify(second)) == []


def test_what_cannot_be_appended_is_refused(tmp_path):
    root = image_folder(tmp_path / "images")
    with pytest.raises(ValueError, match="there is no finished corpus"):
        shard(root, tmp_path / "corpus", append=True)
    shard(root, tmp_path / "corpus")
    before = content(tmp_path / "corpus")
    grow(root, 1000)
    with pytest.raises(ValueError, match=r"has 1 classes that the corpus does not have \(a-new-one\)"):
        shard(root, tmp_path / "corpus", append=True, new_classes="refuse")
    (tmp_path / "labels.csv").write_text("path,label,weight\nc0/000.JPEG,a,0.5\n")
    with pytest.raises(ValueError, match=r"has many labels an image, the corpus .* has one"):
        shard(root, tmp_path / "corpus", append=True, labels=tmp_path / "labels.csv")
    assert content(tmp_path / "corpus") == before


def test_another_delivery_under_the_same_paths_is_refused(tmp_path):
    first = image_folder(tmp_path / "week1", images=6)
    shard(first, tmp_path / "corpus")
    before = content(tmp_path / "corpus")
    second = image_folder(tmp_path / "week2", images=6)
    for number in range(4):
        (second / "c1" / f"{number:03d}.JPEG").write_bytes(encoded(500 + number, (90, 70)))
    (second / "c1" / "new.JPEG").write_bytes(encoded(1))
    with pytest.raises(
        ValueError, match=r"4 of 18 images that .* has by their paths are of another size .*c1/000.JPEG"
    ):
        shard(second, tmp_path / "corpus", append=True)
    assert content(tmp_path / "corpus") == before
    converted = shard(first, tmp_path / "smaller", max_side=32)  # sizes that say nothing
    again = shard(first, tmp_path / "smaller", max_side=32, append=True)
    assert again.corpus_hash == converted.corpus_hash


def test_what_was_removed_as_a_duplicate_does_not_come_back_with_an_append(tmp_path, messages):
    root = image_folder(tmp_path / "images")
    copy = root / "c0" / "zz-copy.jpg"
    copy.write_bytes(next(path for path in sorted((root / "c0").iterdir()) if path != copy).read_bytes())
    first = shard(root, tmp_path / "corpus", dedup=True)
    assert first.manifest["removed"], "the copy must have been found"
    grow(root, 1000, count=3)
    second = shard(root, tmp_path / "corpus", append=True)
    assert "3 are new" in messages()
    assert second.num_samples == first.num_samples + 3
    assert copy.name not in {Path(origin).name for origin in second.origins()}


def test_an_append_leaves_out_copies_of_what_is_there_and_of_each_other(tmp_path, messages):
    root = image_folder(tmp_path / "images")
    first = shard(root, tmp_path / "corpus")
    there = sorted((root / "c0").iterdir())[0]
    (root / "c0" / "000-copy-that-sorts-first.jpg").write_bytes(there.read_bytes())
    grow(root, 1000, count=3)
    (root / "c2" / "zz-copy.jpg").write_bytes((root / "c2" / "new-1000.jpg").read_bytes())
    (root / "c1" / "seen-in-the-test.jpg").write_bytes(encoded(77, (90, 70)))
    held_out = image_folder(tmp_path / "heldout", classes=1, images=2)
    (held_out / "c0" / "000.JPEG").write_bytes(encoded(77, (90, 70)))
    (held_out / "c0" / "001.JPEG").write_bytes(there.read_bytes())
    test_set = shard(held_out, tmp_path / "test")

    second = shard(root, tmp_path / "corpus", append=True, dedup=True, exclude=(str(tmp_path / "test"),))
    assert second.num_samples == first.num_samples + 3
    assert f"only the new images are compared with {test_set.url}: those of version 1" in messages()
    lines = [json.loads(line) for line in (tmp_path / "corpus" / "removed-000002.jsonl").read_text().splitlines()]
    relative = str(there.relative_to(root))
    assert {(line["origin"], line["of"], line["corpus"]) for line in lines} == {
        ("c0/000-copy-that-sorts-first.jpg", "c0/001.JPEG", test_set.corpus_hash),
        ("c2/zz-copy.jpg", "c2/new-1000.jpg", None),
        ("c1/seen-in-the-test.jpg", "c0/000.JPEG", test_set.corpus_hash),
    }
    assert relative in set(second.origins())
    (root / "c2" / "another-copy.jpg").write_bytes(there.read_bytes())
    grow(root, 2000, count=2)
    third = shard(root, tmp_path / "corpus", append=True, dedup=True)
    assert third.num_samples == second.num_samples + 2
    (line,) = (tmp_path / "corpus" / "removed-000003.jsonl").read_text().splitlines()
    assert (json.loads(line)["of"], json.loads(line)["corpus"]) == (relative, second.corpus_hash)
    again = shard(root, tmp_path / "corpus", append=True, dedup=True)
    assert again.corpus_hash == third.corpus_hash
    assert "nothing to do" in messages()


def test_ranks_train_on_the_version_that_the_driver_opened(tmp_path):
    root = image_folder(tmp_path / "images")
    first = shard(root, tmp_path / "corpus")
    data = DataSettings(corpus=f"{tmp_path / 'corpus'}#1")
    grow(root, 1000)
    shard(root, tmp_path / "corpus", append=True)
    told = with_places(data, *open_corpora(data))
    corpus, _ = open_corpora(told, check="sizes")
    assert corpus.corpus_hash == first.corpus_hash


@pytest.mark.parametrize("by", ["now", "an older version"])
def test_names_that_once_had_the_same_line_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Any, by: str
) -> None:
    names = [b"a\nb.jpg", b"a\\nb.jpg", b"caf\xe9.jpg", b"caf\\xe9.jpg", b"a\rb.jpg", b"plain\\.jpg", b"a\\x5cnb.jpg"]
    names = names if by == "now" else names[:-1]  # which is as `one_line` writes another one
    root = tmp_path / "images"
    (root / "c0").mkdir(parents=True)
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(root / "c0") + b"/" + name)).write_bytes(encoded(number, (40 + number, 30)))
    with monkeypatch.context() as older:
        if by != "now":
            older.setattr("data_prep.shard_task.one_line", line_of_before)
        listing = list_source(SourceSettings(source=str(root)))
        plan, there = Plan(listing, None, 10**6, seed=0), LocalFolder(tmp_path / "corpus")
        there.write_json("plan.json", plan.describe())
        assemble(there, plan, [write_shard(plan.task(0, there))])
    first = Corpus.open(there)
    assert len(set(first.origins())) == (len(names) if by == "now" else len(names) - 2)
    (root / "c0" / "new.jpg").write_bytes(encoded(99))
    second = shard(root, tmp_path / "corpus", append=True)
    assert f"{len(names)} of {len(names) + 1} images are in" in messages()
    assert (len(second), second.origin(len(names))) == (len(names) + 1, "c0/new.jpg")
    assert {name_of_line(one_line(name)) for name in names} == set(names)
    anew = shard(tmp_path / "corpus", tmp_path / "anew")
    assert sorted(anew.origins()) == sorted(second.origins())
