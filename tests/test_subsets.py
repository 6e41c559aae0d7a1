"""Parts of a corpus that share its shards: what is in them, what reads them, what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.folders import Folder, folder_at
from cluster.settings import SettingsError
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError
from data_prep.distributions import measure
from data_prep.order import SampleOrder
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.show import describe
from data_prep.stratify import apportion, random_places
from data_prep.subset import SubsetSettings, make_parts
from data_prep.verify import verify
from tests.corpora import encoded, image_folder, make_corpus
from tests.s3_server import S3Server

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------- how many of each class


@settings(deadline=None)  # other tests run beside it
@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.sets(st.floats(0.001, 1)), st.integers(0, 2**64 - 1))
def test_every_class_has_its_share_in_every_subset_and_loses_nothing_in_a_larger_one(sizes, shares, seed):
    images = np.array([*sizes, 1])
    totals = sorted({max(1, round(share * images.sum())) for share in shares} | {int(images.sum())})
    before = np.zeros(len(images), int)
    for total, counts in zip(totals, apportion(images, totals, seed), strict=True):
        share = total * images / images.sum()
        assert counts.sum() == total
        assert (np.abs(counts - share) < 1).all()
        assert (counts >= before).all()
        before = counts
    assert (before == images).all()


def test_every_total_from_one_image_on_can_be_had():
    images = np.array([1, 1, 1, 2, 3, 5, 8, 400, 41, 0])
    totals = list(range(1, int(images.sum()) + 1))
    counts = np.array(apportion(images, totals, 0))
    assert (np.diff(counts.sum(1)) == 1).all()
    assert (np.diff(counts, axis=0).min(0) >= 0).all()
    assert (np.abs(counts - np.outer(totals, images) / images.sum()) < 1).all()


def test_samples_are_in_a_random_order_of_their_stratum():
    strata = np.arange(3000) % 3
    places, other = random_places(strata, 0), random_places(strata, 1)
    for stratum in range(3):
        assert sorted(places[strata == stratum]) == list(range(1000))
    assert abs(np.corrcoef(places, np.arange(3000))[0, 1]) < 0.1
    assert abs(np.corrcoef(places, other)[0, 1]) < 0.1
    assert (places == random_places(strata, 0)).all()


# ------------------------------------------------------------------------------------------------------------ corpora


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Corpus:
    """Four classes of 20, 20, 9 and 1 images."""
    folder = tmp_path_factory.mktemp("subset")
    source = image_folder(folder / "images", classes=2, images=20)
    for name, count in (("few", 9), ("single", 1)):
        (source / name).mkdir()
        for place in range(count):
            (source / name / f"{place}.png").write_bytes(encoded(1000 + place + count, image_format="PNG"))
    return make_corpus(source, folder / "corpus")


def parts_of(corpus: Corpus, destination: Path | Folder, **values) -> dict[str, Corpus]:
    values |= {"subsets": tuple(values.get("subsets", ()))}
    return make_parts(SubsetSettings(corpus=corpus.url, destination=str(destination), **values))


def origins(corpus: Corpus) -> list[str]:
    return [corpus.origin(sample) for sample in range(len(corpus))]


def samples(corpus: Corpus) -> dict[str, tuple[bytes, list[tuple[int, float]]]]:
    """Image and labels of every sample, by its origin."""
    images = corpus.read(np.arange(len(corpus)))
    rows, classes, weights = corpus.labels_of(np.arange(len(corpus)))
    labels: list[list[tuple[int, float]]] = [[] for _ in images]
    for row, number, weight in zip(rows.tolist(), classes.tolist(), weights.tolist(), strict=True):
        labels[row].append((number, weight))
    return dict(zip(origins(corpus), zip((i.tobytes() for i in images), labels, strict=True), strict=True))


def check_part(part: Corpus, base: Corpus) -> None:
    """A part is a whole corpus, with the samples of the base as they are there."""
    assert list(verify(part)) == []
    whole, mine = samples(base), samples(part)
    assert len(mine) == len(part)
    assert mine.items() <= whole.items()
    assert part.classes == base.classes
    assert sum(part.shard_sizes) == len(part)
    assert min(part.shard_sizes) > 0
    beside = {"manifest.json", "README.md", "samples.parquet"}
    assert part.folder.tree().keys() == {*beside, *part.manifest["files"]}, "no image is copied"


def test_a_hold_out_takes_of_every_class_its_share_and_the_rest_is_for_training(base, tmp_path, messages):
    parts = parts_of(base, tmp_path / "parts", holdout=0.2)
    assert list(parts) == ["heldout", "train"]
    held, train = parts["heldout"], parts["train"]
    for part in parts.values():
        check_part(part, base)
    assert sorted(origins(held) + origins(train)) == sorted(origins(base))
    of_class = dict(zip(base.classes, held.class_counts, strict=True))
    assert len(held) == 10
    assert of_class["c0"] == of_class["c1"] == 4
    assert of_class["few"] == 2
    assert of_class["single"] == 0
    assert "1 classes have a single image: it stays in train" in messages()
    text = "\n".join(describe(held, measure(held), 3))
    assert "10 images of 4 classes" in text
    assert f"made from: subset {base.url}" in text


def test_subsets_lie_inside_each_other_and_depend_on_the_seed_alone(base, tmp_path):
    parts = parts_of(base, tmp_path / "parts", subsets=[0.1, 20, 1.0], seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"10pct": 5, "20-images": 20, "100pct": 50}
    small, middle, whole = (set(origins(part)) for part in parts.values())
    assert small < middle < whole == set(origins(base))
    for part in parts.values():
        check_part(part, base)
    again = parts_of(base, tmp_path / "again", subsets=[0.1, 20], seed=3)
    assert [part.corpus_hash for part in again.values()] == [part.corpus_hash for part in parts.values()][:2]
    other = parts_of(base, tmp_path / "other", subsets=[0.1, 20], seed=4)
    assert set(origins(other["20-images"])) != middle
    free = parts_of(base, tmp_path / "free", subsets=[20], stratify=False)
    check_part(free["20-images"], base)
    order = SampleOrder(20, 0, parts["20-images"].shard_sizes, window=2)
    assert sorted(order.ids(np.arange(20))[1].tolist()) == list(range(20))


def test_subsets_of_what_is_left_by_a_hold_out_and_parts_of_parts(base, tmp_path):
    parts = parts_of(base, tmp_path / "parts", holdout=10, subsets=[0.5, 1.0])
    assert set(origins(parts["100pct"])) == set(origins(parts["train"]))
    assert set(origins(parts["50pct"])) < set(origins(parts["train"]))
    inner = parts_of(parts["50pct"], tmp_path / "inner", subsets=[0.5])["50pct"]
    check_part(inner, base)
    assert set(origins(inner)) < set(origins(parts["50pct"]))
    shutil.rmtree(tmp_path / "parts")
    check_part(Corpus.open(inner.url), base)


def test_many_labels_an_image(tmp_path):
    source = image_folder(tmp_path / "images", classes=1, images=24)
    lines = ["path,label,weight"]
    for place in range(24):
        lines += [f"c0/{place:03d}.JPEG,{name},{w}" for name, w in (("a", 1), ("b", place % 5 / 4)) if w or name == "b"]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    base = make_corpus(source, tmp_path / "corpus", labels=tmp_path / "labels.csv")
    assert base.label_kind == "multi"
    parts = parts_of(base, tmp_path / "parts", holdout=0.25)
    for part in parts.values():
        check_part(part, base)
    assert len(parts["heldout"]) == 6


def test_the_command_makes_parts_once_and_refuses_another_choice_in_their_place(base, tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "data_prep" / "subset.py"), base.url, "parts", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    done = run("subsets=[0.1,0.5]", "holdout=0.1")
    assert done.returncode == 0, done.stderr
    assert "heldout: 5 of 50 images" in done.stderr
    made = {path: path.stat().st_ino for path in (tmp_path / "parts").rglob("*")}
    (tmp_path / "parts" / "50pct" / "manifest.json").unlink()  # as a run that was killed leaves it
    (tmp_path / "parts" / "50pct" / ".index.bin.writing-0123456789ab").write_bytes(b"of a killed writer")
    done = run("subsets=[0.1,0.5,0.7]", "holdout=0.1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is there already") == 3
    now = {path: path.stat().st_ino for path in (tmp_path / "parts").rglob("*")}
    assert {path.parent.name for path in now if now[path] != made.get(path) and path.is_file()} == {"50pct", "70pct"}
    for words in (["holdout=0.2"], ["subsets=[0.1]", "holdout=0.1", "seed=1"]):
        done = run(*words)
        assert done.returncode == 2
        assert "holds another corpus" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to make"),
        ({"holdout": 0.6}, "at most half of the 49"),
        ({"holdout": 2.5}, "neither a share"),
        ({"subsets": [0.5, 0.1]}, "ascending"),
        ({"subsets": [51]}, "cannot be had of 50"),
        ({"subsets": [0.0]}, "cannot be had"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused(base, tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        parts_of(base, tmp_path / "parts", **settings)


def test_a_part_needs_its_shards_as_they_were(base, tmp_path):
    corpus = Corpus.open(shutil.copytree(base.path, tmp_path / "all" / "corpus").as_posix())
    made = parts_of(corpus, tmp_path / "all" / "parts", holdout=0.2)["train"]
    before = samples(made)
    (tmp_path / "all").rename(tmp_path / "moved")
    part = tmp_path / "moved" / "parts" / "train"
    assert samples(Corpus.open(str(part))) == before, "moved together"
    shutil.copytree(part.parent, tmp_path / "alone" / "parts")
    with pytest.raises(CorpusError, match=r"subset that shares the shards of .*no such folder"):
        Corpus.open(str(tmp_path / "alone" / "parts" / "train"))
    other = make_corpus(image_folder(tmp_path / "images", 2, 9), tmp_path / "alone" / "corpus")
    with pytest.raises(CorpusError, match="another corpus by now"):
        Corpus.open(str(tmp_path / "alone" / "parts" / "train"))
    with pytest.raises(CorpusError, match="holds another corpus"):
        parts_of(other, tmp_path / "moved" / "parts", holdout=0.2)


def test_a_part_is_copied_and_sharded_anew(ray, base, tmp_path):
    part = parts_of(base, tmp_path / "parts", holdout=0.2)["heldout"]
    copy = copy_corpus(CopySettings(source=part.url, destination=str(tmp_path / "far" / "away")))
    shutil.rmtree(tmp_path / "parts")
    assert copy.corpus_hash == part.corpus_hash
    assert copy.shards_folder == copy.folder
    assert list(verify(copy)) == []
    assert samples(copy).items() <= samples(base).items()
    part = parts_of(base, tmp_path / "parts", holdout=0.2)["heldout"]
    anew = shard_corpus(ShardSettings(source=part.url, destination=str(tmp_path / "anew"), shard_mb=1))
    assert samples(anew) == samples(copy)


def test_a_part_stays_readable_when_images_are_appended(ray, tmp_path):
    source = image_folder(tmp_path / "images", classes=2, images=8)
    settings = ShardSettings(source=str(source), destination=str(tmp_path / "corpus"), shard_mb=0.01)
    base = shard_corpus(settings)
    part = parts_of(base, tmp_path / "parts", subsets=[0.5])["50pct"]
    before = samples(part)
    (source / "c1" / "new.JPEG").write_bytes(encoded(77))
    assert len(shard_corpus(settings.model_copy(update={"append": True}))) == 17
    assert samples(Corpus.open(part.url)) == before
    with pytest.raises(CorpusError, match="append to that one"):
        shard_corpus(ShardSettings(source=str(source), destination=part.url, append=True))


def test_parts_on_s3_share_shards_in_their_bucket(base, s3: S3Server, tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    there = folder_at(s3.bucket() + "/corpora/base", "test")
    for name in base.folder.tree():
        there.put(base.path / name, name)
    corpus = Corpus.open(there)
    with pytest.raises(CorpusError, match="in the same bucket"):
        parts_of(corpus, tmp_path / "local", holdout=0.2)
    parts = parts_of(corpus, folder_at(there.url.replace("corpora/base", "parts/one"), "test"), holdout=0.2)
    assert sorted(origins(parts["heldout"]) + origins(parts["train"])) == sorted(origins(base))
    check_part(parts["heldout"], base)
    local = parts_of(base, tmp_path / "local", holdout=0.2)
    assert parts["heldout"].corpus_hash == local["heldout"].corpus_hash
